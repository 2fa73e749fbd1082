"""Tables tuned on one digits model, measured on others: another seed, another width, trained with divergence matching.

    python benchmarks/transfer.py [--steps 3000] [--nfe 8]

All models are trained here, alike. Own: tuned on the model itself. Transferred: tuned on the first. RMSE to each model's own
converged solution on noise that no tuner saw, with 95 % bootstrap intervals.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cyclopts
import torch

from fewstep import Boss, LeastSquares, Model, NonStationary, Sampler, TimeGrid, compare, load, methods, tabulate
from fewstep.noise import draw
from fewstep.training.loop import train
from fewstep.training.recipe import RECIPES, Keeping, Recipe
from fewstep.training.state import checkpoints

Tune = Callable[[Model, int], Sampler]


def _models(folder: Path, steps: int) -> dict[str, Model]:
    first = replace(RECIPES["digits"], steps=steps)
    recipes: dict[str, Recipe] = {
        "first": first,
        "another seed": replace(first, seed=1),
        "two thirds as wide": replace(first, width=128),
        "trained with FDM": replace(first, divergence=0.01),
    }
    found = {}
    for name, recipe in recipes.items():
        out = folder / name.replace(" ", "-")
        if not (out / "config.json").exists():
            train(recipe, out, resume=bool(checkpoints(out)), keeping=Keeping(every=500), progress=True)
        found[name] = load(out)
    return found


def _boss(model: Model, nfe: int) -> Sampler:
    return Boss()(*_problem(model, 32, 0), nfe=nfe)


def _fit(model: Model, nfe: int) -> Sampler:
    return LeastSquares()(*_problem(model, 64, 0), nfe=nfe)


def _learned(model: Model, nfe: int) -> Sampler:
    return NonStationary()(*_problem(model, 64, 0), nfe=nfe)


def _uniform(model: Model, nfe: int) -> Sampler:
    return tabulate(methods.euler, TimeGrid.uniform(nfe))


TUNERS: dict[str, Tune] = {"BOSS's steps (Euler)": _boss, "fit": _fit, "NonStationary": _learned}


def _problem(model: Model, count: int, which: int):
    assert model.shape is not None
    return model.given(torch.arange(count) % 10), draw((count, *model.shape), 0, which)


def main(
    steps: int = 3000,
    nfe: int = 8,
    noises: int = 256,
    out: Path = Path(__file__).parent / "results" / "transfer.json",
    runs: Path = Path("runs/transfer"),
) -> None:
    """Train, tune, measure."""
    models = _models(runs, steps)
    firsts = {name: tune(models["first"], nfe) for name, tune in TUNERS.items()}
    results: dict[str, dict] = {}
    print(f"NFE {nfe}, {noises} test noises, models of {steps} steps\n")
    print("| model | table | own | transferred | uniform Euler |\n|---|---|---|---|---|")
    for name, model in models.items():
        tables = {"uniform": _uniform(model, nfe)}
        for tuner, tune in TUNERS.items():
            tables[f"{tuner}, own"] = firsts[tuner] if name == "first" else tune(model, nfe)
            tables[f"{tuner}, transferred"] = firsts[tuner]
        report = compare(tables, *_problem(model, noises, 7), metrics=("rmse",))
        rows = {row.name: row.metrics["rmse"] for row in report.rows}
        results[name] = {k: [v.value, v.low, v.high] for k, v in rows.items()}
        for tuner in TUNERS:
            moved = "-" if name == "first" else str(rows[f"{tuner}, transferred"])
            print(f"| {name} | {tuner} | {rows[f'{tuner}, own']} | {moved} | {rows['uniform']} |", flush=True)
    out.write_text(json.dumps({"steps": steps, "nfe": nfe, "noises": noises, "rmse": results}, indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
