"""Scale-time transformations x-bar(r) = s_r x(t_r) (2310.19075): Runge-Kutta steps on them, and the bound that trains them."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._types import Field, State
from ..coordinates import Coordinates
from ..problem import Problem
from ..sampler import Sampler
from .gauss_newton import knots_of
from .jacobian import Write

Base = Literal["euler", "midpoint"]
STAGES = {"euler": 1, "midpoint": 2}
"""Calls per step."""

ONE = math.log(math.expm1(1.0))
"""softplus of this is one."""

NEAR = 1e-7
"""Between the places of a difference in r."""

CHECK = 10
"""Iterations on the bound between looks at the held-out noise."""


@dataclass(frozen=True)
class ScaleTime:
    """A transformation known at m + 1 equally spaced r, which are the calls of a method.

    Attributes:
        t: (m + 1,) increasing times from 0 to 1.
        dt: (m,) dt / dr > 0.
        s: (m + 1,) scales > 0, s[0] = 1.
        ds: (m,) ds / dr.
    """

    t: Tensor
    dt: Tensor
    s: Tensor
    ds: Tensor

    @staticmethod
    def of(theta: Tensor) -> "ScaleTime":
        """From 4 m - 1 free numbers; zeros are the identity. Times increase and scales are positive whatever they are."""
        m = (len(theta) + 1) // 4
        t, dt, s, ds = theta.split([m - 1, m, m, m])
        return ScaleTime(knots_of(t), torch.nn.functional.softplus(dt + ONE), torch.cat([s.new_ones(1), s.exp()]), ds)

    @staticmethod
    def widened(calls: int, sigma0: float) -> "ScaleTime":
        """To the path whose noise is wider by `sigma0` (2403.01329, eq. 14), on CondOT: t_r = r / (r + sigma0 (1 - r)).

        The start scale of that path is undone at once: s_0 x_0 = sigma0 x_0. A width of one is the identity.
        """
        r = torch.arange(calls + 1, dtype=torch.float64) / calls
        s = r + sigma0 * (1 - r)
        return ScaleTime(r / s, sigma0 / s[:-1] ** 2, s / sigma0, torch.full_like(r[1:], (1.0 - sigma0) / sigma0))

    @staticmethod
    def along(coordinates: Coordinates, calls: int) -> "ScaleTime":
        """To the variables in which the solution is smooth, x over its scale in the clock of `coordinates`."""
        r = torch.arange(calls + 1, dtype=torch.float64) / calls

        def scales(t: Tensor) -> Tensor:
            return torch.tensor([coordinates.scale(float(time)) for time in t], dtype=torch.float64)

        before, after = (r[:-1] - NEAR).clamp(min=0.0), r[:-1] + NEAR
        (t0, s0), (t1, s1) = ((t, coordinates.scale(0.0) / scales(t)) for t in map(coordinates.time, (before, after)))
        inner = coordinates.time(r[1:-1])
        t = torch.cat([r[:1], inner, r[-1:]])
        return ScaleTime(t, (t1 - t0) / (after - before), coordinates.scale(0.0) / scales(t), (s1 - s0) / (after - before))

    @property
    def theta(self) -> Tensor:
        """(4 m - 1,) the numbers that `of` makes this from."""
        gaps = self.t.diff()
        return torch.cat([(gaps[:-1] / gaps[-1]).log(), self.dt.expm1().log() - ONE, self.s[1:].log(), self.ds])

    @property
    def calls(self) -> int:
        """How many calls a method makes on it: m."""
        return len(self.dt)


def step(u: Field, q: ScaleTime, base: Base, i: int | Tensor, x: State) -> State:
    """One step of the base method on x-bar, written for x (eqs. 17, 19-20), from place `i`: a number, or one per sample."""

    def at(values: Tensor, k: int | Tensor) -> Tensor:
        found = values[k]
        return found if found.ndim == 0 else found.to(x).view(-1, *[1] * (x.ndim - 1))

    h, end = STAGES[base] / q.calls, i + STAGES[base]
    s, ds, dt, s_end = at(q.s, i), at(q.ds, i), at(q.dt, i), at(q.s, end)
    if base == "euler":
        return (s + h * ds) / s_end * x + h * dt * s / s_end * u(x, q.t[i])
    half = i + 1
    s_half = at(q.s, half)
    z = (s + h / 2 * ds) * x + h / 2 * s * dt * u(x, q.t[i])
    turn = at(q.ds, half) / s_half * z + at(q.dt, half) * s_half * u(z / s_half, q.t[half])
    return s / s_end * x + h / s_end * turn


def run(u: Field, q: ScaleTime, base: Base, x: State) -> State:
    """All steps, from noise to data; ``q.calls`` NFE."""
    for i in range(0, q.calls, STAGES[base]):
        x = step(u, q, base, i, x)
    return x


def lipschitz_products(q: ScaleTime, base: Base, constant: float) -> Tensor:
    """M_i (eq. 26): by how much the steps after step i may stretch its error, if the velocity has this Lipschitz constant."""
    stages = STAGES[base]
    h, rate = stages / q.calls, q.ds.abs() / q.s[:-1] + q.dt * constant
    stretch = 1 + h * rate if base == "euler" else 1 + h * rate[1::2] * (1 + h / 2 * rate[::2])
    lengths = q.s[:-1:stages] / q.s[stages::stages] * stretch
    after = torch.cat([lengths[1:], lengths.new_ones(1)])
    return after.flip(0).cumprod(0).flip(0)


def bound(problem: Problem, q: ScaleTime, base: Base, constant: float) -> Tensor:
    """L_bes (eqs. 24-28): the error of every step from the exact path, weighted by M_i; all steps in one batched call.

    The path is the cached reference, moved along its own velocity where the times move (eq. 28), so gradients reach them.
    Costs per noise: the calls of one sample, with a graph, and one more per step without.
    """
    stages = STAGES[base]
    places = torch.arange(0, q.calls + 1, stages)
    field, steps, noises = problem.tiled(len(places) - 1)
    times = q.t[places]
    states = torch.stack([problem.solution.at(float(t)) for t in times.detach()])
    x, moving = states[steps, noises], times[steps]
    with torch.no_grad():
        velocity = field(x, moving.detach())
    slopes = torch.zeros_like(states)  # stays zero at t = 1, which does not move
    slopes[steps, noises] = velocity
    moved = (times - times.detach()).to(states).view(-1, *[1] * (states.ndim - 1))
    path = states + slopes * moved
    gap = step(field, q, base, places[steps], path[steps, noises]) - path[steps + 1, noises]
    norms = (gap.double().square().flatten(1).mean(1) + 1e-20).sqrt()  # the root has no derivative at zero
    return (lipschitz_products(q, base, constant).to(norms)[steps] * norms).sum() / problem.noise.shape[0]


def bound_training(
    write: Write, theta: Tensor, fitting: Problem, held: Problem, *, base: Base, iterations: int, rate: float, constant: float
) -> tuple[Tensor, Sampler, float]:
    """Adam on the bound: the iterate whose table is best on `held`, every `CHECK`-th is tried: (theta, table, error)."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.999), eps=1e-6)
    first = write(theta.detach())
    best = start = (theta.detach().clone(), first, held.score(first))
    for k in range(1, iterations + 1):
        (theta.grad,) = torch.autograd.grad(bound(fitting, ScaleTime.of(theta), base, constant), theta)
        if not bool(torch.isfinite(theta.grad).all()):
            break  # it diverged
        optimizer.step()
        if k % CHECK == 0 or k == iterations:
            table = write(theta.detach().clone())
            error = held.score(table)
            best = (theta.detach().clone(), table, error) if error < best[2] else best
    if best is start:
        warnings.warn("the bound improved nothing on held-out noise; the table is returned as it was", stacklevel=3)
    return best
