"""Trajectories of dynamical systems: CFM against flow-and-divergence matching (FDM) on CondOT and VE, at equal steps.

    python experiments/dynamics.py [--print-config] [--seeds 3] [--steps 500] ...

The learning rate of each objective on each path is the best of the same few, by the held-out regression loss of as many short
runs on one system. An interrupted run goes on with the cells that are missing.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cyclopts
import numpy as np
import torch

from cells import RESULTS, Cell, Row, Rows, fill, markdown, spread, trained
from fewstep.training.data.source import FiniteSource
from fewstep.training.recipe import Recipe
from systems import STEPS, SYSTEMS, trajectories
from trajectory_measures import Truth, judged

PATHS: dict[str, Callable[["Config"], dict[str, Any]]] = {
    "OT": lambda config: {},
    "VE": lambda config: {
        "path": f"VE(sigma_min={config.smear}, sigma_max={config.sigma_max})", "predicts": "data", "raw": "edm",
        "weight": "edm", "sigma_data": 1.0,
    },
}  # fmt: skip
"""What each changes of the recipe. VE is trained as in EDM, with times uniform in log(sigma)."""

OBJECTIVES: dict[str, Callable[["Config"], dict[str, Any]]] = {
    "CFM": lambda config: {},
    "FDM": lambda config: {
        "divergence": config.divergence, "divergence_form": "vector", "divergence_share": config.share
    },
}  # fmt: skip


@cyclopts.Parameter(name="*")
@dataclass(frozen=True)
class Config:
    """The same network, steps and trials for both objectives."""

    systems: tuple[str, ...] = ("lorenz", "fitzhugh", "pendulum")
    seeds: int = 3
    """Of weights, data order, noise and times; the trajectories are the same."""
    steps: int = 500
    batch: int = 128
    width: int = 256
    blocks: int = 3
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    """Learning rates that are tried."""
    tuned_on: str = "lorenz"
    trial_steps: int = 200
    divergence: float = 0.01
    """Weight of FDM's term, which must be small in many dimensions; 0.1 was tried first and was worse."""
    share: float = 0.25
    """Part of the batch that it is computed on."""
    sigma_max: float = 20.0
    """Of VE: the largest distance between standardised trajectories is about 30, their leading standard deviation 5 to 10."""
    smear: float = 0.01
    """sigma_min of VE; log-likelihoods are of trajectories with so much noise, on both paths."""
    train: int = 12_000
    reference: int = 16_000
    """True trajectories that samples are compared with."""
    fresh: int = 8_000
    """Further ones, for noise floors and log-likelihoods."""
    samples: int = 2048
    guided: int = 512
    calls: int = 40
    """Network calls per sample (twice as many under event guidance)."""
    likelihoods: int = 128
    tol: float = 1e-4
    """Of dopri5."""
    bins: int = 64


class Data(NamedTuple):
    """Standardised trajectories to train on, true ones to compare with."""

    source: FiniteSource
    truth: Truth


def main(
    config: Config = Config(),  # frozen
    *,
    out: Path = RESULTS / "dynamics.json",
    runs: Path = Path("runs/dynamics"),
    print_config: bool = False,
) -> None:
    """Fill `out` and the table beside it."""
    if print_config:
        return print(json.dumps(asdict(config), indent=1))
    variants = [(path, objective) for path in PATHS for objective in OBJECTIVES]
    cells: dict[str, Cell] = {
        f"tune/{path}/{objective}/{rate:g}": partial(_trial, config, path, objective, rate, runs)
        for path, objective in variants
        for rate in config.rates
    }
    for seed in range(config.seeds):
        for system in config.systems:
            for path, objective in variants:
                cells[f"{system}/{path}/{objective}/{seed}"] = partial(_final, config, system, path, objective, seed, runs)
    fill(out, config, cells, partial(table, config))
    return None


