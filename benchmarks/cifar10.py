"""Which sampler to use: learned, fitted, published and stock ones on the bundled digits and the CIFAR-10 models in models/.

    python benchmarks/cifar10.py --data cifar10-train.parquet [--models cifar10-flow,cifar10-vp]
    python benchmarks/cifar10.py --models digits,digits-vp,digits-edm --noises 1024 --out benchmarks/results/digits.json
    python benchmarks/cifar10_page.py                         # docs/benchmarks.md and its plots, from the results file

End-point RMSE on noise that no tuner saw, with 95 % bootstrap intervals; Frechet distances (FD), spatial FD, precision and
recall in the features of the classifier that experiments/cifar10.py trains (digits: in pixels), three seeds, beside the floor
of as many real images. An interrupted run goes on with the cells that are missing; a model that is not there is left out.
digits-vp and digits-edm are trained here first, some minutes each: VP with v-prediction, and EDM's path and preconditioning.
"""

import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

from cells import Cell, Row, Rows, fill
from classifier import classifier
from fewstep import (
    Bespoke,
    Boss,
    CountedField,
    LearnedKnots,
    LeastSquares,
    Model,
    NonStationary,
    Sampler,
    TimeGrid,
    compare,
    compare_images,
    features_of,
    load,
    methods,
    tabulate,
    tune,
)
from fewstep._errors import BudgetError
from fewstep._precision import exact_products
from fewstep.candidates import candidates, grids
from fewstep.evaluation import BiasWarning, Extractor, Features, Group
from fewstep.evaluation import Row as Measured
from fewstep.evaluation.generation import CHUNK
from fewstep.ladder import Effort
from fewstep.methods import Method
from fewstep.noise import draw
from fewstep.path import AffinePath, CondOT
from fewstep.problem import Problem
from fewstep.training.loop import train
from fewstep.training.recipe import RECIPES
from fewstep.training.state import checkpoints
from fewstep.trajectory import dopri5, reference
from fewstep.tuners.nonstationary import numbers_of
from fewstep.zoo import training_passes
from halves import future_only, past_only

ROOT = Path(__file__).parents[1]
HOUSE = {"digits": "digits", "digits-vp": "runs/digits-vp", "digits-edm": "runs/digits-edm"}
HOUSE |= {name: str(ROOT / "models" / name) for name in ("cifar10-flow", "cifar10-vp")}
_DIAL = ("path", "predicts", "raw", "weight", "time", "time_mean", "time_std")
DIGITS = {
    f"digits-{kind}": replace(
        RECIPES["digits"], steps=5000, **{name: getattr(RECIPES[f"cifar10-{kind}"], name) for name in _DIAL}
    )
    for kind in ("vp", "edm")
}
"""What is trained here: the digits' recipe with the path and objective of the CIFAR-10 recipes."""
PAIRS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3))
"""(k, l) of PFDiff, as published."""
FIRST = ROOT / "benchmarks" / "results" / "first-flow-tables.json"
"""Tables of the flow that was trained before the one in models/, on a tenth of the images."""
CLASSIFIER = ROOT / "models" / "cifar10-classifier"


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """What is measured."""

    data: str = ""
    """Parquet file of CIFAR-10's training images, for the CIFAR-10 models."""
    models: str = "cifar10-flow,cifar10-vp"
    """Which models."""
    budgets: str = "4,6,8,10"
    """NFE."""
    learn: str = ""
    """Those of them that `tune --effort learn` is for; default all."""
    count: int = 500
    """Images per sampler and seed for distances."""
    noises: int = 64
    """Test noises for end-point errors."""
    single: int = 128
    """Noises for each of the solvers one by one, of which a quarter chooses; they are tested on four times `noises`."""
    seeds: int = 3
    """Of the images."""
    device: str = "cpu"
    """Where networks run, such as cuda."""


