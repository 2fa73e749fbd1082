"""The picture of the samples: tiles for images, curves for signals, points for everything else."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .pictures import COLUMNS, REFERENCE, Strip, kind, mosaic, tiled
from .style import COLOURS, INK, MUTED, bare
from .view import Label, short

LEFT, WIDE = 2.35, 5.55
"""Inches: where rows start, and how long they are."""

MOST_POINTS = 512


def samples_figure(found: Sequence[Strip]) -> Figure:
    """The picture of all strips: one row each for images and signals, one panel each for points."""
    how = kind(found[0].samples.shape[1:])
    return {"image": _images, "signal": _signals, "points": _panels}[how](found)


def _rows(found: Sequence[Strip], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a name and empty axes for each strip; `height` of a row in inches."""
    height = max(height, 0.36)
    total = height * len(found) + 0.65
    figure = Figure(figsize=(8.0, total))
    figure.text(0.012, 1 - 0.16 / total, "Samples from the same noise", weight="bold", size=11, va="top")
    rows = []
    for i, strip in enumerate(found):
        bottom = (total - 0.55 - (i + 1) * height) / total
        _name(figure, strip.label, bottom + height / total / 2, total)
        rows.append(figure.add_axes((LEFT / 8, bottom + 0.04 * height / total, WIDE / 8, 0.92 * height / total)))
        bare(rows[-1])
    return figure, rows


def _images(found: Sequence[Strip]) -> Figure:
    ready = tiled(found)
    rows = ready.mosaics(256)
    figure, all_axes = _rows(found, min(WIDE * max(row.shape[0] / row.shape[1] for row in rows), 1.2) / 0.92)
    for axes, row in zip(all_axes, rows, strict=True):
        axes.imshow(row, interpolation="nearest" if ready.rows[0].shape[1] <= 64 else "antialiased", aspect="equal")
        axes.set_anchor("W")
    if ready.errors:
        share = 1 - mosaic(ready.errors[0]).shape[1] / ready.mosaics()[0].shape[1]
        first = all_axes[0]
        first.apply_aspect()
        for x, text in ((0.0, "samples"), (share, f"errors, {ready.gain:g}-fold")):
            first.text(x, 1.12, text, transform=first.transAxes, size=8, color=MUTED, va="bottom")
    return figure


def _signals(found: Sequence[Strip]) -> Figure:
    figure, all_axes = _rows(found, 0.5)
    for axes, strip in zip(all_axes, found, strict=True):
        _curves(axes, strip, found)
    return figure


def _name(figure: Figure, of: Label, middle: float, total: float) -> None:
    """Two lines: what it costs and how far off it is; then who it is."""
    colour = COLOURS[of.group] if of is not REFERENCE else INK
    first, second = (of.detail, of.name) if of.detail else (of.name, "")
    shift = 0.02 / total if second else 0.0
    figure.text(
        0.012,
        middle + shift,
        short(first, 34),
        weight="bold",
        size=8,
        color=colour,
        va="bottom" if second else "center",
        parse_math=False,
    )
    figure.text(0.012, middle - shift, short(second, 40), size=6.8, color=MUTED, va="top", parse_math=False)


def _curves(axes: Axes, strip: Strip, found: Sequence[Strip]) -> None:
    """The first signals side by side, the reference in grey behind them."""
    x = strip.samples[:COLUMNS]
    x = x[:, 0] if x.ndim == 3 else x
    base = found[0].samples[:COLUMNS] if found[0].label is REFERENCE else None
    values = (base if base is not None else x).nan_to_num()
    low, high = float(values.min()), float(values.max())
    spread = max(high - low, 1e-6)
    for j, curve in enumerate(x):
        t = np.linspace(j, j + 0.9, len(curve))
        if base is not None and strip.label is not REFERENCE:
            truth = base[j, 0] if base.ndim == 3 else base[j]
            axes.plot(t, truth, color=MUTED, alpha=0.5, linewidth=1.6, rasterized=True)
        axes.plot(t, curve.clamp(low - spread, high + spread), color=COLOURS[strip.label.group], linewidth=0.9, rasterized=True)
    axes.set(xlim=(0, COLUMNS if len(x) > COLUMNS else len(x)), ylim=(low - 0.1 * spread, high + 0.1 * spread))


def _panels(found: Sequence[Strip]) -> Figure:
    """The first two coordinates as points, the reference in grey below each."""
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    total = 2.2 * rows + 0.4
    figure = Figure(figsize=(8.0, total))
    figure.text(
        0.012, 1 - 0.12 / total, "Samples from the same noise (first two coordinates)", weight="bold", size=11, va="top"
    )
    clouds = [_plane(strip.samples) for strip in found]
    finite = clouds[0][np.isfinite(clouds[0]).all(1)] if np.isfinite(clouds[0]).any() else np.zeros((1, 2))
    middle, reach = (finite.max(0) + finite.min(0)) / 2, max(float(np.ptp(finite, axis=0).max()) * 0.56, 1e-6)
    for i, (strip, cloud) in enumerate(zip(found, clouds, strict=True)):
        row, column = divmod(i, columns)
        axes = figure.add_axes(
            ((column + 0.05) / columns, (total - 0.4 - 2.2 * (row + 1) + 0.05) / total, 0.9 / columns, 1.72 / total)
        )
        bare(axes)
        if found[0].label is REFERENCE and i:
            axes.plot(*clouds[0].T, ".", color=MUTED, alpha=0.35, markersize=3, rasterized=True)
        axes.plot(*cloud.T, ".", color=COLOURS[strip.label.group], markersize=3, alpha=0.7, rasterized=True)
        axes.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach), aspect="equal")
        axes.set_title(
            short(strip.label.detail or strip.label.name, 28), size=8, weight="bold", loc="left", pad=12, parse_math=False
        )
        axes.text(
            0,
            1.02,
            short(strip.label.name if strip.label.detail else "", 34),
            size=7,
            color=MUTED,
            transform=axes.transAxes,
            parse_math=False,
        )
    return figure


def _plane(samples: Tensor) -> np.ndarray:
    """(k, 2): the first two coordinates; a single one against its rank in the batch."""
    flat = samples[:MOST_POINTS].flatten(1)
    if flat.shape[1] == 1:
        flat = torch.cat([flat, torch.linspace(-1, 1, len(flat))[:, None]], dim=1)
    return flat[:, :2].numpy()
