"""Distances between two sets of feature vectors: Frechet and kernel inception distance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import generator
from .estimate import BLOCKS, Estimate, jackknife, shuffled


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean (dim,) and scatter (dim, dim) of vectors, float64; sums of them are those of the sets together."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(x: Tensor) -> "Moments":
        """The moments of vectors (count, *shape), which are flattened."""
        x = x.flatten(1).double()
        mean = x.mean(0)
        return Moments(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: "Moments") -> "Moments":
        count, gap = self.count + other.count, other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + gap.outer(gap) * (self.count * other.count / count))

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (dim, dim)."""
        return self.scatter / (self.count - 1)


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance between Gaussian fits of two sets of vectors (Heusel et al., 1706.08500, eq. 6).

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> frechet(x, 2 * x + 3)  # means 0 and 3, standard deviations 1 and 2
        10.0
    """
    return _ToGaussian(Moments.of(y)).distance(Moments.of(x))


def frechet_estimate(x: Tensor, y: Tensor, *, minus: Tensor | None = None) -> Estimate:
    """The Frechet distance of generated `x` from real `y`, with a jackknife interval over the generated samples.

    The distance of small sets is biased upwards (by about dim^2 / count for like sets): compare equal counts only, and with
    the distance of real samples from real ones at that count.

    Args:
        x: (count, dim) generated.
        y: (n, dim) real.
        minus: (count, dim) what another sampler made of the same noises: its distance is subtracted. Its jackknife leaves out
            the same noises, so that what the two share cancels, in the value and in the interval.

    Raises:
        ValueError: `minus` has another shape than `x`.
    """
    target = _ToGaussian(Moments.of(y))
    value, parts = _distances(target, x)
    if minus is not None:
        if minus.shape != x.shape:
            raise ValueError(
                f"a difference needs as many samples of either sampler, got {tuple(x.shape)}, {tuple(minus.shape)}"
            )
        other, theirs = _distances(target, minus)
        value, parts = value - other, [mine - its for mine, its in zip(parts, theirs, strict=True)]
    return jackknife(value, parts)


def _distances(target: "_ToGaussian", x: Tensor) -> tuple[float, list[float]]:
    """Of all samples, and without one block of them each."""
    x = shuffled(x)
    blocks = [Moments.of(x[k::BLOCKS]) for k in range(BLOCKS) if k < len(x)]
    parts = []
    for k in range(len(blocks)):
        first, *others = blocks[:k] + blocks[k + 1 :]
        parts.append(target.distance(sum(others, start=first)))
    return target.distance(Moments.of(x)), parts


class _ToGaussian:
    """The distance to one Gaussian, whose covariance's root is found once."""

    def __init__(self, moments: Moments) -> None:
        self.mean, self.covariance = moments.mean, moments.covariance
        self.root: Tensor | None = None
        if bool(torch.isfinite(self.covariance).all()):
            values, vectors = torch.linalg.eigh(self.covariance)
            self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(self, moments: Moments) -> float:
        """NaN where either side is not finite: a sampler that blew up has a row like any other."""
        covariance = moments.covariance
        if self.root is None or not bool(torch.isfinite(covariance).all()):
            return math.nan
        cross = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp(min=0).sqrt().sum()
        gap = (self.mean - moments.mean).square().sum()
        return float(gap + self.covariance.trace() + covariance.trace() - 2 * cross)


def kid(x: Tensor, y: Tensor, *, size: int = 1000, seed: int = 0) -> Estimate:
    """Kernel inception distance: the unbiased MMD^2 under the kernel (a . b / dim + 1)^3 (Binkowski et al., 1801.01401).

    The mean over disjoint random subsets, of `size` samples or a tenth of the smaller set; disjoint ones are independent, so
    that their scatter gives the interval (over generated and real samples), which the usual overlapping ones do not.

    Args:
        x: (n, dim) generated, at least 20.
        y: (m, dim) real, at least 20.
        size: samples on either side in a subset, at most; cost and memory grow with it.
        seed: of the subsets.

    Raises:
        ValueError: fewer samples.
    """
    count = min(len(x), len(y))
    if count < 2 * BLOCKS:
        raise ValueError(f"KID needs at least {2 * BLOCKS} samples on either side, got {count}")
    size = max(2, min(size, count // BLOCKS))
    xs, ys = (z[torch.randperm(len(z), generator=generator(seed, "kid", side))] for side, z in enumerate((x, y)))
    starts = range(0, count - size + 1, size)
    each = [mmd(xs[start : start + size].double(), ys[start : start + size].double()) for start in starts]
    total = math.fsum(each)
    return jackknife(total / len(each), [(total - value) / (len(each) - 1) for value in each])


def mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of MMD^2 under the cubic kernel from two sets (n, dim) (Gretton et al., 2012, lemma 6)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / x.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
