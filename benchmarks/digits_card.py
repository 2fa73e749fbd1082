"""The page of the bundled digits model, measured on it and never typed: ``python benchmarks/digits_card.py DIRECTORY``.

The bundled model is ``fewstep train --recipe digits --out DIRECTORY``; this replaces the page and pictures that training left.
"""

import argparse
import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep._disk import atomic_write
from fewstep.field import Model
from fewstep.grid import TimeGrid
from fewstep.training.data import FiniteSource, open_source
from fewstep.training.finish import CURVE
from fewstep.trajectory import record, reference
from fewstep.zoo.checkpoint import WEIGHTS, read_config, read_model
from fewstep.zoo.records import TrainingRecord

SHAPE, CLASSES = (1, 8, 8), 10
SAMPLES = 2000
SAID = ("batch", "lr", "warmup", "weight_decay", "ema", "label_dropout", "dropout", "width", "blocks")
BUDGETS = (4, 6, 8, 10, 20)


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in [-1, 1] with labels (n,), and those kept aside from training."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


def load_digits() -> Digits:
    """What the recipe trained on, and what it kept aside."""
    source = open_source("digits", hold_out=6)
    held = source.held_out()
    whole = open_source("digits", hold_out=0)
    assert held is not None
    assert held[1] is not None
    assert isinstance(whole, FiniteSource)
    assert whole.labels is not None
    aside = torch.arange(len(whole.data)) % 6 == 5
    return Digits(whole.data[~aside], whole.labels[~aside], held[0], held[1])


@dataclass(frozen=True)
class Measured:
    """What the card says of the model.

    Attributes:
        accuracy: share of samples that a classifier reads as their label, by guidance scale.
        control: the same classifier's share on real digits that it has not seen.
        distances: from samples, and from unseen real digits, to the nearest training digit: 5 %, 50 % and 95 % quantiles.
        copies: share of samples that lie nearer to a training digit than 99 % of the unseen real digits do.
        nearest_unseen: share of samples whose nearest real digit is an unseen one.
        share_unseen: share of unseen digits among all: what `nearest_unseen` would be without any learning by heart.
        euler: RMSE per pixel of Euler on uniform steps against the converged solution, by NFE, for guidance 1 and 2.
        reference_error: the converged solution's own.
    """

    accuracy: dict[float, float]
    control: float
    distances: dict[str, tuple[float, float, float]]
    copies: float
    nearest_unseen: float
    share_unseen: float
    euler: dict[float, dict[int, float]]
    reference_error: float


def write_card(directory: Path) -> Measured:
    """Measure the model in `directory` and write ``README.md``, ``curve.png`` and ``samples.png`` beside it (a minute)."""
    model, digits = read_model(directory), load_digits()
    labels = torch.arange(SAMPLES) % CLASSES
    noise = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(2024))
    solutions = {w: reference(model.given(labels, guidance=w), noise, tol=5e-4) for w in (1.0, 2.0)}
    samples = {w: solution.end for w, solution in solutions.items()}
    euler = {w: _euler_errors(model, w, labels, noise, end) for w, end in samples.items()}
    accuracy, control = _readability(samples, labels, digits)
    to_seen, control_to_seen = (_nearest(x, digits.images) for x in (samples[1.0], digits.held_images))
    everything = torch.cat([digits.images, digits.held_images])
    measured = Measured(
        accuracy,
        control,
        {"samples": _quantiles(to_seen), "unseen real digits": _quantiles(control_to_seen)},
        float((to_seen < control_to_seen.quantile(0.01)).double().mean()),
        float((_distances(samples[1.0], everything).argmin(1) >= len(digits.images)).double().mean()),
        len(digits.held_images) / len(everything),
        euler,
        max(solution.error for solution in solutions.values()),
    )
    training = read_config(directory).training
    assert training is not None, "fewstep train records how it trained"
    atomic_write(directory / "samples.png", _samples_picture(samples, labels))
    curve = [json.loads(line) for line in (directory / CURVE).read_text().splitlines()]
    atomic_write(directory / "curve.png", _curve_picture(curve))
    atomic_write(directory / "README.md", _text(model, training, measured, digits, (directory / WEIGHTS).stat().st_size))
    return measured


