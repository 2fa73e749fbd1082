"""CIFAR-10: the flow and the VP model that benchmarks use, and CFM against FDM at equal steps and at equal time.

    python experiments/cifar10.py --train cifar10-train.parquet --test cifar10-test.parquet [--hours 2] [--print-config]
    python experiments/cifar10.py ... --start models/cifar10-flow --out experiments/results/cifar10-continued.json

Frechet distances in the features of a classifier trained here, beside the floor of as many real images; bits per dimension of
test images. An interrupted run goes on with the cells that are missing, and with the training that was interrupted.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cyclopts
import torch
from torch import Tensor

from cells import RESULTS, Cell, Row, Rows, fill, markdown, solved, spread
from classifier import classifier, embedded
from fewstep import Model, bits_per_dim, load
from fewstep.evaluation import frechet
from fewstep.training.data import Source, open_source
from fewstep.training.loop import train
from fewstep.training.recipe import RECIPES, Keeping, Recipe
from fewstep.training.state import checkpoints
from fewstep.zoo import read_config

MODELS = Path(__file__).parents[1] / "models"
LONGER = 1.2
"""An FDM step costs about so many CFM steps of time (benchmarks/fdm_cost.py)."""


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """Budgets: hours for each of the two models that are kept, steps for each of the comparison's."""

    train: str = ""
    """Parquet file of the training images."""
    test: str = ""
    """Parquet file of the test images."""
    hours: float = 2.0
    """Training time of each of the two models in models/."""
    epochs: float = 3.0
    """Of the classifier."""
    steps: int = 1000
    """Of each model in the comparison of CFM with FDM."""
    seeds: int = 1
    """Of that comparison."""
    start: str = ""
    """Model that the comparison goes on from; default: random weights."""
    lr: float = 6e-4
    precision: Literal["no", "bf16"] = "no"
    """Of the comparison's training."""
    divergence: float = 0.02
    """FDM's weight."""
    samples: int = 2000
    """Images drawn per model, classes in turn."""
    calls: int = 32
    """Network calls per image."""
    likelihoods: int = 64
    """Test images whose bits per dimension are taken."""


