"""BOSS stage 1 (2312.16414): step times by dynamic programming over local truncation errors of Euler's method.

The cost of stepping from knot i to knot j of a fine Euler path is || x_j - x_i - (t_j - t_i) v_i ||^2, averaged over samples
(the paper's eq. 5); the K-step schedule of least total cost is a shortest path with K edges.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._tabulate import tabulate
from .._types import BudgetError, Field, State
from ..composite import CountedField, start_scale
from ..coordinates import Coordinates
from ..grid import TimeGrid
from ..methods import ddim, euler
from ..sampler import Sampler
from ..trajectory import Trajectory, record

Cost = Literal["squared", "norm"]

CHUNKS = {"cpu": 1 << 21}
"""Bytes of velocities taken at once, by device: on a CPU what its cache holds, elsewhere `CHUNK`."""

CHUNK = 1 << 27


BLOCKS = 3
"""Row blocks of the Gram matrix."""


def truncation_errors(trajectory: Trajectory, cost: Cost = "squared") -> np.ndarray:
    """Local truncation errors of one Euler step between any two knots of an Euler path.

    With d_l = v_l - v_(l-1), the error from i to j is sum_{i<l<j} (t_j - t_l) d_l: states cancel exactly, and everything
    follows from the Gram matrix of the d_l. That is one matrix product instead of a loop over pairs, and free of the
    cancellation that makes a Gram matrix of states useless in float32.

    Args:
        trajectory: from `record`; times (N + 1,), velocities (N, batch, ...).
        cost: "squared" L2 per sample, averaged over samples (the paper), or its root, "norm".

    Returns:
        (N + 1, N + 1) float64, entry (i, j) for i < j, zero elsewhere; unscaled by the dimension, as in the paper.

    Raises:
        ValueError: a velocity is NaN or infinite.
    """
    times, velocities = trajectory.times.numpy(), trajectory.velocities
    gram = _gram(velocities, per_sample=cost == "norm")
    if not np.isfinite(gram).all():
        raise ValueError("truncation errors need finite velocities; the recorded trajectory holds NaN or infinity")
    errors = _from_gram(gram, times)
    return np.sqrt(errors).mean(axis=0) if cost == "norm" else errors[0]


def _gram(velocities: Tensor, *, per_sample: bool) -> np.ndarray:
    """<d_l, d_m> averaged over samples, (1, N - 1, N - 1), or for each sample, (batch, N - 1, N - 1)."""
    count, batch = velocities.shape[:2]
    flat = velocities.reshape(count, batch, -1)
    if not per_sample:
        flat = flat.reshape(count, -1)
        width = max(1, CHUNKS.get(flat.device.type, CHUNK) // (count * flat.element_size()))
        edges = [(count - 1) * k // BLOCKS for k in range(BLOCKS + 1)]
        blocks = [(low, high) for low, high in itertools.pairwise(edges) if high > low]
        total = torch.zeros(count - 1, count - 1, dtype=torch.float64, device=flat.device)
        memory = flat.new_empty((count - 1) * width)
        for piece in flat.split(width, dim=1):
            d = memory[: (count - 1) * piece.shape[1]].view(count - 1, piece.shape[1])
            torch.sub(piece[1:], piece[:-1], out=d)
            for low, high in blocks:  # the upper triangle, in blocks: a third less arithmetic than the full square
                total[low:high, low:] += d[low:high] @ d[low:].T
        upper = (total / batch).triu().cpu().numpy()
        return (upper + np.triu(upper, 1).T)[None]
    step = max(1, CHUNK // (count * flat.shape[2] * flat.element_size()))
    parts = [(p[1:] - p[:-1]).transpose(0, 1) for p in flat.split(step, dim=1)]
    return torch.cat([p @ p.transpose(1, 2) for p in parts]).double().cpu().numpy()


def _from_gram(h: np.ndarray, times: np.ndarray) -> np.ndarray:
    """E[s, i, j] from the Gram matrices h[s] by recurrences in j without cancellation; O(N^2) per matrix.

    For the path from i: Q(j) = |v_j - v_i|^2, R(j) = <error at j, v_j - v_i>, and the error at j + 1 is the error at j plus
    (t_(j+1) - t_j) (v_j - v_i).
    """
    count, steps = h.shape[0], len(times) - 1
    e = np.zeros((count, steps + 1, steps + 1))
    q, r = np.zeros((count, steps)), np.zeros((count, steps))  # for every start i
    dt = np.diff(times)
    for j in range(1, steps + 1):
        e[:, :j, j] = e[:, :j, j - 1] + 2 * dt[j - 1] * r[:, :j] + dt[j - 1] ** 2 * q[:, :j]
        if j == steps:
            break
        # Sums over l = i + 1 .. j - 1 of H_lj and of (t_(j-1) - t_l) H_lj, for every i, as suffix sums of one column.
        column = h[:, : j - 1, j - 1]
        plain = _suffix(column)
        weighted = _suffix(column * (times[j - 1] - times[1:j]))
        r[:, :j] += dt[j - 1] * q[:, :j] + weighted + dt[j - 1] * plain
        q[:, :j] += 2 * plain + h[:, j - 1, j - 1][:, None]
    return np.maximum(e, 0.0)


def _suffix(values: np.ndarray) -> np.ndarray:
    """Sums over entries i.. for i = 0 .. len, along the last axis."""
    sums = np.cumsum(values[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([sums, np.zeros((len(values), 1))], axis=1)


class Schedules(NamedTuple):
    """All budgets of one Bellman program: `knots[k]` are the k + 1 knot indices of the best k-step schedule."""

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
) -> Schedules:
    """Least-cost schedules from the first knot to the last with exactly k = 1 .. `most` steps, in one pass.

    Args:
        costs: (N + 1, N + 1), cost of the step i -> j for i < j.
        most: largest number of steps K.
        times: (N + 1,) knot times, needed for the step limits; default the indices.
        min_step: shortest step allowed.
        max_step: longest step allowed.
        fixed: knot indices that every schedule must visit.

    Returns:
        Schedules for every k that the limits allow; ties take the earlier knot. O(K N^2) time.

    Raises:
        ValueError: NaN among the costs, or a fixed knot that does not exist.
        BudgetError: the limits leave no schedule at all.
    """
    n = len(costs) - 1
    upper = np.triu(np.ones_like(costs, dtype=bool), 1)
    if np.isnan(costs[upper]).any():
        raise ValueError("the Bellman program needs costs without NaN: a truncation error is not a number")
    edges = np.where(upper, costs, np.inf)
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
    value = np.full(n + 1, np.inf)
    value[0] = 0.0
    back, schedules = [], Schedules({}, {})
    for k in range(1, min(most, n) + 1):
        through = value[:, None] + edges
        back.append(through.argmin(axis=0))
        value = through[back[-1], np.arange(n + 1)]
        if np.isfinite(value[n]):
            knots = [n]
            for choice in reversed(back):
                knots.append(int(choice[knots[-1]]))
            schedules.knots[k], schedules.costs[k] = np.array(knots[::-1]), float(value[n])
    if not schedules.knots:
        raise BudgetError(f"no schedule of up to {most} steps satisfies min_step, max_step and fixed together")
    return schedules


@dataclass(frozen=True)
class Boss:
    """Euler's method on the step times that BOSS finds.

    Attributes:
        knots: N, steps of the fine Euler path (the paper's K_max). Costs N field calls, once for all budgets.
        cost: "squared" (the paper) or "norm".
        min_step: shortest step allowed, in the clock.
        max_step: longest step allowed.
        fixed: times that every schedule must visit (moved to the nearest knot).

    On paths with unbounded velocity the clock is the angle between noise and data, and method and costs are those of DDIM.
    """

    knots: int = 100
    cost: Cost = "squared"
    min_step: float | None = None
    max_step: float | None = None
    fixed: tuple[float, ...] = ()

    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The tuned table; costs `knots` field calls on `noise`.

        Raises:
            BudgetError: `nfe` is not between 1 and `knots`, or the limits exclude it.
            FieldError: NaN from the network.
        """
        grid = self.grids(field, noise, (nfe,))[nfe]
        path = Coordinates.of(field).path
        sampler = tabulate(euler if path is None else ddim(path), grid, start_scale=start_scale(field))
        return sampler.named(f"boss-{sampler.provenance.method}")

    def grids(self, field: Field, noise: State, budgets: Sequence[int]) -> dict[int, TimeGrid]:
        """The step times for several budgets from one recorded path; any method can walk them."""
        if min(budgets) < 1 or max(budgets) > self.knots:
            raise BudgetError(f"BOSS on {self.knots} knots finds 1 to {self.knots} steps, asked for {sorted(budgets)}")
        coordinates = Coordinates.of(field)
        knots = TimeGrid.uniform(self.knots)
        errors = truncation_errors(_fine_path(CountedField(field), coordinates, knots, noise * start_scale(field)), self.cost)
        taus = knots.knots.numpy()
        found = bellman(
            errors, max(budgets), times=taus, min_step=self.min_step, max_step=self.max_step,
            fixed=[int(np.abs(taus - float(coordinates.tau(t))).argmin()) for t in self.fixed],
        )  # fmt: skip
        missing = [k for k in budgets if k not in found.knots]
        if missing:
            raise BudgetError(f"min_step, max_step and fixed leave no schedule of {missing[0]} steps")
        return {k: _grid(coordinates, taus[found.knots[k]]) for k in budgets}


def _fine_path(field: CountedField, coordinates: Coordinates, knots: TimeGrid, x0: Tensor) -> Trajectory:
    """The path whose one-step errors are the costs: of Euler in t, or where the table will be DDIM, of DDIM.

    DDIM is Euler for x / alpha in minus sigma / alpha with minus the noise prediction as velocity.
    """
    if coordinates.path is None:
        return record(field, knots, x0)
    times = _grid(coordinates, knots.knots.numpy()).knots
    alpha, sigma, _, _ = coordinates.path.coefficients(times)
    ratio = -sigma / alpha
    y = x0 / float(alpha[0])
    noises = y.new_empty(len(times) - 1, *y.shape)
    with torch.no_grad():
        for i in range(len(noises)):
            noises[i] = field.predict(y * float(alpha[i]), float(times[i]), "noise")
            y = y - float(ratio[i + 1] - ratio[i]) * noises[i]
    return Trajectory(ratio, y[None], -noises)


def _grid(coordinates: Coordinates, taus: np.ndarray) -> TimeGrid:
    times = coordinates.time(torch.from_numpy(taus))
    return TimeGrid(torch.cat([torch.zeros(1, dtype=torch.float64), times[1:-1], torch.ones(1, dtype=torch.float64)]))
