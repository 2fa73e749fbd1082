"""Densities in the plane on which flows are compared, sampled exactly, with their log-density where it is known.

The checkerboard is scaled as in the flow-and-divergence-matching experiments (unit squares / 0.45), the others as in FFJORD
(arXiv:1810.01367), whose samplers most papers copied.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Points = Float[Tensor, "n 2"]
Nats = Float[Tensor, " n"]

SQUARE = 1 / 0.45
"""Side of one of the checkerboard's eight squares."""

_EDGE = 1e-6


@dataclass(frozen=True)
class Toy:
    """A density in the plane.

    Attributes:
        name: as `open_source` knows it.
        sample: ``sample(rng, count)`` -> (count, 2) float32.
        log_density: (n, 2) -> (n,) in nats, float64; None where it has no formula.
    """

    name: str
    sample: Callable[[torch.Generator, int], Tensor]
    log_density: Callable[[Tensor], Tensor] | None = None


def checkerboard(rng: torch.Generator, count: int) -> Points:
    """Uniform on eight squares of a 4x4 board, corners at +-2 / 0.45.

    A millionth of a side is left out along the edges: rounding to float32 never leaves a square.
    """
    column = torch.randint(4, (count,), generator=rng)
    row = 2 * torch.randint(2, (count,), generator=rng) + column % 2
    inside = torch.rand(count, 2, generator=rng, dtype=torch.float64).clamp(_EDGE, 1 - _EDGE)
    return ((torch.stack([column, row], 1) - 2 + inside) * SQUARE).float()


def checkerboard_log_density(x: Points) -> Nats:
    """log(0.45^2 / 8) = -3.6765 nats in a square, minus infinity elsewhere; also the best mean log-likelihood.

    Example:
        >>> checkerboard_log_density(torch.tensor([[0.1, 0.1]]))
        tensor([-3.6765], dtype=torch.float64)
    """
    board = x.double() / SQUARE
    column, row = board.floor().unbind(1)
    inside = ((column - row) % 2 == 0) & (board >= -2).all(1) & (board < 2).all(1)
    level = torch.full((len(x),), -math.log(8 * SQUARE**2), dtype=torch.float64, device=x.device)
    return level.masked_fill(~inside, -math.inf)


def eight_gaussians(rng: torch.Generator, count: int) -> Points:
    """Eight Gaussians on a circle of radius 2 sqrt 2, standard deviation sqrt 2 / 4 each."""
    mean = _ring()[torch.randint(8, (count,), generator=rng)]
    return (mean + math.sqrt(2) / 4 * torch.randn(count, 2, generator=rng, dtype=torch.float64)).float()


def eight_gaussians_log_density(x: Points) -> Nats:
    """In closed form."""
    return _blur(x, _ring(), torch.full((8,), 1 / 8, dtype=torch.float64), math.sqrt(2) / 4)


def moons(rng: torch.Generator, count: int) -> Points:
    """Two half circles of radius 2, one upside down inside the other's reach, blurred by a standard deviation of 0.2."""
    angle = math.pi * torch.rand(count, generator=rng, dtype=torch.float64)
    second = torch.randint(2, (count, 1), generator=rng) == 1
    first_arc, second_arc = _arcs(angle)
    noise = torch.randn(count, 2, generator=rng, dtype=torch.float64)
    return (torch.where(second, second_arc, first_arc) + 0.2 * noise).float()


def moons_log_density(x: Points) -> Nats:
    """By Gauss-Legendre quadrature along the arcs, exact to rounding where the density matters; 256 numbers a sample."""
    node, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(128))
    return _blur(x, torch.cat(_arcs(math.pi / 2 * (node + 1))), torch.cat([weight, weight]) / 4, 0.2)


def pinwheel(rng: torch.Generator, count: int) -> Points:
    """Five arms, each a Gaussian (0.6 along, 0.2 across, after scaling by 2) bent by a rotation that grows with the radius."""
    arm = torch.randint(5, (count,), generator=rng)
    spread = torch.tensor([0.3, 0.1], dtype=torch.float64)
    along, across = (torch.randn(count, 2, generator=rng, dtype=torch.float64) * spread).unbind(1)
    along = along + 1
    angle = 2 * math.pi / 5 * arm + 0.25 * along.exp()
    c, s = angle.cos(), angle.sin()
    return (2 * torch.stack([along * c + across * s, across * c - along * s], 1)).float()


def _ring() -> Tensor:
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return 2 * math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)


def _arcs(angle: Tensor) -> tuple[Tensor, Tensor]:
    c, s = angle.cos(), angle.sin()
    shift = torch.tensor([-1.0, -0.2], dtype=torch.float64)
    return 2 * torch.stack([c, s], 1) + shift, 2 * torch.stack([1 - c, 0.5 - s], 1) + shift


def _blur(x: Tensor, mean: Tensor, weight: Tensor, std: float) -> Tensor:
    """Log-density of equally blurred points."""
    mean, weight = mean.to(x.device), weight.to(x.device)
    parts = []
    for part in x.double().split(4096):  # the table of distances would be large
        square = (part[:, :1] - mean[:, 0]) ** 2 + (part[:, 1:] - mean[:, 1]) ** 2
        parts.append(torch.logsumexp(weight.log() - square / (2 * std**2), 1))
    return torch.cat(parts) - math.log(2 * math.pi * std**2)


TOYS = {
    toy.name: toy
    for toy in (
        Toy("checkerboard", checkerboard, checkerboard_log_density),
        Toy("pinwheel", pinwheel),
        Toy("8gaussians", eight_gaussians, eight_gaussians_log_density),
        Toy("moons", moons, moons_log_density),
    )
}
"""By name."""
