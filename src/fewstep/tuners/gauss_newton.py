"""Learning a table by least squares on the end point: Gauss-Newton with forward differences, no back-propagation.

The end point depends on a few dozen numbers (times and coefficients) and has thousands of residuals, so J^T J is small and the
whole Jacobian J costs one more forward pass per noise, number and step that the number reaches, many of them in one batch. No
graph is kept, memory does not grow with the network, and a dozen iterations do what first-order training needs hundreds for
(`benchmarks/learned.py` counts the passes of both).

Whatever writes a table from numbers can be learnt: all rows (`NonStationary`), a scale-time transformation (`Bespoke`), or the
knots of a method (`LearnedKnots`).
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._precision import exact_products
from .._types import FewstepError, Field, FieldError, State
from ..composite import CountedField
from ..noise import needed
from ..problem import Problem, Score, judgeable
from ..sampler import Sampler
from ..trajectory import reference
from .jacobian import Write, normal_equations

DAMPINGS = (0.1, 1.0, 10.0)
"""Factors on the damping that every iteration tries."""

MOST_DAMPING, LEAST_DAMPING = 1e3, 1e-9


@dataclass(frozen=True)
class Found:
    """What was learnt.

    Attributes:
        theta: (p,) the numbers.
        sampler: their table.
        error: its RMSE on the held-out noise.
        iterations: Gauss-Newton iterations done.
        diverged: no step improved anything: `sampler` is the start.
    """

    theta: Tensor
    sampler: Sampler
    error: float
    iterations: int
    diverged: bool


@exact_products()
def gauss_newton(
    write: Write,
    theta: Tensor,
    fitting: Problem,
    held: Problem,
    *,
    iterations: int = 8,
    patience: int = 2,
    log_loss: bool = False,
    metric: Score = "rmse",
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Minimise the end-point error of ``write(theta)`` on `fitting`; keep the iterate that is best on `held`.

    Levenberg's damping in the units of J^T J's diagonal. One iteration costs, per fitting noise, n field calls and one for
    every pair of a number and a call that it reaches (148 for all 60 numbers of an 8-call table), and 3 n for the choice of
    the damping; per held noise n.

    Args:
        write: numbers to table.
        theta: (p,) where to start.
        fitting: problem whose error is minimised.
        held: problem that chooses among the iterates.
        iterations: at most.
        patience: iterations without an improvement on `held` after which to stop.
        log_loss: minimise the mean of log(mean square error) over noises (2403.01329, eq. 13) instead of the mean square
            error: noises with small errors count as much as those with large ones.
        metric: what `held` is judged by.
        tick: called once per iteration.
    """
    sampler = write(theta)
    kept = Found(theta, sampler, held.score(sampler, metric), 0, True)
    loss, damping, stale = _loss(fitting, sampler, log_loss), 1e-3, 0
    if loss == math.inf:
        return kept  # it blows up: there is nothing to differentiate
    for k in range(1, iterations + 1):
        normal, slope = normal_equations(write, theta, fitting, log_loss)
        theta, now, damping = _step(write, theta, normal, slope, fitting, log_loss, damping, loss)
        tick()
        if now >= loss:
            break
        gain, loss = loss - now if log_loss else 1 - now / max(loss, 1e-300), now
        sampler = write(theta)
        error = held.score(sampler, metric)
        stale = 0 if error < kept.error else stale + 1
        if error < kept.error:
            kept = Found(theta, sampler, error, k, False)
        if stale >= patience or gain < 1e-3:
            break
    return kept


