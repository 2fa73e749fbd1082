"""The training-free search space of `tune`: registered methods x grids, and every stock scheduler, as tables."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ._tabulate import write_table
from ._types import BudgetError, Field
from .composite import path_of, start_scale
from .coordinates import Coordinates
from .evaluation import Group
from .grid import TimeGrid
from .methods import registry
from .path import AffinePath, CondOT
from .sampler import Sampler
from .stock import stock_samplers

FIT_ONLY = {"shift3", "power1.2", "shift2", "karras"}
"""Grids that only the fit tries: every grid costs the search about 30 tables."""


@dataclass(frozen=True)
class Candidate:
    """A table with the name and the group that reports use."""

    name: str
    group: Group
    sampler: Sampler


def grids(n: int, path: AffinePath, boss: TimeGrid | None = None) -> dict[str, TimeGrid]:
    """Grid families of n steps, BOSS's among them where it is known."""
    found = {
        "uniform": TimeGrid.uniform(n),
        "quadratic": TimeGrid.quadratic(n),
        "power0.8": TimeGrid.power(n, 0.8),
        "power1.2": TimeGrid.power(n, 1.2),
        "shift0.5": TimeGrid.shifted(n, 0.5),
        "shift2": TimeGrid.shifted(n, 2.0),
        "shift3": TimeGrid.shifted(n, 3.0),
        "log-snr": TimeGrid.log_snr(n, path),
        "karras": TimeGrid.karras(n, path),
        "angle": angle_grid(Coordinates(path), n),
    }
    return found if boss is None else {**found, "boss": boss}


def angle_grid(coordinates: Coordinates, n: int) -> TimeGrid:
    """Equal steps of the angle between noise and data."""
    times = coordinates.time(torch.arange(n + 1, dtype=torch.float64) / n)
    return TimeGrid(torch.cat([times.new_zeros(1), times[1:-1], times.new_ones(1)]))


def candidates(field: Field, nfe: int, boss: Mapping[int, TimeGrid]) -> list[Candidate]:
    """Every distinct table of exactly `nfe` calls over velocities, stock schedulers first.

    Args:
        field: decides the path.
        nfe: budget.
        boss: BOSS's grids by number of steps, where known.
    """
    path = home(field)
    found: list[Candidate] = []
    seen: set[bytes] = set()
    for candidate in [*_stock(path, nfe), *_methods(path, start_scale(field), nfe, boss)]:
        key = _key(candidate.sampler)
        if key not in seen:
            seen.add(key)
            found.append(candidate)
    return found


def home(field: Field) -> AffinePath:
    """The field's path; a bare field is taken to be a CondOT flow, as diffusers' flow schedulers do.

    Whatever the field really is, candidates are judged by the error they make on it.
    """
    return path_of(field) or CondOT()


def _stock(path: AffinePath, nfe: int) -> Iterator[Candidate]:
    for name, stock in stock_samplers(path, nfe).items():
        try:
            yield Candidate(name, stock.group, stock.sampler.rebase(path, "velocity").named(name))
        except ValueError:
            continue  # asks its network where the velocity is infinite; no velocity table exists


def _methods(path: AffinePath, scale: float, nfe: int, boss: Mapping[int, TimeGrid]) -> Iterator[Candidate]:
    for name, method in registry(path).items():
        try:
            n = method.intervals(nfe)
        except BudgetError:
            continue
        for grid_name, grid in grids(n, path, boss.get(n)).items():
            if grid_name in FIT_ONLY:
                continue
            try:
                table = write_table(method, grid, start_scale=scale, calls=nfe)
            except ValueError:
                continue  # singular on this grid (a held noise prediction at alpha = 0, an infinite velocity)
            label = f"{name}@{grid_name}"
            yield Candidate(label, "method", table.named(label))


def _key(sampler: Sampler) -> bytes:
    numbers = torch.cat([sampler.times, sampler.a, sampler.b.flatten()])
    return torch.round(numbers * 1e9).numpy().tobytes()
