"""Models by name: the bundled ones, directories that fewstep saved, and functions of yours that return one."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._disk import one_line, short
from .._types import FewstepError
from ..field import Model
from .checkpoint import CONFIG, read_config, read_model, save_model
from .network import ResidualMLP
from .records import ModelConfig, TrainingRecord

__all__ = [
    "ModelConfig",
    "ResidualMLP",
    "TrainingRecord",
    "bundled",
    "load",
    "read_config",
    "save_model",
    "training_passes",
    "training_record",
]

_HERE = Path(__file__).parent


def bundled() -> list[str]:
    """Names of the models that come with fewstep, for `load`.

    Example:
        >>> bundled()
        ['digits']
    """
    return sorted(file.parent.name for file in _HERE.glob(f"*/{CONFIG}"))


def load(name: str | Path) -> Model:
    """A model by name.

    Args:
        name: a bundled name ("digits"); a directory that fewstep saved (write ``./digits`` for one of your own with a
            bundled name); or ``package.module:function``, a function of yours, called without arguments, that returns
            ``adapt(network, ...)``. Modules are also looked for in the working directory.

    Raises:
        ArtifactError: the directory does not hold a sound model.
        FewstepError: an unknown name (the nearest is suggested), or the module or function cannot be used.

    Example:
        >>> load("digits").shape
        (1, 8, 8)
    """
    directory = _directory(name)
    if directory is not None:
        return read_model(directory)
    if ":" in str(name):
        return _from_function(str(name))
    near = difflib.get_close_matches(str(name), bundled(), n=1, cutoff=0.4)
    raise FewstepError(
        one_line(f'unknown model "{short(name)}": ')
        + (f'did you mean "{near[0]}"? ' if near else "")
        + f"a model is a bundled name ({', '.join(bundled())}), a directory that fewstep saved, or package.module:function"
    )


def training_passes(name: str | Path) -> int | None:
    """Network passes (one sample, a forward and backward pass counted as three) that training this model took.

    Those of the model that it started from are among them. Arguments, None and errors are those of `training_record`.
    """
    record = training_record(name)
    return None if record is None else sum(run.network_passes for run in record.runs())


def training_record(name: str | Path) -> TrainingRecord | None:
    """How a model's weights came about.

    Args:
        name: as for `load`.

    Returns:
        None where it is not known, as for a function of yours.

    Raises:
        ArtifactError: the directory does not hold a sound model.
    """
    directory = _directory(name)
    return None if directory is None else read_config(directory).training


def _directory(name: str | Path) -> Path | None:
    if isinstance(name, str) and name in bundled():
        return _HERE / name
    return Path(name) if os.path.isdir(name) else None


def _from_function(name: str) -> Model:
    place, _, attribute = name.partition(":")
    with _working_directory_importable():
        try:
            module = importlib.import_module(place)
        except Exception as error:  # the module runs code of the user's, which can raise anything
            raise _unusable(name, f"importing {place} gave {type(error).__name__}: {error}") from error
        made = getattr(module, attribute, None)
        if made is None:
            near = difflib.get_close_matches(attribute, dir(module), n=1)
            raise _unusable(name, f'{place} has no "{attribute}"' + (f', did you mean "{near[0]}"?' if near else ""))
        try:
            model = made() if callable(made) else made
        except Exception as error:
            raise _unusable(name, f"calling it gave {type(error).__name__}: {error}") from error
    if not isinstance(model, Model):
        raise _unusable(name, f"it must return a fewstep Model, got {type(model).__name__}; return adapt(network, ...)")
    return model


def _unusable(name: str, why: str) -> FewstepError:
    return FewstepError(one_line(f'cannot use the model "{short(name)}": {short(why, 300)}'))


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """A console script's search path lacks the folder that the user stands in; it comes last, so it hides nothing."""
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
