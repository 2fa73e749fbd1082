"""Shortest paths with exactly k steps: the program behind BOSS and GITS, and OSS's greedy walk of the student."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._types import BudgetError, FieldError
from ..trajectory import Trajectory

CHUNK = 1 << 27
"""Bytes of states that are compared with the teacher's at once."""


class Schedules(NamedTuple):
    """All budgets of one program: `knots[k]` are the k + 1 knot indices of the k-step schedule, `costs[k]` its total cost."""

    knots: dict[int, np.ndarray]
    costs: dict[int, float]


def bellman(
    costs: np.ndarray,
    most: int,
    *,
    times: np.ndarray | None = None,
    min_step: float | None = None,
    max_step: float | None = None,
    fixed: Sequence[int] = (),
    discount: float = 1.0,
) -> Schedules:
    """Least-cost schedules from the first knot to the last with exactly k = 1 .. `most` steps, in one pass.

    Args:
        costs: (N + 1, N + 1), cost of the step i -> j for i < j.
        most: largest number of steps K.
        times: (N + 1,) knot times, needed for the step limits; default the indices.
        min_step: shortest step allowed.
        max_step: longest step allowed.
        fixed: knot indices that every schedule must visit.
        discount: gamma; the m-th step from the start (m = 0, 1, ...) counts gamma^m times its cost. Above 1 it asks for
            accurate *late* steps; it is V_j(k) = min_i c_ji + gamma V_i(k - 1) of GITS, walked from the other end.

    Returns:
        Schedules for every k that the limits allow; ties take the earlier knot. O(K N^2) time.

    Raises:
        ValueError: NaN among the costs, a fixed knot that does not exist, or a discount that is not positive.
        BudgetError: the limits leave no schedule at all.
    """
    n = len(costs) - 1
    upper = np.triu(np.ones_like(costs, dtype=bool), 1)
    if np.isnan(costs[upper]).any():
        raise ValueError("the Bellman program needs costs without NaN: a truncation error is not a number")
    if not 0 < discount < np.inf:
        raise ValueError(f"discount must be positive (1 is none, GITS takes 1.15), got {discount}")
    edges = _limited(np.where(upper, costs, np.inf), times, min_step, max_step, fixed)
    value = np.full(n + 1, np.inf)
    value[0] = 0.0
    back, schedules = [], Schedules({}, {})
    for k in range(1, min(most, n) + 1):
        through = value[:, None] + discount ** (k - 1) * edges
        back.append(through.argmin(axis=0)[:, None])
        value = through.min(axis=0)
        if np.isfinite(value[n]):
            schedules.knots[k], schedules.costs[k] = _track(back, n)[:, 0], float(value[n])
    return _some(schedules, most)


