"""Step times: strictly increasing knots in float64, used exactly as given."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._types import GridError
from .path import AffinePath


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """The knots 0 <= t_0 < t_1 < ... < t_n <= 1 between which a method steps; 0 is noise, 1 is data.

    Args:
        knots: n + 1 times; a tensor keeps its graph, so that the times of any tabulated method can be learnt.

    Raises:
        GridError: fewer than two knots, not finite, outside [0, 1], or not strictly increasing.

    Example:
        >>> TimeGrid.uniform(4).knots
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """

    knots: Tensor

    def __init__(self, knots: Tensor | Sequence[float]) -> None:
        values = torch.as_tensor(knots, dtype=torch.float64).cpu()
        seen = values.detach()
        if seen.ndim != 1 or len(seen) < 2:
            raise GridError(f"a time grid needs at least two knots in one row, got shape {tuple(seen.shape)}")
        if not bool(torch.isfinite(seen).all()) or seen[0] < 0 or seen[-1] > 1:
            raise GridError(f"knots must lie in [0, 1] (0 = noise, 1 = data), got {_short(seen)}")
        if not bool((seen.diff() > 0).all()):
            raise GridError(f"knots must be strictly increasing (0 = noise, 1 = data), got {_short(seen)}")
        object.__setattr__(self, "knots", values)

    @property
    def intervals(self) -> int:
        """Number of steps n."""
        return len(self.knots) - 1

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps (t_i, t_{i+1}) as 0-d float64 tensors."""
        return zip(self.knots[:-1], self.knots[1:], strict=True)

    @staticmethod
    def uniform(n: int) -> "TimeGrid":
        """Equal steps in t."""
        return TimeGrid(_fractions(n))

    @staticmethod
    def power(n: int, exponent: float) -> "TimeGrid":
        """t_i = (i / n)^exponent: an exponent above 1 puts more steps near the noise."""
        return TimeGrid(_fractions(n) ** exponent)

    @staticmethod
    def quadratic(n: int) -> "TimeGrid":
        """1 - t_i = (1 - i / n)^2: more steps near the data (DDIM's "quad" spacing, 2010.02502)."""
        return TimeGrid(1.0 - (1.0 - _fractions(n)) ** 2)

    @staticmethod
    def shifted(n: int, shift: float) -> "TimeGrid":
        """The resolution shift s -> S s / (1 + (S - 1) s) of s = 1 - t (Esser et al., 2403.03206, eq. 23), applied once.

        Raises:
            GridError: `shift` is not positive.
        """
        if not shift > 0:
            raise GridError(f"shift must be positive (1 is uniform), got {shift}")
        s = 1.0 - _fractions(n)
        return TimeGrid(1.0 - shift * s / (1.0 + (shift - 1.0) * s))

    @staticmethod
    def log_snr(n: int, path: AffinePath) -> "TimeGrid":
        """Equal steps in log(alpha / sigma) between the path's margins; the outer knots are 0 and 1 exactly."""
        low, high = path.log_snr(path.margin), path.log_snr(1.0 - path.margin)
        return _between_ends(path.time_of_log_snr(low + (high - low) * _fractions(n)))

    @staticmethod
    def karras(n: int, path: AffinePath, rho: float = 7.0) -> "TimeGrid":
        """Steps equal in (sigma / alpha)^(1 / rho) between the path's margins, then one to the data, as the paper has it
        (Karras et al., 2206.00364, eq. 5).
        """
        high, low = (torch.exp(-path.log_snr(t)) ** (1 / rho) for t in (path.margin, 1.0 - path.margin))
        levels = high + (low - high) * (_fractions(n - 1) if n > 1 else _fractions(n)[:1])
        return _between_ends(torch.cat([path.time_of_log_snr(-rho * levels.log()), torch.ones(1, dtype=torch.float64)]))

    @staticmethod
    def ays(n: int, path: AffinePath, name: Literal["sd15", "sdxl", "svd"]) -> "TimeGrid":
        """Align Your Steps (Sabour et al., 2404.14507): the ten noise levels found for one model, on any path.

        The levels are sigma / alpha, as diffusers ships them (`AysSchedules`), followed by the path's own lowest; another
        number of steps interpolates their logarithms, as the authors do. The outer knots are 0 and 1 exactly.

        Args:
            n: number of steps.
            path: the model's path.
            name: Stable Diffusion 1.5, Stable Diffusion XL, or Stable Video Diffusion.

        Raises:
            GridError: an unknown name, or levels beyond the path's.
        """
        from diffusers.schedulers.scheduling_utils import AysSchedules

        if name not in _AYS:
            raise GridError(f'the AYS tables are {", ".join(_AYS)}, got "{name}"')
        table = -torch.tensor(AysSchedules[_AYS[name]][:-1], dtype=torch.float64).log()
        log_snr = torch.cat([table, path.log_snr(1.0 - path.margin)[None]])
        position = _fractions(n) * len(table)
        left = position.long().clamp(max=len(table) - 1)
        times = path.time_of_log_snr(torch.lerp(log_snr[left], log_snr[left + 1], position - left))
        if not bool((torch.cat([times[1:-1], times.new_ones(1)]) > torch.cat([times.new_zeros(1), times[1:-1]])).all()):
            spans = (float(torch.exp(-value)) for value in (table[0], table[-1], path.log_snr(0.0), log_snr[-1]))
            raise GridError(
                "the AYS levels of {}, sigma / alpha from {:g} to {:g}, do not fit into the path's, from {:g} to {:g}; take "
                "the table of a more similar model, or TimeGrid.log_snr".format(name, *spans)
            )
        return _between_ends(times)


_AYS = {"sd15": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas", "svd": "StableDiffusionVideoSigmas"}


def _fractions(n: int) -> Tensor:
    if n < 1:
        raise GridError(f"a time grid needs at least one step, got n = {n}")
    return torch.arange(n + 1, dtype=torch.float64) / n


def _between_ends(knots: Tensor) -> TimeGrid:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return TimeGrid(torch.cat([ends[:1], knots[1:-1], ends[1:]]))


def _short(values: Tensor) -> str:
    shown = ", ".join(f"{v:g}" for v in values[:6].tolist())
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"
