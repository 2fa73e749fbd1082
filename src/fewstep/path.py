"""Affine paths x_t = alpha_t x1 + sigma_t x0 between noise x0 ~ N(0, I) at t = 0 and data x1 at t = 1.

Every quantity that a network predicts is a row in the basis (x1, x0): data (1, 0), noise (0, 1), the state
(alpha, sigma), the velocity (alpha', sigma'), the score (0, -1/sigma). Given the state and one of them, any other is one
2x2 solve away; that solve is the only conversion in fewstep.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
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
            >>> x, v = torch.ones(1, 2), torch.full((1, 2), 3.0)
            >>> CondOT().convert(v, x, 0.5, source="velocity", target="data")
            tensor([[2.5000, 2.5000]])
        """
        if source == target:
            return value
        p, q = self.mix(t, source, target)
        return _per_sample(p, value) * value + _per_sample(q, x) * x

    def interpolate(self, x0: State, x1: State, t: Time) -> Interpolant:
        """The state between noise `x0` and data `x1` at time `t`, with its velocity."""
        c = self.coefficients(t)
        alpha, sigma, d_alpha, d_sigma = (_per_sample(value, x0) for value in c)
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


def _per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class CondOT(AffinePath):
    """alpha = t, sigma = 1 - t: straight lines (Lipman et al., 2210.02747; Liu et al., 2209.03003)."""

    def _coefficients(self, t):
        return t, 1.0 - t, torch.ones_like(t), -torch.ones_like(t)

    def _time(self, log_snr):
        return torch.sigmoid(log_snr)


@dataclass(frozen=True)
class Cosine(AffinePath):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2) (Nichol & Dhariwal, 2102.09672, without the offset)."""

    def _coefficients(self, t):
        half_pi = math.pi / 2
        # cos(pi/2) is 6e-17 in floating point; the end of the path is data and nothing else.
        sine, cosine = torch.sin(half_pi * t), torch.where(t == 1.0, torch.zeros_like(t), torch.cos(half_pi * t))
        return sine, cosine, half_pi * cosine, -half_pi * sine

    def _time(self, log_snr):
        return torch.atan(log_snr.exp()) * (2 / math.pi)


@dataclass(frozen=True)
class VP(AffinePath):
    """Variance preserving, linear beta(1 - t) (Song et al., 2011.13456, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def margin(self) -> float:
        """Within it sigma is below 1e-3."""
        return 1e-5

    def _coefficients(self, t):
        tau = 1.0 - t
        slope = self.beta_max - self.beta_min
        log_alpha = -(tau**2 * slope / 4 + tau * self.beta_min / 2)
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = (tau * slope + self.beta_min) / 2 * alpha
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma

    def _time(self, log_snr):
        # alpha^2 = sigmoid(2 lambda); then tau solves slope tau^2 / 4 + beta_min tau / 2 = -log alpha.
        cost = (-torch.nn.functional.logsigmoid(2 * log_snr) / 2).clamp(max=1e30)  # infinite at pure noise
        slope = self.beta_max - self.beta_min
        return 1.0 - 4 * cost / (self.beta_min + (self.beta_min**2 + 4 * slope * cost).sqrt())


@dataclass(frozen=True)
class VE(AffinePath):
    """Variance exploding: alpha = 1, sigma geometric from sigma_max to sigma_min (Song et al., 2011.13456, eq. 30)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @property
    def start_scale(self) -> float:
        """Sigma at t = 0."""
        return self.sigma_max

    def _coefficients(self, t):
        rate = math.log(self.sigma_max / self.sigma_min)
        sigma = self.sigma_max * torch.exp(-rate * t)
        return torch.ones_like(t), sigma, torch.zeros_like(t), -rate * sigma

    def _time(self, log_snr):
        return (log_snr + math.log(self.sigma_max)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(AffinePath):
    """alpha = 1, sigma = sigma_max (1 - t): the ODE of Karras et al. (2206.00364) with its sigma(t) = t clock reversed.

    Euler in t is Euler in sigma. The path ends in data; `sigma_min` is the lowest noise level at which the network is
    asked, and where the log-SNR and Karras grids take their last step to zero.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def start_scale(self) -> float:
        """Sigma at t = 0."""
        return self.sigma_max

    @property
    def margin(self) -> float:
        """Where sigma is `sigma_min`."""
        return self.sigma_min / self.sigma_max

    def _coefficients(self, t):
        one = torch.ones_like(t)
        return one, self.sigma_max * (1.0 - t), torch.zeros_like(t), -self.sigma_max * one

    def _time(self, log_snr):
        return 1.0 - torch.exp(-log_snr) / self.sigma_max


class DiscreteVP(AffinePath):
    """The path of a network trained on T discrete noise levels, from a diffusers scheduler's `alphas_cumprod`.

    Time t stands for the fractional timestep (1 - t) T - 1, so t = 0 is timestep T - 1, t = 1 - 1/T is timestep 0 and
    t = 1 is clean data ("set_alpha_to_one"). log alpha is linear between levels, as in DPM-Solver (2206.00927, app. D).

    Args:
        alphas_cumprod: (T,) decreasing products of 1 - beta, in (0, 1).

    Raises:
        ValueError: values outside (0, 1) or not decreasing.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        levels = torch.as_tensor(alphas_cumprod).detach().cpu().to(torch.float64)
        if levels.ndim != 1 or len(levels) < 2 or not bool(((levels > 0) & (levels < 1)).all() and (levels.diff() < 0).all()):
            ends = f" from {levels.flatten()[0]:g} to {levels.flatten()[-1]:g}" if levels.numel() else ""
            raise ValueError(
                "alphas_cumprod must be a decreasing vector in (0, 1), such as scheduler.alphas_cumprod; "
                f"got shape {tuple(levels.shape)}{ends}"
            )
        self.levels = levels
        self.count = len(levels)
        # Index k holds log alpha of timestep k - 1; the first entry is clean data.
        self.log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), levels.log() / 2])

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.levels.numpy().tobytes()).hexdigest()[:12]
        return f"DiscreteVP(count={self.count}, sha256={digest})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiscreteVP) and torch.equal(self.levels, other.levels)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def margin(self) -> float:
        """One timestep: t = 1 - 1/T is timestep 0."""
        return 1.0 / self.count

    def timestep(self, t: Time) -> Tensor:
        """The fractional timestep in [0, T - 1] that the network is asked at time `t`."""
        return ((1.0 - torch.as_tensor(t, dtype=torch.float64)) * self.count - 1.0).clamp(min=0.0)

    def time(self, timestep: Time) -> Tensor:
        """The time t of a (fractional) timestep."""
        return 1.0 - (torch.as_tensor(timestep, dtype=torch.float64) + 1.0) / self.count

    def _coefficients(self, t):
        table = self.log_alpha.to(t.device)
        position = ((1.0 - t) * self.count).clamp(0.0, self.count)
        left = position.floor().clamp(max=self.count - 1).long()
        slope = table[left + 1] - table[left]
        log_alpha = table[left] + (position - left) * slope
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = -self.count * slope * alpha
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma

    def _time(self, log_snr):
        log_alpha = torch.nn.functional.logsigmoid(2 * log_snr) / 2
        table = self.log_alpha.to(log_alpha.device)
        left = (torch.searchsorted(-table, -log_alpha) - 1).clamp(0, self.count - 1)
        position = left + (log_alpha - table[left]) / (table[left + 1] - table[left])
        return 1.0 - position / self.count
