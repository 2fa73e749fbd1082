"""Step times for the fit itself: a smooth warp of a good grid, judged on noise that was not fitted on.

BOSS's times are optimal for Euler's local errors; the least-squares fit has other needs. Searching them on the fit's own
training error over-fits (150 Powell evaluations on digits at 8 calls: .0066 in the sample, .0098 outside, where BOSS's grid has
.0083), so every evaluation fits on one half of the noise and scores on the other.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize

from .._tabulate import write_table
from .._types import Field
from ..composite import start_scale
from ..coordinates import Coordinates
from ..grid import TimeGrid
from ..methods import ddim, euler
from ..problem import Problem
from ..sampler import Sampler
from .least_squares import fit

WARPS = 3
FAILED = 50.0
"""Objective (a logarithm) of a grid whose fit blows up."""

TINY = 1e-300
"""Error that stands for none at all, which has no logarithm."""


def plain_table(field: Field, grid: TimeGrid) -> Sampler:
    """The first-order table on a grid that every fit may start from: Euler, or DDIM where velocities are unbounded."""
    path = Coordinates.of(field).path
    return write_table(euler if path is None else ddim(path), grid, start_scale=start_scale(field))


def search_grid(
    problem: Problem, start: TimeGrid, *, evaluations: int = 60, tick: Callable[[], None] = lambda: None
) -> TimeGrid:
    """Improve the knots of `start` for the fit.

    Powell's method bends the step lengths by three numbers: their contrast, a tilt and a bow. One evaluation costs nfe field
    calls on the problem's noise. (Every time by itself is learnt by `NonStationary`.)

    Args:
        problem: the fitting noise; its first half fits, its second half scores.
        start: a grid from 0 to 1.
        evaluations: of the objective, about so many.
        tick: called once per evaluation.

    Returns:
        The best grid seen; `start` itself if nothing is better.
    """
    coordinates = Coordinates.of(problem.field)
    half = problem.each // 2
    first, second = problem.part(0, half), problem.part(half, 2 * half)
    lengths = np.log(np.diff(coordinates.tau(start.knots).numpy()))
    n = len(lengths)
    s = (np.arange(n) + 0.5) / n - 0.5
    bends = np.stack([lengths - lengths.mean(), 4 * s, 16 * (s**2 - 1 / 12)])
    best: tuple[float, np.ndarray] = (math.inf, lengths)

    def cost(logs: np.ndarray) -> float:
        nonlocal best
        tick()
        try:
            table = plain_table(first.field, _grid(coordinates, logs))
            fitted, _ = fit(first.field, first.noise, first.solution, table)
            error = second.score(fitted)
        except (ValueError, ArithmeticError, RuntimeError):
            return FAILED  # knots that collapsed onto each other, or a singular system
        value = math.log(max(error, TINY)) if error < math.inf else FAILED
        if value < best[0]:
            best = (value, logs)
        return value

    if n > 1:
        options = {"maxfev": evaluations, "xtol": 2e-2, "ftol": 1e-2}
        minimize(
            lambda p: cost(lengths + p @ bends if p.any() else lengths),  # Powell's first is the start itself
            np.zeros(WARPS),
            method="Powell",
            bounds=[(-1.5, 1.5)] * WARPS,
            options=options,
        )
    return start if best[1] is lengths else _grid(coordinates, best[1])


def _grid(coordinates: Coordinates, logs: np.ndarray) -> TimeGrid:
    steps = np.exp(logs - logs.max())
    taus = torch.from_numpy(np.cumsum(steps / steps.sum())[:-1])
    inner = coordinates.time(taus)
    return TimeGrid(torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]))
