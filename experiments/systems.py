"""Dynamical systems whose trajectories are learnt: Lorenz, FitzHugh-Nagumo and the double pendulum, with their events.

Settings as in Finzi et al. (2306.07526), who are followed by the flow-and-divergence-matching experiments. All are solved by
Runge-Kutta 4 with sub-steps. Lorenz and the pendulum are chaotic: halving the sub-steps changes late states, not their law.
The double pendulum is the physical one, with the mass matrix [[2, c], [c, 1]]; the public code's is off by one in its indices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
"""States (n, dim)."""

STEPS = 60
"""Length of a trajectory."""


def _same(z: Array) -> Array:
    return z


@dataclass(frozen=True)
class System:
    """A system dz/dt = rate(z).

    Attributes:
        name: of the system.
        dim: numbers per state.
        rate: (n, dim) -> (n, dim).
        start: ``start(rng, n)`` -> first states (n, dim).
        dt: time between two states of a trajectory.
        drop: states before the trajectory begins.
        substeps: Runge-Kutta steps in `dt`.
        shown: what a trajectory shows of a state.
        hidden: back from there.
        event: C of trajectories (n, STEPS, dim), (n,), differentiable: the event is C > 0.
    """

    name: str
    dim: int
    rate: Callable[[Array], Array]
    start: Callable[[np.random.Generator, int], Array]
    dt: float
    drop: int
    substeps: int
    shown: Callable[[Array], Array] = _same
    hidden: Callable[[Array], Array] = _same
    event: Callable[[Tensor], Tensor] | None = None


def trajectories(system: System, count: int, seed: int) -> Array:
    """(count, STEPS, dim)."""
    z = system.start(np.random.default_rng(seed), count)
    for _ in range(system.drop):
        z = _step(system, z)
    return continued(system, system.shown(z), STEPS - 1)


def continued(system: System, first: Array, steps: int) -> Array:
    """The true trajectories (n, steps + 1, dim) from what they show first, (n, dim)."""
    z = system.hidden(first)
    shown = [first]
    for _ in range(steps):
        z = _step(system, z)
        shown.append(system.shown(z))
    return np.stack(shown, 1)


def _step(system: System, z: Array) -> Array:
    h, f = system.dt / system.substeps, system.rate
    for _ in range(system.substeps):
        k1 = f(z)
        k2 = f(z + h / 2 * k1)
        k3 = f(z + h / 2 * k2)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(z + h * k3))
    return z


def _lorenz(z: Array) -> Array:
    """The states are those of Lorenz' equations over 20."""
    x, y, w = 20 * z.T
    return np.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], 1) / 20


def _lorenz_event(x: Tensor) -> Tensor:
    """Little oscillation in the first coordinate."""
    return 0.6 - torch.fft.rfft(x[..., 0], dim=1).abs()[:, 1:].mean(1)


def _fitzhugh(z: Array) -> Array:
    """Two coupled neurons (x1, x2, y1, y2), five times the equations' states (Farazmand & Sapsis, 1803.06277)."""
    x, y = z[:, :2] / 5, z[:, 2:] / 5
    dx = x * (-0.025794 - x) * (x - 1) - y + 0.128 * (x[:, ::-1] - x)
    return 5 * np.concatenate([dx, np.array([0.0065, 0.0135]) * x - 0.02 * y], 1)


def _fitzhugh_event(x: Tensor) -> Tensor:
    """Both neurons fire together."""
    return x[..., :2].mean(-1).amax(1) - 2.5


def _pendulum(z: Array) -> Array:
    """Hamilton's equations of two unit masses on unit rods under unit gravity, for angles and momenta (q1, q2, p1, p2)."""
    q1, q2, v1, v2 = _velocities(z).T
    turning = v1 * v2 * np.sin(q1 - q2)
    return np.stack([v1, v2, -turning - 2 * np.sin(q1), turning - np.sin(q2)], 1)


def _velocities(z: Array) -> Array:
    """The momenta solved for velocities: M = [[2, c], [c, 1]], c = cos(q1 - q2)."""
    q1, q2, p1, p2 = z.T
    c = np.cos(q1 - q2)
    return np.stack([q1, q2, (p1 - c * p2) / (2 - c * c), (2 * p2 - c * p1) / (2 - c * c)], 1)


def _momenta(z: Array) -> Array:
    q1, q2, v1, v2 = z.T
    c = np.cos(q1 - q2)
    return np.stack([q1, q2, 2 * v1 + c * v2, c * v1 + v2], 1)


SYSTEMS = {
    system.name: system
    for system in (
        System("lorenz", 3, _lorenz, lambda rng, n: rng.normal(size=(n, 3)), 0.1, 30, 10, event=_lorenz_event),
        System("fitzhugh", 4, _fitzhugh, lambda rng, n: 0.2 * rng.normal(size=(n, 4)), 6.0, 250, 6, event=_fitzhugh_event),
        System(
            "pendulum", 4, _pendulum, lambda rng, n: rng.normal(size=(n, 4)) * [1, 1, 0.2, 0.3], 0.5, 0, 10,
            shown=_velocities, hidden=_momenta,
        ),
    )
}  # fmt: skip
"""By name."""
