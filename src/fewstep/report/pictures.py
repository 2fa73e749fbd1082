"""Samples of every sampler from the same noise: their labels, and the tiles of images."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from matplotlib import image
from torch import Tensor

from ..evaluation import Report
from ..sampler import Sampler
from .view import Label, label

Kind = Literal["image", "signal", "points"]

COLUMNS = 12
ERRORS = 4
"""Of the columns, where images have a reference."""

MOST_STRIPS = 24
REFERENCE = Label("converged reference", None, "", "other")

EMBEDDED_BYTES = 140_000
"""Of all tiles in the page together, before base64."""


@dataclass(frozen=True, eq=False)
class Strip:
    """One sampler's samples, (k, *shape) float32 on the host."""

    label: Label
    samples: Tensor


def strips(
    report: Report, samplers: Mapping[str, Sampler], pictures: Mapping[str, Tensor], reference: Tensor | None
) -> list[Strip]:
    """The reference first, then the samplers in the order given.

    Raises:
        ValueError: the pictures' samples differ in shape.
    """
    found = [] if reference is None else [Strip(REFERENCE, reference)]
    found += [Strip(label(report, key, samplers.get(key)), value) for key, value in pictures.items()]
    shapes = {tuple(strip.samples.shape[1:]) for strip in found}
    if len(shapes) > 1 or any(strip.samples.ndim < 2 for strip in found):
        raise ValueError(f"pictures and reference_picture must be (k, *shape) with one shape, got {sorted(map(str, shapes))}")
    if any(len(strip.samples) == 0 for strip in found):
        raise ValueError("pictures need at least one sample each")
    return [Strip(s.label, s.samples.detach().float().cpu()) for s in found[:MOST_STRIPS]]


def kind(shape: Sequence[int]) -> Kind:
    """How samples of this shape are drawn.

    (C, H, W) with up to 4 channels, and (H, W), are images; (L,) and (C, L) with L > 8 are signals; the rest are points.
    """
    if len(shape) == 3 and shape[0] <= 4 and min(shape[1:]) > 1:
        return "image"
    if len(shape) == 2 and min(shape) >= 8:
        return "image"
    if len(shape) in (1, 2) and shape[-1] > 8:
        return "signal"
    return "points"


def tiles(strip: Strip, scale: tuple[float, float]) -> np.ndarray:
    """(k, H, W, 3) floats in 0..1; values that are not finite are mid-grey."""
    x = strip.samples[:COLUMNS]
    x = x[:, None] if x.ndim == 3 else x
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, max(0, 3 - x.shape[1])))
    low, high = scale
    x = ((x[:, :3] - low) / (high - low)).nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)
    return x.permute(0, 2, 3, 1).numpy()


def value_range(found: Sequence[Strip]) -> tuple[float, float]:
    """Black and white: [-1, 1] for pictures; for latents (2 or 4 channels) the range of the first strip."""
    shape = found[0].samples.shape[1:]
    if len(shape) == 2 or shape[0] in (1, 3):
        return -1.0, 1.0
    finite = found[0].samples[torch.isfinite(found[0].samples)]
    low, high = (float(v) for v in torch.quantile(finite[:100_000], torch.tensor([0.01, 0.99]))) if len(finite) else (-1.0, 1.0)
    return low, max(high, low + 1e-6)


def mosaic(parts: np.ndarray, gap: float = 0.06) -> np.ndarray:
    """Tiles in one row with transparent gaps, (H, W, 4); small tiles are enlarged so that the gap has pixels."""
    times = max(1, math.ceil(32 / parts.shape[1]))
    parts = parts.repeat(times, 1).repeat(times, 2)
    k, height, width, _ = parts.shape
    step = width + max(1, round(gap * width))
    row = np.zeros((height, k * step, 4), dtype=np.float32)
    for i, tile in enumerate(parts):
        row[:, i * step : i * step + width, :3], row[:, i * step : i * step + width, 3] = tile, 1.0
    return row[:, : k * step - (step - width)]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Image strips ready to draw.

    Attributes:
        rows: for each strip its samples (k, H, W, 3).
        errors: for each strip its first few magnified differences to the reference, around mid-grey; () without one.
        gain: their magnification.
    """

    rows: tuple[np.ndarray, ...]
    errors: tuple[np.ndarray, ...] = ()
    gain: float = 1.0

    def mosaics(self, side: int | None = None) -> list[np.ndarray]:
        """One RGBA picture per strip, tiles at most `side` pixels large: the samples, a gap, the errors."""
        parts = [_reduced(row, side) for row in self.rows]
        if not self.errors:
            return [mosaic(part) for part in parts]
        joined = []
        for part, error in zip(parts, (_reduced(error, side) for error in self.errors), strict=True):
            left, right = mosaic(part), mosaic(error)
            joined.append(np.concatenate([left, np.zeros((len(left), left.shape[0] // 3, 4), np.float32), right], axis=1))
        return joined


def tiled(found: Sequence[Strip]) -> Tiles:
    """The tiles of image strips; with the reference as first strip, the errors of the first few beside them."""
    scale = value_range(found)
    if found[0].label is not REFERENCE or len(found) == 1:
        return Tiles(tuple(tiles(strip, scale) for strip in found))
    rows = tuple(tiles(strip, scale)[: COLUMNS - ERRORS] for strip in found)
    count = min(ERRORS, *(len(row) for row in rows))
    differences = [row[:count] - rows[0][:count] for row in rows]
    typical = float(np.median([np.sqrt(np.square(d).mean()) for d in differences[1:]]))
    gain = next((g for g in (50.0, 20.0, 10.0, 5.0, 2.0) if g * typical <= 0.2), 1.0)
    return Tiles(rows, tuple(np.clip(0.5 + gain * d, 0, 1) for d in differences), gain)


def embedded(tiled: Tiles) -> list[str]:
    """Every image strip as a ``data:`` address, all together within `EMBEDDED_BYTES`: exact if small, else reduced."""
    exact = [_encode(row, "png") for row in tiled.mosaics()] if tiled.rows[0].shape[1] <= 64 else []
    if exact and sum(map(len, exact)) <= EMBEDDED_BYTES:
        return [_address(data, "png") for data in exact]
    for side in (96, 64, 48, 32, 24):
        reduced = [_encode(row, "webp") for row in tiled.mosaics(side)]
        if sum(map(len, reduced)) <= EMBEDDED_BYTES:
            break
    return [_address(data, "webp") for data in reduced]


def _reduced(parts: np.ndarray, side: int | None) -> np.ndarray:
    height, width = parts.shape[1:3]
    if side is None or max(height, width) <= side:
        return parts
    size = (max(1, round(height * side / max(height, width))), max(1, round(width * side / max(height, width))))
    x = torch.from_numpy(parts).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(x, size=size, mode="area").permute(0, 2, 3, 1).numpy()


def _encode(pixels: np.ndarray, form: str) -> bytes:
    buffer = BytesIO()
    image.imsave(buffer, pixels, format=form, pil_kwargs={"quality": 80} if form == "webp" else {"optimize": True})
    return buffer.getvalue()


def _address(data: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"
