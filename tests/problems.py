"""Fields that carry their own exact solutions, and smooth ones that have none; everything in float64 by default."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep import TimeGrid
from fewstep.path import AffinePath


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cancelling_wave(x: Tensor, t: Tensor | float) -> Tensor:
    """Four midpoint steps solve it exactly: their values cancel as the integral does. A coarse reference is wrong inside."""
    return 5 * torch.cos(torch.as_tensor(6 * math.pi * t, dtype=x.dtype).view(-1, 1)) * torch.ones_like(x)


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(mean, diag(std^2)) on any affine path: the optimal network, its velocity and the exact flow.

    The state at t is Gaussian with mean alpha m and spread S = sqrt(alpha^2 std^2 + sigma^2); the flow keeps every sample
    at its number of spreads from the mean.
    """

    path: AffinePath
    mean: Tensor
    std: Tensor

    def data(self, x, t):
        """E[x1 | x_t = x]."""
        alpha = self.path.coefficients(t).alpha
        return self.mean + alpha * self.std**2 / self.spread(t) ** 2 * (x - alpha * self.mean)

    def velocity(self, x, t):
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t)
        stretch = (alpha * d_alpha * self.std**2 + sigma * d_sigma) / self.spread(t) ** 2
        return d_alpha * self.mean + stretch * (x - alpha * self.mean)

    def spread(self, t):
        alpha, sigma, _, _ = self.path.coefficients(t)
        return (alpha**2 * self.std**2 + sigma**2).sqrt()

    def solution(self, x, start, end):
        """Where the flow carries the states `x` between two times."""
        alpha_start, alpha_end = self.path.coefficients(start).alpha, self.path.coefficients(end).alpha
        return alpha_end * self.mean + self.spread(end) / self.spread(start) * (x - alpha_start * self.mean)


def gaussian_flow(path: AffinePath) -> GaussianFlow:
    """Three dimensions, three spreads, no symmetry about the origin: nothing cancels in an error."""
    return GaussianFlow(
        path, torch.tensor([0.5, -0.3, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.6, 1.5], dtype=torch.float64)
    )


class ShearedSpiral:
    """A non-linear field in the plane with a closed form, for orders: no method is better on it than it should be.

    y spirals, dy/dt = g' y + w' J y with g = sin(2 t) / 2 and w = t + 0.6 t^2; the state is x = (y1, y2 + shear y1^2).
    """

    shear = 0.7

    def velocity(self, x, t):
        y1, y2 = x[:, 0], x[:, 1] - self.shear * x[:, 0] ** 2
        t = torch.as_tensor(t, dtype=torch.float64)
        growth, turn = torch.cos(2 * t), 1 + 1.2 * t
        d1, d2 = growth * y1 - turn * y2, growth * y2 + turn * y1
        return torch.stack([d1, d2 + 2 * self.shear * y1 * d1], 1)

    def solution(self, x, start: float, end: float):
        grown = math.exp((math.sin(2 * end) - math.sin(2 * start)) / 2)
        angle = (end + 0.6 * end**2) - (start + 0.6 * start**2)
        y = torch.complex(x[:, 0], x[:, 1] - self.shear * x[:, 0] ** 2) * grown * complex(math.cos(angle), math.sin(angle))
        return torch.stack([y.real, y.imag + self.shear * y.real**2], 1)


def slope(errors: list[float], steps: list[int]) -> float:
    """Order of convergence between the last two step counts."""
    return math.log(errors[-2] / errors[-1]) / math.log(steps[-1] / steps[-2])


def small_start(n: int, first: int) -> TimeGrid:
    """n equal steps behind `first` tiny ones, whose low order does not matter: they have the square of the length."""
    h = 0.8 / n
    knots = [0.1 + i * h**2 for i in range(first)]
    return TimeGrid([*knots, *(knots[-1] + h**2 + (0.9 - knots[-1] - h**2) * i / n for i in range(n + 1))])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@dataclass(frozen=True)
class Mixture:
    """Data from equally likely isotropic Gaussians: a smooth non-linear field on any path."""

    path: AffinePath
    means: Tensor
    std: float

    def data(self, x, t):
        """E[x1 | x_t = x]."""
        return self._expected(x, t)[0]

    def velocity(self, x, t):
        _, _, d_alpha, d_sigma = self.path.coefficients(t)
        data, noise = self._expected(x, t)
        return d_alpha * data + d_sigma * noise

    def _expected(self, x, t):
        """Posterior means of data and noise: per component a Gaussian's, weighted by how well each explains x."""
        alpha, sigma, _, _ = self.path.coefficients(t)
        variance = alpha**2 * self.std**2 + sigma**2
        gaps = x[:, None] - alpha * self.means.to(x)
        weights = torch.softmax(-(gaps**2).sum(-1) / (2 * variance), dim=1)[..., None]
        data = (weights * (self.means.to(x) + alpha * self.std**2 / variance * gaps)).sum(1)
        return data, (weights * (sigma / variance * gaps)).sum(1)


def mixture(path: AffinePath, dimensions: int = 2, components: int = 5, std: float = 0.25, seed: int = 0) -> Mixture:
    return Mixture(path, 1.2 * randn(components, dimensions, seed=seed), std)


class SmoothNetwork(nn.Module):
    """A small random network in x and t, called ``network(x, t)``."""

    def __init__(self, size: int = 3, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Parameter(randn(size + 1, width, seed=seed).to(dtype) / (size + 1) ** 0.5)
        self.bias = nn.Parameter(randn(width, seed=seed + 1).to(dtype))
        self.second = nn.Parameter(randn(width, size, seed=seed + 2).to(dtype) / width**0.5)

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype).expand(x.shape[0])
        inputs = torch.cat([x.flatten(1), t[:, None].to(x.dtype)], dim=1)
        return (torch.tanh(inputs @ self.first + self.bias) @ self.second).view(x.shape)


class Recorder:
    """A field that remembers what it was asked."""

    def __init__(self, field) -> None:
        self.field, self.times, self.states = field, [], []

    def __call__(self, x, t):
        self.times.append(float(t))
        self.states.append(x.detach().clone())
        return self.field(x, t)
