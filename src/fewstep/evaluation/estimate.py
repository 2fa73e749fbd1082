"""A measured number with its interval, and the two ways in which intervals here are made and joined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, randperm

from ..keyed import generator

RESAMPLES = 1000
"""Bootstrap resamples over noises."""

BLOCKS = 10
"""Into so many interleaved blocks are samples cut for a jackknife."""


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95 % interval over noises."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def jackknife(value: float, parts: Sequence[float]) -> Estimate:
    """`value` with the Student interval of the delete-a-group jackknife (Quenouille; Kott, 2001).

    For what a bootstrap would bias: a resample repeats samples, which narrows covariances and gives neighbours at no distance.

    Args:
        value: of all samples.
        parts: the same number without one block of the samples each.

    Example:
        >>> print(jackknife(2.0, [1.5, 2.0, 2.5]))
        2 [-0.4841, 4.484]
    """
    from scipy.special import stdtrit  # not needed to import fewstep

    groups, mean = len(parts), math.fsum(parts) / len(parts)
    error = math.sqrt((groups - 1) / groups * math.fsum((part - mean) ** 2 for part in parts))
    spread = float(stdtrit(groups - 1, 0.975)) * error
    return Estimate(value, value - spread, value + spread)


def shuffled(x: Tensor) -> Tensor:
    """The samples (n, ...) in an order of their own, the same at every call.

    Blocks are every tenth sample, and samples of ten classes in turn would make blocks of one class each: without shuffling an
    interval would be that of leaving out classes.
    """
    return x[randperm(len(x), generator=generator(0, "blocks")).to(x.device)]


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over seeds, with the wider of two 95 % intervals: of the seeds' own ones together, and of their scatter.

    A few seeds say little about their scatter (three can agree by chance), and an interval from inside one seed knows nothing
    of what goes wrong between them.

    Raises:
        ValueError: no estimate.

    Example:
        >>> print(over_seeds([Estimate(1.0, 0.9, 1.1), Estimate(2.0, 1.9, 2.1)]))
        1.5 [0.52, 2.48]
    """
    if not estimates:
        raise ValueError("a mean over seeds needs at least one")
    if len(estimates) == 1:
        return estimates[0]
    seeds, values = len(estimates), [estimate.value for estimate in estimates]
    mean = math.fsum(values) / seeds
    inside = math.sqrt(math.fsum(((estimate.high - estimate.low) / 2) ** 2 for estimate in estimates)) / seeds
    between = 1.96 * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (seeds - 1) / seeds)
    return Estimate(mean, mean - max(inside, between), mean + max(inside, between))
