"""`tune`: from training-free search over BOSS to the closed-form fit, judged on noise that nothing was fitted on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from ._types import BudgetError, Field, FieldError
from .composite import JointField
from .field import Model, ModelField
from .journal import Journal, identity
from .ladder import Climb, Effort, draw
from .problem import Score
from .progress import Stages
from .result import TuneResult


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

    Three sets of noise: candidates are fitted on the first, chosen on the second, and reported on the third.

    Args:
        model_or_field: a `Model` from `adapt`, or any ``field(x, t) -> velocity``.
        nfe: budget of field calls, or several.
        effort: "search" compares training-free methods, grids and stock schedulers; "fit" adds BOSS's grid to them and the
            closed-form fit with its grid search (no back-propagation).
        noise: fitting noise (batch, *shape), its shape, or the number of noises per condition (default 256) if the
            model's shape is known. Selection and test noise of the same size are drawn.
        conditions: arguments of `Model.given`, one mapping per condition; one table is tuned for all of them. Default: no
            condition, or for a class-conditional model all classes in turn.
        metric: "rmse" over all samples, or "worst": of the worst condition.
        seed: of every noise set.
        resume: folder that keeps finished pieces; the same call then goes on where it stopped.
        progress: show stages with their cost (on stderr).

    Returns:
        `TuneResult`: ``result[8]`` is the sampler, ``result.report`` the measurement with bootstrap intervals.

    Raises:
        BudgetError: an NFE below 1.
        FieldError: NaN or a wrong shape from the network, a reference that does not converge, or unknown noise shape.

    Example:
        >>> result = tune(lambda x, t: x.cos() - x, nfe=2, noise=(32, 2), effort="search")
        >>> result[2].nfe
        2
    """
    budgets = sorted({nfe} if isinstance(nfe, int) else set(nfe))
    if not budgets or budgets[0] < 1:
        raise BudgetError(f"a budget is at least 1 call, got {budgets or 'none'}")
    if effort not in ("search", "fit"):
        raise ValueError(f'effort is "search" or "fit", got "{effort}"')
    if metric not in ("rmse", "worst"):
        raise ValueError(f'metric is "rmse" or "worst", got "{metric}"')
    field, fitting = _field_and_noise(model_or_field, noise, conditions, seed)
    key = identity(field, fitting, __version__, torch.__version__, seed, metric, effort)
    with Stages(progress) as stages:
        journal = Journal(None if resume is None else Path(resume), key)
        return Climb(field, fitting, effort, metric, seed, journal, stages).run(budgets)


def _field_and_noise(
    source: Model | Field, noise: Tensor | Sequence[int] | int | None, conditions: Sequence[Mapping[str, Any]] | None, seed: int
) -> tuple[Field, Tensor]:
    """The field on all conditions and the fitting noise for it."""
    if not isinstance(source, Model):
        if conditions is not None:
            raise ValueError("conditions belong to a Model; a field already has its condition inside")
        model = source.model if isinstance(source, ModelField | JointField) else None
    else:
        model = source
    count = len(conditions) if conditions else 1
    if isinstance(noise, Tensor):
        fitting = noise
        if fitting.shape[0] % count:
            raise FieldError(f"noise for {count} conditions must divide among them, got a batch of {fitting.shape[0]}")
    else:
        if isinstance(noise, Sequence):
            shape = tuple(noise)
        else:
            if model is None or model.shape is None:
                raise FieldError(
                    "the shape of a sample is not known: pass noise=(batch, *shape) or a tensor, or adapt(..., shape=...)"
                )
            shape = ((256 if noise is None else noise) * count, *model.shape)
        device = model.device_dtype()[0] if model is not None else torch.device("cpu")
        fitting = draw(shape, seed, 0).to(device)
    if not isinstance(source, Model):
        return source, fitting
    each = fitting.shape[0] // count
    fields = [_given(source, condition, each) for condition in conditions or [{}]]
    return (fields[0] if len(fields) == 1 else JointField(fields)), fitting


def _given(model: Model, condition: Mapping[str, Any], batch: int) -> ModelField:
    """One condition; a class-conditional model without a label gets all classes in turn."""
    known = {"label", "guidance", "condition", "null", "classifier", "classifier_scale"}
    if set(condition) - known:
        raise ValueError(f"conditions are arguments of Model.given, {sorted(known)}; got {sorted(set(condition) - known)}")
    arguments = dict(condition)
    if "label" not in arguments and model.classes is not None:
        arguments["label"] = torch.arange(batch) % model.classes
    return model.given(arguments.pop("label", None), **arguments)