@dataclass(frozen=True)
class Case:
    """One model with its test noise and its real images."""

    name: str
    config: Config

    @cached_property
    def model(self) -> Model:
        """Loaded when the first cell asks for it; those of `DIGITS` are trained then."""
        house = Path(HOUSE[self.name])
        if self.name in DIGITS and not (house / "config.json").exists():
            train(DIGITS[self.name], house, resume=bool(checkpoints(house)), progress=True)
        return on(load(HOUSE[self.name]), self.config.device)

    @property
    def budgets(self) -> tuple[int, ...]:
        """NFE."""
        return tuple(int(n) for n in self.config.budgets.split(","))

    @property
    def learnt(self) -> tuple[int, ...]:
        """NFE of tables that are learnt."""
        return tuple(int(n) for n in (self.config.learn or self.config.budgets).split(","))

    @property
    def flow(self) -> bool:
        """On the straight path; on VP a reference takes four times the calls."""
        return isinstance(self.model.path, CondOT)

    @property
    def small(self) -> bool:
        """Of the digits."""
        return self.name.startswith("digits")

    def field(self, count: int, guidance: float = 1.0) -> Any:
        """All classes in turn."""
        return self.model.given(torch.arange(count) % self.model.classes, guidance=guidance)  # type: ignore[operator]  # has classes

    def noise(self, count: int, which: int) -> Tensor:
        """See `fewstep.noise.draw`."""
        assert self.model.shape is not None
        return draw((count, *self.model.shape), 0, which).to(self.config.device)

    @property
    def tol(self) -> float:
        """Of references: what is measured errs by more, and a finer one costs hours on the CIFAR-10 VP model."""
        return 1e-4 if self.small else 5e-4 if self.flow else 2e-3

    @cache  # noqa: B019  # lives as long as the run
    @exact_products()
    def problem(self, which: int, count: int, guidance: float = 1.0) -> Problem:
        """Noise (7: the test noise; 0: what is learnt and chosen by) and its converged solution."""
        noise, field = self.noise(count, which), self.field(count, guidance)
        return Problem(field, noise, reference(field, noise, tol=self.tol))

    def test(self, guidance: float = 1.0, times: int = 1) -> Problem:
        """The test noise, `times` as much as configured."""
        return self.problem(7, times * self.config.noises, guidance)

    @exact_products()
    def errors(
        self, tables: Mapping[str, Sampler], groups: Mapping[str, Group] | None = None, guidance: float = 1.0, times: int = 1
    ) -> Row:
        """End-point errors by name."""
        test = self.test(guidance, times)
        report = compare(
            tables, test.field, test.noise, reference=test.solution, metrics=("rmse", "median", "psnr"), groups=groups
        )
        return {r.name: _plain(r) for r in report.rows} | {"reference error": test.solution.error}

    @cache  # noqa: B019  # as above
    def real(self) -> tuple[Features, Extractor]:
        """Features of real images, and what makes them."""
        if self.small:
            from sklearn.datasets import load_digits

            digits: Any = load_digits()
            images, extractor = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, Extractor.of("pixels")
        else:
            from fewstep.training.data import open_source

            source: Any = open_source(self.config.data)
            net = classifier(CLASSIFIER, source, (torch.empty(0), torch.empty(0)), 0)[0].to(self.config.device)
            images = source.data[:10_000].float() / 127.5 - 1
            extractor = Extractor("CIFAR-10 classifier", net.features_and_spatial)
        return features_of(images, extractor), extractor

    @exact_products()
    def images(self, tables: Mapping[str, Sampler], guidance: float = 1.0, against: str | None = None) -> Row:
        """Distances to real images by name."""
        real, extractor = self.real()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BiasWarning)  # the floor beside it says how large the bias is
            report = compare_images(
                tables, self.model, real, self.config.count, extractor=extractor, seeds=range(self.config.seeds),
                guidance=guidance, against=against, batch=128 if self.config.device == "cpu" else CHUNK,
            )  # fmt: skip
        return {r.name: _plain(r) for r in report.rows}


def _plain(row: Measured) -> Row:
    return {"nfe": row.nfe, "group": row.group, **{k: asdict(v) for k, v in row.metrics.items()}}


def _kept(sampler: Sampler) -> Row:
    return {
        "times": sampler.times.tolist(),
        "a": sampler.a.tolist(),
        "b": sampler.b.tolist(),
        "method": sampler.provenance.method,
    }


def _table(row: Row) -> Sampler:
    times, a, b = (torch.tensor(row[k], dtype=torch.float64) for k in ("times", "a", "b"))
    return Sampler(times, a, b).named(row["method"])


