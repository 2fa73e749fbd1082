"""The last word of `tune`: chosen tables and baselines on noise that no stage has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import __version__
from ._types import Field
from .candidates import Candidate
from .composite import CountedField, JointField, path_of
from .evaluation import Group, Report, Row, measure
from .field import Model, ModelField
from .problem import Problem
from .progress import Cost
from .sampler import Provenance, Sampler
from .trajectory import dopri5

BASELINES: tuple[Group, ...] = ("stock", "corrected")
TOLERANCES = (1e-1, 1e-2, 1e-3)
"""Of the adaptive baseline."""


def rows_of(
    problem: Problem, chosen: Mapping[int, Mapping[str, Candidate]], pools: Mapping[int, Sequence[Candidate]]
) -> list[Row]:
    """Final rows: the tuned table of each budget, every stock scheduler, and the best training-free methods."""
    inner, parent = _inside(problem.field)

    def row(name: str, sampler: Sampler, group: Group) -> Row:
        counted = CountedField(inner, check=False, parent=parent)
        sample = sampler(counted, problem.noise)
        return measure(name, sample, problem.solution, counted, group=group)

    rows = []
    for n, ranked in chosen.items():
        best = next(iter(ranked.values()))
        rows.append(row(best.name, best.sampler, "tuned"))
        rows += [row(c.name, c.sampler, c.group) for c in pools[n] if c.group in BASELINES]
        methods = [c for c in ranked.values() if c.group == "method"][:3]
        rows += [row(c.name, c.sampler, c.group) for c in methods]
    return rows


def _inside(field: Field) -> tuple[Field, CountedField | None]:
    """The field without its counter, and the counter."""
    return (field.field, field) if isinstance(field, CountedField) else (field, None)


def adaptive_rows(problem: Problem) -> list[Row]:
    """The adaptive dopri5 of torchdiffeq at a few tolerances, with the NFE that it took."""
    inner, parent = _inside(problem.field)
    rows = []
    for tol in TOLERANCES:
        counted = CountedField(inner, check=False, parent=parent)
        solved = dopri5(counted, problem.noise, tol=tol)
        rows.append(measure(f"dopri5, tol {tol:g}", solved.sample, problem.solution, counted, group="adaptive"))
    return rows


def summary(
    rows: Sequence[Row], chosen: Mapping[int, Mapping[str, Candidate]], seconds: Mapping[int, Row]
) -> list[dict[str, Any]]:
    """The headline: tuned against the best stock scheduler of the same NFE, as shipped or corrected, and the runner-up."""
    lines = []
    for n, ranked in chosen.items():
        tuned = next(r for r in rows if r.nfe == n and r.group == "tuned")
        report = Report("", tuple(rows))
        stock = report.best(n, *BASELINES)
        second = seconds.get(n)
        error = tuned.metrics["rmse"]
        lines.append(
            {
                "nfe": n,
                "tuned": tuned.name,
                "tuned_rmse": error.value,
                "tuned_low": error.low,
                "tuned_high": error.high,
                "tuned_worst": tuned.worst,
                "best_stock": stock.name if stock else None,
                "best_stock_rmse": stock.metrics["rmse"].value if stock else None,
                "ratio": error.value / stock.metrics["rmse"].value if stock and stock.metrics["rmse"].value else None,
                "runner_up": second.name if second else None,
                "runner_up_rmse": second.metrics["rmse"].value if second else None,
                "finalists": len(ranked),
            }
        )
    return lines


def runner_up(ranked: Mapping[str, Candidate]) -> Candidate | None:
    """The best candidate that is not the winner's own grid with another ridge."""
    winner, *others = ranked.values()
    for other in others:
        if other.sampler.times.shape != winner.sampler.times.shape or not torch.allclose(
            other.sampler.times, winner.sampler.times
        ):
            return other
    return None


def finished(sampler: Sampler, field: Field, row: Row, facts: Mapping[str, Any], seed: int) -> Sampler:
    """The winner over the network's own prediction and clock, with its provenance: what is saved."""
    model, conditions = model_of(field)
    path = path_of(field)
    error = row.metrics["rmse"]
    measured = {
        "rmse": error.value,
        "rmse_low": error.low,
        "rmse_high": error.high,
        "reference_error": facts["reference error"],
    }
    if row.worst is not None:
        measured["rmse_worst_condition"] = row.worst
    provenance = Provenance(
        method=sampler.provenance.method,
        model=model.name if model else getattr(field, "__name__", type(field).__name__),
        fingerprint=model.fingerprint() if model else "",
        path=repr(path) if path else "",
        shape=model.shape if model else None,
        raw=model.raw if model else "plain",
        sigma_data=model.sigma_data if model else 0.5,
        conditions=conditions,
        seed=seed,
        versions={"fewstep": __version__, "torch": torch.__version__},
        measured=measured,
    )
    if model is None:
        return sampler.with_provenance(provenance)
    # The field asks its network inside this span; at these times the two predictions determine each other.
    times = sampler.times.clamp(*model.path.span(model.predicts))
    native = replace(sampler, times=times).rebase(model.path, model.predicts)
    clock = torch.stack([torch.as_tensor(model.clock(t), dtype=torch.float64) for t in times])
    return replace(native, clock=None if torch.equal(clock, times) else clock, provenance=provenance)


def model_of(field: Field) -> tuple[Model | None, tuple[str, ...]]:
    """The model behind a field and its conditions in words."""
    if isinstance(field, CountedField):
        return model_of(field.field)
    if isinstance(field, JointField):
        return field.model, tuple(f.label for f in field.fields)
    if isinstance(field, ModelField):
        return field.model, (field.label,)
    return None, ()


def cost_facts(costs: Sequence[Cost]) -> dict[str, Any]:
    """Field calls, network passes summed over samples and seconds of every stage, and what tuning and measuring took of it."""
    stages = [
        {"stage": c.stage, "field calls": c.calls, "network passes": c.samples, "seconds": round(c.seconds, 2)} for c in costs
    ]
    return {
        "cost": stages,
        "network passes": sum(c.samples for c in costs),
        "tuning passes": sum(c.samples for c in costs if not c.measures),
        "measuring passes": sum(c.samples for c in costs if c.measures),
        "seconds": round(sum(c.seconds for c in costs), 1),
    }
