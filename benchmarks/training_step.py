"""Throughput of a training step against a bare PyTorch loop and against torchcfm's published loop, on the same network.

    python benchmarks/training_step.py [--torchcfm-venv FOLDER]

fewstep's step is `Session.advance` with its look at the loss: keyed data, noise and times, label dropout, loss, backward
pass, gradient clipping, fused AdamW, averaged weights, counters. The others, written out below:

- bare: random rows, `randn`, `rand`, label dropout, loss, backward pass, clipping, fused AdamW; nothing is checked or logged.
- bare + EMA: the same, and the averaged weights by one `torch._foreach_lerp_`: the work of fewstep's step.
- torchcfm: the loop of examples/images/cifar10/train_cifar10.py (Adam, LambdaLR, clipping, its `ema` over the state dict)
  around `ConditionalFlowMatcher`, with batches by random rows, which favours it.
- torchcfm + DataLoader: the same, with batches from a shuffling `DataLoader`, as published, but without its workers and
  image transforms.

torchcfm pulls torchvision and pins much else, so it goes without its dependencies into a virtual environment of its own,
together with POT, all that its matcher imports. That environment sees this one's packages: every loop runs on the same PyTorch,
in one process, in turn, so that a ratio is of the same machine at the same moment. Where the installation fails, the two rows
are left out. Times are the process's CPU time on one thread (wall-clock on a GPU); wall-clock ratios are given beside them.
"""

import argparse
import importlib.util
import json
import os
import site
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.training import loop
from fewstep.training.assemble import first_network
from fewstep.training.data import FiniteSource
from fewstep.training.recipe import RECIPES, Keeping, Recipe

STEPS = 1_000_000
"""Of the recipes: so many that the learning rate hardly moves."""

CASES: dict[str, tuple[Recipe, int]] = {
    "digits MLP": (replace(RECIPES["digits"], clip=1.0, steps=STEPS), 4),
    "U-Net": (Recipe(data="images.npy", network="unet2d", channels=(32, 64), patch=2, batch=32, steps=STEPS), 1),
}
"""Name -> recipe, steps per turn."""

Step = Callable[[], None]


def session(recipe: Recipe, folder: Path) -> loop.Session:
    """A run of fewstep that has not begun."""
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (4096, 3, 32, 32), np.uint8))
    with chdir(folder):
        return loop._begin(recipe, folder / "run", None, None, False, Keeping(), False)


def fewstep_step(run: loop.Session) -> Step:
    def step() -> None:
        run.advance()
        if run.run.step % run.look == 0:
            run.check_losses()

    return step


def random_rows(source: FiniteSource, recipe: Recipe, device: torch.device) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """``batch() -> (images, labels)`` by random rows of the whole data, uint8 scaled as fewstep does."""
    data, labels = source.data.to(device), None if source.labels is None else source.labels.to(device)

    def batch() -> tuple[Tensor, Tensor | None]:
        rows = torch.randint(len(data), (recipe.batch,), device=device)
        x1 = data.index_select(0, rows)
        x1 = x1 if x1.is_floating_point() else x1.float().div_(127.5).sub_(1)
        return x1, None if labels is None else labels.index_select(0, rows)

    return batch


def bare_step(network: nn.Module, source: FiniteSource, recipe: Recipe, device: torch.device, *, ema: bool) -> Step:
    """A training step without a framework around it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    weights: list[Tensor] = list(network.parameters())
    average = [w.detach().clone() for w in weights]
    batch = random_rows(source, recipe, device)

    def step() -> None:
        x1, label = batch()
        x0, t = torch.randn_like(x1), torch.rand(len(x1), device=device)
        at = t.view(-1, *[1] * (x1.ndim - 1))
        condition = []
        if label is not None:
            dropped = torch.rand(len(x1), device=device) < recipe.label_dropout
            condition = [torch.where(dropped, source.classes or 0, label)]
        output = network(torch.lerp(x0, x1, at), t, *condition)
        nn.functional.mse_loss(output, x1 - x0).backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - recipe.ema)  # type: ignore[reportPrivateImportUsage]  # no public name

    return step


def torchcfm_step(network: nn.Module, source: FiniteSource, recipe: Recipe, device: torch.device, *, loader: bool) -> Step:
    """A step of torchcfm's published loop; labels go to the network as its MNIST notebook hands them over."""
    matcher = importlib.import_module("torchcfm.conditional_flow_matching").ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(step, recipe.warmup) / recipe.warmup)
    average = deepcopy(network)
    rows = random_rows(source, recipe, device)
    batches = loaded(source, recipe) if loader else iter(rows, None)

    def step() -> None:
        optimizer.zero_grad()
        x1, *label = (part.to(device) for part in next(batches) if part is not None)
        x0 = torch.randn_like(x1)
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1)
        vt = network(xt, t, *label)
        loss = torch.mean((vt - ut) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        theirs, mine = network.state_dict(), average.state_dict()
        for key in theirs:
            mine[key].data.copy_(mine[key].data * recipe.ema + theirs[key].data * (1 - recipe.ema))

    return step


def loaded(source: FiniteSource, recipe: Recipe) -> Iterator[Any]:
    """Batches from a DataLoader over the same data, for ever."""
    data = source.data if source.data.is_floating_point() else source.data.float().div(127.5).sub(1)
    columns = [data] if source.labels is None else [data, source.labels]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*columns), batch_size=recipe.batch, shuffle=True, drop_last=True
    )
    while True:
        yield from loader


