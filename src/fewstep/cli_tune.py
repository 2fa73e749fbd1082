"""`fewstep demo` and `fewstep tune`: nothing here imports torch before a command runs."""

import json as jsonlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from .config import TuneConfig, as_flags, flag_value, parse_conditions, settings_in, to_toml

if TYPE_CHECKING:
    from torch import Tensor

    from .field import Model
    from .result import TuneResult


def demo(*, out: Path = Path("fewstep-demo"), seed: int = 0, json: bool = False) -> None:
    """Tune samplers for the bundled digits model at NFE 4, 6, 8 and 10 and compare them with every stock scheduler.

    Args:
        out: folder for samplers, report and pictures.
        seed: seed of all noise.
        json: print the report as JSON.
    """
    tune("digits", settings=TuneConfig(out=out, seed=seed, effort="learn"), json=json)


def tune(
    model: str,
    *,
    settings: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
    config: Annotated[Path | None, Parameter()] = None,
    print_config: bool = False,
    json: bool = False,
) -> None:
    """Find the best sampler of each budget for a model.

    Args:
        model: a bundled name (digits), a directory saved by fewstep, or package.module:function.
        settings: see below.
        config: TOML or JSON file with any of these settings; flags win over it.
        print_config: print the settings as TOML and stop.
        json: print the report as JSON.
    """
    if print_config:
        print(to_toml(settings), end="")
        return
    del config  # `main` has already put the file's settings in front of the flags
    loaded = load_model(model)
    conditions = parse_conditions(settings.condition, settings.guidance)
    groups = [[c] for c in conditions] if settings.each and conditions else [conditions]
    reports = []
    for group in groups:
        out = settings.out / _folder(group) if len(groups) > 1 and group else settings.out
        reports.append(_tune_one(loaded, model, settings, group, out, quiet=json))
    if json:
        print(jsonlib.dumps(reports if len(reports) > 1 else reports[0], indent=1))


def _folder(group: Sequence[dict[str, Any]]) -> str:
    return "_".join(f"{k}-{v:g}" for one in group for k, v in one.items())


def _tune_one(
    model: "Model", name: str, settings: TuneConfig, conditions: list[dict[str, Any]] | None, out: Path, *, quiet: bool
) -> dict[str, Any]:
    import shutil

    from .climb import tune as tune_model
    from .report import to_console, write_report
    from .zoo import training_passes

    writable(out)
    result = tune_model(
        model, nfe=settings.nfe, effort=settings.effort, noise=settings.noise, conditions=conditions, metric=settings.metric,
        seed=settings.seed, resume=out / "progress", progress=True,
    )  # fmt: skip
    result = result.with_training_cost(training_passes(name))
    result.save(out)
    pictures, target = _pictures(model, result, settings.seed)
    write_report(result.report, out, samplers=result.by_name(), pictures=pictures, reference_picture=target)
    shutil.rmtree(out / "progress", ignore_errors=True)
    if not quiet:
        to_console(result.report)
        print(f"samplers and report in {out}; open {out / 'report.html'}")
        print(f"use one:  fewstep sample {name} --sampler {out / f'nfe-{max(result)}'} --num 64 --out samples")
    return {**result.report.to_dict(), "samplers": {str(n): str(out / f"nfe-{n}") for n in result}}


def _pictures(model: "Model", result: "TuneResult", seed: int) -> tuple[dict[str, "Tensor"], "Tensor"]:
    """Samples of the tuned samplers and of the best stock scheduler of each budget, all from the same noise."""
    import torch

    from .noise import draw
    from .trajectory import reference

    assert model.shape is not None
    count = 20
    field = model.given(torch.arange(count) % model.classes if model.classes else None)
    noise = draw((count, *model.shape), seed, 3, model.source).to(model.device_dtype()[0])
    pictures = {name: sampler(field, noise) for name, sampler in result.by_name(rivals=True).items()}
    return pictures, reference(field, noise, tol=1e-3).end


def load_model(name: str) -> "Model":
    """A model by name. Waking a second thread costs more than it adds to a network as small as the bundled ones."""
    import torch

    from .zoo import ResidualMLP, load

    model = load(name)
    if model.source is not None:
        from .training.source import with_source

        model = with_source(model)
    if isinstance(model.network, ResidualMLP) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model


def writable(folder: Path) -> None:
    """Fail before the work, not after it."""
    from .artifact import atomic_write

    probe = folder / ".writable"
    atomic_write(probe, b"")
    probe.unlink()


def flags_before(words: Sequence[str]) -> list[str]:
    """The settings of the file that --config names, as flags to stand before those given."""
    file = flag_value(words, "--config")
    if not file:
        return []
    given = {word.partition("=")[0] for word in words}
    return as_flags({k: v for k, v in settings_in(Path(file), TuneConfig).items() if f"--{k}" not in given})
