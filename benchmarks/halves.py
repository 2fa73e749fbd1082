"""PFDiff's two ideas one at a time, as its paper ablates them (2408.08822): only the past prediction, or only the future one.

On fine steps g with macro steps of k + 1: both ask the network at g_(i+l). *Past only* gets there with the last prediction and
goes on from there (no restart). *Future only* gets there with a fresh prediction and restarts, at two calls per macro step.
"""

from fewstep.methods import Method, method
from fewstep.methods._frozen import FrozenStep
from fewstep.path import AffinePath, CondOT


def _rule(path: AffinePath) -> FrozenStep:
    return FrozenStep(None, "velocity") if isinstance(path, CondOT) else FrozenStep(path, "noise")


def past_only(skip: int, ahead: int, path: AffinePath) -> Method:
    """The springboard is where the state goes on; one call per macro step."""
    rule, macro = _rule(path), skip + 1

    @method(
        order=1,
        paper="arXiv:2408.08822",
        calls=lambda n: 1 + (n - 1) // macro if n % macro == 1 else None,
        name=f"past{skip}_{ahead}",
    )
    def run(u, grid, x):
        g = grid.knots
        held, x = rule.step(u, x, g[0], g[1])
        for i in range(1, grid.intervals, macro):
            x = rule.replay(x, held, g[i], g[i + ahead])
            held, x = rule.step(u, x, g[i + ahead], g[i + macro])
        return x

    return run


def future_only(skip: int, ahead: int, path: AffinePath) -> Method:
    """A fresh springboard and a restart; two calls per macro step."""
    rule, macro = _rule(path), skip + 1

    @method(
        order=1,
        paper="arXiv:2408.08822",
        calls=lambda n: 2 * n // macro if n % macro == 0 else None,
        name=f"future{skip}_{ahead}",
    )
    def run(u, grid, x):
        g = grid.knots
        for i in range(0, grid.intervals, macro):
            _, y = rule.step(u, x, g[i], g[i + ahead])
            held, _ = rule.step(u, y, g[i + ahead], g[i + macro])
            x = rule.replay(x, held, g[i], g[i + macro])
        return x

    return run
