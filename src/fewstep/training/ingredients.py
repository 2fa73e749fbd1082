"""What decides a run beside its recipe: the data as they are, and what a caller in Python passes instead of its parts."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import linspace, nn

from .._disk import one_line
from ..keyed import Keyed
from .batch import Objective
from .data import Source

LOOKED_AT = 8
"""Samples by which data are told from other data."""

LONGEST = 200
"""Characters of a network or objective in words."""


@dataclass(frozen=True)
class Own:
    """What a caller passed, in words; empty where it is the recipe's."""

    network: str = ""
    data: str = ""
    objective: str = ""

    @staticmethod
    def of(network: nn.Module | None, data: Source | None, objective: Objective | None) -> "Own":
        """Network and objective with their settings; data are told apart by `facts`."""
        return Own(_described(network), "" if data is None else type(data).__name__, _described(objective))


def made_of(network: nn.Module | None, objective: Objective | None, data: Source, source: Source | None) -> dict[str, Any]:
    """What a checkpoint says of it, in JSON's types; of the caller's own only what every process and version says alike."""
    own = {"own network": _weights(network), "own objective": "" if objective is None else _settings(objective)}
    rest = {} if source is None else {"source": facts(source)}
    return {**own, "data": facts(data), **rest}


def facts(source: Source) -> dict[str, Any]:
    """What tells data from other data, in JSON's types and for the price of one draw."""
    x, label = source.draw(Keyed(0, 0, 0, LOOKED_AT), LOOKED_AT)
    flat = x.double().flatten(1)
    sums = flat @ linspace(1.0, 2.0, flat.shape[1], dtype=flat.dtype) / flat.shape[1]  # a plain mean would not see an order
    labels = None if label is None else label.tolist()
    return {
        "size": source.size,
        "shape": list(source.shape),
        "classes": source.classes,
        "labels": labels,
        "sums": sums.tolist(),
    }


def other(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two `facts`, with both values; sums may differ by rounding (another processor or version)."""
    found = {name: (theirs.get(name), mine[name]) for name in mine if name != "sums" and theirs.get(name) != mine[name]}
    if found:
        return found
    scale = max(map(abs, theirs["sums"]))
    for k, (then, now) in enumerate(zip(theirs["sums"], mine["sums"], strict=True)):
        if not math.isclose(then, now, abs_tol=1e-3 * scale):
            return {f"weighted mean of sample {k}": (f"{then:.4g}", f"{now:.4g}")}  # one such sample says it
    return {}


def _weights(network: nn.Module | None) -> str:
    """Class, and which parameters it has."""
    if network is None:
        return ""
    shapes = repr([(name, tuple(p.shape)) for name, p in network.named_parameters()])
    return f"{type(network).__qualname__} with weights {hashlib.sha256(shapes.encode()).hexdigest()[:8]}"


def _settings(thing: object) -> str:
    """A plain value, or a class with such fields where it is a dataclass."""
    if _plain(thing):
        return repr(thing)
    name = type(thing).__qualname__  # not its module, which is another one in a script than when it is imported
    if not is_dataclass(thing):
        return name
    values = {f.name: getattr(thing, f.name) for f in fields(thing) if f.compare}
    told = {k: v for k, v in values.items() if _plain(v) or (is_dataclass(v) and not isinstance(v, type))}
    return f"{name}({', '.join(f'{k}={_settings(v)}' for k, v in told.items())})"


def _plain(value: object) -> bool:
    return all(map(_plain, value)) if type(value) is tuple else type(value) in (int, float, str, bool, type(None))


def _described(thing: object | None) -> str:
    """Its settings on one line of at most `LONGEST` characters, without addresses, which are new in every process."""
    if thing is None:
        return ""
    text = re.sub(r" at 0x[0-9a-fA-F]+|[\w.]+\.<locals>\.", "", one_line(" ".join(repr(thing).split())))
    return text if len(text) <= LONGEST else f"{type(thing).__name__}(... {hashlib.sha256(text.encode()).hexdigest()[:8]})"
