"""Couplings: which source sample goes with which data sample. One file each.

A file of this package takes part by defining a class with a ``name``; recipes find it under that name.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from ..._types import State
from .independent import Independent as Independent
from .minibatch_ot import MinibatchOT as MinibatchOT


@runtime_checkable
class Coupling(Protocol):
    """Pairs the whole batch of one step; its settings are dataclass fields.

    Attributes:
        name: what recipes call it.
        whole: whether pairing needs the whole batch; otherwise every process may pair its own share.
    """

    name: ClassVar[str]
    whole: ClassVar[bool]

    def __call__(self, x0: State, x1: State, labels: Tensor | None) -> Tensor:
        """For each row of the data `x1` the row of the source `x0` that goes with it: (batch,) int64, a permutation.

        Args:
            x0: (batch, *shape) source samples.
            x1: (batch, *shape) data.
            labels: (batch,) classes of the data, or None.
        """
        ...


def _found() -> dict[str, Callable[..., Coupling]]:
    found: dict[str, Callable[..., Coupling]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for entry in vars(module).values():
            if isinstance(entry, type) and entry.__module__ == module.__name__ and isinstance(vars(entry).get("name"), str):
                found[vars(entry)["name"]] = entry
    return found


COUPLINGS: dict[str, Callable[..., Coupling]] = _found()
"""Every coupling class by name."""
