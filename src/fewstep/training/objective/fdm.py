"""Flow and divergence matching (Huang et al., 2602.00869): velocity regression plus a penalty on the density's error.

For x = alpha x1 + sigma eps the conditional score is s = -eps / sigma, the conditional velocity u = alpha' x1 + sigma' eps
and its divergence d sigma' / sigma. A velocity v carries the right density where the mean over x1 of

    R = div v + (v - u).s - div u,        sigma R = sigma div v - (v - u).eps - d sigma'

vanishes at every x. sigma R is finite on every path and is what this file computes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._types import FewstepError, State
from ...field import Model
from ...keyed import Keyed, generator
from ...path import AffinePath, Interpolant
from ..batch import Batch, Loss
from .regression import Regression

Form = Literal["vector", "two_probes", "exact"]
Probes = Literal["rademacher", "gaussian"]

EXACT_LIMIT = 256
"""Largest dimension for the exact divergence, which takes one backward pass per dimension."""

_VELOCITY = Regression("velocity")


@dataclass(frozen=True)
class FlowAndDivergence:
    """`base` + `weight` times the divergence mismatch, in the forms whose gradient vanishes at the true velocity.

    In all of them the v of (v - u).eps is held fixed: differentiated, it would pull v towards small variance, away from the
    truth. Nor are |R| (a median is not a mean) and the square of a one-probe estimate (its variance depends on v) offered.

    - "vector": mean square of the elements of sigma J'z - eps (v - u).z - sigma' z: one probe compares the whole Jacobian J of
      v, not only its trace. The cheapest and, above two dimensions, the least noisy.
    - "two_probes": (sigma R)^2 / d in mean and mean gradient, from z1'Jz1 and z2'Jz2 with independent probes. Its value is
      the product of the two estimates, unbiased and sometimes negative.
    - "exact": (sigma R)^2 / d from all d derivatives; for small dimensions.

    Over d, the three pull an error in v back about as hard as each other and as the velocity regression does, in any
    dimension (measured in 2, 16 and 128 on a mixture of Gaussians: 0.38 to 0.40 along a sine of amplitude 0.3, the regression
    0.30). One sample's gradient varies by 2.5, 1.5 and 1.4 in the vector form, by 2.7, 3.5 and 6.5 with two probes, by 1.3,
    0.33 and 0.11 in the regression: the larger d, the smaller `weight` must be. The paper and its public 2-D code do not
    divide by d: their lambda is this one over d. The term carries the weight that `base` puts on the velocity error.

    Cost (benchmarks/fdm_cost.py, CPU, one thread of a machine in use): on U-Nets with and without attention the default, the
    vector form on 1/16 of the batch, takes 1.2 to 1.3 times the time of the regression alone and, in a pass of its own,
    no more memory; on the whole batch 2.8 to 3.3 times and 3.1 to 3.7 times. On a 4 x 512 MLP, where weights outweigh
    activations, 1.24 and 1.21.

    The theory needs source noise that is normal and independent of the data: not for optimal transport or teacher pairs.

    Attributes:
        weight: lambda, of the term's mean over samples and steps; 0 switches it off at no cost. What bounds it is noise: with
            r the noise of the term's gradient in units of the regression's (4.0 on 8x8 digits, 11.5 on 3x32x32 images:
            benchmarks/fdm_noise.py), keep it well below sqrt(share / every) / r. 0.2 on the whole batch helped in the plane, on
            a sixteenth it did harm there; 0.1 hurt on trajectories of 180 and 240 numbers, 0.01 did not (experiments/).
        form: see above.
        share: fraction of the batch that the term is computed on, evenly spaced rows from an offset drawn at each step; it
            is scaled by 1 / share, so that its mean stays the same.
        every: it is computed at every so many steps only, and scaled by as much (as lazy regularisation: Karras et al.,
            1912.04958, appendix B).
        probes: law of z; "rademacher" (signs) has the least variance.
        base: the regression.

    Raises:
        FewstepError: an option outside its range, Gaussian probes for the exact form, or the exact form above 256 dimensions.
    """

    name: ClassVar[str] = "fdm"
    independent_noise: ClassVar[bool] = True
    weight: float = 0.01
    form: Form = "vector"
    share: float = 1 / 16
    every: int = 1
    probes: Probes = "rademacher"
    base: Regression = _VELOCITY

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise FewstepError(f"weight of the divergence must be 0 or more, got {self.weight:g}")
        if self.form not in get_args(Form):
            raise FewstepError(f'form must be one of {", ".join(get_args(Form))}, got "{self.form}"')
        if not 0 < self.share <= 1:
            raise FewstepError(f"share must lie in (0, 1], got {self.share:g}; weight=0 switches the divergence off")
        if self.every < 1:
            raise FewstepError(f"every must be 1 or more steps, got {self.every}; weight=0 switches the divergence off")
        if self.probes not in get_args(Probes):
            raise FewstepError(f'probes must be one of {", ".join(get_args(Probes))}, got "{self.probes}"')
        if self.probes == "gaussian" and self.form == "exact":
            raise FewstepError('form="exact" has no probes, got probes="gaussian"; leave one of the two out')

    def __call__(self, model: Model, batch: Batch) -> Loss:
        """The loss of each sample; its part "divergence" has the mean of the term before `weight`, where it is computed."""
        pieces = self._pieces(model, batch)
        places = torch.cat([rows for rows, _ in pieces]).argsort().to(batch.x1.device)
        losses = [piece() for _, piece in pieces]
        each = torch.cat([loss.each for loss in losses])[places]
        return Loss(each, {name: torch.cat([loss.parts[name] for loss in losses])[places] for name in losses[0].parts})

    def pieces(self, model: Model, batch: Batch) -> list[Callable[[], Loss]]:
        """The rows without the term, and those with it; see `Piecewise`."""
        return [piece for _, piece in self._pieces(model, batch)]

    def _pieces(self, model: Model, batch: Batch) -> list[tuple[Tensor, Callable[[], Loss]]]:
        """With the places of their samples."""
        active = self.weight > 0 and batch.keyed.step % self.every == 0
        chosen, others, keyed = _rows(batch.keyed, self.share if active else 0.0)

        def matched() -> Loss:
            flow, term = self._both(model, _take(batch, chosen, keyed))
            return Loss(flow + (self.weight * self.every / self.share) * term, {"divergence": term.detach() / self.share})

        def rest() -> Loss:
            each = self.base(model, _take(batch, others, batch.keyed)).each
            return Loss(each, {"divergence": torch.zeros_like(each)} if active else {})

        # The others first: once there are gradients to add to, less memory is left for activations.
        return [(rows, piece) for rows, piece in ((others, rest), (chosen, matched)) if len(rows)]

    def passes(self, size: int) -> float:
        """Cost per sample in forward passes, a backward pass being two, for samples of `size` numbers."""
        # One to the input, and two for the backward pass through that.
        products = {"exact": 3 * size, "vector": 3, "two_probes": 4}[self.form]
        return self.base.passes(size) + (products * self.share / self.every if self.weight else 0.0)

    def span(self, model: Model) -> tuple[float, float]:
        """First and last time at which everything is finite; draw times inside."""
        return self.base.span(model)

    def _both(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """The regression and the unscaled divergence term of every sample, (batch,) each, from one pass of the network."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            pair = model.path.interpolate(batch.x0, batch.x1, batch.t)
            pair = pair._replace(xt=pair.xt.detach().requires_grad_(True))
            native = batch.field(model).predict(pair.xt, pair.t, model.predicts)
            flow = self.base.compare(model, pair, native)
            v = model.path.convert(native, pair.xt, pair.t, source=model.predicts, target="velocity")
            term = self._divergence(Mismatch.at(model.path, pair, v), batch.keyed)
        return flow, self.base.velocity_weights(model, batch.t).to(term) * term

    def _divergence(self, m: "Mismatch", keyed: Keyed) -> Tensor:
        if self.form == "exact":
            return m.residual(m.trace()) ** 2 / m.size
        z = self._probe(keyed, "probe", m)
        if self.form == "vector":
            return m.vector(z).square().mean(1)
        # Gradient 2 R1 dR2, of which only the second needs a graph; the value is R1 R2.
        first = m.residual((m.pull(z, graph=False) * z).sum(1)).detach()
        z = self._probe(keyed, "second probe", m)
        second = m.residual((m.pull(z) * z).sum(1))
        return first * (2 * second - second.detach()) / m.size

    def _probe(self, keyed: Keyed, what: str, m: "Mismatch") -> Tensor:
        draw = keyed.normal if self.probes == "gaussian" else keyed.signs
        return draw(what, m.size).to(m.eps)


