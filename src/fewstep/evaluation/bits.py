"""Bits per dimension of discrete data under a continuous flow, by uniform dequantisation."""

import math
from typing import Any

import torch
from torch import Tensor

from .._types import Field, FieldError
from ..field import Model
from ..keyed import Keyed
from ..path import AffinePath
from .divergence import DivergenceRule
from .estimate import RESAMPLES, Estimate
from .flow import Source
from .likelihood import log_density
from .solve import Solver


def bits_per_dim(
    field: Field | Model,
    images: Tensor,
    *,
    levels: int = 256,
    repeats: int = 1,
    seed: int = 0,
    solver: Solver = "dopri5",
    divergence: DivergenceRule = "hutchinson",
    probes: int = 1,
    tol: float = 1e-5,
    end: float | None = None,
    path: AffinePath | None = None,
    source: Source | None = None,
    max_batch: int | None = 128,
) -> Estimate:
    """The bound on the code length of discrete data: mean over images of -log2 P(image) / dim, in bits.

    Pixel k of 0 .. levels - 1 becomes (k + u) / (levels / 2) - 1 with u uniform in [0, 1) (Theis et al., 1511.01844): its
    bin of width 2 / levels fills [-1, 1), and by Jensen's inequality -E_u log2 p(x) / dim + log2(levels / 2) is at least the
    code length (the "+ 7" of 8-bit images). A model is meant that was trained on such data.

    Args:
        field: as for `log_density`. With one label per image, give the field with these labels.
        images: (batch, *shape): integers 0 .. levels - 1, or floats on the lattice k / ((levels - 1) / 2) - 1 in [-1, 1],
            the usual scaling, which are first turned back into integers.
        levels: values that a pixel can take.
        repeats: dequantisations (and sets of probes) per image, averaged. Each costs a solve.
        seed: of the dequantisation, keyed by repeat and image, and of the probes.
        solver: as for `log_density`, like the next ones.
        divergence: "hutchinson" is unbiased for the mean.
        probes: per repeat.
        tol: see `log_density`.
        end: see `log_density`.
        path: see `log_density`.
        source: see `log_density`.
        max_batch: images that are solved for together.

    Returns:
        The mean with its 95 % bootstrap interval over images, which holds the noise of dequantisation and probes, too.

    Raises:
        FieldError: pixels out of range or off the lattice, and as for `log_density`.
        ValueError: fewer than 2 levels or 1 repeat.

    Example:
        >>> pixels = torch.arange(256).view(64, 4)
        >>> inside = lambda x: torch.full(x.shape[:1], -4 * math.log(2))  # uniform in [-1, 1]^4
        >>> print(bits_per_dim(lambda x, t: 0 * x, pixels, source=inside))
        8 [8, 8]
    """
    if levels < 2 or repeats < 1:
        raise ValueError(f"levels must be at least 2 and repeats at least 1, got {levels} and {repeats}")
    settings: dict[str, Any] = {
        "solver": solver, "divergence": divergence, "probes": probes, "tol": tol, "end": end,
        "path": path, "source": source, "max_batch": max_batch,
    }  # fmt: skip
    pixels = _pixels(images, levels)
    bits = torch.zeros(len(pixels), dtype=torch.float64)
    for repeat in range(repeats):
        x = dequantised(pixels, levels, seed, repeat)
        nats = log_density(field, x, seed=seed + repeat, **settings).value.double().cpu()
        bits += (math.log2(levels / 2) - nats / (x[0].numel() * math.log(2))) / repeats
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([bits[torch.randint(len(bits), (len(bits),), generator=generator)].mean() for _ in range(RESAMPLES)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(bits.mean()), low, high)


def dequantised(pixels: Tensor, levels: int, seed: int, repeat: int) -> Tensor:
    """(k + u) / (levels / 2) - 1, float32, on the pixels' device."""
    u = Keyed(seed, repeat, 0, len(pixels)).uniform("dequantise", *pixels.shape[1:])
    return (pixels + u.to(pixels)) / (levels / 2) - 1


def _pixels(images: Tensor, levels: int) -> Tensor:
    """Integers 0 .. levels - 1, as float32."""
    if images.ndim < 2 or images.numel() == 0:
        raise FieldError(f"images must be (batch, *shape), got shape {tuple(images.shape)}")
    values = (images.double() + 1) * ((levels - 1) / 2) if images.is_floating_point() else images.double()
    pixels = values.round()
    if not bool(((pixels >= 0) & (pixels < levels)).all()):
        kind = "floats in [-1, 1]" if images.is_floating_point() else f"integers in 0 .. {levels - 1}"
        raise FieldError(f"images must be {kind}, got values from {images.min().item():g} to {images.max().item():g}")
    if float((values - pixels).abs().max()) > 0.01:
        raise FieldError(
            f"floating-point images must lie on the lattice k / {(levels - 1) / 2:g} - 1 of {levels} levels; these lie between "
            "its values (already dequantised or resized?): pass the integers"
        )
    return pixels.float()
