"""Stages of long work: what runs, how long it takes, how many network calls it has cost."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .composite import CountedField


@dataclass
class Cost:
    """What a finished stage took: field calls, network passes summed over samples, seconds.

    `measures` tells stages that only report from those that tuning needs.
    """

    stage: str
    calls: int
    samples: int
    seconds: float
    measures: bool = False


class Stage:
    """A running stage; `tick` after every piece."""

    def __init__(self, bar: object = None, task: object = None) -> None:
        self._bar, self._task = bar, task

    def expect(self, pieces: int) -> None:
        """How many pieces there will be, where that was not known at the start."""
        if self._bar is not None:
            self._bar.update(self._task, total=pieces)  # type: ignore[attr-defined]  # as below

    def tick(self) -> None:
        """One more piece is done."""
        if self._bar is not None:
            self._bar.advance(self._task)  # type: ignore[attr-defined]  # a rich Progress, not imported unless shown


class Stages:
    """Shows stages on stderr (bars on a terminal, lines elsewhere) and remembers their cost."""

    def __init__(self, show: bool) -> None:
        self.costs: list[Cost] = []
        self._show, self._bar = show, None

    def __enter__(self) -> "Stages":
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def __call__(self, name: str, field: CountedField, pieces: int | None = None, *, measures: bool = False) -> Iterator[Stage]:
        """Run one stage; calls are counted on `field`."""
        calls, samples, start = field.calls, field.samples, time.perf_counter()
        task = None if self._bar is None else self._bar.add_task(name, total=pieces)
        yield Stage(self._bar, task)
        cost = Cost(name, field.calls - calls, field.samples - samples, time.perf_counter() - start, measures)
        self.costs.append(cost)
        if self._bar is not None and task is not None:
            self._bar.update(task, total=1, completed=1)
        elif self._show:
            print(f"{name:<22} {cost.seconds:6.1f} s  {cost.calls:>6} field calls", file=sys.stderr, flush=True)