def student_schedules(
    slope: Callable[[Tensor, int], Tensor],
    teacher: Trajectory,
    most: int,
    *,
    times: np.ndarray | None = None,
    min_step: float | None = None,
    max_step: float | None = None,
) -> Schedules:
    """OSS (2503.21774): for each sample the walk of the *student* that stays closest to the teacher, then the median walk.

    With x_j the teacher's states and z_j(k) the student's state at knot j after k steps, z_0(0) = x_0,

        z_j(k) = z_i + (t_j - t_i) v(z_i, t_i),  z_i = z_i(k - 1),  for the i < j that brings it closest to x_j

    in mean square; the k-step schedule of the sample leads to z_N(k). The errors are global, not local, but the program is
    greedy: only the closest state survives at each knot, and a worse one might have led to a better end. (The published code
    also lets steps start from the noise at later knots and carries the table of k steps over to k + 1; this does not.)

    Args:
        slope: ``slope(z, i)``, the velocity of states (batch, ...) at knot i; asked (most - 1) (N - most / 2) times.
        teacher: Euler path in the same variables; times (N + 1,), states (N + 1, batch, ...).
        most: largest number of steps K.
        times: (N + 1,) knot times of the step limits; default the indices.
        min_step: shortest step allowed.
        max_step: longest step allowed.

    Returns:
        Schedules for every k that the limits allow: the median over samples, knot by knot (it keeps the limits where knots
        are equally spaced), and the mean over samples of the mean square end error of each sample's *own* schedule. Ties
        take the earlier knot.

    Raises:
        FieldError: a student's state is not finite.
        BudgetError: the limits leave no schedule at all.
    """
    n, batch = len(teacher.times) - 1, teacher.states.shape[1]
    upper = np.triu(np.ones((n + 1, n + 1), dtype=bool), 1)
    allowed = np.isfinite(_limited(np.where(upper, 0.0, np.inf), times, min_step, max_step, ()))
    reached = np.arange(n + 1) == 0
    states, back, schedules = teacher.states, [], Schedules({}, {})
    for k in range(1, min(most, n) + 1):
        best = torch.full((n + 1, batch), torch.inf, dtype=torch.float64, device=states.device)
        origin = torch.zeros(n + 1, batch, dtype=torch.int64, device=states.device)
        nearest = torch.zeros_like(states)
        for i in np.flatnonzero(reached & allowed.any(axis=1)).tolist():
            velocity = teacher.velocities[0] if i == 0 else slope(states[i], i)
            for ends in _pieces(np.flatnonzero(allowed[i]), states[i]):
                landing = states[i] + _column(teacher.times[ends] - teacher.times[i], states) * velocity
                error = (landing - teacher.states[ends]).reshape(len(ends), batch, -1).double().square().mean(2)
                closer = error < best[ends]
                best[ends] = torch.where(closer, error, best[ends])
                origin[ends] = torch.where(closer, i, origin[ends])
                nearest[ends] = torch.where(closer.view(*closer.shape, *[1] * (states.ndim - 2)), landing, nearest[ends])
        reached, states = (reached[:, None] & allowed).any(axis=0), nearest
        if not bool(torch.isfinite(best[torch.from_numpy(reached)]).all()):
            raise FieldError(f"after {k} steps a state of the student is not finite; try a longer min_step or more knots")
        back.append(origin.cpu().numpy())
        if reached[n]:
            ordered = np.sort(_track(back, n), axis=1)
            middle = (ordered[:, (batch - 1) // 2] + ordered[:, batch // 2] + 1) // 2
            schedules.knots[k], schedules.costs[k] = middle, float(best[n].mean())
    return _some(schedules, most)


def _limited(
    edges: np.ndarray, times: np.ndarray | None, min_step: float | None, max_step: float | None, fixed: Sequence[int]
) -> np.ndarray:
    """The costs with infinity for the steps that the limits forbid."""
    n = len(edges) - 1
    times = np.arange(n + 1.0) if times is None else np.asarray(times)
    lengths = times[None, :] - times[:, None]
    slack = 1e-12 * float(lengths.max())
    if min_step is not None:
        edges[lengths < min_step - slack] = np.inf
    if max_step is not None:
        edges[lengths > max_step + slack] = np.inf
    for knot in fixed:
        if not 0 <= knot <= n:
            raise ValueError(f"fixed knots are indices in 0..{n}, got {knot}")
        edges[:knot, knot + 1 :] = np.inf
    return edges


def _track(back: Sequence[np.ndarray], last: int) -> np.ndarray:
    """Knots (k + 1, batch) of the schedules that end at `last`, from where every step came: k arrays (N + 1, batch)."""
    knots = [np.full(back[0].shape[1], last)]
    for choice in reversed(back):
        knots.append(np.take_along_axis(choice, knots[-1][None], axis=0)[0])
    return np.stack(knots[::-1])


def _some(schedules: Schedules, most: int) -> Schedules:
    if not schedules.knots:
        raise BudgetError(f"no schedule of up to {most} steps satisfies min_step, max_step and fixed together")
    return schedules


def _pieces(ends: np.ndarray, state: Tensor) -> Sequence[Tensor]:
    return torch.from_numpy(ends).split(max(1, CHUNK // (state.numel() * 8)))


def _column(values: Tensor, states: Tensor) -> Tensor:
    return values.to(states).view(-1, *[1] * (states.ndim - 1))
