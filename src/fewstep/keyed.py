"""Random numbers that depend on seed, step and place in the batch, and on nothing that happened before.

A run that is resumed, or spread over more processes, so draws the numbers that the undisturbed run would have drawn, and no
generator state has to be stored. Numbers are made on the CPU, in blocks of `BLOCK` samples with a generator each: a process
makes the blocks that its share of the batch touches.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Samples per generator."""


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator for this seed and key; unlike keys give independent streams.

    Example:
        >>> torch.equal(torch.rand(3, generator=generator(0, "t", 5)), torch.rand(3, generator=generator(0, "t", 5)))
        True
    """
    words = [seed, *(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key)]
    # As an array the same words take a third of the time, and a step asks for dozens of generators.
    entropy = np.array(words, np.uint32) if max(words) < 2**32 else words
    # PyTorch's CPU generator keeps 32 bits of its seed: mix before, rather than shift the step out of sight.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@dataclass(frozen=True)
class Keyed:
    """The random numbers of samples `start` to `stop` of the whole batch of one training step.

    Attributes:
        seed: of the run.
        step: optimiser step.
        start: first sample of this process's share.
        stop: one past its last.

    Example:
        >>> every = Keyed(seed=0, step=7, start=0, stop=100).normal("noise", 2)
        >>> torch.equal(Keyed(seed=0, step=7, start=70, stop=90).normal("noise", 2), every[70:90])
        True
    """

    seed: int
    step: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def normal(self, what: str, *shape: int) -> Tensor:
        """Standard normal numbers (samples, *shape), float32; `what` tells the quantities of one step apart."""
        return self._blocks(what, lambda g: torch.randn(BLOCK, *shape, generator=g))

    def uniform(self, what: str, *shape: int) -> Tensor:
        """Numbers in [0, 1), float64."""
        return self._blocks(what, lambda g: torch.rand(BLOCK, *shape, generator=g, dtype=torch.float64))

    def signs(self, what: str, *shape: int) -> Tensor:
        """-1 or 1 with equal chance (Rademacher), float32."""
        return self._blocks(what, lambda g: torch.randint(0, 2, (BLOCK, *shape), generator=g).float() * 2 - 1)

    def share(self, start: int, stop: int) -> "Keyed":
        """Another part of the same step's batch; `start` and `stop` count from the batch's first sample."""
        return replace(self, start=start, stop=stop)

    def _blocks(self, what: str, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        first, last = self.start // BLOCK, -(-self.stop // BLOCK)
        whole = torch.cat([make(generator(self.seed, what, self.step, block)) for block in range(first, last)])
        return whole[self.start - first * BLOCK : self.stop - first * BLOCK]
