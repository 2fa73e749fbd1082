"""The affine paths x_t = alpha_t x1 + sigma_t x0 between noise x0 ~ N(0, I) at t = 0 and data x1 at t = 1."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._affine import AffinePath
from ._affine import Coefficients as Coefficients
from ._affine import Interpolant as Interpolant
from ._affine import raw_mix as raw_mix
from ._types import Time


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
    """Variance preserving, linear beta(1 - t) (Song et al., 2011.13456, eq. 33).

    Raises:
        ValueError: not 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _check(self, 0 < self.beta_min <= self.beta_max < math.inf, "0 < beta_min <= beta_max")

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
    """Variance exploding: alpha = 1, sigma geometric from sigma_max to sigma_min (Song et al., 2011.13456, eq. 30).

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check(self, 0 < self.sigma_min < self.sigma_max < math.inf, "0 < sigma_min < sigma_max")

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

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check(self, 0 < self.sigma_min < self.sigma_max < math.inf, "0 < sigma_min < sigma_max")

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


def _check(path: AffinePath, sound: bool, needs: str) -> None:
    """Refuse a path whose log-SNR would not rise from noise to data, or would be infinite inside."""
    if not sound:
        name = type(path).__name__
        raise ValueError(f"{name} needs {needs}, all finite; got {path!r}; {name}() has the usual values")
