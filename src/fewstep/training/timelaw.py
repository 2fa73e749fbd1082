"""Time laws: how often training visits each time of the path.

A law is a quantile function: uniform numbers go in, times come out. What is stratified or shared between processes is
therefore the uniform numbers, and no law has to know of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .._types import FewstepError
from ..keyed import Keyed, generator
from ..path import AffinePath

_BELOW_ONE = 1.0 - 2.0**-53


@runtime_checkable
class TimeLaw(Protocol):
    """Quantile function of the times; its settings are dataclass fields."""

    def __call__(self, u: Tensor, path: AffinePath) -> Tensor:
        """Times (batch,) float64 for `u` (batch,) float64 in [0, 1); the caller clamps them into the path's span."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every time equally often.

    Example:
        >>> from fewstep import CondOT
        >>> Uniform()(torch.tensor([0.0, 0.25], dtype=torch.float64), CondOT()).tolist()
        [0.0, 0.25]
    """

    def __call__(self, u: Tensor, path: AffinePath) -> Tensor:
        """`u` itself."""
        return u


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2): the middle of the path more often than its ends (Esser et al., 2403.03206, section 3.1).

    Attributes:
        mean: above 0 favours times near the data. The paper's clock runs the other way: its mean has the other sign.
        std: spread of the logit.

    Raises:
        FewstepError: `std` is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self)

    def __call__(self, u: Tensor, path: AffinePath) -> Tensor:
        """Quantiles of the logit-normal law; the path plays no part."""
        return torch.sigmoid(self.mean + self.std * _normal(u))


@dataclass(frozen=True)
class LogSNR:
    """Uniform in log(alpha / sigma) between the path's ends, moved inside by `path.margin` where they are infinite."""

    def __call__(self, u: Tensor, path: AffinePath) -> Tensor:
        """The times at which the log-SNR is that far between its ends."""
        low, high = (float(path.log_snr(end)) for end in _ends_of_log_snr(path))
        return path.time_of_log_snr(low + u * (high - low))


@dataclass(frozen=True)
class NormalLogSNR:
    """log(alpha / sigma) ~ N(mean, std^2): the defaults are the log-normal sigma of EDM (Karras et al., 2206.00364, table 1).

    Attributes:
        mean: minus EDM's P_mean of ln(sigma), which is -1.2.
        std: EDM's P_std.

    Raises:
        FewstepError: `std` is not positive.
    """

    mean: float = 1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std(self)

    def __call__(self, u: Tensor, path: AffinePath) -> Tensor:
        """The times of normal quantiles of the log-SNR."""
        return path.time_of_log_snr(self.mean + self.std * _normal(u))


LAWS: dict[str, Callable[..., TimeLaw]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "log_snr": LogSNR,
    "normal_log_snr": NormalLogSNR,
}
"""Every law by the name that recipes use."""


def draw_times(law: TimeLaw, keyed: Keyed, total: int, path: AffinePath, span: tuple[float, float], stratified: bool) -> Tensor:
    """The times of samples `keyed.start` to `keyed.stop` of one step's batch.

    Stratified times are one per equal share of probability over the whole batch (Kingma et al., 2107.00630, appendix I.1,
    with a draw inside each share): each time keeps its law, and the batch's mean loss varies less. Which sample gets which
    share is shuffled anew at every step.

    Args:
        law: quantile function.
        keyed: the samples and the step.
        total: size of the whole batch, over all processes and accumulated pieces.
        path: the model's path.
        span: first and last time to return; what falls outside moves to the nearer one.
        stratified: see above.

    Returns:
        (samples,) float64 on the CPU, the same however the batch is divided.

    Raises:
        FewstepError: `keyed` reaches past `total`.
    """
    if keyed.stop > total:
        raise FewstepError(f"samples up to {keyed.stop} were asked of a batch of {total}; give the size of the whole batch")
    u = keyed.uniform("time")
    if stratified:
        strata = torch.randperm(total, generator=generator(keyed.seed, "strata", keyed.step))[keyed.start : keyed.stop]
        u = ((strata + u) / total).clamp(max=_BELOW_ONE)
    return law(u, path).clamp(*span)


def _normal(u: Tensor) -> Tensor:
    """Standard normal quantiles; a zero among the uniform numbers must not become minus infinity."""
    return torch.special.ndtri(u.clamp(2.0**-54, _BELOW_ONE))


def _ends_of_log_snr(path: AffinePath) -> tuple[float, float]:
    finite = [bool(torch.isfinite(path.log_snr(end))) for end in (0.0, 1.0)]
    return (0.0 if finite[0] else path.margin, 1.0 if finite[1] else 1.0 - path.margin)


def _check_std(law: LogitNormal | NormalLogSNR) -> None:
    if not law.std > 0:
        raise FewstepError(f"std of {type(law).__name__} must be positive, got {law.std:g}")
