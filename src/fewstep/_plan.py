"""How a table is executed: each row from the fewest tensors, nothing kept longer than it is needed.

A row x_i = a_i x_0 + sum_j b_ij u_j has up to i + 1 terms, but for most methods it is a short recurrence: Euler's row is
the previous state plus one output, a two-step method's the previous state plus two. `make_plan` finds that form from the
numbers alone; `Stepper` runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._types import FieldError

EXACT = 1e-12
"""Relative residual under which a recurrence counts as the same row (tables are float64)."""

LARGEST = 64.0
"""A recurrence with larger coefficients than this multiple of the row's would cancel in float32; the row is used as it is."""


class Term(NamedTuple):
    """A summand: coefficient * ("x", index) or coefficient * ("u", index); ("x", -1) is the noise itself."""

    coefficient: float
    kind: str
    number: int


@dataclass(frozen=True)
class Plan:
    """For every row its terms, and after every row the tensors that no later row needs."""

    rows: tuple[tuple[Term, ...], ...]
    drops: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def alive(self) -> int:
        """Most tensors (states, outputs, noise) that are held at once."""
        held: set[tuple[str, int]] = {("x", -1)}
        most = 1
        for i, drops in enumerate(self.drops):
            if self.rows[i] != (Term(1.0, "x", -1),):  # else this state is the noise itself
                held.add(("x", i))
            if i:
                held.add(("u", i - 1))
            most = max(most, len(held))
            held -= set(drops)
        return most


