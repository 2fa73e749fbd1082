"""Regression on velocity, noise or data, with the weightings of the literature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..._types import FewstepError, State
from ...field import Model
from ...path import AffinePath, Interpolant
from ..batch import Batch, Loss

Target = Literal["velocity", "noise", "data"]
Weighting = Literal["uniform", "velocity", "snr", "min_snr", "edm"]

GAMMA = 5.0
"""Where min-SNR weighting cuts (Hang et al., 2303.09556)."""


@dataclass(frozen=True)
class Regression:
    """Mean over a sample's elements of w(t) (prediction - truth)^2, or of its pseudo-Huber form.

    The model's own prediction is expressed in the target's space first, so any network can be trained on any target. A
    named weighting means the same squared loss in whichever space the error is measured: what the paper puts on its own
    target is converted to this one's.

    Attributes:
        target: space in which the error is measured; None takes what the model predicts.
        weight: "uniform" is 1 in the target's space, "velocity" 1 on the velocity error. With s = sigma / alpha, on the data
            error: "snr" is 1 / s^2 (1 on the noise error: the simple loss of Ho et al., 2006.11239), "min_snr" min(1 / s^2, 5)
            (Hang et al., 2303.09556), "edm" (s^2 + d^2) / (s d)^2 with d the model's `sigma_data` (Karras et al., 2206.00364).
        huber: c of the pseudo-Huber loss sqrt(e^2 + c^2) - c, taken element by element and averaged as in Rectified Diffusion
            (2410.07303, c = 1e-3). Consistency models (2310.14189) take it once per sample, with the norm of e. None squares.

    Raises:
        FewstepError: an unknown target or weighting, or a `huber` that is not positive.

    Example:
        >>> from fewstep import CondOT, adapt
        >>> from fewstep.keyed import Keyed
        >>> model = adapt(lambda x, t: torch.zeros_like(x))
        >>> x0, x1 = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
        >>> batch = Batch(x0, x1, torch.tensor([0.5], dtype=torch.float64), None, Keyed(0, 0, 0, 1))
        >>> Regression()(model, batch).each
        tensor([5.])
    """

    name: ClassVar[str] = "regression"
    target: Target | None = None
    weight: Weighting = "uniform"
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target not in get_args(Target):
            hint = '; the score is the noise over -sigma: regress "noise"' if self.target == "score" else ""
            raise FewstepError(f'target must be one of {", ".join(get_args(Target))}, got "{self.target}"{hint}')
        if self.weight not in get_args(Weighting):
            raise FewstepError(f'weight must be one of {", ".join(get_args(Weighting))}, got "{self.weight}"')
        if self.huber is not None and not 0 < self.huber < math.inf:
            raise FewstepError(f"huber must be a positive number, or None for the squared error; got {self.huber:g}")

    def __call__(self, model: Model, batch: Batch) -> Loss:
        """The loss of each sample of the batch."""
        pair = model.path.interpolate(batch.x0, batch.x1, batch.t)
        native = batch.field(model).predict(pair.xt, pair.t, model.predicts)
        return Loss(self.compare(model, pair, native))

    def compare(self, model: Model, pair: Interpolant, native: State) -> Tensor:
        """The loss (batch,) of the model's own prediction `native` (batch, *shape) at the state of `pair`."""
        target = self.space(model)
        prediction = model.path.convert(native, pair.xt, pair.t, source=model.predicts, target=target)
        truth = {"data": pair.x1, "noise": pair.x0, "velocity": pair.ut}[target]
        squared = (prediction - truth).square().flatten(1)
        if self.huber is not None:
            # sqrt(e^2 + c^2) - c without the cancellation at small e
            squared = squared / ((squared + self.huber**2).sqrt() + self.huber)
        each = squared.mean(1)
        return each if self.weight == "uniform" else self.weights(model, pair.t).to(each) * each

    def space(self, model: Model) -> Target:
        """The target, or what stands in for None; a score network is compared in noise, where nothing is infinite."""
        if self.target is not None:
            return self.target
        return "noise" if model.predicts == "score" else model.predicts

    def weights(self, model: Model, t: Tensor) -> Tensor:
        """w(t) of the squared error in the target's space, (batch,) float64."""
        if self.weight == "uniform":
            return torch.ones_like(t, dtype=torch.float64)
        on_data = _ON_DATA[self.weight](model.path, t, model.sigma_data)
        return on_data * model.path.mix(t, self.space(model), "data")[0] ** 2

    def velocity_weights(self, model: Model, t: Tensor) -> Tensor:
        """What the (squared) loss puts on the velocity error at each time, (batch,) float64."""
        return self.weights(model, t) * model.path.mix(t, "velocity", self.space(model))[0] ** 2

    def passes(self, size: int) -> float:
        """Cost per sample in forward passes, a backward pass being two, for samples of `size` numbers."""
        return 3.0

    def span(self, model: Model) -> tuple[float, float]:
        """First and last time at which truth, weight and the model's velocity are all finite; draw times inside."""
        path, ends = model.path, model.path.span(model.predicts)

        def sound(end: float) -> bool:
            t = torch.tensor([end], dtype=torch.float64)  # one per sample: a single time would raise
            numbers = [self.weights(model, t), *path.mix(t, model.predicts, self.space(model))]
            if self.space(model) == "velocity":
                numbers += [path.coefficients(t).d_alpha, path.coefficients(t).d_sigma]
            return bool(torch.cat(numbers).isfinite().all())

        return (ends[0] if sound(0.0) else max(ends[0], path.margin), ends[1] if sound(1.0) else min(ends[1], 1 - path.margin))


def _squared_ratio(path: AffinePath, t: Tensor) -> Tensor:
    """(sigma / alpha)^2: the variance of the noise beside unit data."""
    c = path.coefficients(t)
    return (c.sigma / c.alpha) ** 2


_ON_DATA: dict[str, Callable[[AffinePath, Tensor, float], Tensor]] = {
    "velocity": lambda path, t, _: path.mix(t, "data", "velocity")[0] ** 2,
    "snr": lambda path, t, _: 1 / _squared_ratio(path, t),
    "min_snr": lambda path, t, _: (1 / _squared_ratio(path, t)).clamp(max=GAMMA),
    "edm": lambda path, t, sd: (_squared_ratio(path, t) + sd**2) / (_squared_ratio(path, t) * sd**2),
}
"""Weighting -> w(path, t, sigma_data) of the squared data error, (batch,) float64."""
