"""Writing a table: run the method once on coefficient vectors.

The state starts as the basis vector e_0 and the k-th call of the field returns e_k, so every state that the method visits
*is* its row of the table.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._types import Field, NotLinearError, State, Time
from .grid import TimeGrid
from .sampler import Provenance, Sampler

Run = Callable[[Field, TimeGrid, State], State]

MOST_CALLS = 1000
"""A method that asks more often than this on one grid is taken to adapt its steps."""


def tabulate(method: Run, grid: TimeGrid, *, start_scale: float = 1.0) -> Sampler:
    """The table of `method` on `grid`: equal to running the method, for every field.

    Differentiable: gradients of the table reach `grid.knots`.

    Args:
        method: plain code ``method(field, grid, noise) -> sample`` that combines states linearly.
        grid: its step times.
        start_scale: standard deviation of the state at t = 0 (`path.start_scale`: 80 for EDM); noise stays standard normal.

    Raises:
        NotLinearError: the method clips, adapts, or draws noise.

    Example:
        >>> from fewstep import methods
        >>> tabulate(methods.euler, TimeGrid.uniform(2)).b
        tensor([[0.0000, 0.0000],
                [0.5000, 0.0000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    sampler = write_table(method, grid, start_scale=start_scale)
    _probe(method, grid, sampler, start_scale)
    return sampler


def write_table(method: Run, grid: TimeGrid, *, start_scale: float = 1.0, calls: int | None = None) -> Sampler:
    """`tabulate` without the check that the method is linear: for methods that the contract tests cover.

    `calls` is the number of field calls, where it is known; it is counted otherwise.
    """
    size = 1 + (_count_calls(method, grid) if calls is None else calls)
    basis = torch.eye(size, dtype=torch.float64)
    rows, times = [], []

    def record(x: Tensor, t: Time) -> Tensor:
        rows.append(x[0].clone())  # a method may move its state in place
        times.append(torch.as_tensor(t, dtype=torch.float64))
        return basis[min(len(rows), size - 1)].clone()[None]

    rows.append(method(record, grid, start_scale * basis[:1])[0])
    name = str(getattr(method, "name", getattr(method, "__name__", type(method).__name__)))
    if len(rows) != size:
        raise NotLinearError(
            f'"{name}" asked the field {size - 1} times, then {len(rows) - 1}; adaptive methods are not tables'
        )
    table = torch.stack(rows)
    if bool(table.detach()[:, 1:].triu().any()):  # a state cannot hold outputs that are yet to come
        raise _not_a_table(name)
    return Sampler(torch.stack(times), table[:, 0], table[:, 1:], provenance=Provenance(method=name))


def _count_calls(method: Run, grid: TimeGrid) -> int:
    calls = 0

    def count(x: Tensor, t: Time) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > MOST_CALLS:
            raise NotLinearError(f"the method asked the field more than {MOST_CALLS} times; adaptive methods are not tables")
        return torch.zeros_like(x)

    method(count, grid, torch.ones(1, 1, dtype=torch.float64))
    if calls == 0:
        raise NotLinearError("the method never asked the field; it must call field(x, t) at least once")
    return calls


def _probe(method: Run, grid: TimeGrid, sampler: Sampler, start_scale: float) -> None:
    """Compare method and table on a random non-linear field, with states large enough that clips show."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    noise = 4.0 * torch.randn(8, 6, generator=generator, dtype=torch.float64)

    def field(x: Tensor, t: Time) -> Tensor:
        return 3.0 * torch.tanh(x @ weight.to(x) / 4.0) + torch.sin(5.0 * torch.as_tensor(t, dtype=x.dtype)) * x

    with torch.no_grad():
        direct, table = method(field, grid, start_scale * noise), sampler(field, noise)
    if direct.shape != noise.shape or not torch.allclose(direct, table, rtol=1e-8, atol=1e-8 * float(table.abs().max())):
        raise _not_a_table(sampler.provenance.method)


def _not_a_table(name: str) -> NotLinearError:
    return NotLinearError(
        f'"{name}" is not a table: its result differs from the linear combination of its own calls '
        "(it clips, adapts or draws noise); put a clip into the field instead, or use it as a baseline"
    )