def learnt(
    write: Write,
    theta: Tensor,
    fitting: Problem,
    held: Problem,
    *,
    iterations: int,
    log_loss: bool = False,
    start: Sampler | None = None,
) -> Sampler:
    """`gauss_newton` for a tuner: refuses a reference that cannot judge, and says so where nothing improves.

    Args:
        write: numbers to table.
        theta: (p,) where to start.
        fitting: as for `gauss_newton`.
        held: likewise.
        iterations: likewise.
        log_loss: likewise.
        start: what is returned where nothing improves; default ``write(theta)``.

    Raises:
        FieldError: the reference is not more accurate than the table to start from.
    """
    judgeable(write(theta), held)
    found = gauss_newton(write, theta, fitting, held, iterations=iterations, log_loss=log_loss)
    if not found.diverged:
        if found.error < held.solution.error:
            warnings.warn(
                f"what was learnt is {found.error:.2g} from a reference that is only accurate to {held.solution.error:.2g}; a "
                "lower tol may lead further",
                stacklevel=3,
            )
        return found.sampler
    kept = start or found.sampler
    name = kept.provenance.method or "the table to start from"
    warnings.warn(f"no step improved {name} on held-out noise; it is returned as it was", stacklevel=3)
    return kept


def halves(field: Field, noise: State, *, numbers: int, holdout: float, tol: float) -> tuple[Problem, Problem]:
    """The problem that fits and the one that chooses, with their reference solution.

    Raises:
        FieldError: too little noise for so many numbers.
    """
    size = noise[0].numel()
    least = needed(numbers / (1 - holdout), size)
    if noise.shape[0] < least:
        raise FieldError(
            f"learning {numbers} numbers needs at least {least} noises of {size} elements ({holdout:.0%} of them only "
            f"validates), got {noise.shape[0]}"
        )
    problem = Problem(_open(field), noise, reference(field, noise, tol=tol))
    split = problem.each - max(1, round(holdout * problem.each))
    if split < 1:
        raise FieldError(f"learning needs at least two noises per condition, got {problem.each}")
    return problem.part(0, split), problem.part(split, problem.each)


def _loss(problem: Problem, sampler: Sampler, log_loss: bool) -> float:
    with torch.no_grad():
        squares = (sampler(problem.field, problem.noise) - problem.solution.end).double().square().flatten(1).mean(1)
    value = float(squares.clamp(min=1e-300).log().mean() if log_loss else squares.mean())
    return value if math.isfinite(value) else math.inf


def _step(
    write: Write, theta: Tensor, normal: Tensor, slope: Tensor, fitting: Problem, log_loss: bool, damping: float, loss: float
) -> tuple[Tensor, float, float]:
    """The best of a few damped steps: (numbers, loss, damping); the numbers as they were if none is better."""
    scale = normal.diagonal().clamp(min=1e-12 * float(normal.diagonal().max()) + 1e-300).sqrt()
    scaled, right = normal / scale / scale[:, None], slope / scale
    while damping <= MOST_DAMPING:
        tried = []
        for factor in DAMPINGS:
            eye = torch.eye(len(theta), dtype=torch.float64)
            try:
                candidate = theta - torch.linalg.solve(scaled + damping * factor * eye, right) / scale
                tried.append((_loss(fitting, write(candidate), log_loss), factor, candidate))
            except (FewstepError, ValueError, ArithmeticError, RuntimeError):
                continue  # a singular system, or numbers that make no table
        best = min(tried, key=lambda item: item[0], default=(math.inf, 1.0, theta))
        if best[0] < loss:
            return best[2], best[0], max(damping * best[1], LEAST_DAMPING)
        damping *= 1e2
    return theta, loss, damping


def _open(field: Field) -> Field:
    """The field without a check for NaN: trial steps may blow up, the reference has vouched for the network."""
    return CountedField(field.field, check=False, parent=field) if isinstance(field, CountedField) else field


def spread_knots(starts: Sequence[float]) -> Tensor:
    """Logits of step lengths: their softmax gives the lengths; the last is fixed to zero and left out."""
    lengths = torch.tensor([b - a for a, b in itertools.pairwise(starts)], dtype=torch.float64)
    logits = lengths.log()
    return (logits - logits[-1])[:-1]


def knots_of(logits: Tensor) -> Tensor:
    """The inverse of `spread_knots`: n - 1 logits -> n + 1 increasing numbers from 0 to 1."""
    steps = torch.softmax(torch.cat([logits, logits.new_zeros(1)]), dim=0)
    inner = torch.cumsum(steps, dim=0)[:-1]
    return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