class Mismatch(NamedTuple):
    """What the residuals are made of.

    Attributes:
        v: (batch, *shape) the model's velocity, with its graph.
        x: (batch, *shape) the states that it was computed from, a leaf of that graph.
        gap: (batch, size) v - u, v held fixed.
        eps: (batch, size) the noise, -sigma times the conditional score.
        sigma: (batch,)
        d_sigma: (batch,) its time derivative.
    """

    v: Tensor
    x: Tensor
    gap: Tensor
    eps: Tensor
    sigma: Tensor
    d_sigma: Tensor

    @classmethod
    def at(cls, path: AffinePath, pair: Interpolant, v: State) -> "Mismatch":
        """For the velocity `v` at the state of `pair`, which must require gradients."""
        _, sigma, _, d_sigma = path.coefficients(pair.t)
        gap = (v.detach() - pair.ut).flatten(1)
        return cls(v, pair.xt, gap, pair.x0.flatten(1), sigma.to(v), d_sigma.to(v))

    @property
    def size(self) -> int:
        """Numbers per sample, d."""
        return self.eps.shape[1]

    def pull(self, z: Tensor, graph: bool = True) -> Tensor:
        """J'z, (batch, size): a reverse pass, which here is cheaper than a forward one in time and memory."""
        (pulled,) = torch.autograd.grad(self.v, self.x, z.view_as(self.v), retain_graph=True, create_graph=graph)
        return pulled.flatten(1)

    def trace(self) -> Tensor:
        """Divergence of v, (batch,)."""
        if self.size > EXACT_LIMIT:
            raise FewstepError(
                f"the exact divergence takes one backward pass per dimension, here {self.size} (at most {EXACT_LIMIT}); "
                'use form="vector"'
            )
        return torch.stack(
            [self.pull(row.expand_as(self.eps))[:, i] for i, row in enumerate(torch.eye(self.size).to(self.eps))]
        ).sum(0)

    def residual(self, trace: Tensor) -> Tensor:
        """Sigma R, (batch,), from a divergence or an estimate of it; the inner product is exact."""
        return self.sigma * trace - (self.gap * self.eps).sum(1) - self.size * self.d_sigma

    def vector(self, z: Tensor) -> Tensor:
        """Sigma times the Jacobian's residual, transposed, along z: (batch, size)."""
        along = (self.gap * z).sum(1, keepdim=True)
        return self.sigma[:, None] * self.pull(z) - self.eps * along - self.d_sigma[:, None] * z


def _rows(keyed: Keyed, share: float) -> tuple[Tensor, Tensor, Keyed]:
    """Every (1 / share)-th sample of the whole batch, from an offset drawn per step, however the batch is divided.

    Returns:
        Places of the chosen and of the other samples in this process's part, and the random numbers of the chosen ones.
    """
    offset = float(torch.rand((), generator=generator(keyed.seed, "share", keyed.step), dtype=torch.float64))
    count = (torch.arange(keyed.start, keyed.stop + 1, dtype=torch.float64) * share + offset).floor().long()
    chosen = count.diff() > 0
    numbers = keyed.share(int(count[0]), int(count[-1]))
    return torch.where(chosen)[0], torch.where(~chosen)[0], numbers


def _take(batch: Batch, places: Tensor, keyed: Keyed) -> Batch:
    """The samples at these places of the batch."""
    if len(places) == len(batch.x1):
        return replace(batch, keyed=keyed)
    at = places.to(batch.x1.device)
    label = None if batch.label is None else batch.label[at.to(batch.label.device)]
    return Batch(batch.x0[at], batch.x1[at], batch.t[at.to(batch.t.device)], label, keyed)
