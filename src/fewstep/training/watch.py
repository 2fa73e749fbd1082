"""What a person sees of a training run, and how one stops it."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .recipe import Keeping
from .state import Run

SAME = 2.0
"""Seconds within which two signals count as one."""


@contextmanager
def interrupted() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C or a termination signal has come; a later one takes effect at once."""
    came: list[float] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        # A launcher may forward the signal that its children have had from the terminal: that is the same one.
        if came and time.monotonic() - came[0] > SAME:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        came.append(time.monotonic())

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shown(run: Run, steps: int, batch: int, keeping: Keeping, show: bool) -> Iterator[Callable[[], None]]:
    """Progress on stderr with rate and time left: a bar on a terminal, a line for every point of the curve elsewhere."""
    first, start = run.step, time.perf_counter()

    def words() -> str:
        rate = (run.step - first) / max(time.perf_counter() - start, 1e-9)
        point = run.curve[-1] if run.curve else {"loss": math.nan}
        losses = ", ".join(f"{name} {point[name]:.4f}" for name in point if name not in ("step", "lr", "samples_per_s"))
        left = int(min((steps - run.step) / rate if rate else 0.0, max(keeping.seconds - run.seconds, 0.0)))
        return f"{losses}  {rate:5.1f} steps/s, {rate * batch:,.0f} samples/s  {_clock(left)} left"

    def line() -> None:
        if run.step % keeping.every == 0 or run.step == steps:
            print(f"step {run.step:>6}/{steps}  {words()}", file=sys.stderr, flush=True)

    if not show:
        yield lambda: None
        return
    if not sys.stderr.isatty():
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(words(), total=steps, completed=first)
        yield lambda: bar.update(task, completed=run.step, description=words())


def _clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
