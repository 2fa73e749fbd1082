"""Objectives: what a training step minimises. One file each.

A file of this package takes part by defining a class with a ``name``; recipes find it under that name.
"""

import importlib
import pkgutil
from collections.abc import Callable

from ..batch import Objective
from .fdm import FlowAndDivergence as FlowAndDivergence
from .regression import Regression as Regression


def _found() -> dict[str, Callable[..., Objective]]:
    found: dict[str, Callable[..., Objective]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for entry in vars(module).values():
            if isinstance(entry, type) and entry.__module__ == module.__name__ and isinstance(vars(entry).get("name"), str):
                found[vars(entry)["name"]] = entry
    return found


OBJECTIVES: dict[str, Callable[..., Objective]] = _found()
"""Every objective class by name."""
