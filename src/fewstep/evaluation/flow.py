"""What every log-density needs: where the flow starts and ends, how its divergence is taken, pieces of a batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .._types import Field, FieldError
from ..composite import CountedField, JointField, path_of, source_of
from ..field import Model
from ..path import AffinePath
from ..problem import taken
from .divergence import DivergenceRule, Traced, exact, hutchinson, signs
from .solve import known

Source = Callable[[Tensor], Tensor]
"""The log-density of states at t = 0: (batch, *shape) -> (batch,), in nats."""

Run = Callable[[CountedField, Tensor], tuple[Tensor, Tensor]]
"""(field of some samples, which) -> (states (batch, *shape), log-densities (batch, rows))."""


@dataclass(frozen=True, eq=False)
class LogDensity:
    """Log-densities and what they cost.

    Attributes:
        value: (batch,) nats.
        standard_error: (batch,) over the probes; zero where the divergence is exact, NaN with a single probe.
        nfe: field calls per sample, counted (the most, where the batch was split). Backward passes come on top: one per
            call and probe, or per call and dimension.
        noise: (batch, *shape) the standard normal noise that leads to the sample (the state at t = 0 over the start scale).
    """

    value: Tensor
    standard_error: Tensor
    nfe: int
    noise: Tensor


@dataclass(frozen=True, eq=False)
class Flow:
    """A field between noise at t = 0 and data at `end`, with the density of its states at t = 0."""

    field: Field
    path: AffinePath | None
    end: float
    source: Source | None

    @staticmethod
    def of(field: Field | Model, path: AffinePath | None, end: float | None, source: Source | None) -> "Flow":
        """The path and the end that the field knows, where none is given."""
        field = field.given() if isinstance(field, Model) else field
        home = path or path_of(field)
        if (points := source_of(field)) is not None and source is None:
            raise FieldError(
                f"this model's paths start at samples of {points.name}, not at noise: give source=, their log-density"
            )
        if end is None:
            end = _last(field, home)
        if not 0.0 < end <= 1.0:
            raise ValueError(f"end must lie in (0, 1] (0 = noise, 1 = data), got {end:g}")
        return Flow(field, home, end, source)

    @property
    def start_scale(self) -> float:
        """Standard deviation of the state at t = 0."""
        return 1.0 if self.path is None else self.path.start_scale

    def at_start(self, x0: Tensor) -> Tensor:
        """Log-density of states at t = 0, (batch,)."""
        if self.source is None:
            flat = x0.flatten(1) / self.start_scale
            constant = math.log(self.start_scale) + math.log(2 * math.pi) / 2  # once per dimension
            return -flat.square().sum(1) / 2 - flat.shape[1] * constant
        value = self.source(x0)
        if value.shape != x0.shape[:1]:
            raise FieldError(f"source must return one log-density per sample, ({len(x0)},), got {tuple(value.shape)}")
        return value


def _last(field: Field, path: AffinePath | None) -> float:
    """The last time at which the velocity is finite."""
    if isinstance(field, CountedField):
        return _last(field.field, path)
    if isinstance(field, JointField):
        return min(_last(part, path) for part in field.fields)
    fallback = 1.0 if path is None else path.span("velocity")[1]
    return float(getattr(field, "last", fallback))


@dataclass(frozen=True, eq=False)
class Rule:
    """How the divergence is taken; `probes` (rows, batch, *shape), or None where it is exact."""

    probes: Tensor | None
    graph: bool

    @staticmethod
    def of(divergence: DivergenceRule, probes: int, seed: int, x: Tensor, graph: bool) -> "Rule":
        """Draws the probes."""
        known("divergence", divergence, get_args(DivergenceRule))
        if probes < 1:
            raise ValueError(f"probes must be at least 1, got {probes}")
        return Rule(None if divergence == "exact" else signs(seed, probes, x), graph)

    @property
    def rows(self) -> int:
        """Estimates of one log-density."""
        return 1 if self.probes is None else len(self.probes)

    def traced(self, field: Field, index: Tensor) -> Traced:
        """Velocity and divergence for the samples `index`."""
        if self.probes is None:
            return exact(field, graph=self.graph)
        return hutchinson(field, self.probes[:, index], graph=self.graph)

    def result(self, logs: Tensor, nfe: int, noise: Tensor) -> LogDensity:
        """Mean and standard error over the estimates, logs (batch, rows)."""
        if self.probes is None:
            spread = torch.zeros_like(logs[:, 0])
        elif self.rows == 1:
            spread = torch.full_like(logs[:, 0], math.nan)
        else:
            spread = logs.detach().std(1) / math.sqrt(self.rows)
        return LogDensity(logs.mean(1), spread.detach(), nfe, noise)


def checked(x: Tensor, name: str) -> Tensor:
    """States fit to be solved for: floating, finite, at least float32, (batch, *shape) with a batch."""
    if not x.is_floating_point() or x.ndim < 2 or x.numel() == 0:
        raise FieldError(f"{name} must be floating-point states (batch, *shape), got {x.dtype} of shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise FieldError(f"{name} holds NaN or infinity")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_pieces(field: Field, batch: int, max_batch: int | None, run: Run, *, graph: bool) -> tuple[Tensor, Tensor, int]:
    """Run on pieces of the batch and put them together, with the most field calls that one of them took."""
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    inner = field.field if isinstance(field, CountedField) else field
    conditions = len(inner.fields) if isinstance(inner, JointField) else 1
    each = -(-batch // conditions)
    step = each if max_batch is None else max(1, max_batch // conditions)
    every, indices, parts, nfe = torch.arange(batch).chunk(conditions), [], [], 0
    with torch.set_grad_enabled(graph):
        for i in range(0, each, step):
            index = torch.cat([rows[i : i + step] for rows in every])
            part = taken(field, slice(i, i + step)) if step < each else field
            counted = part.over(part.field) if isinstance(part, CountedField) else CountedField(part)
            parts.append(run(counted, index))
            indices.append(index)
            nfe = max(nfe, counted.calls)
    order = torch.cat(indices).argsort()
    states, logs = (torch.cat(column)[order] for column in zip(*parts, strict=True))
    return states, logs, nfe
