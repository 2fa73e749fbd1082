"""A tuning problem: a field, noise, and the converged solution from it; with honest ways to look at parts of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._types import Field, FieldError
from .composite import CountedField, JointField
from .sampler import Sampler
from .trajectory import Reference

Score = Literal["rmse", "worst"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Noise (conditions x noises, *shape), the field on it and its solution.

    Under a `JointField` the noise is cut into equal consecutive parts, one per condition; every part is treated alike.
    """

    field: Field
    noise: Tensor
    solution: Reference

    @property
    def conditions(self) -> int:
        """Number of conditions."""
        inner = self.field.field if isinstance(self.field, CountedField) else self.field
        return len(inner.fields) if isinstance(inner, JointField) else 1

    @property
    def each(self) -> int:
        """Noises per condition."""
        return self.noise.shape[0] // self.conditions

    def part(self, start: int, stop: int) -> "Problem":
        """Noises start .. stop of every condition."""
        if start <= 0 and stop >= self.each:
            return self
        keep = torch.arange(self.noise.shape[0], device=self.noise.device)
        keep = torch.cat([rows[start:stop] for rows in keep.chunk(self.conditions)])
        return Problem(taken(self.field, slice(start, stop)), self.noise[keep], self.solution.select(keep))

    def tiled(self, times: int) -> tuple[Field, Tensor, Tensor]:
        """Every noise `times` times in one batch: its field; for each place of the batch, which copy and which noise it is."""
        rows = torch.arange(self.noise.shape[0]).chunk(self.conditions)
        noises = torch.cat([part.repeat(times) for part in rows])
        copies = torch.arange(times).repeat_interleave(self.each).repeat(self.conditions)
        return taken(self.field, torch.arange(self.each).repeat(times)), copies, noises

    def score(self, sampler: Sampler, kind: Score = "rmse") -> float:
        """The end-point error of a sampler: over all samples, or of the worst condition; infinite if it blows up."""
        squares = (sampler(self.field, self.noise) - self.solution.end).double().square().flatten(1).mean(1)
        if not bool(torch.isfinite(squares).all()):
            return float("inf")
        parts = squares.chunk(self.conditions) if kind == "worst" else (squares,)
        return max(float(part.mean().sqrt()) for part in parts)


def judgeable(start: Sampler, held: Problem) -> float:
    """The error of a table to start from; FieldError unless the reference is more accurate than the table to start from."""
    begin, exact, end = held.score(start), held.solution.error, held.solution.end
    rounding = 10 * torch.finfo(end.dtype).eps * float(end.double().square().mean().sqrt())
    if not exact < begin and not max(begin, exact) <= rounding:  # nothing is more accurate than rounding lets it be
        raise FieldError(
            f"the reference is only accurate to {exact:.2g}, the table to start from errs by {begin:.2g}; give a lower tol"
        )
    return begin


def taken(field: Field, index: slice | Tensor) -> Field:
    """The field for some samples; a bare function does not care which."""
    if isinstance(field, CountedField):
        return field.over(taken(field.field, index))
    return field.take(index) if hasattr(field, "take") else field  # type: ignore[attr-defined]  # just asked
