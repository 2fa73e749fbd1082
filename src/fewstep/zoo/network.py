"""The small residual MLP behind the bundled models."""

import math

import torch
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """Velocity network for short vectors or tiny images: residual blocks conditioned on time and class.

    Args:
        shape: shape of one sample, flattened inside.
        classes: number of classes; index ``classes`` is the null class that guidance needs.
        width: hidden width.
        blocks: number of residual blocks.

    Called as ``network(x, t, label=None)`` with ``x`` (batch, *shape), ``t`` (batch,) or a number in [0, 1], 0 = noise,
    and ``label`` (batch,) integers; no label means the null class.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 224, blocks: int = 3) -> None:
        super().__init__()
        self.config = {"shape": list(shape), "classes": classes, "width": width, "blocks": blocks}
        self.classes = classes
        self.frequencies = 32
        size = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(2 * self.frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        if label is None:
            label = torch.full((x.shape[0],), self.classes, device=x.device)
        # Octaves up to 2 pi * 8: low enough to keep the field smooth in t, which is what a few-step solver lives on.
        rates = torch.logspace(-1, 3, self.frequencies, base=2.0, device=x.device, dtype=x.dtype) * 2 * math.pi
        angles = t[:, None] * rates
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.label(label)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(h).view(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.condition = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        inner = self.first(self.norm(h)) + self.condition(nn.functional.silu(condition))
        return h + self.second(nn.functional.silu(inner))
