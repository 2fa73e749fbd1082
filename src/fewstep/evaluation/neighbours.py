"""Precision and recall by nearest neighbours: how much of what is drawn looks real, and how much of the real is drawn."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .estimate import BLOCKS, Estimate, jackknife, shuffled

ENTRIES = 2**24
"""Distances that are held at once."""


def precision_recall(x: Tensor, y: Tensor, *, k: int = 3) -> tuple[Estimate, Estimate]:
    """Precision and recall (Kynkaanniemi et al., 1904.06991, eq. 1 and 2), with jackknife intervals over generated samples.

    A set's manifold is the union of balls about its samples that reach to the k-th nearest other one. Precision is the share
    of generated samples on the real manifold, recall the share of real ones on the generated manifold. Both depend on the
    number of samples. Every pair of samples is looked at once or twice: memory stays bounded, time grows with the square.
    The interval of recall is cautious (half as wide again as values scatter): neighbours change abruptly with the samples.

    Args:
        x: (n, dim) generated.
        y: (m, dim) real.
        k: which neighbour the balls reach to.

    Raises:
        ValueError: too few samples for `k`.

    Example:
        >>> x, y = torch.arange(20.0).view(20, 1), torch.arange(10.0, 30.0).view(20, 1)
        >>> [estimate.value for estimate in precision_recall(x, y, k=1)]
        [0.55, 0.55]
    """
    fewest = min(len(x) - -(-len(x) // BLOCKS), len(y))
    if not 1 <= k < fewest:
        raise ValueError(f"k must be at least 1 and less than the samples of either side ({fewest} without a block), got {k}")
    x, y = shuffled(x).double(), y.double()
    reach = torch.cat([part.topk(k, largest=False).values[:, -1:] for part in _distances(y)])  # no block of them is left out
    inside = _within(x, y, reach)[:, 0]
    covered = _within(y, x, _radii(x, k)).double().mean(0).tolist()
    block = torch.arange(len(x), device=x.device) % BLOCKS
    shares = [float(inside[block != b].double().mean()) for b in range(BLOCKS)]
    return jackknife(float(inside.double().mean()), shares), jackknife(covered[0], covered[1:])


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other sample, (n, 1 + BLOCKS): among all, and among those outside each block.

    Samples inside the block that is left out have radius -1, which no distance is below.
    """
    found = []
    for part in _distances(x):
        # The k-th nearest outside a block is among the k nearest of each other block.
        near = [part[:, b::BLOCKS].topk(min(k, part[:, b::BLOCKS].shape[1]), largest=False).values for b in range(BLOCKS)]
        sets = [near, *(near[:b] + near[b + 1 :] for b in range(BLOCKS))]
        found.append(torch.stack([torch.cat(each, dim=1).kthvalue(k, dim=1).values for each in sets], dim=1))
    radii = torch.cat(found)
    for b in range(BLOCKS):
        radii[b::BLOCKS, 1 + b] = -1.0
    return radii


def _distances(x: Tensor) -> Iterator[Tensor]:
    """Distances of samples to all samples, some rows at a time; of a sample to itself infinite."""
    for start in range(0, len(x), _rows(len(x))):
        part = torch.cdist(x[start : start + _rows(len(x))], x)
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        yield part


def _within(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether points (n, dim) lie in any ball about centres (m, dim), for each column of radii (m, c): (n, c)."""
    parts = []
    for rows in points.split(_rows(len(centres))):
        distance = torch.cdist(rows, centres)
        parts.append(torch.stack([(distance <= column).any(1) for column in radii.T], dim=1))
    return torch.cat(parts)


def _rows(columns: int) -> int:
    return max(1, ENTRIES // columns)
