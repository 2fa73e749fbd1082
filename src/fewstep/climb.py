"""`tune`: from training-free search over BOSS to the closed-form fit, judged on noise that nothing was fitted on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import __version__
from ._types import BudgetError, Field, FieldError
from .candidates import Candidate, candidates, grids, home
from .coordinates import Coordinates
from .evaluation import Report
from .field import CountedField, JointField, Model, ModelField, path_of
from .grid import TimeGrid
from .journal import Journal, identity
from .path import AffinePath
from .problem import Problem, Score
from .progress import Stage, Stages
from .sampler import Sampler
from .trajectory import reference
from .tuners.boss import Boss
from .tuners.grid_search import plain_table, search_grid
from .tuners.least_squares import fit
from .verdict import BASELINES, adaptive_rows, cost_facts, finished, model_of, rows_of, runner_up, summary

Effort = Literal["search", "fit"]

SCREEN = 16
"""Noises per condition on which all candidates are screened."""

FINALISTS = 12
"""Candidates that are then scored on the whole selection set."""

BOSS_NOISES = 128
RIDGES = (1e-8, 1e-5, 1e-3)
WARPS, KNOTS = 60, 90
"""Evaluations of the two grid searches, per budget."""


@dataclass(frozen=True, eq=False)
class TuneResult:
    """Tuned samplers by budget, with the measurements that chose them.

    Attributes:
        samplers: one per NFE.
        report: every row of the final measurement, and the facts behind it.
        path: of the model, where it is known.
        rivals: the best stock scheduler of each budget, as a table over velocities, where there is one.
    """

    samplers: Mapping[int, Sampler]
    report: Report
    path: AffinePath | None
    rivals: Mapping[int, Candidate]

    def __getitem__(self, nfe: int) -> Sampler:
        if nfe not in self.samplers:
            raise BudgetError(f"tuned for {sorted(self.samplers)} calls, asked for {nfe}; run tune(..., nfe={nfe})")
        return self.samplers[nfe]

    def __iter__(self) -> Iterator[int]:
        return iter(self.samplers)

    def by_name(self, *, rivals: bool = False) -> dict[str, Sampler]:
        """Samplers by display name, for reports; with `rivals`, the best stock scheduler of the same budget after each."""
        named = {}
        for n, sampler in self.samplers.items():
            named[f"fewstep, {n} calls"] = sampler
            if rivals and n in self.rivals:
                named[f"{self.rivals[n].name}, {n} calls"] = self.rivals[n].sampler
        return named

    def with_training_cost(self, passes: int | None) -> "TuneResult":
        """The same result, its report telling the cost of tuning as a share of the model's training, if that is known."""
        if passes is None:
            return self
        share = self.report.facts["network passes"] / passes
        facts = {**self.report.facts, "network passes of the model's training": passes, "share of training": f"{share:.3%}"}
        return replace(self, report=replace(self.report, facts=facts))

    def save(self, directory: str | Path) -> list[Path]:
        """Write every sampler into ``directory/nfe-N``; returns those folders."""
        return [sampler.save(Path(directory) / f"nfe-{nfe}", path=self.path) for nfe, sampler in self.samplers.items()]