def contestants(name: str, folder: Path) -> dict[str, Step]:
    """Every loop with a network of its own that starts from the same weights."""
    recipe = CASES[name][0]
    run = session(recipe, folder)
    source, device = run.parts.data, run.device
    assert isinstance(source, FiniteSource)

    def fresh() -> nn.Module:
        return first_network(run.parts).to(device).train()

    found = {
        "fewstep": fewstep_step(run),
        "bare": bare_step(fresh(), source, recipe, device, ema=False),
        "bare + EMA": bare_step(fresh(), source, recipe, device, ema=True),
    }
    if has_torchcfm():
        found["torchcfm"] = torchcfm_step(fresh(), source, recipe, device, loader=False)
        found["torchcfm + DataLoader"] = torchcfm_step(fresh(), source, recipe, device, loader=True)
    return found


def has_torchcfm() -> bool:
    return importlib.util.find_spec("torchcfm") is not None


def turn(step: Step, count: int) -> tuple[float, float]:
    """Wall-clock and processor seconds per step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return (time.perf_counter() - wall) / count, (time.perf_counter() - wall) / count
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def measure(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Steps per second of every loop, and the ratios of fewstep's to each, round by round."""
    steps, count = contestants(name, folder), CASES[name][1]
    for step in steps.values():
        turn(step, 2)
    table: dict[str, list[tuple[float, float]]] = {label: [] for label in steps}
    order = list(steps)
    for _ in range(rounds):
        for label in order:
            table[label].append(turn(steps[label], count))
        order = order[1:] + order[:1]
    rows = []
    for label, times in table.items():
        wall, cpu = ([theirs[k] / ours[k] for theirs, ours in zip(times, table["fewstep"], strict=True)] for k in (0, 1))
        rows.append({
            "network": name, "loop": label, "cpu steps/s": 1 / statistics.median(t[1] for t in times),
            "wall steps/s": 1 / statistics.median(t[0] for t in times), "ratio": statistics.median(cpu),
            "ratio min": min(cpu), "ratio max": max(cpu), "wall ratio": statistics.median(wall),
        })  # fmt: skip
    return rows


def environment(folder: Path) -> Path | None:
    """The interpreter of a virtual environment with torchcfm that sees this one's packages; None where it cannot be made."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        if not python.exists():
            venv.create(folder, with_pip=True)
            (inside,) = folder.glob("[lL]ib/**/site-packages")
            # addsitedir also reads the .pth files there, which an editable installation of fewstep needs
            lines = [f"import site; site.addsitedir({str(path)!r})\n" for path in site.getsitepackages()]
            (inside / "parent.pth").write_text("".join(lines))
        if subprocess.run([python, "-c", "import torchcfm"], capture_output=True).returncode:
            command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "torchcfm", "pot"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            subprocess.run([python, "-c", "import torchcfm"], check=True, capture_output=True, text=True)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        print(f"torchcfm cannot be installed, so its loop is left out: {' '.join(said)}", file=sys.stderr)
        return None
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--torchcfm-venv", type=Path, help="where torchcfm is, or is installed; default: a temporary folder")
    parser.add_argument("--here", action="store_true", help="measure in this interpreter, with torchcfm only if it is here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.here and not has_torchcfm():
            python = environment(args.torchcfm_venv or Path(folder) / "venv")
            words = ["--here", "--rounds", str(args.rounds), "--out", str(args.out)]
            sys.exit(subprocess.run([python or sys.executable, __file__, *words]).returncode)
        compare(args.rounds, args.out, Path(folder))


def compare(rounds: int, out: Path, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in CASES:
        (folder / name).mkdir()
        rows += measure(name, rounds, folder / name)
    versions = {package: version(package) for package in ("torch", "accelerate", "diffusers")}
    if has_torchcfm():
        versions["torchcfm"] = version("torchcfm")
    clock = "wall-clock" if torch.cuda.is_available() else "CPU time of one thread"
    print(f"steps per second by {clock}, medians of {rounds} interleaved rounds; ratio = fewstep's steps/s over the loop's")
    print("| network | loop | steps/s | ratio (min to max) | ratio by wall-clock |")
    print("|---|---|---|---|---|")
    for r in rows:
        ratio = f"{r['ratio']:.3f} ({r['ratio min']:.2f} to {r['ratio max']:.2f}) | {r['wall ratio']:.3f}"
        own = r["loop"] == "fewstep"
        print(f"| {r['network']} | {r['loop']} | {r['cpu steps/s']:.1f} | {' | ' if own else ratio} |")
    print(", ".join(f"{package} {number}" for package, number in versions.items()))
    out.parent.mkdir(exist_ok=True)
    settings = {name: {"batch": recipe.batch, "steps per turn": count} for name, (recipe, count) in CASES.items()}
    document = {"rounds": rounds, "clock": clock, "versions": versions, "cases": settings, "rows": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