def experiment(config: Config, out: Path, runs: Path) -> Rows:
    """All cells."""
    data = open_source(config.train, hold_out=50, flip=True)
    spread_out = open_source(config.train, hold_out=50, flip=True, dequantize=True)
    test = open_source(config.test, limit=None)
    real, labels = _all(test)
    net, facts = classifier(MODELS / "cifar10-classifier", data, (real, labels), config.epochs)
    truth = embedded(net, real)
    pixels = ((real[: config.likelihoods] + 1) * 127.5).round().to(torch.uint8)
    measure = partial(_measured, config, net, truth, pixels, labels[: config.likelihoods])

    def kept(name: str, rows: Rows) -> Row:
        model = _kept(config, name, data, runs)
        return _record(MODELS / name) | measure(model)

    def compared(seed: int, divergence: float, longer: float, rows: Rows) -> Row:
        recipe = replace(
            RECIPES["cifar10-flow"], data=config.train, dequantize=True, seed=seed, steps=round(config.steps * longer),
            decay="cosine", divergence=divergence, start=config.start, lr=config.lr, precision=config.precision,
            warmup=min(200, config.steps // 5) if config.start else 200,
        )  # fmt: skip
        folder = runs / f"compared-{seed}-{divergence:g}-{longer:g}"
        model = _trained(recipe, folder, spread_out, Keeping(every=200))
        row = _record(folder) | measure(model)
        shutil.rmtree(folder)
        return row

    def started(rows: Rows) -> Row:
        return _record(Path(config.start)) | measure(load(config.start))

    def floor(rows: Rows) -> Row:
        half = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
        return {"FD": frechet(truth[half[: config.samples]], truth[half[config.samples :]])} | facts

    cells: dict[str, Cell] = {"real": floor}
    if config.start:
        cells["start"] = started
    else:
        cells |= {name: partial(kept, name) for name in ("cifar10-flow", "cifar10-vp")}
    for seed in range(config.seeds):
        cells[f"CFM/{seed}"] = partial(compared, seed, 0.0, 1.0)
        cells[f"FDM/{seed}"] = partial(compared, seed, config.divergence, 1.0)
        cells[f"CFM, equal time/{seed}"] = partial(compared, seed, 0.0, LONGER)
    return fill(
        out, replace(config, train=Path(config.train).name, test=Path(config.test).name), cells, partial(_table, config)
    )


def _all(source: Source) -> tuple[Tensor, Tensor]:
    images, labels = getattr(source, "data", None), getattr(source, "labels", None)
    assert isinstance(images, Tensor)
    assert isinstance(labels, Tensor)
    return images.float() / 127.5 - 1, labels


def _kept(config: Config, name: str, data: Source, runs: Path) -> Model:
    """The model in models/, trained if it is not there yet."""
    if not (MODELS / name / "config.json").exists():
        recipe = replace(RECIPES[name], data=config.train)
        keeping = Keeping(every=200, preview=1000, seconds=3600 * config.hours, stored="bfloat16")
        _trained(recipe, runs / name, data, keeping)
        shutil.rmtree(runs / name / "previews", ignore_errors=True)
        shutil.copytree(runs / name, MODELS / name)
    return load(MODELS / name)


def _trained(recipe: Recipe, folder: Path, data: Source, keeping: Keeping) -> Model:
    if (folder / "config.json").exists():
        return load(folder)
    return train(recipe, folder, data=data, resume=bool(checkpoints(folder)), keeping=keeping, progress=True)


def _record(folder: Path) -> Row:
    record = read_config(folder).training
    assert record is not None
    return {
        "steps": sum(run.steps for run in record.runs()),
        "train_cpu_h": round(sum(run.cpu_hours for run in record.runs()), 3),
        "network passes": sum(run.network_passes for run in record.runs()),
    } | record.losses


def _measured(config: Config, net: Any, truth: Tensor, pixels: Tensor, labels: Tensor, model: Model) -> Row:
    assert model.shape is not None
    noise = torch.randn(config.samples, *model.shape, generator=torch.Generator().manual_seed(1))
    device = model.device_dtype()[0]
    drawn = []
    for part in torch.arange(config.samples).split(250):
        drawn.append(solved(model.given(part % 10), noise[part].to(device), config.calls).cpu())
    row: Row = {"FD": frechet(embedded(net, torch.cat(drawn)), truth)}
    bits = bits_per_dim(model.given(labels), pixels.to(device), solver=8, max_batch=None)
    return row | {"bits/dim": bits.value, "bits/dim low": bits.low, "bits/dim high": bits.high}


def _table(config: Config, rows: Rows) -> str:
    names = list(dict.fromkeys(name.partition("/")[0] for name in rows))
    lines = []
    for name in names:
        mine = [row for key, row in rows.items() if key.partition("/")[0] == name]
        cells = [spread([row.get(key) for row in mine], 3) for key in ("FD", "bits/dim", "held_out", "train_cpu_h")]
        lines.append([name, str(len(mine)), str(mine[0].get("steps", "-")), *cells])
    accuracy = rows["real"]["test accuracy"]
    return markdown(["model", "seeds", "steps", "FD*", "bits/dim", "held-out loss", "training CPU h"], lines) + (
        f"\nFD*: Frechet distance of {config.samples} samples ({config.calls} calls each) to the 10,000 test images in the 64 "
        f"features of a classifier trained here ({accuracy:.1%} of the test images right); real: {config.samples} test images "
        f"against the others. Bits/dim: {config.likelihoods} test images, uniform dequantisation, Hutchinson, 8 Runge-Kutta "
        "steps; the kept models and a comparison's start were not trained on dequantised images, the comparison's were.\n"
    )


def main(
    *,
    config: Config = Config(),  # frozen
    out: Path = RESULTS / "cifar10.json",
    runs: Path = Path("runs/cifar10"),
    print_config: bool = False,
) -> None:
    """Run the experiment."""
    if print_config:
        print(json.dumps(asdict(config), indent=1))
        return
    if not config.train or not config.test:
        raise SystemExit("pass --train and --test, the two parquet files")
    print(experiment(config, out, runs) and out.with_suffix(".md").read_text())


if __name__ == "__main__":
    cyclopts.run(main)