def tune(
    model_or_field: Model | Field,
    *,
    nfe: int | Sequence[int] = 8,
    effort: Effort = "fit",
    noise: Tensor | Sequence[int] | int | None = None,
    conditions: Sequence[Mapping[str, Any]] | None = None,
    metric: Score = "rmse",
    seed: int = 0,
    resume: str | Path | None = None,
    progress: bool = False,
) -> TuneResult:
    """Find the best sampler of each budget for one model.

    Three sets of noise: candidates are fitted on the first, chosen on the second, and reported on the third.

    Args:
        model_or_field: a `Model` from `adapt`, or any ``field(x, t) -> velocity``.
        nfe: budget of field calls, or several.
        effort: "search" compares training-free methods, grids and stock schedulers; "fit" adds BOSS's grid to them and the
            closed-form fit with its grid search (no back-propagation).
        noise: fitting noise (batch, *shape), its shape, or the number of noises per condition (default 256) if the
            model's shape is known. Selection and test noise of the same size are drawn.
        conditions: arguments of `Model.given`, one mapping per condition; one table is tuned for all of them. Default: no
            condition, or for a class-conditional model all classes in turn.
        metric: "rmse" over all samples, or "worst": of the worst condition.
        seed: of every noise set.
        resume: folder that keeps finished pieces; the same call then goes on where it stopped.
        progress: show stages with their cost (on stderr).

    Returns:
        `TuneResult`: ``result[8]`` is the sampler, ``result.report`` the measurement with bootstrap intervals.

    Raises:
        BudgetError: an NFE below 1.
        FieldError: NaN or a wrong shape from the network, a reference that does not converge, or unknown noise shape.

    Example:
        >>> result = tune(lambda x, t: x.cos() - x, nfe=2, noise=(32, 2), effort="search")
        >>> result[2].nfe
        2
    """
    budgets = sorted({nfe} if isinstance(nfe, int) else set(nfe))
    if not budgets or budgets[0] < 1:
        raise BudgetError(f"a budget is at least 1 call, got {budgets or 'none'}")
    if effort not in ("search", "fit"):
        raise ValueError(f'effort is "search" or "fit", got "{effort}"')
    if metric not in ("rmse", "worst"):
        raise ValueError(f'metric is "rmse" or "worst", got "{metric}"')
    field, fitting = _field_and_noise(model_or_field, noise, conditions, seed)
    key = identity(field, fitting, __version__, torch.__version__, seed, metric, effort)
    with Stages(progress) as stages:
        journal = Journal(None if resume is None else Path(resume), key)
        return _Climb(field, fitting, effort, metric, seed, journal, stages).run(budgets)


def _field_and_noise(
    source: Model | Field, noise: Tensor | Sequence[int] | int | None, conditions: Sequence[Mapping[str, Any]] | None, seed: int
) -> tuple[Field, Tensor]:
    """The field on all conditions and the fitting noise for it."""
    if not isinstance(source, Model):
        if conditions is not None:
            raise ValueError("conditions belong to a Model; a field already has its condition inside")
        model = source.model if isinstance(source, ModelField | JointField) else None
    else:
        model = source
    count = len(conditions) if conditions else 1
    if isinstance(noise, Tensor):
        fitting = noise
        if fitting.shape[0] % count:
            raise FieldError(f"noise for {count} conditions must divide among them, got a batch of {fitting.shape[0]}")
    else:
        shape = tuple(noise) if isinstance(noise, Sequence) else None
        if shape is None:
            if model is None or model.shape is None:
                raise FieldError(
                    "the shape of a sample is not known: pass noise=(batch, *shape) or a tensor, or adapt(..., shape=...)"
                )
            shape = ((256 if noise is None else noise) * count, *model.shape)
        device = model.device_dtype()[0] if model is not None else torch.device("cpu")
        fitting = draw(shape, seed, 0).to(device)
    if not isinstance(source, Model):
        return source, fitting
    each = fitting.shape[0] // count
    fields = [_given(source, condition, each) for condition in conditions or [{}]]
    return (fields[0] if len(fields) == 1 else JointField(fields)), fitting


def _given(model: Model, condition: Mapping[str, Any], batch: int) -> ModelField:
    """One condition; a class-conditional model without a label gets all classes in turn."""
    known = {"label", "guidance", "condition", "null", "classifier", "classifier_scale"}
    if set(condition) - known:
        raise ValueError(f"conditions are arguments of Model.given, {sorted(known)}; got {sorted(set(condition) - known)}")
    arguments = dict(condition)
    if "label" not in arguments and model.classes is not None:
        arguments["label"] = torch.arange(batch) % model.classes
    return model.given(arguments.pop("label", None), **arguments)


