"""What a long step costs: local errors of Euler's method between any two knots of one recorded path."""

import itertools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..trajectory import Trajectory

Cost = Literal["squared", "norm", "deviation"]
"""Squared L2 (BOSS), L2 (GITS's "l2"), or the added distance from the chord (GITS's "dev")."""

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
        cost: "squared" L2 per sample, averaged over samples (BOSS), its root, "norm", or "deviation", see `chord_deviations`.

    Returns:
        (N + 1, N + 1) float64, entry (i, j) for i < j, zero elsewhere; unscaled by the dimension, as in the papers.

    Raises:
        ValueError: a velocity is NaN or infinite.
    """
    if cost == "deviation":
        return chord_deviations(trajectory)
    gram = _gram(trajectory.velocities, per_sample=cost == "norm")
    errors = _from_gram(_finite(gram), trajectory.times.numpy())
    return np.sqrt(errors).mean(axis=0) if cost == "norm" else errors[0]


def chord_deviations(trajectory: Trajectory) -> np.ndarray:
    """How much farther from the chord a step ends than the path does: GITS's cost (2405.11326), which may be negative.

    The chord is the straight line from the first state of the path to the last. With w_l the part of v_l across it and
    y_i = sum_{l<i} (t_(l+1) - t_l) w_l, a step from i to j costs |y_i + (t_j - t_i) w_i| - |y_j|, averaged over samples.
    Time and memory are linear in the number of velocities: there is no Gram matrix.

    Args:
        trajectory: from `record`; times (N + 1,), velocities (N, batch, ...).

    Returns:
        (N + 1, N + 1) float64, entry (i, j) for i < j, zero elsewhere and between neighbouring knots.

    Raises:
        ValueError: a velocity is NaN or infinite.
    """
    times, velocities = trajectory.times, trajectory.velocities
    steps, batch = velocities.shape[:2]
    flat, dt = velocities.reshape(steps, batch, -1), times.diff().to(velocities.device)[:, None, None]
    lengths = (times[None, :] - times[:-1, None])[..., None]
    total = torch.zeros(steps, steps + 1, dtype=torch.float64)
    for v in flat.split(max(1, CHUNK // (8 * steps * max(flat.shape[2], steps + 1))), dim=1):
        v = v.double()
        chord = (dt * v).sum(0)
        along = chord / chord.norm(dim=1, keepdim=True).clamp(min=1e-300)
        w = v - (v * along).sum(2, keepdim=True) * along
        y = torch.cat([torch.zeros_like(w[:1]), (dt * w).cumsum(0)])
        yy, yw, ww = ((p * q).sum(2).cpu() for p, q in ((y, y), (y[:-1], w), (w, w)))
        ends = yy[:-1, None] + 2 * lengths * yw[:, None] + lengths.square() * ww[:, None]
        total += (ends.clamp(min=0.0).sqrt() - yy.sqrt()).sum(2)
    costs = np.zeros((steps + 1, steps + 1))
    costs[:-1] = np.triu(_finite((total / batch).numpy()), 2)
    return costs


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("truncation errors need finite velocities; the recorded trajectory holds NaN or infinity")
    return values


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
