"""Train the bundled digits model: ``python -m fewstep.zoo.train_digits --out runs/digits``.

A class-conditional flow on straight paths, on scikit-learn's 1,797 scanned digits of 8x8 pixels. Every sixth digit is kept
aside, so that the model card can say how far the network has learnt digits and how far it has learnt these digits by heart.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from .._disk import atomic_write
from .._types import FewstepError
from ..artifact import _first, _Strict
from ..field import Model, adapt
from ..path import CondOT
from .checkpoint import CONFIG, TrainingRecord, save_model
from .network import ResidualMLP
from .run_state import CHECKPOINT, Run, stored_recipe, versions
from .watch import interrupted, shown

SHAPE, CLASSES, PATH = (1, 8, 8), 10, CondOT()
HOLD_OUT = 6
"""Every sixth digit is kept aside. Chosen once: models with other seeds are measured on the same digits."""

CURVE = "curve.json"


class Recipe(_Strict):
    """The settings; with the versions they decide every bit of the weights.

    Attributes:
        steps: optimiser steps.
        seed: of everything random.
        batch: digits per step.
        lr: the highest learning rate; it rises over `warmup` steps and falls on a cosine to zero.
        warmup: steps.
        weight_decay: of AdamW.
        ema: decay of the weights' moving average.
        label_dropout: share of digits that are shown without their label, for guidance.
        dropout: inside the network.
        width: of the network.
        blocks: of the network.
        every: steps between two checkpoints, which are also the points of the loss curve.
    """

    steps: Annotated[int, Field(ge=1)] = 10_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch: Annotated[int, Field(ge=1)] = 512
    lr: Annotated[float, Field(gt=0, le=100)] = 1e-3
    warmup: Annotated[int, Field(ge=1)] = 200
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    width: Annotated[int, Field(ge=1)] = 192
    blocks: Annotated[int, Field(ge=0)] = 3
    every: Annotated[int, Field(ge=1)] = 500


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in [-1, 1] with labels (n,), and those kept aside from training."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def load_digits() -> Digits:
    """scikit-learn's digits; no network access.

    Raises:
        FewstepError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise FewstepError("the digits come with scikit-learn, which is missing: pip install 'fewstep[train]'") from error
    pixels, target = sklearn_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, *SHAPE)  # pixels are 0..16
    labels = torch.tensor(target)
    held = torch.arange(len(images)) % HOLD_OUT == HOLD_OUT - 1
    return Digits(images[~held], labels[~held], images[held], labels[held])


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> Model:
    """Train, and save the model and its loss curve in `out`, beside the last checkpoint.

    Args:
        recipe: the settings.
        out: folder for the checkpoint while training, and for the model.
        resume: continue the unfinished run in `out`; the weights will be those of an undisturbed run, bit for bit.

    Returns:
        The trained model.

    Raises:
        FewstepError: the loss is NaN or infinite (the last good checkpoint stays), `out` holds a run or a model and
            `resume` is off, or the run in it is another one.
        KeyboardInterrupt: Ctrl-C or a termination signal, after the current step and a checkpoint.
    """
    digits, file = load_digits(), out / CHECKPOINT
    run = _begin(recipe, file, resume)
    with torch.random.fork_rng(devices=[]), interrupted() as asked, shown(run, recipe.steps, recipe.every) as show:
        while run.step < recipe.steps:
            clock, cpu = time.perf_counter(), time.process_time()
            torch.manual_seed(_key(recipe.seed, run.step))  # everything random below depends on (seed, step) and no more
            rate = _learning_rate(recipe, run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate

            pick = torch.randint(len(digits.images), (recipe.batch,))
            x1 = digits.images[pick]
            label = torch.where(torch.rand(recipe.batch) < recipe.label_dropout, CLASSES, digits.labels[pick])
            t = (torch.arange(recipe.batch) + torch.rand(recipe.batch)) / recipe.batch  # one in each small part of [0, 1]
            line = PATH.interpolate(torch.randn_like(x1), x1, t)
            loss = (run.network(line.xt, t, label) - line.ut).square().mean()
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()

            run.step += 1
            run.update_average(recipe.ema)
            run.pending.append(loss.item())
            pause, stop = run.step % recipe.every == 0 or run.step == recipe.steps, asked()
            if not math.isfinite(run.pending[-1]) or ((pause or stop) and not run.finite()):
                raise _diverged(run, rate, file)
            if pause:
                run.curve.append(_point(run, digits))
                run.pending = []
            run.seconds += time.perf_counter() - clock
            run.cpu_seconds += time.process_time() - cpu
            if pause or stop:
                run.save(file)
            show()
            if stop and run.step < recipe.steps:
                raise KeyboardInterrupt
    return _finish(run, recipe, digits, out)


def _begin(recipe: Recipe, file: Path, resume: bool) -> Run:
    if file.exists() and not resume:
        raise FewstepError(f"{file} is an unfinished run; continue it with --resume, or choose another --out")
    if file.with_name(CONFIG).exists() and not resume:
        raise FewstepError(f"{file.parent} holds a finished model; choose another --out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = ResidualMLP(SHAPE, CLASSES, recipe.width, recipe.blocks, recipe.dropout)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    run = Run.begin(recipe.model_dump(), network, optimizer)
    if resume:
        run.restore(file)
    return run


def _key(seed: int, step: int) -> int:
    # PyTorch's CPU generator keeps 32 bits of its seed: mix before, rather than shift the step out of sight.
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _learning_rate(recipe: Recipe, step: int) -> float:
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def flow_loss(network: nn.Module, images: Tensor, labels: Tensor, repeats: int) -> float:
    """Mean squared velocity error of `network` on these digits, each with `repeats` fixed times and noises."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    with torch.no_grad():
        for _ in range(repeats):
            noise = torch.randn(images.shape, generator=generator)
            t = torch.rand(len(images), generator=generator)
            line = PATH.interpolate(noise, images, t)
            total += float((network(line.xt, t, labels) - line.ut).square().mean())
    return total / repeats


def _point(run: Run, digits: Digits) -> dict[str, float]:
    """One entry of the loss curve: the batches since the last one, and the averaged weights on seen and unseen digits."""
    return {
        "step": run.step,
        "batches": sum(run.pending) / len(run.pending),
        "seen": flow_loss(run.ema, digits.images, digits.labels, repeats=4),
        "unseen": flow_loss(run.ema, digits.held_images, digits.held_labels, repeats=20),
    }


def _diverged(run: Run, rate: float, file: Path) -> FewstepError:
    kept = f"the last good checkpoint (step {run.saved}) is kept in {file}" if run.saved else "there is no checkpoint yet"
    return FewstepError(
        f"the loss is {run.pending[-1]:g} at step {run.step}, learning rate {rate:.3g}: training has diverged; {kept}; "
        "start afresh with a lower --lr in another --out"
    )


def _finish(run: Run, recipe: Recipe, digits: Digits, out: Path) -> Model:
    samples = recipe.steps * recipe.batch
    record = TrainingRecord(
        command=f"python -m fewstep.zoo.train_digits --steps {recipe.steps} --seed {recipe.seed} --lr {recipe.lr:g}",
        data=f"scikit-learn load_digits: {len(digits.images)} seen, {len(digits.held_images)} kept aside (every sixth)",
        recipe=recipe.model_dump(exclude={"steps", "seed"}),
        seed=recipe.seed,
        steps=recipe.steps,
        samples=samples,
        network_passes=3 * samples,
        hours=run.seconds / 3600,
        cpu_hours=run.cpu_seconds / 3600,
        losses={
            "batches": run.curve[-1]["batches"],
            "seen": flow_loss(run.ema, digits.images, digits.labels, repeats=8),
            "unseen": flow_loss(run.ema, digits.held_images, digits.held_labels, repeats=40),
        },
        versions=versions() | {"numpy": np.__version__, "machine": platform.machine()},
    )
    model = adapt(run.ema, path=PATH, shape=SHAPE, classes=CLASSES, null_label=CLASSES, name="digits")
    save_model(model, out, data_range=(-1.0, 1.0), training=record)
    atomic_write(out / CURVE, "[\n" + ",\n".join(json.dumps(point) for point in run.curve) + "\n]\n")
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 when the model and its card are written, 1 with one line on an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.zoo.train_digits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    settings = {"steps": int, "seed": int, "lr": float, "every": int}
    for name, kind in settings.items():
        parser.add_argument(f"--{name}", type=kind, help=f"default: {Recipe.model_fields[name].default}")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    torch.set_num_threads(1)  # sums are ordered by thread: the same weights on any number of cores, and no slower this small
    try:
        before = stored_recipe(args.out / CHECKPOINT) if args.resume else {}
        train(Recipe(**{**before, **given}), args.out, resume=args.resume)
        print(f"model saved in {args.out}; measuring it for the card", file=sys.stderr)
        from .card import write_card

        write_card(args.out)
        (args.out / CHECKPOINT).unlink(missing_ok=True)
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume --out {args.out}", file=sys.stderr)
        return 130
    except (FewstepError, ValidationError) as error:
        print(f"train_digits: {_first(error) if isinstance(error, ValidationError) else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
