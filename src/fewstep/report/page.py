"""The report as one HTML page that needs nothing else, and as Markdown."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..evaluation import Group, Report, Row, markdown_cell
from .coefficients import Table, knots_figure, mapped, weights_figure
from .frontier import frontier_figure
from .pictures import Strip, embedded, kind, tiled
from .samples import samples_figure
from .style import COLOURS, INK, MUTED, PAPER, RULE, svg
from .view import (
    GROUP_NAMES,
    METRIC_NAMES,
    MISSING,
    clean,
    costs,
    facts,
    headline,
    interval,
    metrics,
    number,
    sort_value,
    summary,
)

DARK = {
    "ink": "#e6eaf0",
    "muted": "#9aa5b1",
    "rule": "#303843",
    "paper": "#0f1318",
    "tuned": "#6cb2ff",
    "method": "#45c99e",
    "stock": "#ff8f5c",
    "corrected": "#e0aa3e",
    "adaptive": "#cf97e0",
    "other": "#9aa5b1",
}

SHOWN = 6
"""Rows of each NFE that the full table shows at first; the rest unfolds."""

MOST_ROWS = 1000
MOST_DRAWN = 12
"""Strips of a drawing inside the page; images are lighter and all fit."""


def html(report: Report, tables: Sequence[Table], strips: Sequence[Strip]) -> str:
    """The page; everything that comes from users is escaped. Call it under `style`."""
    source = files(__name__.rpartition(".")[0]).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    title = clean(report.title) or "few-step samplers"
    light = {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER, **COLOURS}
    content = {
        "title": title,
        "colours": [(name, colour, DARK[name]) for name, colour in light.items()],
        "headline": headline(report),
        "summary": [_line(line) for line in summary(report)],
        "small_print": _small_print(report),
        "facts": facts(report),
        "folder": _folder(report),
        "snippets": _snippets(report),
        **_frontier(report, title),
        **_samples(strips),
        **_coefficients(tables),
        **_rows(report),
    }
    return environment.from_string(source).render(content)


def _line(line: dict[str, Any]) -> dict[str, str]:
    """A summary line as text."""
    names = ("nfe", "tuned", "tuned_rmse", "best_stock", "best_stock_rmse", "runner_up", "runner_up_rmse")
    texts = {name: number(line.get(name)) for name in names}
    ratio = line["ratio"]
    return texts | {
        "interval": interval(line.get("tuned_low"), line.get("tuned_high")),
        "ratio": MISSING if ratio is None else f"{ratio:.2f}",
    }


def _small_print(report: Report) -> str:
    parts = ["RMSE per element to the converged solution, with 95 % bootstrap intervals over noises"]
    if "noises per set" in report.facts:
        parts.append(f"{number(report.facts['noises per set'])} noises that no stage of tuning saw")
    elif "noises" in report.facts:
        parts.append(f"{number(report.facts['noises'])} noises")
    if isinstance(report.facts.get("reference error"), float):
        parts.append(f"the reference's own error is {report.facts['reference error']:.2g}")
    return " ".join(["; ".join(parts) + ".", *([spent] if (spent := costs(report)) else [])])


def _frontier(report: Report, title: str) -> dict[str, Any]:
    words = f"{title}: error against number of network calls. {headline(report)}"
    figures = {name: frontier_figure(report, wide=name == "wide") for name in ("wide", "narrow")}
    drawn = {name: Markup(svg(figure, f"frontier-{name}", words)) for name, figure in figures.items()}
    note = "Bars are 95 % bootstrap intervals over noises. "
    if any(row.group == "adaptive" for row in report.rows):
        note += "An adaptive solver takes the calls that it needs, so it stands beside the axis, at the height of its error."
    return {"frontier": drawn, "frontier_note": note}


def _samples(strips: Sequence[Strip]) -> dict[str, Any]:
    content: dict[str, Any] = {"strips": [], "samples_svg": "", "exact": False, "strips_note": ""}
    if not strips:
        return content
    if kind(strips[0].samples.shape[1:]) != "image":
        return content | {"samples_svg": Markup(svg(samples_figure(strips[:MOST_DRAWN]), "samples", "samples of each sampler"))}
    ready = tiled(strips)
    for strip, address in zip(strips, embedded(ready), strict=True):
        name, detail = strip.label.name, strip.label.detail
        content["strips"].append(
            {"group": strip.label.group, "first": detail or name, "second": name if detail else "", "image": address}
        )
    note = "Every column starts from the same noise."
    if ready.errors:
        count = len(ready.errors[0])
        note += f" The last {count} tiles are the errors of the first {count} samples, magnified {ready.gain:g} times"
        note += " (even grey: none)."
    return content | {"strips_note": note, "exact": ready.rows[0].shape[1] <= 64}


def _coefficients(tables: Sequence[Table]) -> dict[str, Any]:
    if not tables:
        return {"knots": "", "maps": []}
    maps = [
        Markup(svg(weights_figure(table), f"map{i}", f"coefficients of {table.label.name}, NFE {table.sampler.nfe}"))
        for i, table in enumerate(mapped(tables))
    ]
    return {"knots": Markup(svg(knots_figure(tables), "knots", "times at which each sampler calls the network")), "maps": maps}


def _rows(report: Report) -> dict[str, Any]:
    """The full table: ordered by NFE, then by the first metric."""
    names = metrics(report)
    first = next(iter(names), "rmse")
    ordered = sorted(report.rows, key=lambda row: (row.nfe, sort_value(row, first)))
    budget = len(ordered) if len(ordered) <= MOST_ROWS else max(SHOWN, MOST_ROWS // len({row.nfe for row in ordered}))
    passes, several = any(row.passes != row.nfe for row in ordered), any(row.by_condition for row in ordered)
    rank: dict[int, int] = {}
    led: set[tuple[int, Group]] = set()
    rows: list[dict[str, Any]] = []
    for row in ordered:
        rank[row.nfe] = place = rank.get(row.nfe, 0) + 1
        rest = place > SHOWN and (row.nfe, row.group) in led
        led.add((row.nfe, row.group))
        classes = [row.group, *(["win"] if place == 1 and row.group != "adaptive" else []), *(["rest"] if rest else [])]
        if place <= budget:
            rows.append(_row(row, names, several) | {"classes": " ".join(classes), "rest": rest})
    counts = {group: sum(row.group == group for row in ordered) for group in GROUP_NAMES}
    head = ["NFE", *(["passes"] if passes else []), "sampler", "group", *(METRIC_NAMES.get(n, clean(n)) for n in names)]
    return {
        "rows": rows,
        "rest": any(row["rest"] for row in rows),
        "left_out": len(ordered) - len(rows),
        "passes": passes,
        "head": [*head, *(["worst condition"] if several else [])],
        "groups": [{"id": g, "name": name, "count": counts[g]} for g, name in GROUP_NAMES.items() if counts[g]],
    }


def _row(row: Row, names: Sequence[str], several: bool) -> dict[str, Any]:
    cells = []
    for name in names:
        estimate = row.metrics.get(name)
        text = interval(estimate.low, estimate.high) if estimate else ""
        cells.append({"value": number(estimate.value if estimate else None), "interval": text})
    if several:
        cells.append({"value": number(row.worst), "interval": ""})
    return {"nfe": row.nfe, "passes": row.passes, "name": clean(row.name), "group": GROUP_NAMES[row.group], "cells": cells}


def _folder(report: Report) -> str:
    return f"nfe-{summary(report)[-1]['nfe']}" if summary(report) else ""


def _snippets(report: Report) -> list[dict[str, str]]:
    """How to run the tuned sampler of the largest budget."""
    folder = _folder(report)
    if not folder:
        return []
    nfe = folder.removeprefix("nfe-")
    start = report.facts.get("starts at")
    drawn = "torch.randn(16, *shape))   #" if start is None else f"x0)   # x0: samples of {start};"
    python = f"""import torch
