"""`tune`: from training-free search over BOSS and the closed-form fit to learnt tables, judged on noise that nothing saw."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from ._precision import exact_products
from ._types import BudgetError, Field, FieldError
from .composite import JointField, source_of
from .field import Model, ModelField
from .journal import Journal, digest, identity
from .ladder import Climb, Effort, Ground
from .noise import NOISES, TEST, draw_sets, enough, needed
from .problem import Score
from .progress import Stages
from .result import TuneResult


@exact_products()
def tune(
    model_or_field: Model | Field,
    *,
    nfe: int | Sequence[int] = 8,
    effort: Effort = "fit",
    noise: Tensor | Sequence[int] | int | None = None,
    conditions: Sequence[Mapping[str, Any]] | None = None,
    metric: Score = "rmse",
    seed: int = 0,
    resume: str | Path | None = None,
    progress: bool = False,
) -> TuneResult:
    """Find the best sampler of each budget for one model.

    Three sets of noise: candidates are fitted on the first, chosen on the second, and reported on the third. On a GPU TF32 is
    off meanwhile.

    Args:
        model_or_field: a `Model` from `adapt`, or any ``field(x, t) -> velocity``.
        nfe: budget of field calls, or several.
        effort: "search" compares training-free methods, BOSS's grid and others, and stock schedulers; "fit" adds the
            closed-form fit of every row with a search of its grid; "learn" adds Gauss-Newton steps on all times and
            coefficients of the best fit. None of them back-propagates through the network.
        noise: fitting noise (batch, *shape), its shape, or the number of noises per condition if the model's shape is known
            (default: 12, for "learn" 32, more where samples are small; two to four conditions share them, more have a
            quarter each). Selection noise of the same size is drawn, and test noise, at least 32 where `model_or_field` is a
            model.
        conditions: arguments of `Model.given`, one mapping per condition; one table is tuned for all of them. Default: no
            condition, or for a class-conditional model all classes in turn.
        metric: "rmse" over all samples, or "worst": of the worst condition.
        seed: of every noise set.
        resume: folder that keeps finished pieces; the same call then goes on where it stopped, and one with more effort on the
            same noise from where this one ended.
        progress: show stages with their cost (on stderr).

    Returns:
        `TuneResult`: ``result[8]`` is the sampler, ``result.report`` the measurement with bootstrap intervals.

    Raises:
        BudgetError: an NFE below 1.
        FieldError: NaN or a wrong shape from the network, a reference that does not converge, unknown noise shape, or too
            little noise to fit or learn from.

    Example:
        >>> result = tune(lambda x, t: x.cos() - x, nfe=2, noise=(32, 2), effort="search")
        >>> result[2].nfe
        2
    """
    budgets = sorted({nfe} if isinstance(nfe, int) else set(nfe))
    if not budgets or budgets[0] < 1:
        raise BudgetError(f"a budget is at least 1 call, got {budgets or 'none'}")
    if effort not in NOISES:
        raise ValueError(f'effort is "search", "fit" or "learn", got "{effort}"')
    if metric not in ("rmse", "worst"):
        raise ValueError(f'metric is "rmse" or "worst", got "{metric}"')
    ground = _ground(model_or_field, noise, conditions, effort, seed, budgets[-1])
    _check_enough(ground.fitting, effort, budgets[-1])
    others = [digest(ground.selection), digest(ground.test)]
    key = identity(ground.field, ground.fitting, __version__, torch.__version__, seed, metric, *others)
    with Stages(progress) as stages:
        journal = Journal(None if resume is None else Path(resume), key)
        return Climb(ground, effort, metric, seed, journal, stages).run(budgets)


def _ground(
    source: Model | Field,
    noise: Tensor | Sequence[int] | int | None,
    conditions: Sequence[Mapping[str, Any]] | None,
    effort: Effort,
    seed: int,
    nfe: int,
) -> Ground:
    """The field on all conditions with its noise; test noise is at least `TEST`, where fields can be made for it."""
    if not isinstance(source, Model):
        if conditions is not None:
            raise ValueError("conditions belong to a Model; a field already has its condition inside")
        model = source.model if isinstance(source, ModelField | JointField) else None
    else:
        model = source
    count, points = len(conditions) if conditions else 1, source_of(source)
    if isinstance(noise, Tensor):
        shape = noise.shape
        if shape[0] % count:
            raise FieldError(f"noise for {count} conditions must divide among them, got a batch of {shape[0]}")
    else:
        shape = tuple(noise) if isinstance(noise, Sequence) else _shape(model, noise, count, effort, nfe)
    each = shape[0] // count
    more = max(each, -(-enough(TEST, math.prod(shape[1:])) // count)) if isinstance(source, Model) else each
    sets = draw_sets((shape[0], shape[0], more * count), shape[1:], seed, points)
    if isinstance(noise, Tensor):
        half = model is not None and noise.dtype in (torch.float16, torch.bfloat16)
        sets[0] = noise.float() if half else noise  # a state in half precision loses what steps add
        fitting, selection, test = (drawn.to(sets[0]) for drawn in sets)
    else:
        device = model.device_dtype()[0] if model is not None else torch.device("cpu")
        fitting, selection, test = (drawn.to(device) for drawn in sets)
    if not isinstance(source, Model):
        return Ground(source, fitting, selection, source, test)
    return Ground(_joint(source, conditions, each), fitting, selection, _joint(source, conditions, more), test)


def _least(effort: Effort, nfe: int, size: int) -> int:
    """The fewest noises for what is fitted or learnt at once at this budget."""
    rows, table = nfe + 1, nfe * (nfe + 5) // 2
    return {"search": 1, "fit": needed(rows, size, 1), "learn": needed(table, size)}[effort]


def _check_enough(fitting: Tensor, effort: Effort, nfe: int) -> None:
    size = fitting[0].numel()
    if len(fitting) < (least := _least(effort, nfe, size)):
        raise FieldError(
            f'effort "{effort}" at {nfe} calls needs at least {least} noises of {size} elements for the numbers that it '
            f"{effort}s at once, got {len(fitting)}"
        )


def _shape(model: Model | None, noise: int | None, count: int, effort: Effort, nfe: int) -> tuple[int, ...]:
    """Of the fitting noise: as many as asked for each of `count` conditions, or what the effort needs."""
    if model is None or model.shape is None:
        raise FieldError("the shape of a sample is not known: pass noise=(batch, *shape) or a tensor, or adapt(..., shape=...)")
    size = math.prod(model.shape)
    usual = max(enough(NOISES[effort], size), _least(effort, nfe, size))
    return ((-(-usual // min(count, 4)) if noise is None else noise) * count, *model.shape)


def _joint(model: Model, conditions: Sequence[Mapping[str, Any]] | None, each: int) -> Field:
    fields = [_given(model, condition, each) for condition in conditions or [{}]]
    return fields[0] if len(fields) == 1 else JointField(fields)


def _given(model: Model, condition: Mapping[str, Any], batch: int) -> ModelField:
    """One condition; a class-conditional model without a label gets all classes in turn."""
    known = {"label", "guidance", "condition", "null", "classifier", "classifier_scale"}
    if set(condition) - known:
        raise ValueError(f"conditions are arguments of Model.given, {sorted(known)}; got {sorted(set(condition) - known)}")
    arguments = dict(condition)
    if "label" not in arguments and model.classes is not None:
        arguments["label"] = torch.arange(batch) % model.classes
    return model.given(arguments.pop("label", None), **arguments)
