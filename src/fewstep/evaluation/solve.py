"""Solving for a state together with the integral of its divergence, in either direction of time."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import methods
from .._precision import exact_products
from .._types import FieldError, Time
from ..grid import TimeGrid
from ..path import AffinePath, CondOT, Cosine
from .divergence import Traced

Solver = Literal["dopri5"] | int | TimeGrid
"""Adaptive Dormand-Prince 5(4) of torchdiffeq; a number of Runge-Kutta 4 steps; or the knots of these steps."""

MOST_STEPS = 20_000
"""An adaptive solve that needs more has met a field that is not smooth."""


def known(what: str, value: object, names: Sequence[str]) -> None:
    """Raise ValueError, with the nearest name, unless `value` is one of `names`."""
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'unknown {what} "{value}": {hint}known are {", ".join(names)}')


def check_solver(solver: Any) -> None:
    """Raise ValueError unless it is a `Solver`; a number that is too small is refused by `TimeGrid`."""
    if not isinstance(solver, int | TimeGrid):
        known("solver", solver, ("dopri5",))


@exact_products()
def integrate(
    traced: Traced, x: Tensor, start: float, stop: float, *, rows: int, solver: Solver, tol: float, path: AffinePath | None
) -> tuple[Tensor, Tensor]:
    """Carry `x` from time `start` to `stop`.

    Args:
        traced: velocity and divergence, `rows` estimates of it.
        x: (batch, *shape) at `start`.
        start: where `x` is.
        stop: where it goes; earlier or later.
        rows: probes.
        solver: see `Solver`.
        tol: rtol = atol of "dopri5", for the state (RMS over all entries) and for the integral alike.
        path: decides where an integer `solver` puts its steps: uniform in the log-SNR on VP, VE, EDM and DiscreteVP,
            where velocities are unbounded, and in t otherwise.

    Returns:
        The state at `stop`, and (rows, batch): the integral of the divergence over time, upwards in time.

    Raises:
        FieldError: a divergence that is not finite, or no step is small enough for `tol`.
    """
    sign, low, high = (1.0 if stop > start else -1.0), min(start, stop), max(start, stop)
    size = x[0].numel()

    def rate(z: Tensor, s: Time) -> Tensor:
        # The clock counts from `start`: float32 times near the data end of a path would be rounded too coarsely.
        t = min(max(start + sign * float(s), low), high)
        v, divergence = traced(z[:, :size].reshape(x.shape), t)
        if not bool(torch.isfinite(divergence).all()):
            raise FieldError(f"the field's divergence is not finite at time t = {t:g} (0 = noise)")
        return torch.cat([sign * v.flatten(1), divergence.T], dim=1)

    z = torch.cat([x.flatten(1), x.new_zeros(x.shape[0], rows)], dim=1)
    if isinstance(solver, str):
        z = _adaptive(rate, z, high - low, size, tol)
    else:
        knots = _knots(solver, path, low, high)
        z = methods.rk4(rate, TimeGrid(knots - low if sign > 0 else (high - knots).flip(0)), z)
    return z[:, :size].reshape(x.shape), z[:, size:].T


def _adaptive(rate: Any, z: Tensor, length: float, size: int, tol: float) -> Tensor:
    from torchdiffeq import odeint

    def norm(error: Tensor) -> Tensor:
        """The integral is one number among many: on its own it is held to the tolerance, too."""
        return torch.maximum(*(part.abs().square().mean().sqrt() for part in (error[:, :size], error[:, size:])))

    ends = torch.tensor([0.0, length], dtype=torch.float64, device=z.device)
    options = {"norm": norm, "max_num_steps": MOST_STEPS, "first_step": _first_step(rate, z, length, tol, norm)}
    try:
        path = odeint(lambda s, y: rate(y, s), z, ends, rtol=tol, atol=tol, method="dopri5", options=options)
    except AssertionError as error:  # torchdiffeq's way to say that it gives up
        raise FieldError(
            f"dopri5 cannot keep to tol = {tol:g} ({str(error).splitlines()[0]}): raise tol, pass float64, or check that the "
            "field is smooth in x and t"
        ) from None
    assert isinstance(path, Tensor)
    return path[-1]


@torch.no_grad()
def _first_step(rate: Any, z: Tensor, length: float, tol: float, norm: Any) -> float:
    """One that changes the state by a hundredth (Hairer, Norsett & Wanner, II.4).

    torchdiffeq's own choice would drag its derivative into the gradients.
    """
    scale = tol + tol * z.abs()
    states, rates = float(norm(z / scale)), float(norm(rate(z, 0.0) / scale))
    return min(0.01 * states / rates if min(states, rates) > 1e-5 else 1e-6, length)


def _knots(solver: int | TimeGrid, path: AffinePath | None, low: float, high: float) -> Tensor:
    if isinstance(solver, int):
        if path is None or isinstance(path, CondOT | Cosine):
            solver = TimeGrid.uniform(solver)
        else:
            solver = TimeGrid.log_snr(solver, path)
    knots = solver.knots.detach()
    inside = knots[(knots > low) & (knots < high - 1e-9)]  # a grid may hold `high` itself, rounded differently
    return torch.cat([knots.new_tensor([low]), inside, knots.new_tensor([high])])
