"""Comparing samplers on the same noise: end-point error with bootstrap intervals, and distances to data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._types import Field, State
from ..composite import CountedField, JointField
from ..sampler import Sampler
from ..trajectory import Reference
from ..trajectory import reference as solve
from .distances import frechet_estimate
from .estimate import RESAMPLES, Estimate

Metric = Literal["rmse", "median", "psnr", "frechet"]
Group = Literal["tuned", "method", "stock", "corrected", "adaptive", "other"]


@dataclass(frozen=True)
class Row:
    """One sampler's results.

    Attributes:
        name: what made it.
        nfe: field calls per sample, counted.
        passes: network passes per sample (twice the NFE under guidance).
        group: where it belongs in tables and plots.
        metrics: estimate for each metric.
        by_condition: RMSE for each condition, where several were compared.
    """

    name: str
    nfe: int
    passes: int
    group: Group
    metrics: Mapping[str, Estimate]
    by_condition: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float | None:
        """The largest RMSE over conditions."""
        return max(self.by_condition.values(), default=None)


@dataclass(frozen=True)
class Report:
    """Rows of a comparison and the facts that a reader needs to trust it (reference error, noises, seeds, costs)."""

    title: str
    rows: tuple[Row, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def best(self, nfe: int, *groups: Group, metric: str = "rmse") -> Row | None:
        """The row with the best value at this NFE, among the given groups (all by default)."""
        sign = _sign(metric)
        rows = [r for r in self.rows if r.nfe == nfe and metric in r.metrics and (not groups or r.group in groups)]
        return min(rows, key=lambda r: sign * _ordered(r.metrics[metric].value, sign), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"title": self.title, "facts": dict(self.facts), "rows": [asdict(row) for row in self.rows]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict`; numbers may be texts such as "nan", as ``report.json`` has them."""
        rows = []
        for row in data["rows"]:
            metrics = {name: Estimate(**{k: float(v) for k, v in value.items()}) for name, value in row["metrics"].items()}
            by_condition = {name: float(value) for name, value in row.get("by_condition", {}).items()}
            rows.append(Row(**{**row, "metrics": metrics, "by_condition": by_condition}))
        return Report(data["title"], tuple(rows), data["facts"])

    def to_markdown(self) -> str:
        """A table, best first within each NFE; intervals are 95 %, over noises."""
        metrics = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        several = any(row.by_condition for row in self.rows)
        head = ["NFE", "sampler", "group", *map(markdown_cell, metrics), *(["worst condition (rmse)"] if several else [])]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        key = metrics[0] if metrics else ""
        sign = _sign(key)
        for row in sorted(
            self.rows, key=lambda r: (r.nfe, sign * _ordered(r.metrics[key].value, sign) if key in r.metrics else 0.0)
        ):
            cells = [str(row.nfe), markdown_cell(row.name), row.group, *(str(row.metrics.get(name, "")) for name in metrics)]
            if several:
                cells.append("" if row.worst is None else f"{row.worst:.4g}")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def markdown_cell(text: object) -> str:
    """A name as one line that is neither Markdown nor HTML."""
    return "".join("\\" + c if c in "\\|<[`*" else c for c in " ".join(str(text).split()))


def _sign(metric: str) -> float:
    """-1 where more is better."""
    return -1.0 if metric.startswith(("psnr", "precision", "recall")) else 1.0


def _ordered(value: float, sign: float) -> float:
    """NaN last, whichever way the metric runs."""
    return value if math.isfinite(value) else sign * math.inf


