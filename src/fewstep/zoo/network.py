"""The small residual MLP behind the bundled models."""

import math

import torch
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """Velocity network for short vectors or tiny images: residual blocks modulated by time and class.

    Args:
        shape: shape of one sample, flattened inside.
        classes: number of classes; index ``classes`` is the null class that guidance needs. 0: no condition.
        width: hidden width.
        blocks: number of residual blocks.
        dropout: inside the blocks, while training.

    Called as ``network(x, t, label=None)`` with ``x`` (batch, *shape), ``t`` (batch,) or a number in [0, 1], 0 = noise,
    and ``label`` (batch,) integers; no label means the null class.

    Example:
        >>> network = ResidualMLP((1, 8, 8), classes=10)
        >>> network(torch.zeros(2, 1, 8, 8), 0.5, torch.tensor([3, 7])).shape
        torch.Size([2, 1, 8, 8])
    """

    FREQUENCIES = 16

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 192, blocks: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes
        self.config = {"width": width, "blocks": blocks, "dropout": dropout}
        size = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The velocity (batch, *shape) at states `x` and times `t`."""
        if label is None:
            label = torch.full((x.shape[0],), self.classes, device=x.device)
        condition = nn.functional.silu(self.time(self._waves(t, x)) + self.label(label))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(h).view(x.shape)

    def _waves(self, t: Tensor | float, x: Tensor) -> Tensor:
        # Half precision cannot tell neighbouring times apart: the angles need float32 whatever the weights are.
        precision = torch.promote_types(x.dtype, torch.float32)
        times = torch.as_tensor(t, dtype=precision, device=x.device).expand(x.shape[0])
        # Periods from 4 down to 1/4: low enough to keep the field smooth in t, which is what a few-step sampler lives on.
        rates = 2 * math.pi * torch.logspace(-2, 2, self.FREQUENCIES, base=2.0, dtype=precision, device=x.device)
        angles = times[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)


class _Block(nn.Module):
    """h + gate * MLP(scale * norm(h) + shift), with scale, shift and gate read from the condition."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        # Every block starts as an unconditioned one; conditions enter as far as they help.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition).chunk(3, dim=1)
        inner = self.first(self.norm(h) * (1 + scale) + shift)
        return h + (1 + gate) * self.second(self.dropout(nn.functional.silu(inner)))
