"""The numbers themselves: where each sampler calls the network, and the weights of the tuned tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..sampler import Sampler
from .style import COLOURS, MUTED
from .view import Label, short

MOST_KNOTS, MOST_MAPS = 24, 6
"""Samplers drawn at most, as strips and as heat maps."""

MOST_NUMBERS = 12
"""Larger tables are drawn without numbers in their cells."""


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler and how pictures name it."""

    label: Label
    sampler: Sampler


def mapped(tables: Sequence[Table]) -> list[Table]:
    """The tables to draw as heat maps: the tuned ones, or all if none is."""
    tuned = [table for table in tables if table.label.group == "tuned"]
    return (tuned or list(tables))[:MOST_MAPS]


def knots_figure(tables: Sequence[Table]) -> Figure:
    """The strips of times alone."""
    shown = tables[:MOST_KNOTS]
    figure = Figure(figsize=(8.0, _height(shown)))
    _knots(figure, shown, top=1.0, total=_height(shown))
    return figure


def weights_figure(table: Table) -> Figure:
    """One heat map alone."""
    figure = Figure(figsize=(3.8, 3.6))
    _weights(figure.add_axes((0.13, 0.03, 0.86, 0.79)), table)
    return figure


def table_figure(tables: Sequence[Table]) -> Figure:
    """Strips above, heat maps below, two in a row."""
    shown, maps = tables[:MOST_KNOTS], mapped(tables)
    strip, cell = _height(shown), 3.75
    total = strip + cell * math.ceil(len(maps) / 2)
    figure = Figure(figsize=(8.0, total))
    _knots(figure, shown, top=1.0, total=total)
    for i, table in enumerate(maps):
        row, column = divmod(i, 2)
        bottom = (total - strip - (row + 1) * cell + 0.1) / total
        _weights(figure.add_axes((0.07 + 0.5 * column, bottom, 0.41, (cell - 0.75) / total)), table)
    return figure


def _height(tables: Sequence[Table]) -> float:
    return 1.05 + 0.3 * len(tables)


def _knots(figure: Figure, tables: Sequence[Table], *, top: float, total: float) -> None:
    figure.text(0.012, top - 0.13 / total, "Where the network is called", weight="bold", size=11, va="top")
    height = 0.3 * len(tables)
    axes = figure.add_axes((0.36, top - (0.5 + height) / total, 0.615, height / total))
    axes.set(xlim=(-0.01, 1.01), ylim=(len(tables) - 0.5, -0.5))
    axes.set_xlabel("time: 0 is noise, 1 is data", size=8, loc="left")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    for i, table in enumerate(tables):
        times, colour = table.sampler.times.detach().numpy(), COLOURS[table.label.group]
        axes.plot([0, 1], [i, i], color=colour, alpha=0.25, linewidth=0.8)
        axes.vlines(times, i - 0.3, i + 0.3, color=colour, linewidth=2)
        name = f"NFE {table.sampler.nfe}  {short(table.label.name, 38)}"
        axes.text(-0.565, i, name, transform=axes.get_yaxis_transform(), size=7.5, color=colour, va="center", parse_math=False)


def _weights(axes: Axes, table: Table) -> None:
    """Row i: the weights of the outputs in state i; each map has its own colour scale."""
    b = table.sampler.b.detach().numpy()[1:]
    n = b.shape[1]
    reach = float(np.abs(b).max()) or 1.0
    # Without the two ends of the scale, black on every cell stays readable.
    shades = matplotlib.colormaps["PuOr_r"](0.5 + 0.4 * b / reach)
    for i in range(n):
        for j in range(i + 1):
            axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, color=shades[i, j], linewidth=0))
            if n <= MOST_NUMBERS:
                axes.text(j, i, _cell(b[i, j]), ha="center", va="center", size=min(8.0, 62 / n), color="#000000")
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal", anchor="NW")
    axes.tick_params(length=0, labelsize=min(8.0, 90 / n), pad=2)
    axes.xaxis.tick_top()
    step = math.ceil(n / 24)
    axes.set_xticks(range(0, n, step), [f"u{j}" for j in range(0, n, step)])
    axes.set_yticks(range(0, n, step), [f"x{i + 1}" for i in range(0, n, step)])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.annotate(
        f"NFE {n}: weights of the {table.sampler.predicts} outputs", (0, 1), (0, 32), "axes fraction", "offset points",
        weight="bold", size=9, va="bottom",
    )  # fmt: skip
    axes.annotate(
        short(table.label.name, 44), (0, 1), (0, 20), "axes fraction", "offset points", size=7.5, color=MUTED, parse_math=False
    )


def _cell(value: float) -> str:
    """Two decimals without the leading zero; nothing for an exact zero."""
    if value == 0:
        return ""
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.2g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
