"""The command line: parse, one library call, print. Nothing here imports torch before a command runs."""

import json as jsonlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Parameter

from . import __version__, cli_train, cli_tune
from .cli_tune import load_model, writable
from .config import Conditions, Integers, Words, parse_conditions

if TYPE_CHECKING:
    from torch import Tensor

    from .composite import JointField
    from .field import Model, ModelField

app = App(
    name="fewstep",
    help="The best few-step sampler that a flow or diffusion model allows, as a small file of numbers.",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # `main` tells how to go on
)

app.command(cli_tune.demo)
app.command(cli_tune.tune)
app.command(cli_train.train)

NOISES = 256
"""Noises of `evaluate` and of tuners that are named there."""


@app.command
def sample(
    model: str,
    *,
    sampler: str,
    num: int = 64,
    nfe: int | None = None,
    which: Conditions = Conditions(),  # noqa: B008  # frozen
    batch: int = 256,
    seed: int = 0,
    out: Path = Path("fewstep-samples"),
    json: bool = False,
) -> None:
    """Draw samples: samples.safetensors, and a picture where they are images.

    Args:
        model: a bundled name (digits), a directory saved by fewstep, or package.module:function.
        sampler: a directory from `fewstep tune`, a method (see `fewstep methods`), method@grid (also @boss, @gits, @oss and
            @learned, found on the model), a stock scheduler, or fit, bespoke-midpoint, nonstationary (learnt on the model).
        num: how many.
        nfe: number of network calls, for a sampler that is not a directory (or to choose one in a folder of several).
        which: see below.
        batch: samples per network batch.
        seed: seed of the noise.
        out: folder.
        json: print a summary as JSON.
    """
    import torch

    from .composite import CountedField
    from .naming import resolve
    from .outputs import save_samples

    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    writable(out)
    loaded = load_model(model)
    noise, labels = _noise(loaded, num, seed), _labels(loaded, num)
    conditions = parse_conditions(which.condition, which.guidance) or [{}]
    if len(conditions) > 1:
        raise ValueError(f"sample draws from one condition at a time, got {len(conditions)}; run it once for each")
    probe = _field(loaded, conditions, labels[:NOISES] if labels is not None else None, min(num, NOISES))
    found = resolve(sampler, loaded, probe, noise[:NOISES], None if nfe is None else (nfe,))
    if len(found) > 1:
        raise ValueError(f"{sampler} holds {len(found)} samplers; choose one with --nfe or give its folder: {', '.join(found)}")
    (name, table), pieces, calls, passes = next(iter(found.items())), [], 0, 1
    for start in range(0, num, batch):
        part = slice(start, start + batch)
        field = _field(loaded, conditions, None if labels is None else labels[part], len(noise[part]))
        counted = CountedField(field)
        pieces.append(table(counted, noise[part]))
        calls, passes = counted.calls, counted.passes
    drawn = torch.cat(pieces)
    files = save_samples(drawn, out, labels)
    summary = {"sampler": name, "num": num, "nfe": calls, "network passes": calls * passes, "files": [str(f) for f in files]}
    print(jsonlib.dumps(summary) if json else f"{num} samples with {calls} network calls each: {', '.join(summary['files'])}")


