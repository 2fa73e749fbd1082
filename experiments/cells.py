"""What the experiments share: resumable cells, samples, histograms and cells of tables."""

import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep import CondOT, Model, TimeGrid, methods
from fewstep._disk import atomic_write
from fewstep.field import ModelField
from fewstep.training.data import Source
from fewstep.training.loop import train
from fewstep.training.recipe import Keeping, Recipe, changed

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]
Rows = dict[str, Row]
Cell = Callable[[Rows], Row]
"""One entry of a results file, computed from those before it."""


def fill(
    file: Path, config: Any, cells: Mapping[str, Cell], table: Callable[[Rows], str], free: Sequence[str] = ("seeds",)
) -> Rows:
    """Run the cells that `file` lacks, in order, and write it and the table beside it after each.

    Args:
        file: of results.
        config: a dataclass, kept there.
        cells: what to run, by name.
        table: writes the table.
        free: settings that may differ from those of the cells that are there, such as more seeds.

    Raises:
        SystemExit: `file` holds results of other settings.
    """
    plain = json.loads(json.dumps(asdict(config)))
    held = json.loads(file.read_text()) if file.exists() else {"config": plain, "cells": {}}
    differing = {name: pair for name, pair in changed(held["config"], plain).items() if name not in free}
    if differing:
        raise SystemExit(f"{file} holds results of other settings ({differing}); move it away, or give another --out")
    rows: Rows = held["cells"]
    for name, cell in cells.items():
        if name in rows:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        row = cell(rows)
        rows[name] = row | {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
        _write(file, plain, rows, table)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    _write(file, plain, rows, table)
    return rows


def _write(file: Path, config: dict[str, Any], rows: Rows, table: Callable[[Rows], str]) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if config.get("device", "cpu") != "cpu":
        machine += f", {torch.cuda.get_device_name(config['device'])}"
    atomic_write(file, json.dumps({"config": config, "machine": machine, "cells": rows}, indent=1) + "\n")
    atomic_write(file.with_suffix(".md"), table(rows))


def trained(recipe: Recipe, folder: Path, data: Source | None = None) -> tuple[Model, Row]:
    """A model of this recipe from its first step on, with what training cost and the last loss of its curve."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    model = train(recipe, folder, data=data, keeping=Keeping(every=recipe.steps))
    last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(folder)
    kept = {k: last[k] for k in ("loss", "held_out") if k in last}
    return model, kept | {"train_cpu_s": round(time.process_time() - start, 1)}


def solved(field: ModelField, noise: Tensor, calls: int, piece: int = 2048) -> Tensor:
    """Samples by `calls` network calls each: Runge-Kutta 4 on CondOT, DPM-Solver++ 2M in the log-SNR on other paths."""
    path = field.path
    if isinstance(path, CondOT):
        method, grid = methods.rk4, TimeGrid.uniform(calls // 4)
    else:
        method, grid = methods.dpmpp(path, 2), TimeGrid.log_snr(calls, path)
    with torch.no_grad():
        return torch.cat([method(field, grid, path.start_scale * part) for part in noise.split(piece)])


def histogram(x: Tensor, edges: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Shares of the points `x` (n, d) in the boxes of a product grid; what lies outside has boxes of its own."""
    place = np.zeros(len(x), dtype=np.int64)
    for column, edge in zip(x.detach().cpu().double().numpy().T, edges, strict=True):
        place = place * (len(edge) + 1) + np.digitize(column, edge)
    size = int(np.prod([len(edge) + 1 for edge in edges]))
    return np.bincount(place, minlength=size) / len(x)


def total_variation(a: Tensor, b: Tensor, edges: Sequence[NDArray[np.float64]]) -> float:
    """Half the absolute difference of two histograms: 0 for equal ones, 1 for disjoint ones."""
    return float(np.abs(histogram(a, edges) - histogram(b, edges)).sum() / 2)


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and standard deviation over seeds, as a cell of a table."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    every = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)