@exact_products()
def stock(case: Case, nfe: int, rows: Rows) -> Row:
    """Every stock scheduler as shipped and corrected; Euler, DDIM and Heun on uniform, log-SNR, EDM (Karras) and BOSS grids."""
    field, path = case.field(8), case.model.path
    boss = Boss().grids(field, case.noise(8, 0), range(1, nfe + 1))
    pick = {c.name: c for c in candidates(field, nfe, boss) if c.group != "method"}
    tables = {c.name: c.sampler for c in pick.values()}
    for method in (methods.euler, methods.ddim(path), methods.heun):
        tables |= on_grids(method, path, nfe, ("uniform", "log-snr", "karras", "boss"), boss)
    measured = case.errors(tables, {n: pick[n].group if n in pick else "method" for n in tables})
    best = min(pick, key=lambda n: measured[n]["rmse"]["value"])
    return measured | {"best stock": best, "table": _kept(pick[best].sampler)}


def on_grids(
    method: Method, path: AffinePath, nfe: int, wanted: Sequence[str], boss: Mapping[int, TimeGrid] | None = None
) -> dict[str, Sampler]:
    """The method's tables of this NFE on the grids that it can walk: none where it cannot spend exactly so many calls."""
    found = {}
    try:
        steps = method.intervals(nfe)
    except BudgetError:
        return {}
    for name, grid in grids(steps, path, (boss or {}).get(steps)).items():
        if name in wanted:
            with suppress(ValueError):  # it asks where the velocity is infinite
                found[f"{method.name}@{name}"] = tabulate(method, grid, start_scale=path.start_scale)
    return found


@exact_products()
def adaptive(case: Case, rows: Rows) -> Row:
    """Torchdiffeq's dopri5 with the NFE that it took."""
    test, found = case.test(), {}
    for tol in (1e-1, 1e-2, 1e-3):
        solved = dopri5(test.field, test.noise, tol=tol)
        error = float((solved.sample - test.solution.end).double().square().mean().sqrt())
        found[f"dopri5, tol {tol:g}"] = {"nfe": solved.nfe, "rmse": error}
    return found