@app.command
def evaluate(
    model: str,
    *,
    samplers: Words,
    nfe: Integers = (),
    which: Conditions = Conditions(),  # noqa: B008  # frozen
    noise: int = NOISES,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure samplers against the converged solution, on noise that no tuning with this seed has seen.

    Args:
        model: a bundled name (digits), a directory saved by fewstep, or package.module:function.
        samplers: names or directories as for `sample`, with commas: euler,pfdiff1_1@boss,fit,bespoke-midpoint,fewstep-tune.
        nfe: budgets, with commas; default: those of the directories.
        which: see below.
        noise: noises per condition.
        seed: seed of the noise.
        out: also write report.json, report.md, report.html and pictures there.
        json: print the report as JSON.
    """
    from .evaluation import compare
    from .naming import resolve
    from .noise import draw_sets
    from .report import write_report

    if out is not None:
        writable(out)
    loaded = load_model(model)
    conditions = parse_conditions(which.condition, which.guidance) or [{}]
    count, device = noise * len(conditions), loaded.device_dtype()[0]
    fitting, _, test = (drawn.to(device) for drawn in draw_sets((count,) * 3, _shape(loaded), seed, loaded.source))
    field = _field(loaded, conditions, _labels(loaded, noise), noise)
    found = {}
    for name in samplers:
        found |= resolve(name, loaded, field, fitting, nfe or None)
    report = compare(found, field, test)
    if out is not None:
        write_report(report, out, samplers=found)
    print(jsonlib.dumps(report.to_dict(), indent=1) if json else report.to_markdown())


@app.command
def methods(*, json: bool = False) -> None:
    """List the registered methods: name, order, network calls per step, paper.

    Args:
        json: print as JSON.
    """
    from .methods import registry

    rows = [
        {"name": m.name, "order": m.order, "nfe per step": price(m.calls), "paper": m.paper, "path": m.path is not None}
        for m in registry().values()
    ]
    if json:
        print(jsonlib.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "order", "NFE", "uses the path", "paper", box=None)
    for row in rows:
        table.add_row(row["name"], str(row["order"]), row["nfe per step"], "yes" if row["path"] else "", row["paper"])
    Console().print(table)


def price(calls: Callable[[int], int | None]) -> str:
    """Field calls as a function of the number of steps, in words."""
    known = [(n, cost) for n in range(1, 13) if (cost := calls(n)) is not None]
    (n0, c0), (n1, c1) = known[-2:]
    slope = (c1 - c0) / (n1 - n0)
    first = round(c1 - slope * (n1 - 1))  # cost of a single step
    if slope == first:
        return f"{first} per step"
    return f"{first} + {first} (steps - 1) / {first / slope:g}"


@app.command
def doctor(*, json: bool = False) -> None:
    """Look at this installation: versions, threads, packages that break others, disk.

    Args:
        json: print as JSON.
    """
    from .doctor import examine

    findings = examine()
    if json:
        print(jsonlib.dumps([f.__dict__ for f in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.what:<14} {finding.detail}")
    if any(f.state == "BAD" for f in findings):
        sys.exit(1)


def _shape(model: "Model") -> tuple[int, ...]:
    if model.shape is None:
        raise ValueError(f"{model.name} does not say the shape of a sample: give adapt(..., shape=...)")
    return model.shape


def _noise(model: "Model", num: int, seed: int) -> "Tensor":
    from .noise import draw

    return draw((num, *_shape(model)), seed, 4, model.source).to(model.device_dtype()[0])


def _labels(model: "Model", num: int) -> "Tensor | None":
    import torch

    return None if model.classes is None else torch.arange(num) % model.classes


def _field(
    model: "Model", conditions: Sequence[dict[str, Any]], labels: "Tensor | None", batch: int
) -> "ModelField | JointField":
    """All conditions side by side; without a label, a class-conditional model gets `labels`."""
    from .composite import JointField

    assert labels is None or len(labels) == batch
    fields = [model.given(c.get("label", labels), guidance=c.get("guidance", 1.0)) for c in conditions]
    return fields[0] if len(fields) == 1 else JointField(fields)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one line and exit 1, Ctrl-C is exit 130."""
    # Idle OpenMP threads that spin slow everything else on a shared machine (and torch itself beside another process).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ._errors import FewstepError

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        before = {"tune": cli_tune.flags_before, "train": cli_train.flags_before}.get(words[0] if words else "")
        if before is not None:
            words[1:1] = before(words)
        app(words)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here (fewstep train: with --resume)", file=sys.stderr)
        sys.exit(130)
    except (FewstepError, ValueError) as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
