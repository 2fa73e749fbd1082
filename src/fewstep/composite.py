"""Fields made of fields: several conditions side by side, and one that counts and checks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._model import SourcePoints
from ._types import Field, FieldError, Prediction, State, Time
from .field import Model, ModelField
from .path import AffinePath


@dataclass(eq=False)
class JointField:
    """Several conditions of one model side by side: the batch is cut into equal consecutive parts, one per field.

    A table tuned on a joint field is tuned for all of its conditions.
    """

    fields: Sequence[ModelField]

    @property
    def path(self) -> AffinePath:
        """The model's path."""
        return self.fields[0].path

    @property
    def passes(self) -> int:
        """Network passes per call of the most expensive condition."""
        return max(f.passes for f in self.fields)

    @property
    def model(self) -> Model:
        """The model behind all conditions."""
        return self.fields[0].model

    def __call__(self, x: State, t: Time) -> State:
        """The velocities of all conditions."""
        return self.predict(x, t, "velocity")

    def take(self, index: slice | Tensor) -> "JointField":
        """The field for some of the samples of every condition."""
        return JointField([f.take(index) for f in self.fields])

    def predict(self, x: State, t: Time, target: Prediction) -> State:
        """The prediction `target` of all conditions; the batch must divide among them."""
        if x.shape[0] % len(self.fields):
            raise FieldError(f"a batch of {x.shape[0]} cannot be shared equally by {len(self.fields)} conditions")
        parts = x.chunk(len(self.fields))
        times = t.chunk(len(parts)) if isinstance(t, Tensor) and t.ndim else [t] * len(parts)
        return torch.cat([f.predict(part, time, target) for f, part, time in zip(self.fields, parts, times, strict=True)])


@dataclass(eq=False)
class CountedField:
    """Counts what a field is asked, and stops at the first output that is not finite.

    Attributes:
        calls: field calls (NFE).
        samples: network passes summed over the batch, the unit in which training costs are counted.
        parent: counts along.
    """

    field: Field
    check: bool = True
    parent: "CountedField | None" = None
    calls: int = dataclasses.field(default=0, init=False)
    samples: int = dataclasses.field(default=0, init=False)

    def over(self, inner: Field) -> "CountedField":
        """A counter for another field whose calls count here too."""
        return CountedField(inner, self.check, self)

    @property
    def path(self) -> AffinePath:
        """The path of the field inside; a bare function has none (AttributeError)."""
        return self.field.path  # type: ignore[attr-defined]  # only reached through path_of, which asks hasattr first

    @property
    def passes(self) -> int:
        """Network passes per call."""
        return getattr(self.field, "passes", 1)

    def __call__(self, x: State, t: Time) -> State:
        """The field's velocity, counted and checked."""
        return self._count(self.field(x, t), x, t)

    def predict(self, x: State, t: Time, target: Prediction) -> State:
        """The field's prediction, counted and checked."""
        return self._count(self.field.predict(x, t, target), x, t)  # type: ignore[attr-defined]  # as `path`

    def _count(self, value: Tensor, x: Tensor, t: Time) -> Tensor:
        counter: CountedField | None = self
        while counter is not None:
            counter.calls += 1
            counter.samples += x.shape[0] * self.passes
            counter = counter.parent
        if value.shape != x.shape:
            raise FieldError(f"the field must return the state's shape {tuple(x.shape)}, got {tuple(value.shape)}")
        if self.check and not bool(torch.isfinite(value).all()):
            when = float(t) if not isinstance(t, Tensor) or t.ndim == 0 else f"{float(t.min()):g}..{float(t.max()):g}"
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            raise FieldError(f"the network returned {kind} at call {self.calls} (counted from 1), time t = {when} (0 = noise)")
        return value


def path_of(f: Any) -> AffinePath | None:
    """The path a field knows, or None for a bare function."""
    if isinstance(f, CountedField):
        return path_of(f.field)
    return getattr(f, "path", None)


def source_of(f: Any) -> SourcePoints | None:
    """What the paths of the model behind a field start from; None: noise, or a bare function."""
    if isinstance(f, CountedField):
        return source_of(f.field)
    model = f if isinstance(f, Model) else getattr(f, "model", None)
    return model.source if isinstance(model, Model) else None


def span_of(f: Any) -> tuple[float, float]:
    """First and last time at which the network behind this field is asked at the field's own time."""
    if isinstance(f, CountedField):
        return span_of(f.field)
    if isinstance(f, JointField):
        firsts, lasts = zip(*(span_of(inner) for inner in f.fields), strict=True)
        return max(firsts), min(lasts)
    return (f.first, f.last) if isinstance(f, ModelField) else (0.0, 1.0)


def start_scale(f: Any) -> float:
    """Standard deviation of the state at t = 0 for this field."""
    path = path_of(f)
    return 1.0 if path is None else path.start_scale


def dtype_of(f: Any) -> torch.dtype:
    """The precision in which the network behind this field computes; float32 for a bare function."""
    if isinstance(f, CountedField):
        return dtype_of(f.field)
    return f.model.device_dtype()[1] if isinstance(f, ModelField | JointField) else torch.float32
