"""The picture that decides: error against the number of network calls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..evaluation import Estimate, Report, Row
from .style import COLOURS, MUTED, bare
from .view import METRIC_NAMES, best_rows, metrics, number, short, sort_value

Rect = tuple[float, float, float, float]

GAP = 0.105
"""Least distance between two labels, as a share of the axes' height."""

MOST_LINES = 6
"""Samplers of no group get lines of their own while there are so few lines in all."""


@dataclass(frozen=True)
class Series:
    """One line: the rows it passes through by NFE."""

    title: str
    colour: str
    mark: str
    dashes: str
    rows: dict[int, Row]

    def points(self, metric: str) -> tuple[list[int], list[Estimate]]:
        """The budgets and what was measured there."""
        return list(self.rows), [row.metrics[metric] for row in self.rows.values()]


def frontier_figure(report: Report, *, wide: bool = True) -> Figure:
    """Error against NFE: a line for each family of samplers, the adaptive solver beside them, dots for all others.

    Args:
        report: any report; without a finite measurement the figure says so.
        wide: labels beside the lines; otherwise (for phones) below them.
    """
    metric = next(iter(metrics(report)), "rmse")
    lines = series(report, metric)
    solved = [row for row in report.rows if row.group == "adaptive" and _drawable(row, metric)]
    figure = Figure(figsize=(8.0, 4.5) if wide else (4.1, 5.4))
    if not lines and not solved:
        figure.text(0.5, 0.5, "no finite measurement to draw", ha="center", color=MUTED)
        return figure
    rect, strip = _layout(wide, len(lines), bool(solved))
    axes = figure.add_axes(rect)
    axes.set_ylim(*_limits(lines, solved, metric))
    dots, hidden = _dots(axes, report, lines, metric)
    for line in lines:
        _draw(axes, line, metric)
    _scales(axes, metric, sorted({nfe for line in lines for nfe in line.rows}))
    _reference(axes, report, metric)
    axes.set_xlabel("network calls (NFE)" + ("; faint dots: other samplers" if dots and wide else ""), loc="left", size=8)
    figure.text(rect[0] - 0.05 if wide else 0.02, 0.93, _title(metric), weight="bold", size=11 if wide else 9.5)
    if hidden:
        note = f"{hidden} further samplers lie beyond the axis"
        axes.text(1.0, 1.005, note, transform=axes.transAxes, ha="right", size=7, color=MUTED)
    if solved:
        _adaptive(figure.add_axes(strip), solved, metric, axes)
    (_label_beside if wide else _label_below)(figure, axes, lines, metric)
    return figure


def _layout(wide: bool, lines: int, solved: bool) -> tuple[Rect, Rect]:
    """Where the axes and the strip of the adaptive solver stand."""
    if wide:
        bottom, height = 0.115, 0.765
        return (0.075, bottom, 0.525 if solved else 0.66, height), (0.868, bottom, 0.122, height)
    bottom = 0.125 + 0.075 * lines
    height = 0.9 - bottom
    return (0.135, bottom, 0.6 if solved else 0.84, height), (0.77, bottom, 0.21, height)


def series(report: Report, metric: str) -> list[Series]:
    """The lines: the best of each group; without groups, the best few samplers by name."""
    tuned, method, stock = (best_rows(report, metric, group) for group in ("tuned", "method", "stock"))
    mended = best_rows(report, metric, "stock", "corrected")
    if all(mended[nfe] is stock.get(nfe) for nfe in mended):
        mended = {}
    lines = [
        Series("tuned by fewstep", COLOURS["tuned"], "o", "-", tuned),
        Series("best training-free method", COLOURS["method"], "s", "-", method),
        Series("best stock scheduler" + (", as shipped" if mended else ""), COLOURS["stock"], "^", "-", stock),
        Series("best stock, grids corrected", COLOURS["corrected"], "v", "--", mended),
    ]
    found = [replace(line, rows={n: row for n, row in line.rows.items() if _drawable(row, metric)}) for line in lines]
    found = [line for line in found if line.rows]
    named = _by_name(report, metric)
    if not found:  # the palette is free
        return [replace(line, colour=colour) for line, colour in zip(named, COLOURS.values(), strict=False)]
    return found + (named if len(named) <= MOST_LINES - len(found) else [])


