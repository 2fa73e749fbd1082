"""What every affine path x_t = alpha_t x1 + sigma_t x0 can do; the paths themselves are in `fewstep.path`.

Every quantity that a network predicts is a row in the basis (x1, x0): data (1, 0), noise (0, 1), the state
(alpha, sigma), the velocity (alpha', sigma'), the score (0, -1/sigma). Given the state and one of them, any other is one
2x2 solve away; that solve is the only conversion in fewstep.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ._types import Prediction, Raw, State, Time


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives, float64, shaped like the time they were asked for."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Interpolant(NamedTuple):
    """A training triple: times (batch,), noise, data, the state between them and its velocity."""

    t: Tensor
    x0: Tensor
    x1: Tensor
    xt: Tensor
    ut: Tensor


class AffinePath(ABC):
    """A pair of functions alpha(t), sigma(t) with alpha rising and sigma falling; subclasses are final."""

    @property
    def margin(self) -> float:
        """How far from a singular end the network is asked at the closest (an end is singular for some predictions only)."""
        return 1e-3

    @property
    def start_scale(self) -> float:
        """Standard deviation of the state at t = 0; a sampler multiplies standard normal noise by it."""
        return 1.0

    @abstractmethod
    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, alpha', sigma' for a float64 tensor of times."""

    @abstractmethod
    def _time(self, log_snr: Tensor) -> Tensor:
        """The time at which log(alpha / sigma) takes this value."""

    def coefficients(self, t: Time) -> Coefficients:
        """alpha, sigma, d alpha/dt, d sigma/dt at `t`, in float64.

        Example:
            >>> from fewstep import CondOT
            >>> CondOT().coefficients(0.25).sigma.item()
            0.75
        """
        return Coefficients(*self._coefficients(torch.as_tensor(t, dtype=torch.float64)))

    def log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha / sigma), float64; infinite where alpha or sigma is zero."""
        alpha, sigma, _, _ = self.coefficients(t)
        return alpha.log() - sigma.log()

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """The inverse of `log_snr`, clipped to [0, 1]."""
        return self._time(torch.as_tensor(log_snr, dtype=torch.float64)).clamp(0.0, 1.0)

    def mix(self, t: Time, source: Prediction, target: Prediction) -> tuple[Tensor, Tensor]:
        """The numbers (p, q), shaped like `t`, with ``target = p * source + q * x``.

        Raises:
            ValueError: `source` and the state do not determine `target` at this time (only checked for a single time).
        """
        c = self.coefficients(t)
        if source == target:
            return torch.ones_like(c.alpha), torch.zeros_like(c.alpha)
        p, q = self._solve(c, source, target)
        if p.ndim == 0 and not torch.compiler.is_compiling() and not bool(torch.isfinite(p) & torch.isfinite(q)):
            raise ValueError(
                f"at t = {float(t):g} on {self!r} the {source} prediction and the state do not determine the {target}; "
                f"ask inside {self.span(source)}"
            )
        return p, q

    @staticmethod
    def _solve(c: Coefficients, source: Prediction, target: Prediction) -> tuple[Tensor, Tensor]:
        (s0, s1), (g0, g1) = _row(c, source), _row(c, target)
        determinant = s0 * c.sigma - s1 * c.alpha
        return (g0 * c.sigma - g1 * c.alpha) / determinant, (s0 * g1 - s1 * g0) / determinant

    def convert(self, value: State, x: State, t: Time, *, source: Prediction, target: Prediction) -> State:
        """Express the prediction `value`, made at state `x` and time `t`, as another prediction.

        Args:
            value: (batch, *shape) prediction of kind `source`.
            x: (batch, *shape) state at which it was made.
            t: number, 0-d tensor or (batch,).
            source: what `value` is.
            target: what to return.

        Example:
            >>> from fewstep import CondOT
            >>> x, v = torch.ones(1, 2), torch.full((1, 2), 3.0)
            >>> CondOT().convert(v, x, 0.5, source="velocity", target="data")
            tensor([[2.5000, 2.5000]])
        """
        if source == target:
            return value
        p, q = self.mix(t, source, target)
        return per_sample(p, value) * value + per_sample(q, x) * x

    def interpolate(self, x0: State, x1: State, t: Time) -> Interpolant:
        """The state between noise `x0` and data `x1` at time `t`, with its velocity."""
        c = self.coefficients(t)
        alpha, sigma, d_alpha, d_sigma = (per_sample(value, x0) for value in c)
        times = torch.as_tensor(t, device=x0.device).expand(x0.shape[0])
        return Interpolant(times, x0, x1, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0)

    def span(self, predicts: Prediction) -> tuple[float, float]:
        """First and last time at which a network with this prediction determines a finite velocity."""

        def finite(t: float) -> bool:
            c = self.coefficients(t)
            if predicts == "velocity":
                return bool(torch.isfinite(c.d_alpha) & torch.isfinite(c.d_sigma))
            p, q = self._solve(c, predicts, "velocity")
            return bool(torch.isfinite(p) & torch.isfinite(q))

        return (0.0 if finite(0.0) else self.margin, 1.0 if finite(1.0) else 1.0 - self.margin)


def _row(c: Coefficients, prediction: Prediction) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(c.alpha)
    rows = {
        "data": (torch.ones_like(zero), zero),
        "noise": (zero, torch.ones_like(zero)),
        "velocity": (c.d_alpha, c.d_sigma),
        "score": (zero, -1.0 / c.sigma),
    }
    return rows[prediction]


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """Shape a 0-d or (batch,) float64 coefficient so that it multiplies `like` without promoting its dtype."""
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(like).view(-1, *[1] * (like.ndim - 1))


def raw_mix(path: AffinePath, t: Time, raw: Raw, sigma_data: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """How a network's bare input `y` and output `w` relate to state and prediction: y = s x, prediction = p w + q x.

    ``plain`` networks see the state and return their prediction; ``negated`` ones return noise - data for a velocity
    (the flow models of diffusers); ``v_prediction`` returns alpha x0 - sigma x1 (Salimans & Ho, 2022; prediction
    "noise"); ``edm`` is the raw network F inside the preconditioning of Karras et al. (2022), table 1 (prediction "data").

    Returns:
        (s, p, q), float64, shaped like `t`.
    """
    c = path.coefficients(t)
    one, zero = torch.ones_like(c.alpha), torch.zeros_like(c.alpha)
    if raw == "plain":
        return one, one, zero
    if raw == "negated":
        return one, -one, zero
    if raw == "v_prediction":
        return one, c.alpha, c.sigma
    variance = c.sigma**2 + sigma_data**2
    return variance.rsqrt(), c.sigma * sigma_data * variance.rsqrt(), sigma_data**2 / variance
