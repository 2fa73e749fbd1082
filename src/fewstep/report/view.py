"""What a report says, before anything draws it: names, numbers, the summary, the headline, the facts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import Group, Report, Row
from ..sampler import Sampler

GROUP_NAMES: Mapping[Group, str] = {
    "tuned": "tuned",
    "method": "training-free",
    "stock": "stock",
    "corrected": "stock, grid corrected",
    "adaptive": "adaptive",
    "other": "other",
}

MISSING = "\N{EN DASH}"
"""In place of a number that does not exist."""

METRIC_NAMES = {"rmse": "RMSE", "median": "median RMSE", "psnr": "PSNR (dB)", "frechet": "Fréchet distance²"}


def clean(text: object) -> str:
    """One printable line: names come from users and may hold line breaks, tabs or terminal escapes."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def short(text: object, most: int) -> str:
    """`clean`, cut off with an ellipsis."""
    line = clean(text)
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def number(value: object) -> str:
    """Three significant digits for a measured number, a dash for none."""
    if value is None:
        return MISSING
    return f"{value:#.3g}".removesuffix(".") if isinstance(value, float) else clean(value)


def interval(low: float | None, high: float | None) -> str:
    """A bootstrap interval, "" if it is unknown."""
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def metrics(report: Report) -> list[str]:
    """Every metric of the report, the one that plots show first."""
    found = dict.fromkeys(name for row in report.rows for name in row.metrics)
    return sorted(found, key=lambda name: name != "rmse")


def sort_value(row: Row, metric: str) -> float:
    """Smaller is better, whichever way the metric runs; what is missing or not finite comes last."""
    value = row.metrics[metric].value if metric in row.metrics else math.nan
    if not math.isfinite(value):
        return math.inf
    return -value if metric == "psnr" else value


def best_rows(report: Report, metric: str, *groups: Group) -> dict[int, Row]:
    """NFE -> the best finite row among the groups."""
    found: dict[int, Row] = {}
    for row in sorted(report.rows, key=lambda r: (r.nfe, sort_value(r, metric))):
        if row.group in groups and math.isfinite(sort_value(row, metric)):
            found.setdefault(row.nfe, row)
    return found


def row_of(report: Report, key: str, sampler: Sampler | None = None) -> Row | None:
    """The row that a key of `samplers` or `pictures` means.

    A key is a row's name, ``"name (8)"`` or ``"name, 8 calls"`` where budgets share a name, or anything for a sampler whose
    provenance names its row.
    """
    budget = [row for row in report.rows if sampler is None or row.nfe == sampler.nfe]
    made = "" if sampler is None else sampler.provenance.method
    for found in (
        [row for row in budget if key in (f"{row.name} ({row.nfe})", f"{row.name}, {row.nfe} calls")],
        [row for row in budget if row.name == key],
        [row for row in budget if row.name == made],
    ):
        if found:
            return found[0] if len(found) == 1 else None
    return None


@dataclass(frozen=True)
class Label:
    """How pictures name a sampler: its name, its budget, its error, its group."""

    name: str
    nfe: int | None
    error: str
    group: Group

    @property
    def detail(self) -> str:
        """The budget and the error in words."""
        return ", ".join(part for part in ("" if self.nfe is None else f"NFE {self.nfe}", self.error) if part)


def label(report: Report, key: str, sampler: Sampler | None) -> Label:
    """The label of a key; a key without a row keeps its own text."""
    row = row_of(report, key, sampler)
    if row is None:
        return Label(clean(key), None if sampler is None else sampler.nfe, "", "other")
    metric = metrics(report)[:1]
    error = [f"{METRIC_NAMES.get(m, m)} {number(row.metrics[m].value)}" for m in metric if m in row.metrics]
    return Label(clean(row.name), row.nfe, "".join(error), row.group)