def _euler_errors(model: Model, guidance: float, labels: Tensor, noise: Tensor, end: Tensor) -> dict[int, float]:
    field = model.given(labels, guidance=guidance)
    ends = {n: record(field, TimeGrid.uniform(n), noise).states[-1] for n in BUDGETS}
    return {n: float((x - end).double().square().mean().sqrt()) for n, x in ends.items()}


def _readability(samples: dict[float, Tensor], labels: Tensor, digits: Digits) -> tuple[dict[float, float], float]:
    from sklearn.svm import SVC

    everything = torch.cat([digits.images, digits.held_images]), torch.cat([digits.labels, digits.held_labels])
    judge = SVC(C=10).fit(everything[0].flatten(1).numpy(), everything[1].numpy())
    rival = SVC(C=10).fit(digits.images.flatten(1).numpy(), digits.labels.numpy())
    accuracy = {w: float(judge.score(x.clamp(-1, 1).flatten(1).numpy(), labels.numpy())) for w, x in samples.items()}
    return accuracy, float(rival.score(digits.held_images.flatten(1).numpy(), digits.held_labels.numpy()))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square differences per pixel, (len(x), len(y))."""
    return torch.cdist(x.flatten(1).double(), y.flatten(1).double()) / x[0].numel() ** 0.5


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    return _distances(x, y).amin(1)


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)).tolist()
    return low, middle, high


def _samples_picture(samples: dict[float, Tensor], labels: Tensor) -> bytes:
    """Ten samples of each class, a row per class, for each guidance scale side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.3), layout="constrained")
    for axes, (w, x) in zip(figure.subplots(1, len(samples)), samples.items(), strict=True):
        rows = torch.stack([x[labels == label][:10, 0] for label in range(CLASSES)])  # (class, sample, 8, 8)
        framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=-1.0)
        axes.imshow(framed.permute(0, 2, 1, 3).reshape(CLASSES * 10, -1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(f"guidance {w:g}")
        axes.set_axis_off()
    return _png(figure)


def _curve_picture(curve: list[dict[str, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, words in (("loss", "batches (dropout on)"), ("held_out", "digits kept aside")):
        axes.plot([p["step"] for p in curve], [p[name] for p in curve], label=words)
    axes.set(xlabel="step", ylabel="mean squared velocity error")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _text(model: Model, training: TrainingRecord, m: Measured, digits: Digits, size: int) -> str:
    facts = training.model_dump() | {
        "recipe": ", ".join(f"{name.replace('_', ' ')} {training.recipe[name]}" for name in SAID).capitalize(),
        "versions": ", ".join(f"{name} {value}" for name, value in training.versions.items()),
        "cpu_minutes": training.cpu_hours * 60,
        "minutes": training.hours * 60,
        **{f"loss_{name}": value for name, value in training.losses.items()},
    }
    template = (Path(__file__).parent / "digits_card.md").read_text(encoding="utf-8")
    filled = template.format(
        **facts,
        path=repr(model.path),
        predicts=model.predicts,
        shape=model.shape,
        null_label=model.null_label,
        parameters=model.parameters(),
        megabytes=size / 1e6,
        pixels=math.prod(SHAPE),
        seen=len(digits.images),
        unseen=len(digits.held_images),
        passes=training.samples / len(digits.images),
        drawn=SAMPLES,
        accuracy_1=m.accuracy[1.0],
        accuracy_2=m.accuracy[2.0],
        control=m.control,
        reference_error=m.reference_error,
        euler=_table(["NFE", *BUDGETS], [[f"guidance {w:g}", *errors.values()] for w, errors in m.euler.items()]),
        distances=_table(["from", "5 %", "median", "95 %"], [[name, *values] for name, values in m.distances.items()]),
        copies=m.copies,
        nearest_unseen=m.nearest_unseen,
        share_unseen=m.share_unseen,
    )
    return "\n\n".join(_wrapped(paragraph) for paragraph in filled.rstrip().split("\n\n")) + "\n"


def _wrapped(paragraph: str) -> str:
    """Running text in lines of like length, whatever the numbers' lengths; tables, headings and code as they are."""
    if paragraph.startswith(("#", "|", "!", "    ")):
        return paragraph
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str | int], rows: list[list[str | float]]) -> str:
    cells = [[str(value) for value in head], ["---"] * len(head)]
    cells += [[value if isinstance(value, str) else f"{value:.3f}" for value in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder of the trained model")
    write_card(parser.parse_args().directory)
