"""Adams-Bashforth on any grid: the multistep method behind iPNDM and DEIS, in t."""

from torch import Tensor

from ..path import AffinePath
from ._method import Method, method


def adams(order: int) -> Method:
    """Variable-step Adams-Bashforth of 1 to 4 steps; 1 NFE per step.

    Each step integrates the polynomial through the last velocities exactly. The first steps have fewer velocities behind
    them and use a lower order, as every one-call-per-step scheduler does; that start limits the *global* order to 2
    (Hairer, Norsett & Wanner, Solving ODEs I, section III.5).

    Raises:
        ValueError: `order` is not 1, 2, 3 or 4.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"adams takes order 1, 2, 3 or 4, got {order}")

    @method(order=min(order, 2), paper="Adams & Bashforth, 1883; iPNDM arXiv:2204.13902", name=f"adams{order}")
    def run(u, grid, x):
        times, velocities = [], []
        for t0, t1 in grid.pairs():
            times, velocities = [t0, *times][:order], [u(x, t0), *velocities][:order]
            weights = _weights(times, t0, t1)
            x = x + sum(w * v for w, v in zip(weights, velocities, strict=True))
        return x

    return run


def _weights(times: list[Tensor], t0: Tensor, t1: Tensor) -> list[Tensor]:
    """Integrals over [t0, t1] of the Lagrange polynomials through `times`."""
    weights = []
    for i, ti in enumerate(times):
        others = [tj for j, tj in enumerate(times) if j != i]
        # Coefficients of prod (s - (tj - t0)), lowest power first, in the local variable s = t - t0.
        polynomial, denominator = [t0 * 0 + 1], t0 * 0 + 1
        for tj in others:
            root = tj - t0
            shifted = [t0 * 0, *polynomial]
            polynomial = [high - root * low for high, low in zip(shifted, [*polynomial, t0 * 0], strict=True)]
            denominator = denominator * (ti - tj)
        h = t1 - t0
        weights.append(sum(c * h ** (k + 1) / (k + 1) for k, c in enumerate(polynomial)) / denominator)
    return weights


def variants(path: AffinePath) -> list[Method]:
    """Registry hook."""
    del path  # velocities only
    return [adams(2), adams(3), adams(4)]
