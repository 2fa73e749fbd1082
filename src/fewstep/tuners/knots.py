"""Learnt step times of any method (the idea of LD3, 2405.15506, for every solver that is a table)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._precision import exact_products
from .._tabulate import write_table
from .._types import Field, GridError, State
from ..composite import start_scale
from ..coordinates import Coordinates
from ..grid import TimeGrid
from ..methods import Method
from ..sampler import Sampler
from .boss import Boss
from .gauss_newton import halves, knots_of, learnt, spread_knots
from .jacobian import Write
from .options import positive, share


@dataclass(frozen=True)
class LearnedKnots:
    """Learn the knots on which a method walks: n - 1 numbers for n steps.

    Attributes:
        method: any method, e.g. ``methods.pfdiff(1, 1)``.
        grid: where to start; default BOSS's grid of as many steps.
        decoupled: also learn the times at which the network is asked, apart from those that the coefficients come from (one
            more number per call).
        iterations: Gauss-Newton iterations, at most.
        log_loss: minimise the mean logarithm of the error instead of the mean error.
        holdout: share of the noise that only chooses among the iterates.
        tol: tolerance of the reference solution.

    Costs per sample: BOSS's and the reference's calls; per iteration about n field calls for every knot.

    Raises:
        TypeError: `method` is not a method.
        ValueError: a setting out of its range.
    """

    method: Method
    grid: TimeGrid | None = None
    decoupled: bool = False
    iterations: int = 12
    log_loss: bool = False
    holdout: float = 0.25
    tol: float = 1e-4

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method is a method such as methods.euler or methods.ddim(path), got {self.method!r}")
        positive(tol=self.tol)
        share("holdout", self.holdout)

    @exact_products()
    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The method's table on the learnt knots; on the first ones, with a warning, if nothing improves it.

        Raises:
            BudgetError: the method cannot spend exactly `nfe` calls.
            FieldError: too little noise, or a reference that is not accurate enough.
            GridError: `grid` has another number of steps, or does not go from 0 to 1.
        """
        steps = self.method.intervals(nfe)
        numbers = steps - 1 + (nfe if self.decoupled else 0)
        fitting, held = halves(field, noise, numbers=numbers, holdout=self.holdout, tol=self.tol)
        grid = self.grid or Boss(knots=max(100, 2 * steps)).grids(fitting.field, fitting.noise, (steps,))[steps]
        write, theta = self.numbers(field, grid, nfe)
        if not numbers:
            return write(theta)  # one step from 0 to 1 leaves nothing to learn
        return learnt(write, theta, fitting, held, iterations=self.iterations, log_loss=self.log_loss)

    def numbers(self, field: Field, grid: TimeGrid, nfe: int) -> tuple[Write, Tensor]:
        """How knots are numbers: logits of the step lengths in the clock where the field is smooth, and shifts of the calls."""
        steps, coordinates, scale = self.method.intervals(nfe), Coordinates.of(field), start_scale(field)
        ends = grid.knots[[0, -1]].tolist()
        if grid.intervals != steps or ends != [0.0, 1.0]:
            raise GridError(
                f"{self.method.name} spends {nfe} calls on {steps} steps from 0 to 1, the grid has {grid.intervals} from "
                f"{ends[0]:g} to {ends[1]:g}"
            )
        name = f"learned-knots({self.method.name})"

        def write(theta: Tensor) -> Sampler:
            taus = knots_of(theta[: steps - 1])
            inner = coordinates.time(taus[1:-1])
            knots = TimeGrid(torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]))
            table = write_table(self.method, knots, start_scale=scale, calls=nfe)
            times = (table.times + theta[steps - 1 :]).clamp(0.0, 1.0) if self.decoupled else table.times
            return Sampler(times, table.a, table.b).named(name)

        shifts = torch.zeros(nfe if self.decoupled else 0, dtype=torch.float64)
        return write, torch.cat([spread_knots(coordinates.tau(grid.knots).tolist()), shifts])
