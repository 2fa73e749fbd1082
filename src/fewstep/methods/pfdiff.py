"""PFDiff (2408.08822): skip steps by reusing a past prediction to look ahead, then a future one to step.

On the fine grid g, the state x is at g_i. A springboard y = phi(past prediction, x, g_i, g_{i+l}) costs nothing; the network
is asked there; the step x = phi(that prediction, x, g_i, g_{i+k+1}) restarts from x. With c = l / (k + 1) this is a midpoint
rule with a stale predictor: second order for c = 1/2 (1_1 and 3_2), first order with a third (2_1, 2_2) or half (3_1, 3_3)
of Euler's error otherwise.
"""

from .._types import BudgetError
from ..path import AffinePath
from ._frozen import Frozen, FrozenStep
from ._method import Method, method
from .dpm import ddim, dpm_single
from .runge_kutta import euler

PAPER = "arXiv:2408.08822"


def pfdiff(skip: int, ahead: int, base: Method = euler, frozen: Frozen = "velocity") -> Method:
    """PFDiff-`skip`_`ahead` on a fine grid of N (skip + 1) - skip steps; N NFE for a first-order base.

    Args:
        skip: k, fine steps left out per macro step of k + 1.
        ahead: l, fine steps from the state to the springboard where the network is asked, 1 <= l <= k.
        base: `euler`, `ddim(path)`, or `dpm_single(path, order, predicts)`. With the last, of p stages, there is no restart:
            the stage predictions of the previous step carry the state l fine steps for free, a real p-stage step covers
            the remaining k + 1 - l (algorithm of the paper for p > 1; its code calls this k_(k-l+1)); NFE = p N.
        frozen: which prediction is reused: "velocity" (FLUX variant), "noise" (DDIM, Stable Diffusion), "data" (guided
            diffusion, DPM-Solver++). The three differ by up to 2x in error at 4 NFE.

    Raises:
        ValueError: 1 <= ahead <= skip does not hold, or `frozen` does not suit `base`.
        BudgetError: (when run) the grid does not have N (skip + 1) - skip steps.

    Example:
        >>> pfdiff(skip=1, ahead=1).intervals(8)
        15
    """
    if not 1 <= ahead <= skip:
        raise ValueError(f"pfdiff needs 1 <= ahead <= skip, got skip={skip}, ahead={ahead}")
    if base.name not in ("euler", "ddim") and (base.path is None or base.stages == 1):
        raise ValueError(f"pfdiff's base is euler, ddim(path) or dpm_single(path, order), got {base.name}")
    if base.stages > 1 and base.name != dpm_single(base.path, base.stages, frozen).name:  # type: ignore[arg-type]  # has a path
        raise ValueError(f'{base.name} does not hold "{frozen}"; give frozen="data" for dpmpp and "noise" for dpm bases')
    rule, macro = FrozenStep(base.path, frozen, base.stages), skip + 1
    order = 2 if 2 * ahead == macro and rule.stages == 1 else 1
    suffix = "" if frozen == "velocity" else f"-{frozen}" if rule.stages == 1 else f"-{base.name}"

    def calls(n: int) -> int | None:
        return rule.stages * (1 + (n - 1) // macro) if n % macro == 1 else None

    @method(order=order, paper=PAPER, calls=calls, name=f"pfdiff{skip}_{ahead}{suffix}", path=base.path, stages=rule.stages)
    def run(u, grid, x):
        g = grid.knots
        if calls(grid.intervals) is None:
            raise BudgetError(f"pfdiff with skip={skip} needs a grid of N * {macro} - {skip} steps, got {grid.intervals}")
        held, x = rule.step(u, x, g[0], g[1])
        for i in range(1, grid.intervals, macro):
            y = rule.replay(x, held, g[i], g[i + ahead])
            if rule.stages == 1:
                held, _ = rule.step(u, y, g[i + ahead], g[i + macro])
                x = rule.replay(x, held, g[i], g[i + macro])
            else:
                held, x = rule.step(u, y, g[i + ahead], g[i + macro])
        return x

    return run


def variants(path: AffinePath) -> list[Method]:
    """Registry hook: the six published settings for each frozen quantity, and 1_1 on the higher-order bases."""
    pairs = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    found = [pfdiff(k, l, ddim(path), frozen) if frozen != "velocity" else pfdiff(k, l)
             for frozen in ("velocity", "noise", "data") for k, l in pairs]  # fmt: skip
    return [*found, pfdiff(1, 1, dpm_single(path, 2), "data"), pfdiff(1, 1, dpm_single(path, 3), "data")]
