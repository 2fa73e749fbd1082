"""What a table does to volumes: exactly, by its Jacobian, or to the flow's accuracy, by its weights as a quadrature."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._types import FieldError, Prediction, State, Time
from ..composite import CountedField
from ..path import AffinePath
from ..sampler import Sampler
from .divergence import Traced, no_derivative


def log_volume(sampler: Sampler, counted: CountedField, noise: State, *, graph: bool) -> tuple[Tensor, Tensor]:
    """The sample and log |det d sample / d noise| of the table's own map, (batch, *shape) and (batch,).

    The unrolled table stays in memory, and is walked back once per dimension.

    Raises:
        FieldError: the map is singular at one of the samples, or the field keeps no graph.
    """
    with torch.enable_grad():
        z = noise if graph and noise.requires_grad else noise.detach().requires_grad_(True)
        x = sampler(Connected(counted), z)
        sums, size = x.flatten(1).sum(0), x[0].numel()
        rows = [
            torch.autograd.grad(sums[i], z, retain_graph=graph or i < size - 1, create_graph=graph)[0].flatten(1)
            for i in range(size)
        ]
    _, logs = torch.linalg.slogdet(torch.stack(rows, dim=1).double())
    if not bool(torch.isfinite(logs).all()):
        bad = int((~torch.isfinite(logs)).sum())
        raise FieldError(f"the table's map is singular at {bad} of {len(logs)} samples: they have no density")
    return (x if graph else x.detach()), (logs if graph else logs.detach()).to(x.dtype)


def velocity_quadrature(sampler: Sampler, path: AffinePath | None, start_scale: float) -> Sampler:
    """The table over velocities, if the weights of its last row integrate over [0, 1].

    Raises:
        FieldError: they do not.
    """
    if sampler.predicts != "velocity":
        if path is None:
            raise FieldError(f'this sampler combines "{sampler.predicts}" predictions: pass the path that they belong to')
        sampler = sampler.rebase(path, "velocity")
    a, whole = sampler.a.detach(), float(sampler.b.detach()[-1].sum())
    if max(abs(float(a[-1]) / start_scale - 1), abs(float(a[0]) / start_scale - 1), abs(whole - 1)) > 1e-6:
        raise FieldError(
            "the flow's log-density is accumulated with the weights of the last row, which must integrate velocities from "
            f"t = 0 to 1: a[0] = a[-1] = {start_scale:g} and b[-1] summing to 1; this table has {float(a[0]):g}, "
            f'{float(a[-1]):g} and {whole:g}; ask for density="sampler", or give a solver instead of the table'
        )
    return sampler


@dataclass(eq=False)
class Accumulating:
    """A field that adds up its divergence with the weights of a table's last row, in the order of the calls."""

    traced: Traced
    weights: list[float]
    path: AffinePath | None
    total: Tensor | float = field(default=0.0, init=False)
    calls: int = field(default=0, init=False)

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The velocity; its divergence is kept."""
        v, divergence = self.traced(x, t)
        self.total = self.total + self.weights[self.calls] * divergence
        self.calls += 1
        return v


@dataclass(eq=False)
class Connected:
    """A field whose outputs must carry a graph: the Jacobian of a table would silently miss the others."""

    field: CountedField

    @property
    def path(self) -> AffinePath:
        """The path of the field inside; a bare function has none (AttributeError)."""
        return self.field.path

    @property
    def passes(self) -> int:
        """Network passes per call."""
        return self.field.passes

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """The velocity."""
        return self._checked(self.field(x, t))

    def predict(self, x: Tensor, t: Time, target: Prediction) -> Tensor:
        """The prediction `target`."""
        return self._checked(self.field.predict(x, t, target))

    @staticmethod
    def _checked(value: Tensor) -> Tensor:
        if not value.requires_grad:
            raise no_derivative()
        return value
