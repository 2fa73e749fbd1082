"""The divergence of a field along its solution: exact, one backward pass per dimension, or estimated with probes."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .._types import Field, FieldError, Time

DivergenceRule = Literal["exact", "hutchinson"]

Traced = Callable[[Tensor, Time], tuple[Tensor, Tensor]]
"""``(x, t) -> (velocity, divergence)``; the divergence has shape (probes, batch), one row where it is exact."""


def exact(field: Field, *, graph: bool) -> Traced:
    """The trace of the Jacobian: one field call and as many backward passes as the state has dimensions.

    Args:
        field: each sample's velocity may depend on that sample only (no batch normalisation in training mode).
        graph: keep the graph, for derivatives of the result; otherwise every term is let go of at once.
    """

    def traced(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        at, v = _asked(field, x, t, graph)
        total, size = x.new_zeros(x.shape[0]), x[0].numel()
        for i in range(size):
            unit = torch.zeros_like(v).flatten(1)
            unit[:, i] = 1.0
            total = total + _pulled_back(v, unit.view_as(v), at, graph or i < size - 1, graph).flatten(1)[:, i]
        return v if graph else v.detach(), total[None]

    return traced


def hutchinson(field: Field, probes: Tensor, *, graph: bool) -> Traced:
    """The products z . (J z), whose mean over probes z is the divergence (Hutchinson, 1990; FFJORD, 1810.01367, eq. 7).

    One field call and one backward pass per probe.

    Args:
        field: as for `exact`.
        probes: (probes, batch, *shape); the same at every time, as an adaptive solver needs them.
        graph: as for `exact`.
    """

    def traced(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        at, v = _asked(field, x, t, graph)
        rows = []
        for k, z in enumerate(probes):
            pulled = _pulled_back(v, z, at, graph or k < len(probes) - 1, graph)
            rows.append((pulled * z).flatten(1).sum(1))
        return v if graph else v.detach(), torch.stack(rows)

    return traced


def signs(seed: int, count: int, like: Tensor) -> Tensor:
    """Rademacher probes (count, *like.shape), drawn on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (count, *like.shape), generator=generator, dtype=torch.int8) * 2 - 1).to(like)


def _asked(field: Field, x: Tensor, t: Time, graph: bool) -> tuple[Tensor, Tensor]:
    if torch.is_inference_mode_enabled():
        raise FieldError("a log-density needs derivatives, which torch.inference_mode rules out; use torch.no_grad instead")
    with torch.enable_grad():
        at = x if graph and x.requires_grad else x.detach().requires_grad_(True)
        v = field(at, t)
    if not v.requires_grad:
        raise no_derivative()
    return at, v


def _pulled_back(v: Tensor, weight: Tensor, at: Tensor, keep: bool, graph: bool) -> Tensor:
    """The gradient of weight . v in the state."""
    (gradient,) = torch.autograd.grad(v, at, weight, retain_graph=keep, create_graph=graph, allow_unused=True)
    if gradient is None:
        raise no_derivative()
    return gradient


def no_derivative() -> FieldError:
    """What to say where autograd finds no way from the field's output to its state."""
    return FieldError(
        "the divergence needs the field's derivative in x, but its output carries no graph back to x: it runs under "
        "torch.no_grad, detaches, or does not use x (write 0 * x + c for a constant)"
    )