def _by_name(report: Report, metric: str) -> list[Series]:
    """One line for each sampler of no group, best first."""
    rows = sorted((r for r in report.rows if r.group == "other" and _drawable(r, metric)), key=lambda r: sort_value(r, metric))
    names = dict.fromkeys(row.name for row in rows)
    rows.sort(key=lambda r: r.nfe)
    return [
        Series(short(name, 30), COLOURS["other"], "Ds^vP<"[i % 6], "-", {row.nfe: row for row in rows if row.name == name})
        for i, name in enumerate(names)
    ]


def _drawable(row: Row, metric: str) -> bool:
    """Whether the value has a place on the axis (logarithmic, except for PSNR)."""
    value = sort_value(row, metric)
    return math.isfinite(value) and (metric == "psnr" or value > 0)


def _title(metric: str) -> str:
    return {
        "rmse": "RMSE to the converged solution",
        "psnr": "PSNR to the converged solution, dB (higher is better)",
    }.get(metric, METRIC_NAMES.get(metric, metric))


def _limits(lines: Sequence[Series], solved: Sequence[Row], metric: str) -> tuple[float, float]:
    """The lines and their intervals; of the adaptive solver only what does not squeeze them."""
    estimates = [e for line in lines for e in line.points(metric)[1]]
    values = [e.value for e in estimates] or [row.metrics[metric].value for row in solved]
    ends = [v for e in estimates for v in (e.low, e.high) if math.isfinite(v)]
    other = [row.metrics[metric].value for row in solved]
    if metric == "psnr":
        low, high = min([*values, *ends]), max([*values, *ends, *other])
        pad = 0.06 * (high - low or 1.0)
        return low - pad, high + pad
    ends = [v for v in ends if min(values) / 10 < v < max(values) * 10]
    near = [v for v in other if min(values) / 30 < v < max(values) * 6]
    low, high = min([*values, *ends, *near]), max([*values, *ends, *near])
    return low / 1.35, high * 1.35


def _dots(axes: Axes, report: Report, lines: Sequence[Series], metric: str) -> tuple[int, int]:
    """Faint dots for the samplers on no line; returns how many there are, and how many more lie beyond the axis."""
    drawn = {id(row) for line in lines for row in line.rows.values()}
    low, high = axes.get_ylim()
    shown = {nfe for line in lines for nfe in line.rows}
    drawn_dots = hidden = 0
    for group, colour in COLOURS.items():
        rows = [
            r
            for r in report.rows
            if r.group == group != "adaptive" and id(r) not in drawn and _drawable(r, metric) and r.nfe in shown
        ]
        inside = [row for row in rows if low <= row.metrics[metric].value <= high]
        drawn_dots += len(inside)
        hidden += len(rows) - len(inside)
        x, y = [row.nfe for row in inside], [row.metrics[metric].value for row in inside]
        # As pixels inside the SVG: hundreds of dots would outweigh the page.
        axes.scatter(x, y, s=9, color=colour, alpha=0.22, linewidths=0, rasterized=True, zorder=1)
    return drawn_dots, hidden


def _draw(axes: Axes, line: Series, metric: str) -> None:
    nfe, estimates = line.points(metric)
    values = [e.value for e in estimates]
    below = [max(e.value - e.low, 0.0) if math.isfinite(e.low) else 0.0 for e in estimates]
    above = [max(e.high - e.value, 0.0) if math.isfinite(e.high) else 0.0 for e in estimates]
    if metric != "psnr":  # a bar that reaches zero has no end on a logarithmic axis
        below = [min(b, 0.99 * v) for b, v in zip(below, values, strict=True)]
    strong = line.mark == "o"
    axes.errorbar(
        nfe, values, yerr=(below, above), color=line.colour, marker=line.mark, linestyle=line.dashes,
        linewidth=2.2 if strong else 1.4, markersize=6 if strong else 5, capsize=3, capthick=1, elinewidth=1,
        markerfacecolor="none" if line.dashes == "--" else line.colour, zorder=4 if strong else 3,
    )  # fmt: skip


