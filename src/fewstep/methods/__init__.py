"""Training-free methods: one file each, the paper's algorithm as plain code.

A file takes part by offering ``variants(path) -> list[Method]``; the registry then gives its methods contract tests, a
command-line name, a row in the docs and a line in the benchmark.
"""

import importlib
import pkgutil

from .._types import FewstepError
from ..path import AffinePath, CondOT
from ._method import Method as Method
from ._method import method as method
from .adams import adams as adams
from .dpm import ddim as ddim
from .dpm import dpm_single as dpm_single
from .dpm import dpmpp as dpmpp
from .pfdiff import pfdiff as pfdiff
from .runge_kutta import euler as euler
from .runge_kutta import heun as heun
from .runge_kutta import midpoint as midpoint
from .runge_kutta import rk4 as rk4


def registry(path: AffinePath | None = None) -> dict[str, Method]:
    """Every registered method by name, for a path (default CondOT).

    Example:
        >>> registry()["pfdiff1_1"].order
        2
    """
    path = path or CondOT()
    found: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for entry in getattr(module, "variants", lambda _: [])(path):
            if entry.name in found:
                raise FewstepError(f'two registered methods are called "{entry.name}"; names must differ')
            found[entry.name] = entry
    return found