from fewstep import Sampler, adapt

field = adapt(network).given()                  # with the arguments of the tuning
fast = Sampler.load("{folder}")
sample = fast(field, {drawn} {nfe} network calls"""
    if start is not None:
        return [{"title": "In Python:", "code": python}]
    pipeline = f"""from fewstep import TableScheduler

pipe.scheduler = TableScheduler.from_pretrained("{folder}")
images = pipe(num_inference_steps={nfe}).images"""
    return [{"title": "In Python:", "code": python}, {"title": "In a diffusers pipeline:", "code": pipeline}]


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """The same content as Markdown; `pictures` are the names of the PNG files beside it."""
    parts = [f"# {markdown_cell(report.title) or 'few-step samplers'}", markdown_cell(headline(report))]
    lines = [_line(line) for line in summary(report)]
    if lines:
        head = ("NFE", "tuned", "RMSE", "best stock scheduler", "RMSE", "tuned / stock", "runner-up", "RMSE")
        names = ("nfe", "tuned", "error", "best_stock", "best_stock_rmse", "ratio", "runner_up", "runner_up_rmse")
        bodies = [
            line | {"error": line["tuned_rmse"] + (f" ({line['interval']})" if line["interval"] else "")} for line in lines
        ]
        parts += [_table(head, [[line[name] for name in names] for line in bodies]), _small_print(report)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    if lines:
        parts += [
            "## How to use it",
            f"The folder `{_folder(report)}`, written by `TuneResult.save`, holds the sampler as numbers, not code.",
        ]
        parts += [f"{snippet['title']}\n\n```python\n{snippet['code']}\n```" for snippet in _snippets(report)]
    plain = [fact for fact in facts(report) if not fact.rows]
    if facts(report):
        parts += ["## Facts", _table(("fact", "value"), [[fact.name, fact.text] for fact in plain])]
        parts += [f"### {markdown_cell(fact.name)}\n\n{_table(fact.head, fact.rows)}" for fact in facts(report) if fact.rows]
    return "\n\n".join([*parts, "## All measurements", report.to_markdown()]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(markdown_cell(cell) for cell in line) + " |" for line in lines)
