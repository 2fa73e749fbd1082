"""Step times by dynamic programming over the local errors of Euler's method: BOSS stage 1, GITS and OSS.

The cost of stepping from knot i to knot j of a fine Euler path is || x_j - x_i - (t_j - t_i) v_i ||^2, averaged over samples
(BOSS, 2312.16414, eq. 5); the K-step schedule of least total cost is a shortest path with K edges. GITS (2405.11326) is the
same program with other costs and a discount; OSS (2503.21774) lets the student walk with its own states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._precision import exact_products
from .._tabulate import tabulate
from .._types import BudgetError, Field, State
from ..composite import CountedField, start_scale
from ..coordinates import Coordinates
from ..grid import TimeGrid
from ..methods import ddim, euler
from ..sampler import Sampler
from ..trajectory import Trajectory
from .bellman import Schedules as Schedules
from .bellman import bellman as bellman
from .bellman import student_schedules as student_schedules
from .options import one_of
from .truncation import Cost as Cost
from .truncation import chord_deviations as chord_deviations
from .truncation import truncation_errors as truncation_errors

States = Literal["teacher", "student"]


class FinePath(NamedTuple):
    """One recorded path of fine steps, from which the grids of every cost and budget follow.

    Attributes:
        coordinates: the clock of the knots.
        taus: (N + 1,) knots in that clock.
        trajectory: the path in the variables where the table's steps are Euler's: t, or for DDIM x / alpha in -sigma / alpha.
        slope: ``slope(y, i)``, the velocity of states in those variables at knot i; one field call.
    """

    coordinates: Coordinates
    taus: np.ndarray
    trajectory: Trajectory
    slope: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Boss:
    """Euler's method on the step times that a published dynamic program finds.

    - BOSS (2312.16414): the defaults.
    - GITS (2405.11326): ``Boss(cost="deviation", discount=1.15)``; with its "l2" metric ``Boss(cost="norm", discount=1.15)``.
    - OSS (2503.21774): ``Boss(states="student")``.

    They differ from the papers in the teacher, which is one here: N Euler (DDIM) steps at equal distances in the clock, where
    GITS records 60 iPNDM steps on Karras's grid.

    Attributes:
        knots: N, steps of the fine Euler path (the paper's K_max). Costs N field calls, once for all budgets.
        cost: "squared" (BOSS), "norm" or "deviation" (GITS): see `truncation_errors`.
        min_step: shortest step allowed, in the clock.
        max_step: longest step allowed.
        fixed: times that every schedule must visit (moved to the nearest knot).
        discount: a step counts this many times as much as the one before it; above 1 late steps become more accurate.
        states: where steps start when they are judged: on the path ("teacher"), or where the steps before have led
            ("student"), for (K - 1) (N - K / 2) more field calls with K the largest budget, greedily: see `student_schedules`.

    On paths with unbounded velocity the clock is the angle between noise and data, and method and costs are those of DDIM.

    Raises:
        ValueError: unknown cost or states, a discount that is not positive, or student states with another cost, a discount or
            fixed times.
    """

    knots: int = 100
    cost: Cost = "squared"
    min_step: float | None = None
    max_step: float | None = None
    fixed: tuple[float, ...] = ()
    discount: float = 1.0
    states: States = "teacher"

    def __post_init__(self) -> None:
        one_of("cost", self.cost, Cost)
        one_of("states", self.states, States)
        if not 0 < self.discount < float("inf"):
            raise ValueError(f"discount must be positive (1 is none, GITS takes 1.15), got {self.discount}")
        if self.states == "student" and (self.cost, self.discount, self.fixed) != ("squared", 1.0, ()):
            raise ValueError('states="student" (OSS) has its own program: leave cost, discount and fixed at their defaults')

    @property
    def name(self) -> str:
        """The published method that these settings are closest to: boss, gits or oss."""
        if self.states == "student":
            return "oss"
        return "gits" if self.cost == "deviation" or self.discount != 1.0 else "boss"

    @exact_products()
    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The tuned table; costs `knots` field calls on `noise`, and what `states` says.

        Raises:
            BudgetError: `nfe` is not between 1 and `knots`, or the limits exclude it.
            FieldError: NaN from the network.
        """
        grid = self.grids(field, noise, (nfe,))[nfe]
        path = Coordinates.of(field).path
        sampler = tabulate(euler if path is None else ddim(path), grid, start_scale=start_scale(field))
        return sampler.named(f"{self.name}-{sampler.provenance.method}")

    def grids(self, field: Field, noise: State, budgets: Sequence[int]) -> dict[int, TimeGrid]:
        """The step times for several budgets from one recorded path; any method can walk them."""
        _check(budgets, self.knots)
        return self.grids_on(self.record(field, noise), budgets)

    def record(self, field: Field, noise: State) -> FinePath:
        """The fine path, for `grids_on` of this tuner and of others with as many knots; `knots` field calls."""
        return _fine_path(CountedField(field), Coordinates.of(field), self.knots, noise * start_scale(field))

    def grids_on(self, path: FinePath, budgets: Sequence[int]) -> dict[int, TimeGrid]:
        """The step times for several budgets from a recorded path: no field calls, unless `states` is "student".

        Example:
            One path for BOSS's grids and GITS's:

            >>> from fewstep.zoo.mixtures import ring
            >>> field, noise = ring().given(), torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
            >>> path = Boss().record(field, noise)
            >>> boss = Boss().grids_on(path, (4, 6, 8))
            >>> gits = Boss(cost="deviation", discount=1.15).grids_on(path, (4, 6, 8))
            >>> gits[8].intervals
            8

        Raises:
            BudgetError: a budget is not between 1 and the path's number of knots, or the limits exclude it.
        """
        taus, coordinates = path.taus, path.coordinates
        _check(budgets, len(taus) - 1)
        most, low, high = max(budgets), self.min_step, self.max_step
        if self.states == "student":
            found = student_schedules(path.slope, path.trajectory, most, times=taus, min_step=low, max_step=high)
        else:
            fixed = [int(np.abs(taus - float(coordinates.tau(t))).argmin()) for t in self.fixed]
            errors = truncation_errors(path.trajectory, self.cost)
            found = bellman(errors, most, times=taus, min_step=low, max_step=high, fixed=fixed, discount=self.discount)
        missing = [k for k in budgets if k not in found.knots]
        if missing:
            raise BudgetError(f"min_step, max_step and fixed leave no schedule of {missing[0]} steps")
        return {k: _grid(coordinates, taus[found.knots[k]]) for k in budgets}


def _check(budgets: Sequence[int], knots: int) -> None:
    if min(budgets) < 1 or max(budgets) > knots:
        raise BudgetError(f"BOSS on {knots} knots finds 1 to {knots} steps, asked for {sorted(budgets)}")


def _fine_path(field: CountedField, coordinates: Coordinates, steps: int, x0: Tensor) -> FinePath:
    """The path whose one-step errors are the costs: of Euler in t, or where the table will be DDIM, of DDIM.

    DDIM is Euler for x / alpha in minus sigma / alpha with minus the noise prediction as velocity.
    """
    taus = TimeGrid.uniform(steps).knots.numpy()
    times = _grid(coordinates, taus).knots
    if coordinates.path is None:
        clock, alpha = times, torch.ones_like(times)
    else:
        alpha, sigma, _, _ = coordinates.path.coefficients(times)
        clock = -sigma / alpha

    def slope(y: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            if coordinates.path is None:
                return field(y, float(times[i]))
            return -field.predict(y * float(alpha[i]), float(times[i]), "noise")

    states, velocities = x0.new_empty(steps + 1, *x0.shape), x0.new_empty(steps, *x0.shape)
    states[0] = x0 / float(alpha[0])
    for i, step in enumerate(clock.diff().tolist()):
        velocities[i] = slope(states[i], i)
        torch.add(states[i], velocities[i], alpha=step, out=states[i + 1])
    return FinePath(coordinates, taus, Trajectory(clock, states, velocities), slope)


def _grid(coordinates: Coordinates, taus: np.ndarray) -> TimeGrid:
    times = coordinates.time(torch.from_numpy(taus))
    return TimeGrid(torch.cat([torch.zeros(1, dtype=torch.float64), times[1:-1], torch.ones(1, dtype=torch.float64)]))
