"""The rungs that `tune` climbs: references, BOSS, search, fit, grid search, final measurement."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import __version__
from ._types import Field
from .candidates import Candidate, candidates, grids, home
from .composite import CountedField, path_of
from .coordinates import Coordinates
from .evaluation import Report
from .grid import TimeGrid
from .journal import Journal
from .problem import Problem, Score
from .progress import Stage, Stages
from .result import TuneResult
from .sampler import Sampler
from .trajectory import reference
from .tuners.boss import Boss
from .tuners.grid_search import plain_table, search_grid
from .tuners.least_squares import fit
from .verdict import BASELINES, adaptive_rows, cost_facts, finished, model_of, rows_of, runner_up, summary

Effort = Literal["search", "fit"]

SCREEN = 16
"""Noises per condition on which all candidates are screened."""

FINALISTS = 8
"""Candidates that are then scored on the whole selection set."""

BOSS_NOISES = 128
RIDGES = (1e-8, 1e-5, 1e-3)
WARPS, KNOTS = 20, 30
"""Evaluations of the two grid searches, per budget."""


def draw(shape: Sequence[int], seed: int, which: int) -> Tensor:
    """Standard normal noise; `which` tells fitting (0), selection (1) and test (2) noise apart, and further sets."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed * 1009 + which))


class Climb:
    """One run of `tune`: the three problems, the journal and the stages."""

    def __init__(
        self, field: Field, fitting: Tensor, effort: Effort, metric: Score, seed: int, journal: Journal, stages: Stages
    ) -> None:
        self.field = CountedField(field)
        self.open = CountedField(field, check=False)  # candidates may blow up; the reference has vouched for the network
        self.effort: Effort = effort
        self.metric: Score = metric
        self.seed, self.journal, self.stages = seed, journal, stages
        self.pools: dict[int, list[Candidate]] = {}
        self.noises = [fitting, *(draw(fitting.shape, seed, k).to(fitting) for k in (1, 2))]

    def run(self, budgets: Sequence[int]) -> TuneResult:
        """Solve, search, fit, choose, measure."""
        self.fitting, self.selection, self.test = (self._problem(k, name) for k, name in enumerate(("fit", "select", "test")))
        boss = self._boss(budgets)
        chosen = {n: self._choose(n, boss) for n in budgets}
        with self.stages("final measurement", self.open):
            rows = rows_of(self.test, chosen, self.pools)
            best = min(row.metrics["rmse"].value for row in rows)
        if self.test.solution.error > best / 10:  # a reference must be ten times better than what it judges
            self.test = self._problem(2, "test, finer", tol=best / 20)
            with self.stages("final measurement", self.open):
                rows = rows_of(self.test, chosen, self.pools)
        with self.stages("rivals", self.open):
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
        with self.stages(f"search, NFE {n}", self.open) as stage:
            self.pools[n] = candidates(self.open, n, boss)
            pool = {c.name: c for c in self.pools[n]}
            stage.expect(len(pool))
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
        """Fits on every grid family and on the best tables' own times, then on a grid searched from the best of those."""
        starts = {name: plain_table(self.open, grid) for name, grid in grids(n, home(self.open), boss.get(n)).items()}
        starts |= {c.name: c.sampler for c in best}
        scores: dict[str, float] = {}
        for name, start in starts.items():
            candidate, scores[name] = self._fitted(f"fit({name})", n, start, RIDGES[0])
            stage.tick()
            yield candidate, scores[name]
        family = min((name for name in starts if _grid_of(starts[name]) is not None), key=lambda name: scores[name])
        first = _grid_of(starts[family])
        assert first is not None
        knots = self.journal.get(
            f"grid-{n}", lambda: search_grid(self.fitting, first, warps=WARPS, knots=KNOTS, tick=stage.tick).knots.tolist()
        )
        yield self._fitted(f"fit({family}, searched)", n, plain_table(self.open, TimeGrid(knots)), RIDGES[0])
        stage.tick()
        for name, table in ((f"{family}, searched", plain_table(self.open, TimeGrid(knots))), (family, starts[family])):
            for ridge in RIDGES[1:]:
                yield self._fitted(f"fit({name}; ridge {ridge:g})", n, table, ridge)
                stage.tick()

    def _fitted(self, name: str, n: int, start: Sampler, ridge: float) -> tuple[Candidate, float]:
        p = self.fitting
        sampler = self.journal.sampler(
            f"{name}-{n}", lambda: fit(p.field, p.noise, p.solution, start, ridge=ridge)[0].named(name)
        )
        score = self.journal.get(f"{name}-{n}-score", lambda: self.selection.score(sampler, self.metric))
        return Candidate(name, "tuned", sampler), score


def _grid_of(table: Sampler) -> TimeGrid | None:
    """The grid on which a first-order method makes its calls where this table does; None for repeated or later first times."""
    knots = torch.cat([table.times, torch.ones(1, dtype=torch.float64)])
    return TimeGrid(knots) if float(knots[0]) == 0.0 and bool((knots.diff() > 0).all()) else None
