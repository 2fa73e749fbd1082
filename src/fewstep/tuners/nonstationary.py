"""Non-stationary solvers (2403.01329): every time and every coefficient of the table is learnt.

x_(i+1) = a_i x_0 + sum_j b_ij u_j holds every Runge-Kutta, multistep and scale-time method (proposition 3.1), so nothing
that is a table has lower error than the best of these. The paper trains them with Adam for thousands of iterations; here a
few Gauss-Newton steps from the closed-form fit do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._precision import exact_products
from .._types import BudgetError, Field, FieldError, State
from ..composite import start_scale
from ..problem import Problem, Score
from ..sampler import Sampler
from .bespoke import precondition
from .boss import Boss
from .gauss_newton import Found, gauss_newton, halves, learnt
from .jacobian import Write
from .least_squares import LeastSquares, fit
from .options import positive, positives, share


@dataclass(frozen=True)
class NonStationary:
    """Learn all of a table.

    Attributes:
        start: the table to start from; default the closed-form fit on the BOSS grid.
        widths: where no `start` is given, factors on the noise of the paths that the fit may start from as well (eq. 14; the
            paper takes 5 and 10 for guidance 2 and 6.5): the fit that errs least on held-out noise is taken. 1 is BOSS's grid
            on the path itself.
        holdout: share of the noise that only chooses among the iterates.
        iterations: Gauss-Newton iterations, at most.
        log_loss: minimise the mean logarithm of the error (eq. 13) instead of the mean error.
        tol: tolerance of the reference solution.

    Costs per sample: the reference's calls and BOSS's, 3 nfe for every width, and for every iteration about nfe^3 / 3 field
    calls (148 at 8, 255 at 10).

    Raises:
        ValueError: no width, one that is not positive, or another setting out of its range.
    """

    start: Sampler | None = None
    widths: tuple[float, ...] = (1.0, 2.0, 5.0)
    holdout: float = 0.25
    iterations: int = 8
    log_loss: bool = False
    tol: float = 1e-4

    def __post_init__(self) -> None:
        positives("widths", self.widths)
        positive(tol=self.tol)
        share("holdout", self.holdout)

    @exact_products()
    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The learnt table, or the one to start from, with a warning, if nothing improves it on held-out noise.

        Raises:
            BudgetError: `start` has another NFE.
            FieldError: too little noise, a reference that is not accurate enough, or `start` combines other predictions than
                velocities.
        """
        if self.start is not None and self.start.nfe != nfe:
            raise BudgetError(f"the table to start from makes {self.start.nfe} calls, the budget is {nfe}")
        if self.start is not None and self.start.predicts != "velocity":
            raise FieldError(
                f'learning starts from rows over velocities, this table combines "{self.start.predicts}" predictions; '
                "use sampler.rebase(path, 'velocity')"
            )
        fitting, held = halves(field, noise, numbers=nfe * (nfe + 5) // 2, holdout=self.holdout, tol=self.tol)
        table = self.start or self._fitted(fitting, held, nfe)
        write, theta = rows_of(table), numbers_of(table)
        return learnt(write, theta, fitting, held, iterations=self.iterations, log_loss=self.log_loss, start=table)

    def _fitted(self, fitting: Problem, held: Problem, nfe: int) -> Sampler:
        """The best of the fits and of what they start from, on held-out noise."""
        field, noise = fitting.field, fitting.noise
        tables = [
            Boss()(field, noise, nfe=nfe) if width == 1.0 else precondition(nfe, width, start_scale(field))
            for width in self.widths
        ]
        ridges = LeastSquares().ridges
        fits = [fit(field, noise, fitting.solution, table, ridge=ridge)[0] for table in tables for ridge in ridges]
        return min([*fits, *tables], key=held.score)


def learn_rows(
    table: Sampler, fitting: Problem, held: Problem, *, iterations: int = 8, log_loss: bool = False, metric: Score = "rmse",
    tick: Callable[[], None] = lambda: None,
) -> Found:  # fmt: skip
    """Gauss-Newton on all numbers of a table, which is returned itself if nothing improves it; see `gauss_newton`."""
    write, theta = rows_of(table), numbers_of(table)
    found = gauss_newton(write, theta, fitting, held, iterations=iterations, log_loss=log_loss, metric=metric, tick=tick)
    return replace(found, sampler=table) if found.diverged else found


def numbers_of(table: Sampler) -> Tensor:
    """Times, then the weights of every row after the first: n (n + 5) / 2 numbers."""
    n = table.nfe
    rows = torch.cat([table.a[:, None], table.b], dim=1)
    return torch.cat([table.times, *(rows[i, : i + 1] for i in range(1, n + 1))]).detach().clone()


def rows_of(table: Sampler) -> Write:
    """The inverse of `numbers_of` for tables of this size; the first row stays, and where the table comes from."""
    n, name = table.nfe, table.provenance.method
    named = name if name.startswith("learned(") else f"learned({name})"
    provenance = replace(table.provenance, method=named, measured={})
    inside = torch.tril(torch.ones(n + 1, n + 1, dtype=torch.bool))
    inside[0] = False

    def write(theta: Tensor) -> Sampler:
        rows = theta.new_zeros(n + 1, n + 1).masked_scatter(inside, theta[n:])
        a = torch.cat([table.a[:1], rows[1:, 0]])
        return Sampler(theta[:n].clamp(0.0, 1.0), a, rows[:, 1:], provenance=provenance)

    return write