def make_plan(a: np.ndarray, b: np.ndarray) -> Plan:
    """Plan the rows of a table; a: (n+1,), b: (n+1, n)."""
    full = np.concatenate([a[:, None], b], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # a recurrence that overflows is not taken
        rows = tuple(_sparsest(full, i) for i in range(len(a)))
    last = len(a) - 1
    # A state is live while the field looks at it, that is until the next row is made; an output is born with that row.
    last_use = {("x", -1): 0, **{("x", i): min(i + 1, last) for i in range(last + 1)}, **{("u", j): j + 1 for j in range(last)}}
    for i, terms in enumerate(rows):
        for term in terms:
            last_use[term.kind, term.number] = max(i, last_use[term.kind, term.number])
    drops = tuple(tuple(key for key, use in last_use.items() if use == i) for i in range(last + 1))
    return Plan(rows, drops)


def _sparsest(full: np.ndarray, i: int) -> tuple[Term, ...]:
    target = full[i]
    best = _terms([(target[0], "x", -1), *((target[1 + j], "u", j) for j in range(i))])
    for back in range(1, min(i, 5)):
        best = min(best, _continued(full, i, back) or best, key=_cost)
        if len(best) <= 2:
            return best
    for states in range(1, min(i, 3) + 1):
        # More outputs leave fewer equations: what fails with the most of them fails with fewer, too.
        most = min(i, 4, len(best) - 1 - states)
        if most < 1 or _recurrence(full, i, states, most) is None:
            continue
        for outputs in range(1, most + 1):
            found = _recurrence(full, i, states, outputs)
            if found is not None:
                best = min(best, found, key=_cost)
                break
    return best


def _cost(terms: tuple[Term, ...]) -> tuple[int, bool]:
    """Fewest terms; among as many, those that let go of the noise."""
    return len(terms), any(term.number < 0 for term in terms)


def _continued(full: np.ndarray, i: int, back: int) -> tuple[Term, ...] | None:
    """The row as an earlier state plus outputs, if the noise has the same weight in both."""
    rest = full[i] - full[i - back]
    rest[np.abs(rest) < EXACT * np.abs(full[i]).max()] = 0.0
    if rest[0] != 0.0 or not np.isfinite(rest).all():
        return None
    return _terms([(1.0, "x", i - back), *((rest[1 + j], "u", j) for j in range(i))])


def _recurrence(full: np.ndarray, i: int, states: int, outputs: int) -> tuple[Term, ...] | None:
    """The row as a combination of the last `states` states and `outputs` outputs, if it is one."""
    target, previous = full[i], full[i - states : i]
    old = 1 + i - outputs  # columns before it: the noise and the outputs that the states must account for
    weights = _weights(previous[:, :old], target[:old])
    rest = target - weights @ previous
    if not np.isfinite(rest).all():
        return None
    scale = max(np.abs(target).max(), 1e-300)
    if np.abs(rest[:old]).max(initial=0.0) > EXACT * scale:
        return None
    if max(np.abs(weights).max(), np.abs(rest[old : 1 + i]).max()) > LARGEST * max(scale, 1.0):
        return None
    weights[np.abs(weights - 1.0) < EXACT] = 1.0
    rest[np.abs(rest) < EXACT * scale] = 0.0
    return _terms(
        [
            *((weights[k], "x", i - states + k) for k in reversed(range(states))),
            *((rest[c], "u", c - 1) for c in range(old, 1 + i)),
        ]
    )


def _weights(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares, target ~ weights @ rows; a single row, the common case, needs no solver."""
    if len(rows) == 1:
        square = rows[0] @ rows[0]
        return np.array([rows[0] @ target / square if square > 0.0 else 0.0])
    return np.linalg.lstsq(rows.T, target, rcond=None)[0]


def _terms(candidates: list[tuple[float, str, int]]) -> tuple[Term, ...]:
    return tuple(Term(float(c), kind, int(k)) for c, kind, k in candidates if c != 0.0)


class Stepper:
    """Runs a plan one output at a time: `state` is where the field is to be asked, `advance(u)` moves on.

    Args:
        plan: from `make_plan`.
        noise: (batch, *shape), at least float32; never written to.
        reuse: write new states over dead ones. Off under autograd and `torch.compile`, and where somebody else may keep
            the states (a diffusers pipeline).
    """

    def __init__(self, plan: Plan, noise: Tensor, *, reuse: bool) -> None:
        self._plan, self._reuse, self._noise = plan, reuse, noise
        self._held: dict[tuple[str, int], Tensor] = {("x", -1): noise}
        self._spare: list[Tensor] = []
        self._row = 0
        self._previous: Tensor | None = None
        self._one_buffer: bool | None = None
        self.state = self._make()

    def advance(self, u: Tensor) -> Tensor:
        """Take the field's output at `state` and return the next state."""
        if u.shape != self.state.shape:
            raise FieldError(f"the field must return the state's shape {tuple(self.state.shape)}, got {tuple(u.shape)}")
        if u.dtype != self.state.dtype:
            u = u.to(self.state.dtype)
        elif self._reuse and shared(u, self.state):
            u = u.clone()  # a field that returns its argument: the state's memory will be written to
        elif not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            u = self._lasting(u)
        self._held["u", self._row] = u
        self._row += 1
        self.state = self._make()
        return self.state

    def _lasting(self, u: Tensor) -> Tensor:
        """The output, copied if the network gives all of them in one buffer (CUDA graphs do) and a row after the next needs it.

        Whether it does shows at the call after, when the first such output is lost: that one is always copied.
        """
        if self._previous is not None:
            self._one_buffer, self._previous = shared(u, self._previous), None
        if ("u", self._row) in self._plan.drops[self._row + 1]:
            return u
        if self._one_buffer is None:
            self._previous = u
        elif not self._one_buffer and any(kind == "u" and shared(u, value) for (kind, _), value in self._held.items()):
            raise FieldError(
                "the network wrote its output over an earlier one that this table still needs; return a new tensor from every "
                "call (output.clone())"
            )
        return u if self._one_buffer is False else u.clone()

    @property
    def alone(self) -> bool:
        """Whether `state` is all that is left of the past states: who edits it in place then edits everything."""
        return not any(kind == "x" and index != self._row for kind, index in self._held)

    def shift(self, delta: Tensor, weights: Sequence[float]) -> None:
        """The caller moved the state by `delta`: move the noise and the kept states to where they would have led there.

        Args:
            delta: what was added to `state`.
            weights: the table's `a`. At the same outputs, noise moved by delta / a_row moves state k by a_k / a_row delta.
        """
        here = weights[self._row]
        for kind, index in tuple(self._held):
            if kind == "x" and (index == self._row or here != 0.0):
                share = 1.0 if index == self._row else (weights[index] if index >= 0 else 1.0) / here
                self._held[kind, index] = torch.add(self._held[kind, index], delta, alpha=share)
        self.state = self._held["x", self._row]

    def _make(self) -> Tensor:
        terms, drops = self._plan.rows[self._row], self._plan.drops[self._row]
        operands = [(t.coefficient, self._held[t.kind, t.number]) for t in terms]
        if [(t.coefficient, t.kind) for t in terms] == [(1.0, "u")]:
            operands = [(1.0, operands[0][1].clone())]  # a state is ours to write over, an output is not
        dying = [self._held[key] for key in drops if key[0] == "x" and self._writable(key)] if self._reuse else []
        operands = _best_first(operands, dying)
        free = [x for x in dying if not any(x is value for _, value in operands[1:])]
        if operands and _among(operands[0][1], free):
            out = operands[0][1]
        else:
            free = [x for x in free if not operands or x is not operands[0][1]] + self._spare
            out = free[0] if free else None
        self._spare = [x for x in [*dying, *self._spare] if x is not out]
        state = _combine(operands, self._noise, out, self._reuse)
        for key in drops:
            self._held.pop(key, None)
        self._held["x", self._row] = state
        return state

    def _writable(self, key: tuple[str, int]) -> bool:
        """Whether this dying tensor is ours and not also held under another name."""
        value = self._held.get(key)
        if value is None or value is self._noise or key[1] < 0:
            return False
        return not any(value is other for name, other in self._held.items() if name != key)


def resume(plan: Plan, a: Tensor, b: Tensor, index: int, state: Tensor, u: Tensor) -> Stepper:
    """A stepper that stands at call `index` in `state` without having made the calls before it.

    Their outputs are taken to equal `u`, the output of this call.

    Raises:
        ValueError: the state at this call does not depend on the noise.
    """
    if index == 0:
        return Stepper(plan, state, reuse=False)
    weight, u = float(a[index]), u.to(state.dtype)
    if weight == 0.0:
        raise ValueError(f"this table cannot start at call {index}: its state there does not depend on the noise (a = 0)")
    stepper = Stepper(plan, torch.add(state, u, alpha=-float(b[index].sum())) / weight, reuse=False)
    for _ in range(index):
        stepper.advance(u)
    stepper.shift(state - stepper.state, a.tolist())
    return stepper


def _best_first(operands: list[tuple[float, Tensor]], dying: list[Tensor]) -> list[tuple[float, Tensor]]:
    """First an operand with coefficient one (saves a pass), better still one whose memory the result can take."""
    best, least = 0, 4
    for k, (coefficient, value) in enumerate(operands):  # a loop, because torch.compile cannot trace a sort by keys
        rank = 2 * (coefficient != 1.0) + (not _among(value, dying))
        if rank < least:
            best, least = k, rank
    return operands[best : best + 1] + operands[:best] + operands[best + 1 :]


def shared(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors lie in the same memory; asks the host only."""
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _among(x: Tensor, others: list[Tensor]) -> bool:
    return any(x is other for other in others)


def _combine(operands: list[tuple[float, Tensor]], like: Tensor, out: Tensor | None, reuse: bool) -> Tensor:
    if not operands:
        return torch.zeros_like(like)
    (c0, first), rest = operands[0], operands[1:]
    if c0 == 1.0 and not rest:
        return first
    if c0 == 1.0:
        (c1, second), rest = rest[0], rest[1:]
        total = torch.add(first, second, alpha=c1, out=out)
    else:
        total = torch.mul(first, c0, out=out)
    for c, value in rest:
        total = total.add_(value, alpha=c) if reuse else torch.add(total, value, alpha=c)
    return total
