"""One-step methods in the velocity: Euler and the classical Runge-Kutta family."""

from ..path import AffinePath
from ._method import Method, method


@method(order=1, paper="Euler, 1768")
def euler(u, grid, x):
    """Euler's method; on the CondOT path it is DDIM. 1 NFE per step."""
    for t0, t1 in grid.pairs():
        x = x + (t1 - t0) * u(x, t0)
    return x


@method(order=2, paper="Runge, 1895", calls=lambda n: 2 * n, stages=2)
def midpoint(u, grid, x):
    """Explicit midpoint. 2 NFE per step."""
    for t0, t1 in grid.pairs():
        h = t1 - t0
        x = x + h * u(x + h / 2 * u(x, t0), t0 + h / 2)
    return x


@method(order=2, paper="Heun, 1900", calls=lambda n: 2 * n, stages=2)
def heun(u, grid, x):
    """Heun's method, the trapezoid. 2 NFE per step; the last call is at t = 1."""
    for t0, t1 in grid.pairs():
        h = t1 - t0
        k1 = u(x, t0)
        k2 = u(x + h * k1, t1)
        x = x + h / 2 * (k1 + k2)
    return x


@method(order=4, paper="Kutta, 1901", calls=lambda n: 4 * n, stages=4)
def rk4(u, grid, x):
    """The classical fourth-order method. 4 NFE per step."""
    for t0, t1 in grid.pairs():
        h = t1 - t0
        k1 = u(x, t0)
        k2 = u(x + h / 2 * k1, t0 + h / 2)
        k3 = u(x + h / 2 * k2, t0 + h / 2)
        k4 = u(x + h * k3, t1)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def variants(path: AffinePath) -> list[Method]:
    """Registry hook."""
    del path  # these methods know velocities only
    return [euler, midpoint, heun, rk4]
