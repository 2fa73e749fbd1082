"""Non-stationary solvers (2403.01329): every time and every coefficient of the table is learnt.

x_(i+1) = a_i x_0 + sum_j b_ij u_j holds every Runge-Kutta, multistep and scale-time method (proposition 3.1), so nothing
that is a table has lower error than the best of these. The paper trains them with Adam for thousands of iterations; here a
few Gauss-Newton steps from the closed-form fit do.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._types import BudgetError, Field, FieldError, State
from ..composite import path_of
from ..path import CondOT
from ..problem import Problem, Score
from ..sampler import Sampler
from .bespoke import precondition
from .boss import Boss
from .gauss_newton import Found, Write, gauss_newton, halves, learnt
from .least_squares import fit


@dataclass(frozen=True)
class NonStationary:
    """Learn all of a table.

    Attributes:
        start: the table to start from; default the closed-form fit on the BOSS grid.
        sigma0: above 1, start from the fit on a path whose noise is wider by this factor (eq. 14; the paper takes 5 and 10 for
            guidance 2 and 6.5).
        holdout: share of the noise that only chooses among the iterates.
        iterations: Gauss-Newton iterations, at most.
        log_loss: minimise the mean logarithm of the error (eq. 13) instead of the mean error.
        tol: tolerance of the reference solution.

    Costs per sample: the reference's calls, and for every iteration about nfe^3 / 3 field calls (148 at 8, 255 at 10).
    """

    start: Sampler | None = None
    sigma0: float = 1.0
    holdout: float = 0.25
    iterations: int = 8
    log_loss: bool = False
    tol: float = 1e-4

    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The learnt table, or the one to start from, with a warning, if nothing improves it on held-out noise.

        Raises:
            BudgetError: `start` has another NFE.
            FieldError: too little noise, a reference that is not accurate enough, `start` combines other predictions than
                velocities, or `sigma0` on another path than CondOT.
        """
        if self.start is not None and self.start.nfe != nfe:
            raise BudgetError(f"the table to start from makes {self.start.nfe} calls, the budget is {nfe}")
        if self.start is not None and self.start.predicts != "velocity":
            raise FieldError(
                f'learning starts from rows over velocities, this table combines "{self.start.predicts}" predictions; '
                "use sampler.rebase(path, 'velocity')"
            )
        path = path_of(field)
        if self.start is None and self.sigma0 != 1.0 and path is not None and not isinstance(path, CondOT):
            raise FieldError(f"sigma0 is for the CondOT path, the field lives on {path!r}; leave it at 1 and give a start")
        fitting, held = halves(field, noise, numbers=nfe * (nfe + 5) // 2, holdout=self.holdout, tol=self.tol)
        table = self.start or self._fitted(fitting, nfe)
        write, theta = rows_of(table), numbers_of(table)
        return learnt(write, theta, fitting, held, iterations=self.iterations, log_loss=self.log_loss, start=table)

    def _fitted(self, fitting: Problem, nfe: int) -> Sampler:
        field, noise = fitting.field, fitting.noise
        table = Boss()(field, noise, nfe=nfe) if self.sigma0 == 1.0 else precondition(nfe, self.sigma0)
        return fit(field, noise, fitting.solution, table)[0]


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