@cache
def opened(config: Config, name: str, runs: Path) -> Data:
    """The trajectories of a system, made once and kept in the run folder."""
    system, count = SYSTEMS[name], config.train + config.reference + config.fresh
    file = runs / f"{name}-{count}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file.with_suffix(".part.npy"), trajectories(system, count, seed=0))
        file.with_suffix(".part.npy").rename(file)
    every = torch.from_numpy(np.load(file))
    train, reference, fresh = every.split([config.train, config.reference, config.fresh])
    mean, std = train.mean((0, 1)), train.std((0, 1))
    source = FiniteSource(((train - mean) / std).float(), origin=f"trajectories of {name}", hold_out=12)
    return Data(source, Truth(system, reference, fresh, mean, std))


def recipe_of(config: Config, system: str, path: str, objective: str, rate: float, seed: int, steps: int) -> Recipe:
    """One point of the comparison."""
    changes = PATHS[path](config) | OBJECTIVES[objective](config)
    return Recipe(
        data=system, seed=seed, steps=steps, batch=config.batch, lr=rate, network="mlp", width=config.width,
        blocks=config.blocks, warmup=min(100, steps // 10), weight_decay=0.0, ema=0.99, **changes,
    )  # fmt: skip


def _trial(config: Config, path: str, objective: str, rate: float, runs: Path, rows: Rows) -> Row:
    recipe = recipe_of(config, config.tuned_on, path, objective, rate, 1000, config.trial_steps)  # a seed of its own
    return trained(recipe, runs / "trial", opened(config, config.tuned_on, runs).source)[1]


def chosen_rate(config: Config, path: str, objective: str, rows: Rows) -> float:
    """The learning rate with the least held-out regression loss."""
    return min(config.rates, key=lambda rate: rows[f"tune/{path}/{objective}/{rate:g}"]["held_out"])


def _final(config: Config, name: str, path: str, objective: str, seed: int, runs: Path, rows: Rows) -> Row:
    rate, data = chosen_rate(config, path, objective, rows), opened(config, name, runs)
    recipe = recipe_of(config, name, path, objective, rate, seed, config.steps)
    model, row = trained(recipe, runs / "final", data.source)
    return {"lr": rate} | row | judged(config, model, data.truth, seed)


COLUMNS = {
    "held-out loss": ("held_out", 4), "TV": ("tv", 4), "floor": ("tv_floor", 4), "out of range": ("outside", 4),
    "rel. error": ("relative_error", 3), "nats/dim": ("nats_per_dim", 3), "TV of C": ("event_tv", 3),
    "floor ": ("event_tv_floor", 3), "P(E)": ("event", 3), "P(E) data": ("event_data", 3), "P(E) guided": ("guided_event", 3),
    "TV given E": ("guided_tv", 3), "floor  ": ("guided_tv_floor", 3), "training CPU s": ("train_cpu_s", 0),
}  # fmt: skip
"""Head of the table -> entry of a row and digits; heads are told apart by spaces."""


def table(config: Config, rows: Rows) -> str:
    """Mean and standard deviation over seeds, and the trials."""
    lines, trials = [], []
    for system in config.systems:
        for path in PATHS:
            for objective in OBJECTIVES:
                found = [row for name, row in rows.items() if name.rsplit("/", 1)[0] == f"{system}/{path}/{objective}"]
                numbers = [spread([row.get(key) for row in found], digits) for key, digits in COLUMNS.values()]
                if found:
                    lines.append([system, path, objective, f"{found[0]['lr']:g}", str(len(found)), *numbers])
    for path in PATHS:
        for objective in OBJECTIVES:
            losses = [rows.get(f"tune/{path}/{objective}/{rate:g}", {}).get("held_out") for rate in config.rates]
            trials.append([path, objective, *(spread([loss], 4) for loss in losses)])
    note = (
        f"{config.steps} steps of {config.batch}, MLP {config.width} x {config.blocks} on {STEPS} states at once; FDM: vector "
        f"form on {config.share:g} of the batch, weight {config.divergence:g}. Mean ± standard deviation over seeds. Held-out "
        f"losses after {config.trial_steps} steps on {config.tuned_on}, by learning rate:\n"
    )
    head = ["system", "path", "objective", "lr", "seeds", *COLUMNS]
    return f"{markdown(head, lines)}\n{note}\n{markdown(['path', 'objective', *map('{:g}'.format, config.rates)], trials)}"


if __name__ == "__main__":
    cyclopts.run(main)
