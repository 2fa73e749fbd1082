"""`fewstep train`: nothing here imports torch before the command runs."""

import difflib
import json as jsonlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from .config import as_flags, flag_value, settings_in
from .training.launch import launch, reporting
from .training.recipe import NETWORK_OPTIONS, RECIPES, Keeping, Recipe, plain


def train(
    *,
    recipe: Annotated[str, Parameter()] = "",
    settings: Recipe = Recipe(),  # noqa: B008  # frozen
    keeping: Keeping = Keeping(),  # noqa: B008  # frozen
    out: Path = Path("fewstep-train"),
    resume: bool = False,
    processes: int = 1,
    skip_unreadable: bool = False,
    print_config: bool = False,
    json: bool = False,
) -> None:
    """Train a flow or diffusion model on your data; the folder it leaves is a MODEL for the other commands.

    Args:
        recipe: digits, density2d, cifar10-flow, cifar10-vp, cifar10-edm, or a YAML, TOML or JSON file with any of the settings
            below; flags win over it.
        settings: see below.
        keeping: see below.
        out: folder for checkpoints, curve, previews and the model.
        resume: continue the unfinished run in OUT; its own recipe is the default then.
        processes: processes to share each batch among (started by torchrun).
        skip_unreadable: leave out images that cannot be read, instead of stopping at the first.
        print_config: print the recipe as YAML and stop.
        json: print a summary as JSON.
    """
    if print_config:
        import yaml

        settings.check(data=False)
        print(yaml.safe_dump(plain(settings), sort_keys=False), end="")
        return
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes > 1 and "LOCAL_RANK" not in os.environ:
        settings.check()  # before the time that processes take to start
        keeping.check()
        settings.pieces(processes)
        launch(processes, sys.argv[1:])
        return
    with reporting():
        _train(settings, out, resume, keeping, skip_unreadable, json)


def _train(settings: Recipe, out: Path, resume: bool, keeping: Keeping, skip_unreadable: bool, json: bool) -> None:
    try:
        from .training.loop import train as run
    except ImportError as error:
        raise ValueError(f"training needs {error.name}: pip install 'fewstep[train]'") from error

    if settings.network == "mlp" and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)  # sums are ordered by thread; and waking others costs a small network more than it gains
    model = run(settings, out, resume=resume, keeping=keeping, progress=True, skip_unreadable=skip_unreadable)
    if int(os.environ.get("RANK", "0")) == 0:
        summary = {"model": str(out), "parameters": model.parameters()}
        print(jsonlib.dumps(summary) if json else f"model, card and curve in {out}; tune it: fewstep tune {out} --nfe 4,6,8")


_YES = ("yes", "y", "1", "true", "t")
"""Values of a switch that cyclopts reads as on."""


def flags_before(words: Sequence[str]) -> list[str]:
    """The settings of --recipe, or of the run that is resumed, as flags to stand before those given.

    Raises:
        ValueError: no such recipe (the nearest is suggested), or a file with unknown keys.
    """
    given, base = {word.partition("=")[0].replace("--no-", "--", 1) for word in words}, _base(words)
    network = flag_value(words, "--network")
    if network and network != base.get("network", Recipe.network):  # another network has other options
        given |= {f"--{name}" for name in NETWORK_OPTIONS}
    return as_flags({k: v for k, v in base.items() if f"--{k.replace('_', '-')}" not in given})


def _base(words: Sequence[str]) -> dict[str, Any]:
    name = flag_value(words, "--recipe")
    if not name and any(word in ("--resume", *(f"--resume={yes}" for yes in _YES)) for word in map(str.lower, words)):
        from .training.state import stored_recipe

        return stored_recipe(Path(flag_value(words, "--out") or "fewstep-train"))
    if not name:
        return {}
    if name in RECIPES:
        return plain(RECIPES[name])
    if Path(name).suffix in (".yaml", ".yml", ".toml", ".json"):
        settings = settings_in(Path(name), Recipe)
        empty = [key for key, value in settings.items() if value is None and getattr(Recipe, key) is not None]
        if empty:
            raise ValueError(
                f"{empty[0]} has no value in {name}; give it one, or leave it out for {getattr(Recipe, empty[0])!r}"
            )
        return settings
    raise ValueError(f'unknown recipe "{name}"; {_nearest(name)}')


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, RECIPES, n=1)
    return f'did you mean "{near[0]}"?' if near else f"known recipes: {', '.join(RECIPES)}; or a YAML, TOML or JSON file"