def compare(
    samplers: Sequence[Sampler] | Mapping[str, Sampler],
    field: Field,
    noise: State,
    *,
    reference: Reference | None = None,
    data: Tensor | None = None,
    metrics: Sequence[Metric] = ("rmse", "psnr"),
    groups: Mapping[str, Group] | None = None,
    seed: int = 0,
) -> Report:
    """Run samplers from the same noise and measure them against the converged solution.

    Args:
        samplers: to compare; names default to their provenance.
        field: the field, from `Model.given` where a sampler combines other outputs than velocities.
        noise: (batch, *shape) standard normal; use noise that no tuner has seen.
        reference: the converged solution from `noise`; solved here if not given.
        data: (m, *shape) real samples, needed for "frechet".
        metrics: "rmse" per element over all noises, "median" over noises of each one's RMSE (which a few trajectories near a
            fork of the flow do not move), "psnr" in dB for data in [-1, 1], "frechet": squared Frechet distance between the
            Gaussian fits of generated and real *states* (no feature network; needs more samples than dimensions).
        groups: where each name belongs.
        seed: of the bootstrap.

    Raises:
        ValueError: "frechet" without data or with too few samples; an unknown metric.
    """
    unknown = set(metrics) - set(get_args(Metric))
    if unknown:
        raise ValueError(f'metrics are "rmse", "median", "psnr" and "frechet", got {sorted(unknown)}')
    named = samplers if isinstance(samplers, Mapping) else by_name(samplers)
    solution = reference or solve(field, noise)
    rows = []
    for name, sampler in named.items():
        counted = CountedField(field, check=False)
        sample = sampler(counted, noise)
        rows.append(
            measure(
                name, sample, solution, counted, data=data, metrics=metrics, group=(groups or {}).get(name, "other"), seed=seed
            )
        )
    facts = {"noises": noise.shape[0], "reference error": solution.error, "reference nfe": solution.nfe, "bootstrap seed": seed}
    return Report("comparison", tuple(rows), facts)


def measure(
    name: str,
    sample: State,
    solution: Reference,
    field: CountedField,
    *,
    data: Tensor | None = None,
    metrics: Sequence[Metric] = ("rmse", "psnr"),
    group: Group = "other",
    seed: int = 0,
) -> Row:
    """The row of one sample whose calls `field` has counted."""
    squares = squared_errors(sample, solution.end)
    found: dict[str, Estimate] = {}
    for metric in metrics:
        if metric == "frechet":
            found[metric] = _frechet_estimate(sample, data)
        else:
            found[metric] = _from_squares(squares, metric, seed)
    parts = field.field.fields if isinstance(field.field, JointField) else ()
    chunks = squares.chunk(len(parts)) if parts else ()
    labels = _distinct([part.label for part in parts])
    by_condition = {label: float(chunk.mean().sqrt()) for label, chunk in zip(labels, chunks, strict=True)}
    return Row(name, field.calls, field.calls * field.passes, group, found, by_condition)


def squared_errors(sample: State, target: State) -> Tensor:
    """Mean square error of every sample, (batch,) float64."""
    return (sample - target).double().square().flatten(1).mean(1).cpu()


def _from_squares(squares: Tensor, metric: str, seed: int) -> Estimate:
    generator = torch.Generator().manual_seed(seed)
    drawn = squares[torch.randint(len(squares), (RESAMPLES, len(squares)), generator=generator)]
    if metric == "median":
        values = torch.cat([squares.quantile(0.5)[None], drawn.quantile(0.5, dim=1)]).sqrt()
    else:
        values = torch.cat([squares.mean()[None], drawn.mean(1)]).sqrt()
    if metric == "psnr":
        values = 20 * torch.log10(2.0 / values.clamp(min=1e-12))
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(values[0]), low, high)


def _frechet_estimate(sample: Tensor, data: Tensor | None) -> Estimate:
    if data is None:
        raise ValueError('metric "frechet" compares with real samples: pass data=')
    size, fewest = sample[0].numel(), min(len(sample), len(data))
    if data.shape[1:] != sample.shape[1:]:
        raise ValueError(f"data must have the samples' shape {tuple(sample.shape[1:])}, got {tuple(data.shape[1:])}")
    if fewest <= size:
        raise ValueError(f"a Frechet distance in {size} dimensions needs more than {size} samples on both sides, got {fewest}")
    return frechet_estimate(sample, data.to(sample.device))


def by_name(samplers: Sequence[Sampler]) -> dict[str, Sampler]:
    """Samplers under the names of their methods, repetitions numbered."""
    return dict(zip(_distinct([sampler.provenance.method or "sampler" for sampler in samplers]), samplers, strict=True))


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the repetitions: two prompts of one shape have the same label, and are two conditions."""
    found: list[str] = []
    for base in names:
        name, copy = base, 2
        while name in found:
            name, copy = f"{base} ({copy})", copy + 1
        found.append(name)
    return found
