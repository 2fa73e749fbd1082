"""One step with the network's view held: what DDIM, DPM-Solver (singlestep) and PFDiff share.

Holding the data prediction m, or the noise prediction, over [s, t] makes the step exact: x_t = R x + P m with
R = sigma_t / sigma_s, P = alpha_t - R alpha_s for data, and the roles of alpha and sigma exchanged for noise. Orders 2 and 3
add divided differences of m in lambda = log(alpha / sigma) (DPM-Solver, 2206.00927, algorithms 1-2; DPM-Solver++,
2211.01095, algorithm 1).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._types import Field
from ..path import AffinePath

Frozen = Literal["velocity", "noise", "data"]


@dataclass(frozen=True)
class FrozenStep:
    """A singlestep rule: `predicts` is held, `stages` is its order and its price in field calls."""

    path: AffinePath | None
    predicts: Frozen
    stages: int = 1

    def __post_init__(self) -> None:
        if self.predicts != "velocity" and self.path is None:
            raise ValueError(f'freezing the {self.predicts} prediction needs a path: use base=ddim(path), or frozen="velocity"')
        if self.predicts == "velocity" and self.stages > 1:
            raise ValueError('a DPM-Solver step freezes "noise" or "data", not the velocity')

    def step(self, u: Field, x: Tensor, s: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """A real step from `s` to `t`: the stage predictions and the new state; `stages` NFE."""
        v = u(x, s)
        if self.stages == 1:
            return [self._held(v, x, s)], self._first(v, x, s, t)
        held = [self._held(v, x, s)]
        for node in range(1, self.stages):
            t_node = self._node(s, t, node)
            y = self._partial(x, held, s, t, t_node, node)
            held.append(self._held(u(y, t_node), y, t_node))
        return held, self.replay(x, held, s, t)

    def replay(self, x: Tensor, held: list[Tensor], s: Tensor, t: Tensor) -> Tensor:
        """The same step with predictions made elsewhere; 0 NFE."""
        if self.predicts == "velocity":
            return x + (t - s) * held[0]
        return self._partial(x, held, s, t, t, self.stages)

    def _first(self, v: Tensor, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """One stage from a fresh velocity: regular also where alpha is zero, unlike `replay` with held noise."""
        if self.predicts == "velocity":
            return x + (t - s) * v
        assert self.path is not None
        x1 = self.path.convert(v, x, s, source="velocity", target="data")
        x0 = self.path.convert(v, x, s, source="velocity", target="noise")
        alpha, sigma, _, _ = self.path.coefficients(t)
        return alpha * x1 + sigma * x0

    def _held(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.path is None:
            return v
        return self.path.convert(v, x, t, source="velocity", target=self.predicts)

    def _weights(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """R, P and the coefficient (alpha or sigma) of the held prediction at t."""
        assert self.path is not None
        alpha_s, sigma_s, _, _ = self.path.coefficients(s)
        alpha_t, sigma_t, _, _ = self.path.coefficients(t)
        if self.predicts == "data":
            ratio = sigma_t / sigma_s
            return ratio, alpha_t - ratio * alpha_s, alpha_t
        if alpha_s == 0:
            raise ValueError(
                f"a held noise prediction leaves the data open at t = {float(s):g}, where alpha = 0; "
                "start the grid later (t >= 1e-3) or freeze the data prediction"
            )
        ratio = alpha_t / alpha_s
        return ratio, sigma_t - ratio * sigma_s, sigma_t

    def _lambdas(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log-SNR at both ends, taken just inside where it is infinite: it places nodes and scales divided differences."""
        assert self.path is not None
        inset = ((t - s) / 2).clamp(max=self.path.margin)
        start, end = self.path.log_snr(s), self.path.log_snr(t)
        return (
            start if torch.isfinite(start) else self.path.log_snr(s + inset),
            end if torch.isfinite(end) else self.path.log_snr(t - inset),
        )

    def _node(self, s: Tensor, t: Tensor, node: int) -> Tensor:
        """Nodes equally spaced in lambda: 1/2 for order 2, 1/3 and 2/3 for order 3."""
        assert self.path is not None
        start, end = self._lambdas(s, t)
        return self.path.time_of_log_snr(start + (end - start) * (node / self.stages))

    def _partial(self, x: Tensor, held: list[Tensor], s: Tensor, t: Tensor, end: Tensor, node: int) -> Tensor:
        """The state at `end` (the node-th node of [s, t], or t itself) from the predictions held so far."""
        ratio, gain, coefficient = self._weights(s, end)
        x_end = ratio * x + gain * held[0]
        if node == 1:
            return x_end
        if self.stages == 2:
            return x_end + gain * (held[1] - held[0])  # 0.5 / r1 with r1 = 1/2
        start, stop = self._lambdas(s, t)
        h = (stop - start) * (node / self.stages)
        slope = coefficient + gain / h if self.predicts == "noise" else coefficient - gain / h
        if node == 2:
            return x_end + 2.0 * slope * (held[1] - held[0])  # r2 / r1
        return x_end + 1.5 * slope * (held[2] - held[0])  # 1 / r2