def summary(report: Report) -> list[dict[str, Any]]:
    """The headline's lines, one per NFE: ``facts["summary"]``, or the same from the rows; ratio is always tuned / stock."""
    lines = [dict(line) for line in report.facts.get("summary") or _summary(report)]
    for line in lines:
        tuned, stock = line.get("tuned_rmse"), line.get("best_stock_rmse")
        ratio = tuned / stock if tuned is not None and stock else math.nan
        line["ratio"] = ratio if math.isfinite(ratio) else None
    return lines


def _summary(report: Report) -> list[dict[str, Any]]:
    stock = best_rows(report, "rmse", "stock", "corrected")
    others = best_rows(report, "rmse", "method", "stock", "corrected")
    lines = []
    for nfe, row in best_rows(report, "rmse", "tuned").items():
        error, base, second = row.metrics["rmse"], stock.get(nfe), others.get(nfe)
        lines.append(
            {"nfe": nfe, "tuned": row.name, "tuned_rmse": error.value, "tuned_low": error.low, "tuned_high": error.high}
            | {"best_stock": base and base.name, "best_stock_rmse": base and base.metrics["rmse"].value}
            | {"runner_up": second and second.name, "runner_up_rmse": second and second.metrics["rmse"].value}
        )
    return lines


def headline(report: Report) -> str:
    """One sentence with the measured ratios; a budget that was not won is said plainly."""
    ratios = {line["nfe"]: line["ratio"] for line in summary(report) if line["ratio"] is not None}
    if not ratios:
        return f"{len(report.rows)} measured samplers with {_listed(sorted({row.nfe for row in report.rows}))} network calls."
    low, high = f"{min(ratios.values()):.2f}", f"{max(ratios.values()):.2f}"
    span = low if low == high else f"{low} to {high}"
    whose = "the tuned sampler leaves" if len(ratios) == 1 else "the tuned samplers leave"
    text = f"With {_listed(list(ratios))} network calls, {whose} {span} times the error of the best stock scheduler"
    lost = [nfe for nfe, ratio in ratios.items() if ratio >= 1]
    return text + (f"; with {_listed(lost)} it is no better." if lost else ".")


def _listed(values: Sequence[object]) -> str:
    """4, 6, 8 and 10; long lists as their range."""
    texts = [str(value) for value in values]
    if len(texts) > 6:
        return f"{texts[0]} to {texts[-1]}"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


@dataclass(frozen=True)
class Fact:
    """One fact: a line of text, or a small table."""

    name: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def facts(report: Report) -> list[Fact]:
    """Every fact except the summary, in the order given."""
    return [_fact(clean(key).replace("_", " "), value) for key, value in report.facts.items() if key != "summary"]


def _fact(name: str, value: Any) -> Fact:
    if isinstance(value, list | tuple) and value and all(isinstance(entry, Mapping) for entry in value):
        head = list(dict.fromkeys(key for entry in value for key in entry))
        rows = tuple(tuple(_text(entry.get(key, "")) for key in head) for entry in value)
        return Fact(name, head=tuple(clean(key).replace("_", " ") for key in head), rows=rows)
    return Fact(name, _text(value))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{clean(key)}: {_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list | tuple | set):
        return ", ".join(_text(entry) for entry in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else number(value)


def to_json(report: Report) -> str:
    """Valid JSON: numbers that are not finite become the strings "nan", "inf" and "-inf" (`Report.from_dict` reads them)."""
    return json.dumps(_plain(report.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, str | bool | int):
        return value
    # A number of numpy's or torch's own types; everything else speaks for itself.
    return _plain(value.item()) if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else str(value)


def costs(report: Report) -> str:
    """What tuning took: network passes, and their share of the model's training where that is known; empty if nothing is."""
    facts = report.facts
    tuning, measuring, share = facts.get("tuning passes"), facts.get("measuring passes"), facts.get("share of training")
    if not isinstance(tuning, int) or not isinstance(measuring, int):
        return ""
    of = f" ({clean(share)} of those that trained the model)" if isinstance(share, str) else ""
    return f"Tuning took {tuning:,} network passes{of}, measuring {measuring:,} more."