def draw(shape: Sequence[int], seed: int, which: int) -> Tensor:
    """Standard normal noise; `which` tells fitting (0), selection (1) and test (2) noise apart."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1009 + which))


class _Climb:
    """One run of `tune`: the three problems, the journal and the stages."""

    def __init__(
        self, field: Field, fitting: Tensor, effort: Effort, metric: Score, seed: int, journal: Journal, stages: Stages
    ) -> None:
        self.field = CountedField(field)
        self.open = CountedField(field, check=False)  # candidates may blow up; the reference has vouched for the network
        self.effort, self.metric, self.seed, self.journal, self.stages = effort, metric, seed, journal, stages
        self.pools: dict[int, list[Candidate]] = {}
        self.noises = [fitting, *(draw(fitting.shape, seed, k).to(fitting) for k in (1, 2))]

    def run(self, budgets: Sequence[int]) -> TuneResult:
        self.fitting, self.selection, self.test = (self._problem(k, name) for k, name in enumerate(("fit", "select", "test")))
        boss = self._boss(budgets)
        chosen = {n: self._choose(n, boss) for n in budgets}
        with self.stages("final measurement", self.open):
            rows = rows_of(self.test, chosen, self.pools)
            best = min(row.metrics["rmse"].value for row in rows)
        if self.test.solution.error > best / 10:  # a reference must be ten times better than what it judges
            self.test = self._problem(2, "test, finer", tol=best / 20)
            rows = rows_of(self.test, chosen, self.pools)
        with self.stages("dopri5", self.open):
            rows += adaptive_rows(self.test)
        seconds = {n: runner_up(ranked) for n, ranked in chosen.items()}
        second_rows = {n: rows_of(self.test, {n: {c.name: c}}, {n: []})[0] for n, c in seconds.items() if c is not None}
        facts = self._facts() | {"summary": summary(rows, chosen, second_rows)}
        report = Report(f"few-step samplers for {facts['model']}", tuple(rows), facts)
        samplers = {}
        for n, ranked in chosen.items():
            winner = next(iter(ranked.values()))
            row = next(r for r in rows if r.nfe == n and r.group == "tuned")
            samplers[n] = finished(winner.sampler.named(winner.name), self.field.field, row, facts, self.seed)
        rivals = {n: best for n in budgets if (best := self._rival(n, report)) is not None}
        return TuneResult(samplers, report, path_of(self.field), rivals)

    def _rival(self, n: int, report: Report) -> Candidate | None:
        row = report.best(n, *BASELINES)
        return None if row is None else next(c for c in self.pools[n] if c.name == row.name)

    def _facts(self) -> dict[str, Any]:
        model, conditions = model_of(self.field)
        costs = cost_facts(self.stages.costs)
        return {
            "model": model.name if model else "field",
            "path": repr(home(self.field)),
            "conditions": list(conditions),
            "noises per set": self.test.noise.shape[0],
            "seed": self.seed,
            "effort": self.effort,
            "metric": self.metric,
            "reference error": self.test.solution.error,
            "cost": costs,
            "network passes": sum(c["network passes"] for c in costs),
            "seconds": round(sum(c["seconds"] for c in costs), 1),
            "versions": f"fewstep {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        }

    def _problem(self, which: int, name: str, tol: float = 1e-4) -> Problem:
        noise = self.noises[which]
        with self.stages(f"reference ({name})", self.field):
            key = f"reference-{which}-{tol:g}"
            solution = self.journal.reference(
                key, Coordinates.of(self.field.field), lambda: reference(self.field, noise, tol=tol)
            )
        return Problem(self.open, noise, solution)

    def _boss(self, budgets: Sequence[int]) -> dict[int, TimeGrid]:
        """BOSS's grids for every number of steps that a method might need within these budgets."""
        most = min(4 * max(budgets), Boss().knots // 2)
        with self.stages("BOSS grids", self.open):
            few = self.fitting.part(0, max(1, BOSS_NOISES // self.fitting.conditions))

            def solve() -> dict[str, list[float]]:
                found = Boss().grids(few.field, few.noise, range(1, most + 1))
                return {str(k): grid.knots.tolist() for k, grid in found.items()}

            kept = self.journal.get("boss", solve)
        return {int(k): TimeGrid(knots) for k, knots in kept.items()}

    def _choose(self, n: int, boss: Mapping[int, TimeGrid]) -> dict[str, Candidate]:
        """All finalists of one budget, best first on the selection noise; ties keep the earlier, simpler one."""
        self.pools[n] = candidates(self.open, n, boss)
        pool = {c.name: c for c in self.pools[n]}
        with self.stages(f"search, NFE {n}", self.open, len(pool)) as stage:
            scores = self.journal.get(f"search-{n}", lambda: self._search(pool, stage))
        finalists = {name: pool[name] for name in scores if name in pool}
        if self.effort == "fit":
            with self.stages(f"fit, NFE {n}", self.open, 12 + 2 * len(RIDGES) + WARPS + KNOTS) as stage:
                for candidate, score in self._fit(n, boss, list(finalists.values())[:2], stage):
                    finalists[candidate.name], scores[candidate.name] = candidate, score
        return dict(sorted(finalists.items(), key=lambda item: scores[item[0]]))

    def _search(self, pool: Mapping[str, Candidate], stage: Stage) -> dict[str, float]:
        few = self.selection.part(0, max(1, SCREEN // self.selection.conditions))
        screened: dict[str, float] = {}
        for name, candidate in pool.items():
            screened[name] = few.score(candidate.sampler, self.metric)
            stage.tick()
        ranked = sorted(screened, key=lambda name: screened[name])
        best_stock = [name for name in ranked if pool[name].group in ("stock", "corrected")][:2]
        kept = list(dict.fromkeys([*ranked[:FINALISTS], *best_stock]))
        scores = {name: self.selection.score(pool[name].sampler, self.metric) for name in kept}
        return dict(sorted(((k, v) for k, v in scores.items() if math.isfinite(v)), key=lambda item: item[1]))

    def _fit(
        self, n: int, boss: Mapping[int, TimeGrid], best: Sequence[Candidate], stage: Stage
    ) -> Iterator[tuple[Candidate, float]]:
        """Fits on every grid family and on the best tables' own times, then on a grid searched for the fit."""
        starts = {name: plain_table(self.open, grid) for name, grid in grids(n, home(self.open), boss.get(n)).items()}
        starts |= {c.name: c.sampler for c in best if c.sampler.nfe == n}
        scores: dict[str, float] = {}
        for name, start in starts.items():
            candidate, scores[name] = self._fitted(f"fit({name})", n, start, RIDGES[0])
            stage.tick()
            yield candidate, scores[name]
        family = min((name for name in scores if name in grids(n, home(self.open), boss.get(n))), key=lambda name: scores[name])
        start = grids(n, home(self.open), boss.get(n))[family]
        knots = self.journal.get(
            f"grid-{n}", lambda: search_grid(self.fitting, start, warps=WARPS, knots=KNOTS, tick=stage.tick).knots.tolist()
        )
        for name, table in ((f"searched from {family}", plain_table(self.open, TimeGrid(knots))), (family, starts[family])):
            for ridge in RIDGES:
                yield self._fitted(f"fit({name}), ridge {ridge:g}", n, table, ridge)
                stage.tick()

    def _fitted(self, name: str, n: int, start: Sampler, ridge: float) -> tuple[Candidate, float]:
        p = self.fitting
        sampler = self.journal.sampler(
            f"{name}-{n}", lambda: fit(p.field, p.noise, p.solution, start, ridge=ridge)[0].named(name)
        )
        score = self.journal.get(f"{name}-{n}-score", lambda: self.selection.score(sampler, self.metric))
        return Candidate(name, "tuned", sampler), score
