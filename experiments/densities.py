"""Densities in the plane: CFM, OT-CFM and flow-and-divergence matching (FDM) on CondOT and VP, at equal steps.

    python experiments/densities.py [--print-config] [--seeds 3] [--steps 1200] ...

Total variation from the truth beside its noise floor, and the mean log-likelihood of samples of the truth beside its
ceiling. An interrupted run goes on with the cells that are missing.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch
from torch import Tensor

from cells import RESULTS, Cell, Row, Rows, fill, markdown, solved, spread, total_variation, trained
from fewstep.evaluation import log_density
from fewstep.keyed import generator
from fewstep.training.data.toys import TOYS
from fewstep.training.recipe import RECIPES

DIVERGENCE = {"divergence_form": "exact", "divergence_share": 1.0}
VARIANCE = {"path": "VP(beta_min=0.1, beta_max=20.0)", "predicts": "noise"}
LONGER = 1.7
"""An FDM step costs about so many CFM steps of time."""
METHODS: dict[str, dict[str, Any]] = {
    "CFM": {},
    "CFM, equal time": {"longer": LONGER},
    "OT-CFM": {"coupling": "minibatch_ot"},
    "FDM": DIVERGENCE,
    "CFM, VP": VARIANCE,
    "FDM, VP": VARIANCE | DIVERGENCE,
    "FDM, vector": {"divergence_form": "vector", "divergence_share": 1.0},
    "FDM, vector on 1/4": {"divergence_form": "vector", "divergence_share": 1 / 4, "lighter": 1 / 4},
    "FDM, vector on 1/16": {"divergence_form": "vector", "divergence_share": 1 / 16, "lighter": 1 / 8},
}
"""What each changes of the recipe density2d; FDM's weight is `Config.divergence` times `lighter` (fewer samples are noisier,
and with the whole weight a sixteenth of the batch does harm), `longer` multiplies the steps."""


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """The same network, steps and learning rate for all methods; CFM also with more steps, as control at equal time."""

    densities: tuple[str, ...] = ("checkerboard", "pinwheel", "8gaussians", "moons")
    seeds: int = 3
    """Of weights, data, noise and times; the test set is one."""
    steps: int = 1200
    batch: int = 128
    lr: float = 2e-3
    width: int = 128
    blocks: int = 3
    divergence: float = 0.2
    """The public 2-D code's 0.1, in this library's normalisation by the dimension."""
    held_out: int = 1000
    """Samples of the truth whose log-likelihood is taken: the same for every cell."""
    tol: float = 1e-5
    """Of dopri5."""
    samples: int = 8192
    reference: int = 2**18
    """Samples of the truth that the model's are compared with."""
    calls: int = 40
    """Network calls per sample."""
    side: float = 5.0
    """Histograms cover [-side, side]^2; mass outside is counted."""
    bins: int = 32
    """Per axis."""


def main(
    config: Config = Config(),  # frozen
    *,
    out: Path = RESULTS / "densities.json",
    runs: Path = Path("runs/densities"),
    print_config: bool = False,
) -> None:
    """Fill `out` and the table beside it."""
    if print_config:
        return print(json.dumps(asdict(config), indent=1))
    cells: dict[str, Cell] = {
        f"{density}/{method}/{seed}": partial(_cell, config, density, method, seed, runs)
        for seed in range(config.seeds)
        for density in config.densities
        for method in METHODS
    }
    fill(out, config, cells, partial(table, config))
    return None


def _cell(config: Config, density: str, method: str, seed: int, runs: Path, rows: Rows) -> Row:
    changes = dict(METHODS[method])
    if changes.keys() & DIVERGENCE.keys():
        changes["divergence"] = config.divergence * changes.pop("lighter", 1.0)
    steps = round(config.steps * changes.pop("longer", 1.0))
    recipe = replace(
        RECIPES["density2d"], data=density, seed=seed, steps=steps, batch=config.batch, lr=config.lr,
        width=config.width, blocks=config.blocks, warmup=min(100, steps // 10), **changes,
    )  # fmt: skip
    model, row = trained(recipe, runs / f"{density}-{method}-{seed}".replace(", ", "-"))
    return row | judged(config, density, seed, model.given())


def judged(config: Config, density: str, seed: int, field: Any) -> Row:
    """Everything that is measured of one model."""
    toy, grid = TOYS[density], [np.linspace(-config.side, config.side, config.bins + 1)] * 2
    truth = toy.sample(generator(0, "reference", density), config.reference)
    fresh = toy.sample(generator(seed, "floor", density), config.samples)
    noise = torch.randn(config.samples, 2, generator=generator(seed, "sampling"))
    drawn = solved(field, noise, config.calls)
    test = toy.sample(generator(0, "test", density), config.held_out)
    logs = log_density(field, test, tol=config.tol)
    ceiling = None if toy.log_density is None else toy.log_density(test)
    known = {} if ceiling is None else {"ceiling": float(ceiling.mean()), "below_se": _error(ceiling - logs.value)}
    return {
        "tv": total_variation(drawn, truth, grid),
        "tv_floor": total_variation(fresh, truth, grid),
        "outside": float((drawn.abs() > config.side).any(1).double().mean()),
        "nats": float(logs.value.double().mean()),
        "nats_se": _error(logs.value),
        "likelihood_nfe": logs.nfe,
    } | known


def _error(values: Tensor) -> float:
    return float(values.double().std() / len(values) ** 0.5)


def table(config: Config, rows: Rows) -> str:
    """Mean and standard deviation over seeds."""
    head = ["density", "method", "seeds", "TV", "TV floor", "nats", "ceiling", "below it", "training CPU s"]
    lines = []
    for density in config.densities:
        for method in METHODS:
            found = [row for name, row in rows.items() if name.rsplit("/", 1)[0] == f"{density}/{method}"]
            if found:
                lines.append([density, method, str(len(found)), *_numbers(lambda key, f=found: [r.get(key) for r in f])])
    note = (
        f"{config.steps} steps of {config.batch} (equal time: x {LONGER:g}), learning rate {config.lr:g}, MLP {config.width} x "
        f"{config.blocks}; FDM: exact divergence of the whole batch, weight {config.divergence:g}; the vector form on parts of "
        f"the batch with weight {config.divergence / 4:g} (1/4) and {config.divergence / 8:g} (1/16). TV: {config.samples} "
        f"samples against {config.reference}, {config.bins}^2 bins; floor: as many samples of the truth. Nats: mean "
        f"log-likelihood of {config.held_out} held-out samples; ceiling: of the truth, on the same samples. Mean ± standard "
        "deviation over seeds.\n"
    )
    return f"{markdown(head, lines)}\n{note}"


def _numbers(of: Callable[[str], list[Any]]) -> list[str]:
    gaps = [None if c is None else c - v for c, v in zip(of("ceiling"), of("nats"), strict=True)]
    ceiling = of("ceiling")[0]
    return [
        spread(of("tv")), spread(of("tv_floor")), spread(of("nats")), "unknown" if ceiling is None else f"{ceiling:.3f}",
        spread(gaps), spread(of("train_cpu_s"), 0),
    ]  # fmt: skip


if __name__ == "__main__":
    cyclopts.run(main)
