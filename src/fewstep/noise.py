"""How much noise each stage of `tune` takes, and the noise itself."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ._model import SourcePoints

NOISES = {"search": (12, 1024), "fit": (12, 1024), "learn": (32, 2048)}
"""Fitting noises: at least so many, and at least so many numbers in all. Selection takes as many.

``fewstep tune models/cifar10-flow --nfe 8 --noise N``: 16 and 12 both give .0108, 8 give .0128."""

TEST = (32, 16384)
"""Likewise for the measurement, where the noise is drawn here."""

SCREEN = (1, 128)
"""Likewise for the first look at all candidates."""

BOSS_NOISES = (8, 512)
"""Likewise for BOSS's grids."""

PER_NUMBER = 4
"""Residuals (noises times elements) for each number that is fitted or learnt, at least."""

FEWEST = 4
"""Noises to learn from, at least, however large they are."""

MOST = 1024
"""Noises that are drawn unless more are asked for."""


def enough(least: tuple[int, int], size: int) -> int:
    """Noises of `size` numbers: (noises, numbers in all) at least, but not above `MOST`."""
    return min(MOST, max(least[0], math.ceil(least[1] / size)))


def needed(numbers: float, size: int, fewest: int = FEWEST) -> int:
    """The fewest noises of `size` elements that so many numbers can be learnt from, or with `fewest` = 1 fitted to."""
    return max(fewest, math.ceil(PER_NUMBER * numbers / max(size, 1)))


def draw(shape: Sequence[int], seed: int, which: int, source: SourcePoints | None = None) -> Tensor:
    """Standard normal noise, or what a model's paths start from.

    `which` tells fitting (0), selection (1) and test (2) noise apart, and further sets. Where these three are of a source, they
    are those of `draw_sets`: another `which` is another order of the same data.
    """
    if source is not None:
        return source(seed * 1009 + which, 0, shape[0])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1009 + which))


def draw_sets(counts: Sequence[int], shape: Sequence[int], seed: int, source: SourcePoints | None) -> list[Tensor]:
    """Fitting, selection and test noise: so many of each, (count, *shape).

    Of a source they are consecutive parts of one order, in which finite data come back only when all have been met.

    Warns:
        UserWarning: the source has fewer samples than that.
    """
    if source is None:
        return [draw((count, *shape), seed, which) for which, count in enumerate(counts)]
    points = source(seed, 0, sum(counts))
    different = len(points.flatten(1).unique(dim=0))
    if different < len(points):
        warnings.warn(
            f"{source.name} has only {different} samples for the {len(points)} points that are fitted to, chosen by and "
            "measured on: errors are partly of points that the sampler was fitted to; ask for less noise",
            stacklevel=2,
        )
    return list(points.split(list(counts)))
