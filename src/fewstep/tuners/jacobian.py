"""How the end point moves with the numbers of a table: forward differences, many in one batch, without back-propagation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._types import Field
from ..composite import dtype_of, path_of
from ..problem import Problem
from ..sampler import Sampler

Write = Callable[[Tensor], Sampler]
"""Numbers (p,) float64 -> a table; differentiable, ValueError where the numbers make no table."""

MEMORY = 1 << 25
"""Largest number of elements of the tangents of all calls; more noise is taken in pieces, more numbers in groups."""

TOGETHER = 1 << 19
"""Elements of a batch of copies of the noise, at most (one copy at least). `adapt(..., max_batch=)` splits batches further."""


def jacobian_of(write: Write, theta: Tensor) -> tuple[Tensor, Tensor]:
    """How the table moves with its numbers: d times (n, p), and d rows (n + 1, n + 1, p), column 0 the noise."""

    def numbers(values: Tensor) -> tuple[Tensor, Tensor]:
        table = write(values)
        return table.times, torch.cat([table.a[:, None], table.b], dim=1)

    found = torch.autograd.functional.jacobian(numbers, theta)
    assert isinstance(found, tuple)
    return found[0], found[1]


def normal_equations(write: Write, theta: Tensor, problem: Problem, log_loss: bool) -> tuple[Tensor, Tensor]:
    """J^T J and J^T r of the end point, summed over the noise in pieces that fit into memory."""
    table, (d_times, d_rows) = write(theta), jacobian_of(write, theta)
    p, size = len(theta), problem.noise[0].numel() * problem.conditions
    piece = max(1, MEMORY // (p * table.nfe * size))
    normal, slope = torch.zeros(p, p, dtype=torch.float64), torch.zeros(p, dtype=torch.float64)
    for low in range(0, problem.each, piece):
        part = problem.part(low, min(low + piece, problem.each))
        end, tangents = propagate(table, d_times, d_rows, part)
        residual = (end - part.solution.end).double()
        weight = residual.square().flatten(1).mean(1).clamp(min=1e-300).rsqrt() if log_loss else torch.ones(len(residual))
        weight = weight.to(residual).view(-1, *[1] * (residual.ndim - 1))
        j, r = (tangents.double() * weight).flatten(1), (residual * weight).flatten()
        normal += (j @ j.T).cpu()
        slope += (j @ r).cpu()
    return normal, slope


def propagate(table: Sampler, d_times: Tensor, d_rows: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The end point (batch, ...) and its derivative in every number (p, batch, ...), by one-sided differences per call.

    Numbers that do not fit into `MEMORY` at once are taken in groups; this costs no further passes.
    """
    ask, noise, n, p = problem.field, problem.noise, table.nfe, d_times.shape[1]
    rows = torch.cat([table.a[:, None], table.b], dim=1).detach().to(noise)
    features = noise.new_zeros(n + 1, *noise.shape)  # the noise, then the outputs
    features[0] = noise
    tangents = noise.new_zeros(p, *noise.shape)
    with torch.no_grad():
        for i in range(n):
            features[i + 1] = ask(torch.tensordot(rows[i, : i + 1], features[: i + 1], dims=1), float(table.times[i]))
        for group in torch.arange(p).split(max(1, MEMORY // (n * noise.numel()))):
            tangents[group] = _tangents(table, rows, features, d_times[:, group], d_rows[..., group], problem)
        return torch.tensordot(rows[n], features, dims=1), tangents


def _tangents(table: Sampler, rows: Tensor, features: Tensor, d_times: Tensor, d_rows: Tensor, problem: Problem) -> Tensor:
    """The derivative of the end point in some of the numbers, (numbers, batch, ...)."""
    n, p = table.nfe, d_times.shape[1]
    moved = features.new_zeros(n, p, *features.shape[1:])  # d output / d number
    for i in range(n + 1):
        used = slice(0, i + 1)
        dx = torch.tensordot(d_rows[i, used].T.to(features), features[used], dims=1)
        if i:
            dx += torch.tensordot(rows[i, 1 : i + 1], moved[:i], dims=1)
        if i == n:
            return dx
        x = torch.tensordot(rows[i, used], features[used], dims=1)
        for some, changes in _changes(problem, x, features[i + 1], float(table.times[i]), dx, d_times[i]):
            moved[i, some] = changes
    raise AssertionError("unreachable: the last row returns")


def _changes(problem: Problem, x: Tensor, u: Tensor, t: float, dx: Tensor, dt: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """How the output `u` at (x, t) changes along each of the directions (dx, dt) that are not zero: (which, changes) in groups.

    A group is one batch of as many copies of the noise: a small batch leaves most of a processor idle.
    """
    lengths, size = dx.flatten(1).square().mean(1).sqrt().cpu().double(), max(float(x.square().mean().sqrt()), 1e-12)
    h = difference(problem.field) / torch.maximum(lengths / size, dt.abs()).clamp(min=1e-300)
    h = torch.where((t + h * dt >= 0.0) & (t + h * dt <= 1.0), h, -h)
    most = max(1, TOGETHER // x.numel())
    still, moving = ((lengths > 0.0) & (dt == 0.0)).nonzero()[:, 0], dt.nonzero()[:, 0]
    alone = path_of(problem.field) is None  # a bare function may only know one time for the whole batch
    groups = [*still.split(most), *moving.split(1 if alone else most)]
    for some in (group for group in groups if len(group)):
        field, copies, noises = problem.tiled(len(some))
        steps = h[some][copies].to(x).view(-1, *[1] * (x.ndim - 1))
        times = t + h[some] * dt[some]
        time = float(times[0]) if len(times.unique()) == 1 else times[copies].to(x)
        change = (field(x[noises] + steps * dx[some][copies, noises], time) - u[noises]) / steps
        changes = change.new_empty(len(some), *x.shape)
        changes[copies, noises] = change
        yield some, changes


def difference(field: Field) -> float:
    """Relative step of one-sided differences: the square root of the network's precision, a little more for float32."""
    return max(4.0 * float(torch.finfo(dtype_of(field)).eps) ** 0.5, 1e-5)
