"""The rungs that `tune` climbs: references, BOSS, search, fit, grid search, Gauss-Newton, final measurement."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import __version__
from ._types import Field
from .candidates import Candidate, candidates, grids, home
from .composite import CountedField, path_of, source_of
from .coordinates import Coordinates
from .evaluation import Report, Row
from .grid import TimeGrid
from .journal import Journal
from .noise import BOSS_NOISES, SCREEN, enough
from .problem import Problem, Score
from .progress import Stage, Stages
from .result import TuneResult
from .sampler import Sampler
from .trajectory import Reference, Solve
from .tuners.boss import Boss
from .tuners.grid_search import plain_table, search_grid
from .tuners.least_squares import fit
from .tuners.nonstationary import learn_rows
from .verdict import BASELINES, adaptive_rows, cost_facts, finished, model_of, rows_of, runner_up, summary

Effort = Literal["search", "fit", "learn"]

FINALISTS = 6
"""Candidates that are then scored on the whole selection set."""

FITTED = 4
"""Grid families whose fit is scored there: those that fit best."""

RIDGES = (1e-8, 1e-5, 1e-3)
WARPS = 8
"""Evaluations of the grid search, per budget."""

ITERATIONS = 4
"""Of Gauss-Newton, from the best fit."""

ACCURACY = 3
"""How many times more accurate than what has been reached the references must be that tables are fitted to and chosen by: than
the best training-free table for the fits, than the best fit for learning. Six gave the digits tables of the same error within
5 % (4 to 10 calls, three seeds), for up to a third more network passes."""

FINEST, FINEST_DOUBLE = 1e-4, 1e-6
"""Beyond it no reference is refined (the second: for noise in double precision): networks in half precision, and networks with
kinks, have none to converge to."""

COARSE = 4e-3
"""Tolerance of that reference to begin with, for the search; and of the one that the report measures against."""


@dataclass(frozen=True, eq=False)
class Ground:
    """What `tune` works on: the field with fitting and selection noise, and with the test noise (which may be more)."""

    field: Field
    fitting: Tensor
    selection: Tensor
    test_field: Field
    test: Tensor


class Climb:
    """One run of `tune`: the three problems, the journal and the stages.

    Attributes:
        fitting: what tables are fitted to, solved as accurately as they have needed so far.
        selection: what they are chosen by, likewise.
    """

    fitting: Problem
    selection: Problem

    def __init__(self, ground: Ground, effort: Effort, metric: Score, seed: int, journal: Journal, stages: Stages) -> None:
        self.field = CountedField(ground.field)
        self.open = CountedField(ground.field, check=False)  # candidates may blow up; the reference has vouched for the network
        journal.counters = (self.field, self.open)
        self.test_field, self.test_noise = ground.test_field, ground.test
        self.effort: Effort = effort
        self.metric: Score = metric
        self.seed, self.journal, self.stages = seed, journal, stages
        self.pools: dict[int, list[Candidate]] = {}
        self.solves: dict[str, Solve] = {}
        self.finest = FINEST_DOUBLE if ground.test.dtype == torch.float64 else FINEST
        self.noises = {"fit": ground.fitting, "select": ground.selection}

    def run(self, budgets: Sequence[int]) -> TuneResult:
        """Solve, search, fit, learn, choose, measure."""
        self._solve(COARSE)
        boss = self._boss(budgets)
        chosen = {n: self._choose(n, boss) for n in budgets}
        test = self._test_problem("test", COARSE)
        rows = self._measured(test, chosen)
        best = min(row.metrics["rmse"].value for row in rows)
        while test.solution.error > (tol := max(best / 10, self.finest)):  # ten times better than what it judges
            test = self._test_problem("test, finer", tol)
            rows = self._measured(test, chosen)
            best = min(row.metrics["rmse"].value for row in rows)
        with self.stages("rivals", self.open, measures=True):
            rows += adaptive_rows(test)
            seconds = {n: runner_up(ranked) for n, ranked in chosen.items()}
            second_rows = {n: rows_of(test, {n: {c.name: c}}, {n: []})[0] for n, c in seconds.items() if c is not None}
        facts = self._facts(test) | {"summary": summary(rows, chosen, second_rows)}
        report = Report(f"few-step samplers for {facts['model']}", tuple(rows), facts)
        samplers = {}
        for n, ranked in chosen.items():
            winner = next(iter(ranked.values()))
            row = next(r for r in rows if r.nfe == n and r.group == "tuned")
            samplers[n] = finished(winner.sampler.named(winner.name), self.field.field, row, facts, self.seed)
        rivals = {n: best for n in budgets if (best := self._rival(n, report)) is not None}
        return TuneResult(samplers, report, path_of(self.field), rivals)

    def _measured(self, test: Problem, chosen: Mapping[int, Mapping[str, Candidate]]) -> list[Row]:
        with self.stages("final measurement", self.open, measures=True):
            return rows_of(test, chosen, self.pools)

    def _rival(self, n: int, report: Report) -> Candidate | None:
        row = report.best(n, *BASELINES)
        return None if row is None else next(c for c in self.pools[n] if c.name == row.name)

    def _facts(self, test: Problem) -> dict[str, Any]:
        model, conditions = model_of(self.field)
        return {
            "model": model.name if model else "field",
            "path": repr(home(self.field)),
            "conditions": list(conditions),
            **({} if (points := source_of(self.field)) is None else {"starts at": points.name}),
            "fitting noises": self.fitting.noise.shape[0],
            "noises per set": test.noise.shape[0],
            "seed": self.seed,
            "effort": self.effort,
            "metric": self.metric,
            "reference error": test.solution.error,
            **cost_facts(self.stages.costs),
            "versions": f"fewstep {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        }

    def _solve(self, tol: float) -> None:
        """The references that tables are fitted to and chosen by."""
        self.fitting, self.selection = (self._problem(role, noise, tol) for role, noise in self.noises.items())

    def _problem(self, role: str, noise: Tensor, tol: float) -> Problem:
        with self.stages(f"reference ({role})", self.field):
            return Problem(self.open, noise, self._reference(role, self.field, noise, tol))

    def _test_problem(self, role: str, tol: float) -> Problem:
        with self.stages(f"reference ({role})", self.field, measures=True):
            solution = self._reference("test", self.field.over(self.test_field), self.test_noise, tol)
        return Problem(self.open.over(self.test_field), self.test_noise, solution)

    def _reference(self, role: str, field: CountedField, noise: Tensor, tol: float) -> Reference:
        """A solution to `tol`, which goes on from a coarser one of the same role that this run has solved."""
        solve = self.solves.setdefault(role, Solve(field, noise))
        return self.journal.reference(f"reference-{role}-{tol:g}", Coordinates.of(field.field), lambda: solve.to(tol))

    def _boss(self, budgets: Sequence[int]) -> dict[int, TimeGrid]:
        """BOSS's grids for every number of steps that a method might need within these budgets."""
        most = min(4 * max(budgets), Boss().knots // 2)
        with self.stages("BOSS grids", self.open):
            few = self.fitting.part(0, -(-enough(BOSS_NOISES, self.fitting.noise[0].numel()) // self.fitting.conditions))

            def solve() -> dict[str, list[float]]:
                found = Boss().grids(few.field, few.noise, range(1, most + 1))
                return {str(k): grid.knots.tolist() for k, grid in found.items()}

            kept = self.journal.get(f"boss-{most}", solve)
        return {int(k): TimeGrid(knots) for k, knots in kept.items()}

    def _choose(self, n: int, boss: Mapping[int, TimeGrid]) -> dict[str, Candidate]:
        """All finalists of one budget, best first on the selection noise; ties keep the earlier, simpler one."""
        with self.stages(f"search, NFE {n}", self.open) as stage:
            self.pools[n] = candidates(self.open, n, boss)
            pool = {c.name: c for c in self.pools[n]}
            stage.expect(len(pool))
            scores = dict(self.journal.get(f"search-{n}", lambda: self._search(pool, stage)))
        finalists = {name: pool[name] for name in scores if name in pool}
        if self.effort != "search":
            if finalists:
                first = min(finalists, key=lambda name: scores[name])
                scores[first] = self._sharpened(n, first, finalists[first].sampler, scores[first])
            with self.stages(f"fit, NFE {n}", self.open, 12 + 2 * len(RIDGES) + WARPS) as stage:
                fits = dict(self._fit(n, boss, list(finalists.values())[:2], stage))
            if self.effort == "learn":
                best = min(fits, key=lambda c: fits[c])
                fits[best] = self._sharpened(n, best.name, best.sampler, fits[best])
                with self.stages(f"learn, NFE {n}", self.open, ITERATIONS) as stage:
                    fits |= self._learn(n, best, stage)
            for candidate, score in fits.items():
                finalists[candidate.name], scores[candidate.name] = candidate, score
        return dict(sorted(finalists.items(), key=lambda item: scores[item[0]]))

    def _search(self, pool: Mapping[str, Candidate], stage: Stage) -> dict[str, float]:
        few = self.selection.part(0, -(-enough(SCREEN, self.selection.noise[0].numel()) // self.selection.conditions))
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
        fits: dict[str, tuple[Sampler, float]] = {}
        for name, start in starts.items():
            fits[name] = self._fitted(f"fit({name})", n, start, RIDGES[0])
            stage.tick()
        tried = sorted(fits, key=lambda name: fits[name][1])[:FITTED]
        scores = {name: self._score(f"fit({name})", n, fits[name][0]) for name in tried}
        yield from ((Candidate(f"fit({name})", "tuned", fits[name][0]), scores[name]) for name in tried)
        family = min(
            (name for name in fits if _grid_of(starts[name]) is not None), key=lambda k: (scores.get(k, math.inf), fits[k][1])
        )
        first = _grid_of(starts[family])
        assert first is not None
        knots = self.journal.get(
            f"grid-{family}-{n}-{self.fitting.solution.error:g}",
            lambda: search_grid(self.fitting, first, evaluations=WARPS, tick=stage.tick).knots.tolist(),
        )
        searched = plain_table(self.open, TimeGrid(knots))
        for name, table, ridges in ((f"{family}, searched", searched, RIDGES), (family, starts[family], RIDGES[1:])):
            for ridge in ridges:
                label = f"fit({name})" if ridge == RIDGES[0] else f"fit({name}; ridge {ridge:g})"
                sampler, _ = self._fitted(label, n, table, ridge)
                yield Candidate(label, "tuned", sampler), self._score(label, n, sampler)
                stage.tick()

    def _fitted(self, name: str, n: int, start: Sampler, ridge: float) -> tuple[Sampler, float]:
        """A fit and its error on the noise that it was fitted on."""
        p = self.fitting
        errors: list[float] = []

        def solve() -> Sampler:
            sampler, error = fit(p.field, p.noise, p.solution, start, ridge=ridge)
            errors.append(error)
            return sampler.named(name)

        key = f"{name}-{n}-{p.solution.error:g}"
        sampler = self.journal.sampler(key, solve)
        return sampler, self.journal.get(f"{key}-residual", lambda: errors[0] if errors else p.score(sampler))

    def _score(self, name: str, n: int, sampler: Sampler) -> float:
        return self.journal.get(f"{name}-{n}-{self._solved()}-score", lambda: self.selection.score(sampler, self.metric))

    def _sharpened(self, n: int, name: str, table: Sampler, score: float) -> float:
        """The score of the best so far, by references `ACCURACY` times more accurate than it is: they are made so.

        What was scored before it and was worse keeps its score by the coarser reference, which flatters nothing.
        """
        while (tol := max(score / ACCURACY, self.finest)) < max(self.fitting.solution.error, self.selection.solution.error):
            self._solve(tol)
            score = self._score(name, n, table)
        return score

    def _solved(self) -> str:
        """Tells what was found with these references from what was found with coarser ones, in journal keys."""
        return f"{self.fitting.solution.error:g}-{self.selection.solution.error:g}"

    def _learn(self, n: int, start: Candidate, stage: Stage) -> dict[Candidate, float]:
        """Gauss-Newton on every number of a fit; nothing where that improves nothing on the selection noise."""
        if self._score(start.name, n, start.sampler) <= self.fitting.solution.error:
            return {}  # already as good as what it would be fitted to

        def refine() -> Sampler:
            p, held = self.fitting, self.selection
            return learn_rows(start.sampler, p, held, metric=self.metric, iterations=ITERATIONS, tick=stage.tick).sampler

        learned = self.journal.sampler(f"learned-{start.name}-{n}-{self._solved()}", refine)
        if learned.provenance.method == start.name:
            return {}
        name = f"learned({start.name})"
        return {Candidate(name, "tuned", learned.named(name)): self._score(name, n, learned)}


def _grid_of(table: Sampler) -> TimeGrid | None:
    """The grid on which a first-order method makes its calls where this table does; None for repeated or later first times."""
    knots = torch.cat([table.times, torch.ones(1, dtype=torch.float64)])
    return TimeGrid(knots) if float(knots[0]) == 0.0 and bool((knots.diff() > 0).all()) else None
