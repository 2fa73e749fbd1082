"""Bespoke solvers (2310.19075): a Runge-Kutta method on a learnt scale-time transformation of the path.

x-bar(r) = s_r x(t_r): learn the values of t, s and of their derivatives at the steps (and half steps) of Euler's or the
midpoint method. What comes out is a table like any other.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .._precision import exact_products
from .._tabulate import write_table
from .._types import BudgetError, Field, State
from ..composite import start_scale
from ..coordinates import Coordinates
from ..grid import TimeGrid
from ..problem import judgeable
from ..sampler import Sampler
from .gauss_newton import halves, learnt
from .options import one_of, positive, positives, share
from .scale_time import STAGES, Base, ScaleTime, bound_training, run

Training = Literal["end_to_end", "bound", "both"]


def table_of(q: ScaleTime, base: Base, scale: float = 1.0) -> Sampler:
    """The table of a transformation; as many calls as `q` has steps."""
    table = write_table(lambda u, _, x: run(u, q, base, x), TimeGrid.uniform(1), start_scale=scale, calls=len(q.dt))
    return table.named(f"bespoke-{base}")


def precondition(nfe: int, sigma0: float, scale: float = 1.0) -> Sampler:
    """Euler on the path whose noise is wider by `sigma0`, see `ScaleTime.widened`."""
    return table_of(ScaleTime.widened(nfe, sigma0), "euler", scale).named(f"preconditioned({sigma0:g})")


@dataclass(frozen=True)
class Bespoke:
    """Learn a scale-time transformation for one model.

    Attributes:
        base: "euler" (4 n - 1 numbers, n = NFE) or "midpoint" (8 n - 1 numbers, n = NFE / 2).
        training: "end_to_end" on the end point's error, "bound" on the paper's bound of it (eq. 26), or "both" in turn. The
            bound is the weaker objective (docs/benchmarks.md); it is here to compare with.
        widths: of the noise of the paths that training may start from, see `ScaleTime.widened`: the one whose table has the
            lowest error is taken. (1.0,) is the identity, the paper's start. On VP, VE and EDM the angle between noise and data
            is tried as well, in which the solution is smooth.
        iterations: Gauss-Newton iterations of the end-to-end training.
        bound_iterations: Adam iterations on the bound.
        rate: their learning rate.
        log_loss: minimise the mean logarithm of the error end to end instead of the mean error.
        lipschitz: L_tau, the Lipschitz constant that the bound supposes for the velocity.
        holdout: share of the noise that only chooses among the iterates.
        tol: tolerance of the reference solution.

    Costs per sample: the reference's calls; those of one sample per width; per Gauss-Newton iteration about (4 n - 1) n or
    (8 n - 1) 2 n field calls; per iteration on the bound those of one sample, forward and backward, all steps in one batch.

    Raises:
        ValueError: an unknown base or training, or a setting that is not positive.
    """

    base: Base = "midpoint"
    training: Training = "end_to_end"
    widths: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)
    iterations: int = 12
    bound_iterations: int = 200
    rate: float = 1e-2
    log_loss: bool = False
    lipschitz: float = 1.0
    holdout: float = 0.25
    tol: float = 1e-4

    def __post_init__(self) -> None:
        one_of("base", self.base, Base)
        one_of("training", self.training, Training)
        positives("widths", self.widths)
        positive(rate=self.rate, lipschitz=self.lipschitz, tol=self.tol)
        share("holdout", self.holdout)

    @exact_products()
    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The learnt table, or the one to start from, with a warning, if nothing improves it on held-out noise.

        Raises:
            BudgetError: an odd `nfe` for the midpoint base.
            FieldError: too little noise, or a reference that is not accurate enough.
        """
        if nfe % STAGES[self.base]:
            near = f"budgets to {nfe} are {nfe - 1} and {nfe + 1}" if nfe > 1 else "budget to 1 is 2"
            raise BudgetError(f"bespoke-midpoint makes two calls per step; the nearest {near}")
        fitting, held = halves(field, noise, numbers=4 * nfe - 1, holdout=self.holdout, tol=self.tol)
        scale = start_scale(field)

        def write(theta: Tensor) -> Sampler:
            return table_of(ScaleTime.of(theta), self.base, scale)

        starts, coordinates = [ScaleTime.widened(nfe, width) for width in self.widths], Coordinates.of(field)
        if coordinates.path is not None:  # velocities are unbounded in t
            starts.append(ScaleTime.along(coordinates, nfe))
        theta = min((q.theta for q in starts), key=lambda theta: fitting.score(write(theta)))
        table = write(theta)
        judgeable(table, held)
        if self.training != "end_to_end":
            theta, table, _ = bound_training(
                write, theta, fitting, held, base=self.base, iterations=self.bound_iterations, rate=self.rate,
                constant=self.lipschitz,
            )  # fmt: skip
        if self.training != "bound":
            table = learnt(write, theta, fitting, held, iterations=self.iterations, log_loss=self.log_loss)
        return table