def _scales(axes: Axes, metric: str, budgets: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    step = math.ceil(len(budgets) / 10)
    ticks = list(budgets)[::-1][::step][::-1] if budgets else []
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    if budgets:
        spare = max((budgets[-1] / budgets[0]) ** 0.04, 1.03)
        axes.set_xlim(budgets[0] / spare, budgets[-1] * spare)
    if metric != "psnr":
        limits = axes.get_ylim()
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if limits[1] / limits[0] < 3000 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _reference(axes: Axes, report: Report, metric: str) -> None:
    error = report.facts.get("reference error")
    if metric == "rmse" and isinstance(error, float) and axes.get_ylim()[0] < error < axes.get_ylim()[1]:
        axes.axhline(error, color=MUTED, linestyle=":", linewidth=1)
        axes.annotate(
            "error of the reference itself", (0.01, error), xycoords=("axes fraction", "data"), color=MUTED, size=7, va="bottom"
        )


def _adaptive(axes: Axes, rows: Sequence[Row], metric: str, like: Axes) -> None:
    """A strip of its own: an adaptive solver takes the calls that it needs, often many times the budgets."""
    axes.set_yscale(like.get_yscale())
    axes.set_ylim(*like.get_ylim())
    axes.set_yticks(like.get_yticks(), ["" for _ in like.get_yticks()])
    axes.set_ylim(*like.get_ylim())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    low, high = like.get_ylim()
    inside = sorted((row.metrics[metric].value, row.nfe) for row in rows if low <= row.metrics[metric].value <= high)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = _place([float(to_axes.transform((0, value))[1]) for value, _ in inside], GAP / 2.2)
    for (value, nfe), height in zip(inside, heights, strict=True):
        axes.plot(0.12, value, "D", color=COLOURS["adaptive"], markersize=5)
        axes.text(0.24, height, f"{nfe} calls", transform=axes.transAxes, va="center", size=8, color=COLOURS["adaptive"])
    axes.set_xlabel("adaptive solver\n(dopri5)", color=COLOURS["adaptive"], loc="left", size=8)


def _place(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights near the wanted ones (ascending), `gap` apart, inside 0..1 as far as they fit."""
    placed: list[float] = []
    for height in wanted:
        placed.append(max(height, placed[-1] + gap if placed else 0.0))
    limit = 1.0
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _words(line: Series, metric: str, most: int) -> str:
    nfe, row = list(line.rows.items())[-1]
    value = f"{number(row.metrics[metric].value)} with {nfe}"
    return value if line.title == row.name else f"{value}: {short(row.name, most)}"


def _label_beside(figure: Figure, axes: Axes, lines: Sequence[Series], metric: str) -> None:
    """Each label at the height of its line's end, moved apart where they would meet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {id(s): to_axes.transform((n[-1], e[-1].value)) for s in lines for n, e in [s.points(metric)]}
    ordered = sorted(lines, key=lambda s: ends[id(s)][1])
    heights = _place([float(ends[id(s)][1]) for s in ordered], GAP)
    for line, height in zip(ordered, heights, strict=True):
        x, y = ends[id(line)]
        axes.annotate(
            "", (x, y), (1.035, height), "axes fraction", "axes fraction", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        text = {"transform": axes.transAxes, "clip_on": False, "parse_math": False}
        axes.text(1.045, height + 0.005, line.title, color=line.colour, weight="bold", size=8.5, va="bottom", **text)
        axes.text(1.045, height - 0.005, _words(line, metric, 20), color=MUTED, size=7, va="top", **text)


def _label_below(figure: Figure, axes: Axes, lines: Sequence[Series], metric: str) -> None:
    legend = figure.add_axes((0.04, 0.01, 0.94, 0.075 * len(lines)))
    bare(legend)
    legend.set(xlim=(0, 1), ylim=(len(lines), 0))
    ordered = sorted(lines, key=lambda s: -s.points(metric)[1][-1].value)
    for i, line in enumerate(ordered):
        legend.plot(0.02, i + 0.5, line.mark, color=line.colour, markerfacecolor="none" if line.dashes == "--" else line.colour)
        legend.text(0.06, i + 0.48, line.title, color=line.colour, weight="bold", size=8, va="bottom", parse_math=False)
        legend.text(0.06, i + 0.52, _words(line, metric, 36), color=MUTED, size=7, va="top", parse_math=False)