def tuned(case: Case, effort: Effort, budgets: Sequence[int], rows: Rows) -> Row:
    """`tune` at an effort, all budgets at once: errors on this benchmark's test noise, and what tuning cost."""
    start = time.perf_counter()
    result = tune(case.model, nfe=budgets, effort=effort, progress=True)
    facts, passes = result.report.facts, training_passes(HOUSE[case.name])
    assert passes is not None
    found = {}
    for n in budgets:
        table = result[n].rebase(case.model.path, "velocity")
        name = result[n].provenance.method
        found[str(n)] = case.errors({name: table})[name] | {
            "table": _kept(table),
            "made by": name,
            "parameters": len(numbers_of(table)),
        }
    return found | {
        "fitting noises": facts["fitting noises"],
        "tuning passes": facts["tuning passes"], "measuring passes": facts["measuring passes"], "training passes": passes,
        "share of training": facts["tuning passes"] / passes, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


@exact_products()
def learned(case: Case, nfe: int, rows: Rows) -> Row:
    """The learned solvers one by one at this NFE, from the same noise: error, parameters, network passes, seconds, table."""
    path, flow, noise = case.model.path, case.flow, case.noise(case.config.single, 0)
    tol = min(case.tol, 1e-4) if flow else case.tol
    knots: list[Method] = [methods.euler, methods.pfdiff(1, 1)] if flow else [methods.ddim(path)]
    tuners: dict[str, Any] = {"fit (LeastSquares)": LeastSquares(tol=tol), "NonStationary": NonStationary(tol=tol)}
    tuners |= {f"LearnedKnots({m.name})": LearnedKnots(m, tol=tol) for m in knots}
    tuners |= {"Bespoke RK1": Bespoke("euler", tol=tol), "Bespoke RK2": Bespoke("midpoint", tol=tol)}
    if flow and case.small:
        tuners |= {
            "Bespoke RK2, identity start": Bespoke("midpoint", widths=(1.0,)),
            "Bespoke RK2, log loss": Bespoke("midpoint", log_loss=True),
            "Bespoke RK2, bound": Bespoke("midpoint", training="bound"),
        }
    tables, cost = {}, {}
    for name, tuner in tuners.items():
        counted, start = CountedField(case.field(len(noise))), time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no step improved|the bound improved nothing")  # the row then shows its start
            try:
                table = tuner(counted, noise, nfe=nfe)
            except BudgetError:
                continue
        tables[name] = table
        numbers = {"Bespoke RK": 4 * nfe - 1, "LearnedKno": nfe - 1}.get(name[:10], len(numbers_of(table)))
        spent = {"network passes": counted.samples, "seconds": round(time.perf_counter() - start, 1), "parameters": numbers}
        cost[name] = spent | {"table": _kept(table)}
    for method in (methods.euler, methods.midpoint) if flow else (methods.ddim(path),):
        tables |= on_grids(method, path, nfe, ("uniform",))
    times = 4 if case.small or flow else 1  # a reference on the CIFAR-10 VP model takes minutes per dozen
    measured = case.errors(tables, times=times)
    found: Row = {n: measured[n] | cost.get(n, {}) for n in tables}
    return found | {
        "noises": len(noise), "tested": len(case.test(times=times).noise), "reference error": measured["reference error"],
        "training passes": training_passes(HOUSE[case.name]),
    }  # fmt: skip


def learned_images(case: Case, nfe: int, rows: Rows) -> Row:
    """Images of the learned solvers one by one, beside the best stock scheduler's."""
    solvers = {
        n: _table(row["table"])
        for n, row in rows[f"{case.name}/learned/{nfe}"].items()
        if isinstance(row, dict) and "table" in row
    }
    return case.images({"best stock": _table(rows[f"{case.name}/stock/{nfe}"]["table"])} | solvers, against="best stock")


def distances(case: Case, nfe: int, rows: Rows) -> Row:
    """Images of the best stock scheduler, of the fit and of the learned table, as far as they are there."""
    tables = {"best stock": _table(rows[f"{case.name}/stock/{nfe}"]["table"])}
    for effort in ("fit", "learn"):
        made = rows.get(f"{case.name}/{effort}", {}).get(str(nfe))  # with --only one of them may not have been made
        if made:
            tables[f"tune --effort {effort}"] = _table(made["table"])
    return case.images(tables, against="best stock")


def others(case: Case, nfe: int, rows: Rows) -> Row:
    """Images of the stock schedulers that come next by error: the best error need not be the best distance."""
    row = rows[f"{case.name}/stock/{nfe}"]
    pool = {c.name: c.sampler for c in candidates(case.field(8), nfe, {}) if c.group in ("stock", "corrected")}
    ranked = sorted((name for name in pool if name in row), key=lambda name: row[name]["rmse"]["value"])
    ours = next(f for e in ("learn", "fit") if (f := rows.get(f"{case.name}/{e}", {}).get(str(nfe))))
    return case.images({"tune": _table(ours["table"])} | {name: pool[name] for name in ranked[1:5]}, against="tune")


def families(path: AffinePath) -> dict[str, list[Method]]:
    """PFDiff's bases and halves, and PFDiff, each with the (k, l) that it may choose from."""
    flow = isinstance(path, CondOT)
    base, frozen = (methods.euler, "velocity") if flow else (methods.ddim(path), "noise")
    found = {
        base.name: [base],
        "past only": [past_only(k, l, path) for k, l in PAIRS],
        "future only": [future_only(k, l, path) for k, l in PAIRS],
        f"PFDiff, {base.name}": [methods.pfdiff(k, l, base, frozen) for k, l in PAIRS],
    }
    if not flow:
        second = methods.dpm_single(path, 2, "noise")
        found |= {"DPM-Solver-2": [second], "PFDiff, DPM-Solver-2": [methods.pfdiff(k, l, second, "noise") for k, l in PAIRS]}
    return found


def pfdiff(case: Case, nfe: int, guidance: float, rows: Rows) -> Row:
    """Bases, halves and PFDiff from the same start level; (k, l) and grid of each chosen on noise that no error is told of."""
    path = case.model.path
    choosing = case.problem(0, case.config.single, guidance)
    best: dict[str, str] = {}
    tables: dict[str, Sampler] = {}
    for family, variants in families(path).items():
        mine: dict[str, Sampler] = {}
        for method in variants:
            mine |= on_grids(method, path, nfe, ("uniform", "log-snr", "karras"))
        if mine:
            with exact_products():
                best[family] = min(mine, key=lambda n: choosing.score(mine[n]))
            tables[best[family]] = mine[best[family]]
    seconds = timed(tables, case.test(guidance))
    return {
        "errors": case.errors(tables, guidance=guidance),
        "images": case.images(tables, guidance),
        "best": best,
        "seconds per 1,000 samples": seconds,
    }


def timed(tables: Mapping[str, Sampler], test: Problem, rounds: int = 5) -> dict[str, float]:
    """Median seconds for 1,000 samples; the tables take turns, so that the machine's moods hit all alike."""
    spent: dict[str, list[float]] = {name: [] for name in tables}
    for _ in range(rounds):
        for name, table in tables.items():
            start = time.perf_counter()
            table(test.field, test.noise).sum().item()  # waits for a device
            spent[name].append((time.perf_counter() - start) * 1000 / len(test.noise))
    return {name: float(torch.tensor(s).median()) for name, s in spent.items()}


def ranges(case: Case, nfe: int, rows: Rows) -> Row:
    """One table for a range of guidance values against one table for each."""
    values, count, found = (1.0, 2.0, 4.0), 32, {}  # noises per value
    one = tune(case.model, nfe=nfe, effort="learn", conditions=[{"guidance": w} for w in values], noise=count)
    joint = one[nfe].rebase(case.model.path, "velocity")
    for w in values:
        own = tune(case.model, nfe=nfe, effort="learn", conditions=[{"guidance": w}], noise=count)
        tables = {
            "one table for all": joint,
            "its own table": own[nfe].rebase(case.model.path, "velocity"),
            "best stock": own.rivals[nfe].sampler,
        }
        found[f"{w:g}"] = case.errors(tables, guidance=w)
    return found


def on(model: Model, device: str) -> Model:
    """The model with its network there."""
    assert isinstance(model.network, nn.Module)
    model.network.to(device)
    return model


def moved(case: Case, nfe: int, rows: Rows) -> Row:
    """Tables that were tuned on another training of the same network, beside this model's own."""
    tables = {}
    for effort, found in json.loads(FIRST.read_text())["tables"].items():
        if str(nfe) in found:
            own = rows[f"{case.name}/{effort}"][str(nfe)]
            tables |= {f"{effort}, own": _table(own["table"]), f"{effort}, transferred": _table(found[str(nfe)])}
    return case.errors(tables | on_grids(methods.euler, case.model.path, nfe, ("uniform",)))


def cases(config: Config) -> Iterator[Case]:
    """The models that are there."""
    for name in config.models.split(","):
        if name not in HOUSE:
            raise SystemExit(f"models are {', '.join(HOUSE)}, got {name}")
        if name.startswith("digits") or (Path(HOUSE[name]).exists() and config.data):
            yield Case(name, config)
        else:
            print(f"{name} is left out: it needs {HOUSE[name]} (experiments/cifar10.py makes it) and --data", file=sys.stderr)


def main(
    *,
    config: Config = Config(),  # frozen
    out: Path = Path(__file__).parent / "results" / "cifar10.json",  # digits.json holds the digits, on more noises
    only: str = "",
) -> None:
    """Run the cells that are missing (with --only, those in whose names this pattern is found)."""
    cells: dict[str, Cell] = {}
    wanted = re.compile(only)
    for case in cases(config):
        parts: dict[str, Callable[[Rows], Row]] = {f"stock/{n}": partial(stock, case, n) for n in (*case.budgets, 20)}
        parts |= {"dopri5": partial(adaptive, case)}
        parts |= {
            "fit": partial(tuned, case, "fit", case.budgets),
            "learn": partial(tuned, case, "learn", case.learnt),
        }
        parts |= {f"images/{n}": partial(distances, case, n) for n in case.budgets}
        parts |= {f"others/{n}": partial(others, case, n) for n in case.budgets}
        parts |= {f"learned/{n}": partial(learned, case, n) for n in case.budgets if case.small or n == 8}
        parts |= {f"learned-images/{n}": partial(learned_images, case, n) for n in case.budgets if case.small or n == 8}
        parts |= {f"pfdiff/{n}/guidance {w:g}": partial(pfdiff, case, n, w) for n in case.budgets for w in (1.0, 2.0)}
        parts |= {f"guidance/{n}": partial(ranges, case, n) for n in case.budgets if case.name == "digits" and n in (6, 8)}
        if case.name == "cifar10-flow":
            parts |= {f"moved/{n}": partial(moved, case, n) for n in case.budgets}
        cells |= {f"{case.name}/{k}": cell for k, cell in parts.items() if wanted.search(f"{case.name}/{k}")}
    fill(
        out,
        replace(config, data=Path(config.data).name),
        cells,
        lambda rows: f"{len(rows)} cells; python benchmarks/cifar10_page.py writes docs/benchmarks.md\n",
        free=("seeds", "count", "learn"),  # what cells say themselves
    )


if __name__ == "__main__":
    cyclopts.run(main)
