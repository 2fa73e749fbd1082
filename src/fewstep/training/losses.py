"""The losses of a run between two points of its curve."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


class Losses:
    """Losses of steps, on the device until somebody looks.

    Args:
        reduce: the mean over all processes.
    """

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self._waiting: dict[str, list[Tensor]] = {}
        self._seen: dict[str, list[float]] = {}

    def add(self, step: Mapping[str, Tensor]) -> None:
        """The 0-d losses of one step, by name; a step need not have all names, but all processes the same."""
        for name, value in step.items():
            self._waiting.setdefault(name, []).append(value)

    def look(self) -> tuple[int, float] | None:
        """Bring them to the host: the first "loss" since the last look that is no number, with how many steps ago it was."""
        found = {name: self._reduce(torch.stack(values)).tolist() for name, values in self._waiting.items()}
        self._waiting.clear()
        for name, values in found.items():
            self._seen.setdefault(name, []).extend(values)
        losses = found.get("loss", [])
        return next(((len(losses) - 1 - k, value) for k, value in enumerate(losses) if not math.isfinite(value)), None)

    def point(self) -> dict[str, float]:
        """Their means since the last point; empty where no step was looked at."""
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        return means
