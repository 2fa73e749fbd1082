"""The end of a training run: the model's folder with its record, curve, pictures and card."""

import io
import json
import platform
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from .._disk import atomic_write
from ..field import Model
from ..outputs import picture
from ..zoo.checkpoint import WEIGHTS, save_model
from ..zoo.records import Precision, TrainingRecord
from .assemble import Parts
from .ingredients import Own
from .measure import draw
from .recipe import NETWORK_OPTIONS, RECIPES, Recipe, plain
from .state import Run, checkpoints, versions

CURVE = "curve.jsonl"

OBJECTIVE = ("target", "weight", "huber", *(f.name for f in fields(Recipe) if f.name.startswith("divergence")), "probes")
"""Fields of `Recipe` that an objective of the caller's own stands for."""


def write_curve(curve: list[dict[str, float]], out: Path) -> None:
    """The loss curve, one JSON object a line; whole or not at all."""
    atomic_write(out / CURVE, "".join(json.dumps(point) + "\n" for point in curve))


def finish(run: Run, parts: Parts, model: Model, out: Path, stored: Precision, own: Own) -> None:
    """Write the folder and clear the checkpoints away.

    Args:
        run: the finished run.
        parts: what it was made of.
        model: the model on averaged weights.
        out: the folder.
        stored: precision of the weights.
        own: what the caller passed; of a network that is none of fewstep's only the weights are written.
    """
    write_curve(run.curve, out)
    record, whole = training_record(run, parts, own), not own.network
    if whole:
        save_model(model, out, stored=stored, data_range=parts.data.data_range, training=record)
    else:
        tensors = {k: v.detach().cpu().clone().to(getattr(torch, stored)) for k, v in run.ema.state_dict().items()}
        atomic_write(out / WEIGHTS, save_tensors(tensors))
    if whole:
        atomic_write(out / "samples.png", picture(draw(model, run.recipe["seed"])))
    atomic_write(out / "curve.png", _curve_picture(run.curve))
    atomic_write(out / "README.md", card(model, record, run, (out / WEIGHTS).stat().st_size, own, drawn=whole))
    for file in checkpoints(out):
        file.unlink()


def training_record(run: Run, parts: Parts, own: Own) -> TrainingRecord:
    """How the weights came about."""
    recipe = parts.recipe
    losses = {k: v for k, v in (run.curve[-1] if run.curve else {}).items() if k in ("loss", "held_out")}
    return TrainingRecord(
        command=call(recipe, own) if own != Own() else command(recipe),
        data=parts.data.description,
        recipe=plain(recipe),
        seed=recipe.seed,
        steps=run.step,
        samples=run.step * recipe.batch,
        network_passes=run.passes,
        hours=run.seconds / 3600,
        cpu_hours=run.cpu_seconds / 3600,
        losses=losses,
        start=None if run.before is None else TrainingRecord.model_validate(run.before),
        versions=versions() | {"numpy": np.__version__, "machine": platform.machine(), "device": _device(run)},
    )


def command(recipe: Recipe) -> str:
    """A command line that is read as this recipe, from the named recipe that it has most in common with."""
    mine, differing = plain(recipe), {}
    for name, known in {"": Recipe(), **RECIPES}.items():
        theirs = plain(known)
        if theirs["network"] != mine["network"]:  # then the command line lets go of its options
            theirs |= dict.fromkeys(NETWORK_OPTIONS)
        differing[name] = {k: v for k, v in mine.items() if theirs[k] != v}
    name = min(differing, key=lambda n: len(differing[n]))
    words = ["fewstep train", *([f"--recipe {name}"] if name else [])]
    return " ".join(words + [_flag(key.replace("_", "-"), value) for key, value in differing[name].items()])


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    text = "none" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    # What begins with a minus would be read as a flag, and what follows --attention as a word of its own.
    return f"--{name}{'=' if value is None or text.startswith('-') else ' '}{shlex.quote(text)}"


def call(recipe: Recipe, own: Own) -> str:
    """The call of `train` with what no command line can say."""
    settings = ", ".join(f"{f.name}={value!r}" for f in fields(recipe) if (value := getattr(recipe, f.name)) != f.default)
    given = [f"{f.name}={value}" for f in fields(own) if (value := getattr(own, f.name))]
    return f"train({', '.join([f'Recipe({settings})', 'out', *given])})"


def _settings(recipe: dict[str, Any], own: Own) -> dict[str, Any]:
    """The recipe's settings that had a say, and what was passed instead of the others."""
    instead = {"network": ("network", *NETWORK_OPTIONS), "data": ("data",), "objective": OBJECTIVE}
    given = {name: value for f in fields(own) if (value := getattr(own, name := f.name))}
    gone = {setting for name in given for setting in instead[name]}
    return {k: v for k, v in recipe.items() if k not in gone} | {name: f"{value}, from Python" for name, value in given.items()}


def card(model: Model, record: TrainingRecord, run: Run, size: int, own: Own, *, drawn: bool) -> str:
    """The model card; every number in it was measured or set in this run."""
    given = ", ".join(f.name for f in fields(own) if getattr(own, f.name))
    name = model.name if not record.recipe["data"] else Path(record.recipe["data"]).stem
    losses = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in record.losses.items())
    settings = "\n".join(f"| {k} | {v} |" for k, v in _settings(record.recipe, own).items() if v not in (None, "", False))
    lines = [
        f"# {name}",
        f"A flow model trained by fewstep{' from Python' if given else ''}: `{record.command}`"
        + (f", with {given} of the caller's own," if given else "")
        + " trained it and wrote this page.",
        "![Samples, classes in turn](samples.png)" if drawn else "",
        f"Path `{model.path!r}`, predicts {model.predicts}, samples of shape {model.shape}"
        + (f", {model.classes} classes (null label {model.null_label})" if model.classes else "")
        + f". {model.parameters():,} weights, {size / 1e6:.2f} MB.",
        f"## Data\n\n{record.data}",
        f"## Cost\n\n{_length(record)}, {record.samples:,} samples, {record.network_passes:,} network passes (a "
        f"forward and backward pass counted as three), {record.hours:.2f} hours on the clock and {record.cpu_hours:.2f} of "
        f"processor time on {record.versions['device']}.",
        f"It started from the model `{record.recipe['start']}`{_before(record.start)}." if record.recipe["start"] else "",
        f"Losses at the end: {losses}." if losses else "",
        "![Loss curve](curve.png)",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in record.versions.items()) + ".",
        f"## Recipe\n\n| setting | value |\n|---|---|\n{settings}",
    ]
    return "\n\n".join(filter(None, lines)) + "\n"


def _length(record: TrainingRecord) -> str:
    stopped = "" if record.steps == record.recipe["steps"] else f" of the {record.recipe['steps']:,} that the recipe plans"
    return f"{record.steps:,} steps{stopped}"


def _before(record: TrainingRecord | None) -> str:
    if record is None:
        return ""
    cost = (
        f"{_length(record)}, {record.samples:,} samples, {record.network_passes:,} network passes, "
        f"{record.cpu_hours:.2f} hours of processor time"
    )
    further = f" from `{record.recipe.get('start')}`{_before(record.start)}" if record.start else ""
    return f", which `{record.command}` trained ({cost}, beside the above){further}"


def _device(run: Run) -> str:
    device = next(run.network.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _curve_picture(curve: list[dict[str, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "held_out"):
        points = [(p["step"], p[name]) for p in curve if name in p]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) == 1 else None)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if curve:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
