"""Models without weights: the exact velocity of Gaussian mixtures, for benchmarks and for trying things out.

Usable wherever a model is named, as ``fewstep.zoo.mixtures:ring``.
"""

import math

import torch
from torch import Tensor

from ..field import Model, adapt
from ..path import AffinePath, CondOT


def mixture(means: Tensor, variances: Tensor, path: AffinePath | None = None, name: str = "mixture") -> Model:
    """The flow whose data are an equal mixture of Gaussians with diagonal covariances, in closed form.

    Args:
        means: (components, dim).
        variances: (dim,) or (components, dim), positive.
        path: default CondOT.
        name: what reports call it.

    Returns:
        A model with ``predicts="velocity"``: at state x, the average over components of
        alpha' m_k + (alpha alpha' c_k + sigma sigma') / (alpha^2 c_k + sigma^2) (x - alpha m_k), weighted by their
        posterior probabilities.
    """
    home = path or CondOT()
    centres, spread = means.double(), variances.double().expand_as(means)

    def network(x: Tensor, t: Tensor) -> Tensor:
        m, c = centres.to(x), spread.to(x)
        alpha, sigma, d_alpha, d_sigma = (v.to(x)[:, None, None] for v in home.coefficients(t))
        variance = alpha**2 * c + sigma**2
        gap = x[:, None] - alpha * m
        weight = torch.softmax((-(gap**2) / variance - variance.log()).sum(-1) / 2, dim=-1)
        velocity = d_alpha * m + (alpha * d_alpha * c + sigma * d_sigma) / variance * gap
        return (weight[..., None] * velocity).sum(1)

    return adapt(network, home, shape=(means.shape[1],), name=name)


def ring() -> Model:
    """Eight narrow Gaussians on a circle in the plane: radius 1.4, standard deviation 0.1."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return mixture(1.4 * torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor(0.01), name="ring")


def spectrum() -> Model:
    """Sixteen Gaussians in 64 dimensions with the falling spectrum of images, variances i^-1.2."""
    generator = torch.Generator().manual_seed(0)
    power = torch.arange(1, 65, dtype=torch.float64) ** -1.2
    means = torch.randn(16, 64, generator=generator, dtype=torch.float64) * power.sqrt()
    return mixture(means, 0.05 * power, name="spectrum")
