"""The summary on a terminal; plain lines where the output is a file or a pipe."""

from collections.abc import Sequence
from typing import Any

from ..evaluation import Report
from .view import GROUP_NAMES, METRIC_NAMES, MISSING, clean, costs, headline, interval, metrics, number, sort_value, summary

PLACES = 3
"""Rows of each NFE that are shown of a report without a summary."""


def to_console(report: Report) -> None:
    """Print the summary: a table on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    head, rows = _summary(report) if summary(report) else _ranking(report)
    if console.is_terminal:
        console.print(_table(head, rows))
    else:
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        for line in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(headline(report))
    error = report.facts.get("reference error")
    if isinstance(error, float):
        print(f"The reference's own error is {error:.2g}.")
    if spent := costs(report):
        print(spent)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold", no_wrap=name in ("NFE", "ratio"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names may look like rich's markup
    return table


def _summary(report: Report) -> tuple[list[str], list[list[str]]]:
    head = ["NFE", "tuned RMSE", "95 % interval", "best stock", "ratio", "tuned sampler", "stock scheduler", "runner-up"]
    rows = []
    for line in summary(report):
        ratio, spread = line["ratio"], interval(line.get("tuned_low"), line.get("tuned_high"))
        names = [number(line.get("tuned")), number(line.get("best_stock"))]
        second = f"{number(line.get('runner_up'))} {number(line.get('runner_up_rmse'))}"
        errors = [number(line.get("tuned_rmse")), spread, number(line.get("best_stock_rmse"))]
        rows.append([number(line.get("nfe")), *errors, MISSING if ratio is None else f"{ratio:.2f}", *names, second])
    return head, rows


def _ranking(report: Report) -> tuple[list[str], list[list[str]]]:
    """The best few of each NFE."""
    names = metrics(report)
    first = next(iter(names), "rmse")
    rows: list[list[str]] = []
    seen: dict[int, int] = {}
    for row in sorted(report.rows, key=lambda r: (r.nfe, sort_value(r, first))):
        seen[row.nfe] = seen.get(row.nfe, 0) + 1
        if seen[row.nfe] <= PLACES:
            values = [number(row.metrics[name].value if name in row.metrics else None) for name in names]
            rows.append([str(row.nfe), clean(row.name), GROUP_NAMES[row.group], *values])
    return ["NFE", "sampler", "group", *(METRIC_NAMES.get(name, name) for name in names)], rows
