"""End-point error against NFE: every method, every stock scheduler, dopri5 and the tuned samplers, on the same noise.

    python benchmarks/work_precision.py [--problems digits,ring,spectrum] [--seeds 0,1,2]

Problems: closed-form mixture flows in 2 and 64 dimensions, and the bundled digits model. Stock schedulers run as shipped and
with the corrected grid (shift applied once, no wasted last call); claims are against the best of them all at that NFE. Tuning
noise, selection noise and test noise are three different sets; the figures are of the test noise.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from fewstep import Model, compare, load, tabulate, tune
from fewstep._errors import BudgetError
from fewstep.candidates import candidates
from fewstep.grid import TimeGrid
from fewstep.methods import registry
from fewstep.noise import TEST, draw, enough
from fewstep.trajectory import reference
from fewstep.zoo.mixtures import ring, spectrum

PROBLEMS = {"digits": lambda: load("digits"), "ring": ring, "spectrum": spectrum}
BUDGETS = (4, 5, 6, 7, 8, 9, 10)
EFFORTS = ("search", "fit", "learn")


def noises(model: Model) -> int:
    """As many as `tune` measures on."""
    assert model.shape is not None
    return enough(TEST, math.prod(model.shape))


def untuned(model: Model, seed: int) -> list[dict]:
    """Every registered method on its uniform grid, every stock scheduler, on the test noise of this seed."""
    count = noises(model)
    field = model.given(None if model.classes is None else torch.arange(count) % model.classes)
    assert model.shape is not None
    noise = draw((count, *model.shape), seed, 2)
    solution = reference(field, noise)
    rows = []
    for nfe in BUDGETS:
        tables, groups = {}, {}
        for candidate in candidates(field, nfe, {}):
            if candidate.group in ("stock", "corrected"):
                tables[candidate.name], groups[candidate.name] = candidate.sampler, candidate.group
        for name, method in registry(model.path).items():
            try:
                tables[name] = tabulate(method, TimeGrid.uniform(method.intervals(nfe)))
                groups[name] = "method"
            except (BudgetError, ValueError):
                continue  # this method cannot spend exactly this budget, or not on a uniform grid
        report = compare(tables, field, noise, reference=solution, metrics=("rmse",), groups=groups)
        rows += [{"name": r.name, "nfe": nfe, "group": r.group, "rmse": r.metrics["rmse"].value} for r in report.rows]
    return rows


def tuned(model: Model, seed: int) -> tuple[list[dict], dict]:
    """`tune` at every effort: rows and costs."""
    rows, cost = [], {}
    for effort in EFFORTS:
        start = time.perf_counter()
        result = tune(model, nfe=BUDGETS, effort=effort, seed=seed)
        cost[effort] = {"seconds": time.perf_counter() - start, "network passes": result.report.facts["tuning passes"]}
        for row in result.report.rows:
            if row.group == "tuned":
                e = row.metrics["rmse"]
                rows.append({"name": f"tune --effort {effort}", "nfe": row.nfe, "group": "tuned", "rmse": e.value,
                             "low": e.low, "high": e.high, "made by": row.name})  # fmt: skip
            elif row.group == "adaptive" and effort == "fit":
                rows.append({"name": row.name, "nfe": row.nfe, "group": "adaptive", "rmse": row.metrics["rmse"].value})
    return rows, cost


def table(rows: list[dict], seeds: int) -> None:
    """Medians over seeds, and the ratios to the best stock scheduler."""

    def of(nfe: int, *groups: str) -> dict[str, float]:
        names = {r["name"] for r in rows if r["nfe"] == nfe and r["group"] in groups}
        found = {n: [r["rmse"] for r in rows if r["name"] == n and r["nfe"] == nfe] for n in names}
        return {n: statistics.median(v) for n, v in found.items() if len(v) == seeds}

    head = ["NFE", "uniform Euler", "best stock, as shipped", "best stock, any grid", "best method, uniform"]
    head += ["search", "fit", "/ best stock", "learn", "/ best stock"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for nfe in BUDGETS:
        shipped, stock, methods, best = of(nfe, "stock"), of(nfe, "stock", "corrected"), of(nfe, "method"), of(nfe, "tuned")
        search, fit, learn = (best[f"tune --effort {effort}"] for effort in EFFORTS)
        cells = [f"{methods['euler']:.4f}"]
        for group in (shipped, stock, methods):
            name = min(group, key=lambda n: group[n])
            cells.append(f"{group[name]:.4f} ({name})")
        cells += [f"{search:.4f}"]
        for value in (fit, learn):
            cells += [f"{value:.4f}", f"**{value / min(stock.values()):.2f}**"]
        print(f"| {nfe} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "work_precision.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds = [int(s) for s in args.seeds.split(",")]
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for problem in args.problems.split(","):
        model, rows, costs = PROBLEMS[problem](), [], []
        for seed in seeds:
            fitted, cost = tuned(model, seed)
            rows += [{**r, "seed": seed} for r in [*untuned(model, seed), *fitted]]
            costs.append(cost)
        print(f"\n{problem}: RMSE per element at the end point, {noises(model)} test noises, medians of seeds {args.seeds}\n")
        table(rows, len(seeds))
        for effort in costs[0]:
            spent = [c[effort] for c in costs]
            time_spent, passes = (statistics.median(c[key] for c in spent) for key in ("seconds", "network passes"))
            print(
                f"tune --effort {effort}, all {len(BUDGETS)} budgets: {time_spent:.0f} s, {passes:.3g} network passes of tuning"
            )
        results[problem] = {"rows": rows, "costs": costs, "seeds": seeds, "noises": noises(model)}
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
