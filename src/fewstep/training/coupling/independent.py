"""The coupling of plain flow matching and diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..._types import State


@dataclass(frozen=True)
class Independent:
    """Source and data as they were drawn (Lipman et al., 2210.02747).

    Example:
        >>> Independent()(torch.randn(3, 2), torch.randn(3, 2), None)
        tensor([0, 1, 2])
    """

    name: ClassVar[str] = "independent"
    whole: ClassVar[bool] = False

    def __call__(self, x0: State, x1: State, labels: Tensor | None) -> Tensor:
        """Each row with its own."""
        return torch.arange(len(x1), device=x1.device)
