"""What a method is: plain code with a name, an order, a paper and a price."""

from collections.abc import Callable
from dataclasses import dataclass

from .._types import BudgetError, Field, State
from ..grid import TimeGrid
from ..path import AffinePath

Run = Callable[[Field, TimeGrid, State], State]


@dataclass(frozen=True)
class Method:
    """A deterministic sampler as code: ``method(field, grid, noise) -> sample``.

    Attributes:
        name: how the registry, the command line and reports call it.
        order: global order of accuracy on a fixed smooth grid, its start included.
        paper: where it comes from.
        run: the algorithm.
        calls: number of steps -> field calls (NFE); None where the method cannot walk that many steps.
        path: the path whose coefficients the method uses, if it does.
        stages: field calls inside one step of the algorithm.
    """

    name: str
    order: int
    paper: str
    run: Run
    calls: Callable[[int], int | None]
    path: AffinePath | None = None
    stages: int = 1

    def __call__(self, field: Field, grid: TimeGrid, noise: State) -> State:
        """Run the algorithm itself; `tabulate` gives the same samples faster."""
        return self.run(field, grid, noise)

    def intervals(self, nfe: int) -> int:
        """The number of steps that costs exactly `nfe` field calls.

        Raises:
            BudgetError: there is none; the message names the nearest budgets that work.
        """
        possible = [(n, cost) for n in range(1, 64 * max(nfe, 1) + 64) if (cost := self.calls(n)) is not None]
        for n, cost in possible:
            if cost == nfe:
                return n
        near = sorted({cost for _, cost in possible}, key=lambda cost: (abs(cost - nfe), cost))[:2]
        raise BudgetError(
            f"{self.name} cannot spend exactly {nfe} calls; the nearest budgets are {' and '.join(map(str, sorted(near)))}"
        )


def method(
    *,
    order: int,
    paper: str,
    calls: Callable[[int], int | None] = lambda n: n,
    name: str | None = None,
    path: AffinePath | None = None,
    stages: int = 1,
) -> Callable[[Run], Method]:
    """Decorate plain code as a `Method`; the registry, the contract tests and the docs pick it up.

    Example:
        >>> @method(order=1, paper="Euler, 1768")
        ... def forward(u, grid, x):
        ...     for t0, t1 in grid.pairs():
        ...         x = x + (t1 - t0) * u(x, t0)
        ...     return x
        >>> forward.intervals(4)
        4
    """

    def wrap(run: Run) -> Method:
        return Method(name or run.__name__, order, paper, run, calls, path, stages)

    return wrap
