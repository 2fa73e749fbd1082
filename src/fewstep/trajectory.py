"""What a sampler is measured against: recorded Euler paths and converged solutions with their own error."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import exact_products
from ._types import Field, FieldError, State, Time
from .composite import CountedField, dtype_of, path_of, span_of, start_scale
from .coordinates import Coordinates
from .grid import TimeGrid

FEWEST_STEPS = 4
MOST_STEPS = 1024
"""Of Runge-Kutta, from the first solve of a reference to the last."""


class Trajectory(NamedTuple):
    """An Euler path: times (n + 1,) float64, states (n + 1, batch, ...), velocities (n, batch, ...)."""

    times: Tensor
    states: Tensor
    velocities: Tensor


def record(field: Field, grid: TimeGrid, x0: State) -> Trajectory:
    """Euler's method along `grid` from the state `x0`, everything kept; n = ``grid.intervals`` field calls."""
    states = x0.new_empty(grid.intervals + 1, *x0.shape)
    velocities = x0.new_empty(grid.intervals, *x0.shape)
    states[0] = x0
    with torch.no_grad():
        for i, (t0, t1) in enumerate(grid.pairs()):
            velocities[i] = field(states[i], float(t0))
            torch.add(states[i], velocities[i], alpha=float(t1 - t0), out=states[i + 1])
    return Trajectory(grid.knots, states, velocities)


@dataclass(frozen=True, eq=False)
class Reference:
    """A converged solution of dx/dt = field(x, t) from given noise, at any time.

    Attributes:
        coordinates: the clock and scale in which `knots`, `states` and `rates` are kept.
        knots: (m + 1,) float64 clock values of the finest solve.
        states: (m + 1, batch, ...) scaled solution there.
        rates: (m + 1, batch, ...) its derivative there (cubic Hermite interpolation in between).
        error: RMS per element of the difference to the solve with half the steps, the worst of the end and three
            interpolated times, divided by 2^p - 1 (Richardson) where the order p is how fast that difference fell, at most 4:
            the estimated error of `end` and `at`.
        nfe: field calls spent.
    """

    coordinates: Coordinates
    knots: Tensor
    states: Tensor
    rates: Tensor
    error: float
    nfe: int

    @property
    def end(self) -> Tensor:
        """The solution at the last time, (batch, *shape)."""
        return self.states[-1] * self.coordinates.scale(self.coordinates.time(self.knots[-1]))

    def at(self, t: Time) -> Tensor:
        """The solution at time `t` (a number), (batch, *shape)."""
        tau = float(self.coordinates.tau(float(t)))
        if not -1e-9 <= tau <= 1 + 1e-9:
            raise ValueError(f"a reference covers times in [0, 1], asked for t = {float(t):g}")
        i, weights = self._hermite(tau)
        values = (self.states[i], self.states[i + 1], self.rates[i], self.rates[i + 1])
        z = sum((w * v for w, v in zip(weights[1:], values[1:], strict=True)), weights[0] * values[0])
        return z * self.coordinates.scale(float(t))

    def _hermite(self, tau: float) -> tuple[int, tuple[float, float, float, float]]:
        i = min(max(int(torch.searchsorted(self.knots, tau, right=True)) - 1, 0), len(self.knots) - 2)
        h = float(self.knots[i + 1] - self.knots[i])
        s = (tau - float(self.knots[i])) / h
        return i, ((1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s), h * s * (1 - s) ** 2, h * s**2 * (s - 1))

    def select(self, index: Tensor | slice) -> "Reference":
        """The same solution for some of the samples."""
        return Reference(self.coordinates, self.knots, self.states[:, index], self.rates[:, index], self.error, self.nfe)


def reference(field: Field, noise: State, *, tol: float = 1e-4, most_steps: int = MOST_STEPS) -> Reference:
    """Solve from t = 0 to 1 with classical Runge-Kutta 4, doubling the steps until two resolutions agree.

    The states compared are the ends *and* interpolated times of the coarser solve, so that `Reference.at` is as good as
    `Reference.end`. On paths with unbounded velocity the solve runs in the angle (`fewstep.coordinates`). Times at which a
    network stops being asked at the field's own time are knots: no step crosses the kink there.

    Args:
        field: the velocity field.
        noise: (batch, *shape) standard normal; scaled by the path's start scale if the field knows its path.
        tol: accepted estimated error, RMS per element.
        most_steps: give up beyond this many steps.

    Raises:
        FieldError: not converged within `most_steps` (the message names the error reached), or NaN from the network.
    """
    return Solve(field, noise, most_steps=most_steps).to(tol)


class Solve:
    """A `reference` that can be made more accurate later: what has been solved is not solved again.

    Args:
        field: as for `reference`, and so are the others.
    """

    def __init__(self, field: Field, noise: State, *, most_steps: int = MOST_STEPS) -> None:
        self._counted = CountedField(field)
        self._coordinates = Coordinates.of(field)
        self._rate = self._coordinates.field(self._counted)
        if path_of(field) is not None and noise.dtype in (torch.float16, torch.bfloat16):
            noise = noise.float()  # a state in half precision loses what the last steps add; networks are asked in their own
        self._z0 = noise * (start_scale(field) / self._coordinates.scale(0.0))
        self._inside = self._coordinates.tau(torch.tensor(span_of(field), dtype=torch.float64)).tolist()
        self._most, self._steps, self._change = most_steps, FEWEST_STEPS, float("inf")
        self._last: Reference | None = None

    @exact_products()
    def to(self, tol: float) -> Reference:
        """The solution at the first resolution whose estimated error is at most `tol`.

        Raises:
            FieldError: as `reference`.
        """
        failure = None
        if self._last is None:
            try:
                self._last = self._at(self._steps)
            except FieldError as caught:
                failure = caught  # steps this long may blow up where shorter ones do not
        while self._last is None or not self._last.error <= tol:
            if self._steps >= self._most:
                rough = dtype_of(self._counted)
                advice = (
                    f"the network computes in {rough}, give tol={2 * self._change:.1g} or the network in float32"
                    if rough in (torch.float16, torch.bfloat16)
                    else "raise tol or most_steps, or check that the field is smooth in x and t"
                )
                raise FieldError(
                    f"the reference did not converge: {self._steps} Runge-Kutta steps still change it by {self._change:.2g} "
                    f"(asked for {tol:.2g}); {advice}"
                )
            try:
                self._double()
            except FieldError as caught:
                raise failure or caught from None
        return self._last

    def _double(self) -> None:
        before, last_change = self._last, self._change
        now = self._at(2 * self._steps)
        self._steps *= 2
        if before is not None:
            self._change = _change(before, now)
            if last_change < float("inf"):  # two resolutions tell of no order, three do
                # The order that the solve really has, from 1 to 4: 4 only where the field is smooth on the scale of a step.
                order = min(max(last_change / max(self._change, 1e-300), 2.0), 16.0)
                now = replace(now, error=self._change / (order - 1.0))
        self._last = now

    def _at(self, steps: int) -> Reference:
        knots = _knots(steps, *self._inside)
        states, rates = _rk4(self._rate, knots, self._z0)
        return Reference(self._coordinates, knots, states, rates, error=float("inf"), nfe=self._counted.calls)


def _knots(steps: int, low: float, high: float) -> Tensor:
    """`steps` equal steps between `low` and `high`; short ones to 0 and 1, where the field has a kink at `low` or `high`."""
    few = max(1, steps // 16)
    ends = [(0.0, low, few), (low, high, steps), (high, 1.0, few)]
    parts = [torch.linspace(a, b, n + 1, dtype=torch.float64)[:-1] for a, b, n in ends if b > a]
    return torch.cat([*parts, torch.ones(1, dtype=torch.float64)])


def _change(before: Reference, now: Reference) -> float:
    """RMS per element of the difference between two solves, the worst of the end and three times between coarse knots."""
    knots = now.knots
    places = (1, (len(knots) // 4) * 2 + 1, len(knots) - 2, len(knots) - 1)
    seen = [now.coordinates.time(knots[i]) for i in places]
    return max(float((now.at(t) - before.at(t)).double().square().mean().sqrt()) for t in seen)


def _rk4(field: Field, knots: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    states, rates = (x0.new_empty(len(knots), *x0.shape) for _ in range(2))
    states[0] = x0
    with torch.no_grad():
        for i, (t0, t1) in enumerate(zip(knots[:-1].tolist(), knots[1:].tolist(), strict=True)):
            h, x = t1 - t0, states[i]
            k1 = rates[i] = field(x, t0)
            k2 = field(x + h / 2 * k1, t0 + h / 2)
            k3 = field(x + h / 2 * k2, t0 + h / 2)
            k4 = field(x + h * k3, t1)
            states[i + 1] = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        rates[-1] = field(states[-1], float(knots[-1]))
    return states, rates


class Adaptive(NamedTuple):
    """An adaptive solve: the sample and the field calls that it took."""

    sample: Tensor
    nfe: int


@exact_products()
def dopri5(field: Field, noise: State, *, tol: float = 1e-3, times: tuple[float, float] = (0.0, 1.0)) -> Adaptive:
    """Adaptive Dormand-Prince 5(4) of torchdiffeq as a baseline: rtol = atol = `tol`; its NFE is what it needed.

    It adapts its steps to the batch, so it is not a table.
    """
    from torchdiffeq import odeint

    counted = CountedField(field)
    ends = torch.tensor(times, dtype=torch.float64, device=noise.device)
    with torch.no_grad():
        path = odeint(lambda t, x: counted(x, float(t)), noise * start_scale(field), ends, rtol=tol, atol=tol, method="dopri5")
    assert isinstance(path, Tensor)
    return Adaptive(path[-1], counted.calls)
