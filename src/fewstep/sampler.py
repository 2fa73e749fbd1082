"""The table: a few-step sampler is numbers, and one loop runs them all.

x_i = a_i x_0 + sum_{j<i} b_ij u_j        u_j = u(x_j, t_j)        i = 0 ... n      x_n is the sample, n the NFE
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from ._plan import Plan, Stepper, make_plan
from ._types import RAW_PREDICTS, Bare, Field, FieldError, PathField, Prediction, Raw, State
from .path import AffinePath, raw_mix


@dataclass(frozen=True)
class Provenance:
    """Where a table comes from and what it was measured on; everything is optional for a hand-written table.

    Attributes:
        method: how the numbers were made, e.g. "least-squares(boss)".
        model: name of the model it was tuned for.
        fingerprint: SHA-256 of that model's weights.
        path: the path, as its repr.
        shape: shape of one sample.
        raw: what a pipeline's network returns: "plain" is `Sampler.predicts`, a prediction is that one, the others are those
            of `fewstep.path.raw_mix`.
        sigma_data: of the preconditioning that raw="edm" stands for.
        conditions: the conditions that it was tuned for.
        seed: seed of the tuning noise.
        versions: of fewstep and torch.
        measured: error measures on noise that no stage of tuning saw.
    """

    method: str = ""
    model: str = ""
    fingerprint: str = ""
    path: str = ""
    shape: tuple[int, ...] | None = None
    raw: Bare = "plain"
    sigma_data: float = 0.5
    conditions: tuple[str, ...] = ()
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Sampler:
    """A few-step sampler as a table of numbers; the same object whatever wrote it.

    Args:
        times: (n,) float64, where the field is called; 0 is noise, 1 is data.
        a: (n + 1,) float64 weights of the noise; a[0] carries an initial scale.
        b: (n + 1, n) float64 weights of the outputs, b[i, j] = 0 for j >= i.
        predicts: which output of the network the rows combine.
        clock: (n,) the network's own time of each call, where it differs from `times`.
        provenance: where the numbers come from.

    Raises:
        ValueError: wrong shapes, values that are not finite, or a row that uses an output not computed yet.

    Example:
        >>> b = torch.tensor([[0, 0], [0.5, 0], [0.5, 0.5]])
        >>> euler = Sampler(times=torch.tensor([0, 0.5]), a=torch.ones(3), b=b)
        >>> euler(lambda x, t: -x, torch.ones(1, 1))
        tensor([[0.2500]])
    """

    times: Tensor
    a: Tensor
    b: Tensor
    predicts: Prediction = "velocity"
    clock: Tensor | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for name in ("times", "a", "b", "clock"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, torch.as_tensor(value, dtype=torch.float64).cpu())
        n = len(self.times) if self.times.ndim == 1 else 0
        if n == 0 or self.a.shape != (n + 1,) or self.b.shape != (n + 1, n):
            raise ValueError(
                "a table of n calls has times (n,), a (n + 1,) and b (n + 1, n) with n >= 1; "
                f"got {tuple(self.times.shape)}, {tuple(self.a.shape)}, {tuple(self.b.shape)}"
            )
        if self.clock is not None and self.clock.shape != (n,):
            raise ValueError(f"clock must have one entry per call, ({n},), got {tuple(self.clock.shape)}")
        numbers = [v.detach() for v in (self.times, self.a, self.b, self.clock) if v is not None]
        if not all(bool(torch.isfinite(v).all()) for v in numbers):
            raise ValueError("a table must be finite; got NaN or infinity among its times or coefficients")
        if bool(self.b.detach().triu().any()):
            raise ValueError("row i may only use outputs j < i: b must be zero on and above its diagonal")
        plan = make_plan(self.a.detach().numpy(), self.b.detach().numpy())
        object.__setattr__(self, "_plan", plan)
        object.__setattr__(self, "_times", tuple(self.times.tolist()))

    @property
    def nfe(self) -> int:
        """Number of field calls per sample."""
        return len(self.times)

    @property
    def plan(self) -> Plan:
        """How the executor computes each row; `plan.alive` is the number of state-sized tensors it holds at most."""
        return self._plan  # type: ignore[attr-defined]  # set in __post_init__, it is not a field of the table

    def __call__(self, field: Field, noise: State, *, trajectory: bool = False, progress: bool = False) -> Tensor:
        """Run the table: `nfe` field calls.

        No graph is kept unless `noise` requires grad. On an accelerator the loop never waits for the device; outputs are
        therefore not checked for NaN here (wrap the field in `CountedField` for that; `tune` and the command line do).

        Args:
            field: ``field(x, t) -> velocity``; a field from `Model.given` if `predicts` is not "velocity". It may return `x`
                or a view of it, but must not keep it: later states are written into the same memory. It may return one and the
                same buffer at every call.
            noise: (batch, *shape) standard normal noise on the field's device.
            trajectory: return all states, (nfe + 1, batch, *shape), instead of the last.
            progress: show a progress bar.

        Returns:
            The sample (batch, *shape), at least float32.

        Raises:
            FieldError: the field cannot give the output that the rows combine, or lives on another path; or it writes over an
                earlier output that is still needed, other than by returning one buffer at every call.
        """
        ask = self._asker(field)
        noise = noise.float() if noise.dtype in (torch.float16, torch.bfloat16) else noise
        graph = noise.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(graph):
            stepper = Stepper(self.plan, noise, reuse=not graph and not torch.compiler.is_compiling())
            states = [stepper.state.clone()] if trajectory else []
            for t in _bar(self._times, progress):  # type: ignore[attr-defined]  # as for plan
                stepper.advance(ask(stepper.state, t))
                if trajectory:
                    states.append(stepper.state.clone())
            if trajectory:
                return torch.stack(states)
            return stepper.state.clone() if stepper.state is noise else stepper.state

    def _asker(self, field: Field) -> Field:
        path = getattr(field, "path", None)
        if self.provenance.path and path is not None and repr(path) != self.provenance.path:
            raise FieldError(f"this sampler was made for {self.provenance.path}, the field lives on {path!r}; tune one for it")
        if self.predicts == "velocity":
            return field
        if path is None or not isinstance(field, PathField):
            raise FieldError(
                f'this sampler combines "{self.predicts}" predictions, a bare velocity field cannot give them; '
                "use adapt(...).given(...), or sampler.rebase(path, 'velocity')"
            )
        return lambda x, t: field.predict(x, t, self.predicts)

    def named(self, method: str) -> "Sampler":
        """The same table under another method name."""
        return self.with_provenance(replace(self.provenance, method=method))

    def with_provenance(self, provenance: Provenance) -> "Sampler":
        """The same table with another story; the numbers are neither copied nor looked at again."""
        same = copy.copy(self)
        object.__setattr__(same, "provenance", provenance)
        return same

    def rebase(self, path: AffinePath, target: Prediction) -> "Sampler":
        """The same sampler over another prediction of the network: equal samples, other numbers.

        The network stays the same: where the table was made for one (its provenance names the path), `Provenance.raw` still
        says what that returns, and the table that is exported for it does not change.

        Raises:
            ValueError: at one of the times the two predictions do not determine each other (name the time).
        """
        if target == self.predicts:
            return self
        mixes = [path.mix(t, target, self.predicts) for t in self.times]
        p, q = (torch.stack(list(column)) for column in zip(*mixes, strict=True))
        a, b = substitute(self.a, self.b, p=p, q=q)
        made, raw = self.provenance, self.provenance.raw
        if raw == target:
            raw = "plain"
        elif raw == "plain" and made.path:
            raw = self.predicts
        return replace(self, a=a, b=b, predicts=target, provenance=replace(made, raw=raw))

    def raw_table(self, path: AffinePath | None, raw: Bare, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
        """(a, b) over a network's bare outputs and inputs, as a diffusers pipeline sees them (`Provenance.raw`).

        Raises:
            ValueError: the path is needed and not given, or the outputs do not determine what the rows combine.
        """
        if raw in ("plain", self.predicts):
            return self.a, self.b
        if raw == "negated" and self.predicts == "velocity":
            return self.a, -self.b
        if path is None:
            raise ValueError(f'a table over "{raw}" outputs needs the path that they belong to')
        if raw in get_args(Prediction):
            return self.rebase(path, cast(Prediction, raw)).raw_table(path, "plain")
        raw = cast(Raw, raw)
        if RAW_PREDICTS[raw] != self.predicts:
            return self.rebase(path, RAW_PREDICTS[raw]).raw_table(path, raw, sigma_data)
        mixes = [raw_mix(path, t, raw, sigma_data) for t in self.times]
        s, p, q = (torch.stack(list(column)) for column in zip(*mixes, strict=True))
        a, b = substitute(self.a, self.b, p=p, q=q)
        scale = torch.cat([s, torch.ones(1, dtype=torch.float64)])
        return a * scale, b * scale[:, None]

    def save(self, directory: str | Path, *, path: AffinePath | None = None) -> Path:
        """Write ``sampler.json`` and ``scheduler_config.json`` (for `TableScheduler`) into `directory`, atomically.

        Args:
            directory: made if it is missing.
            path: of the network; only needed for "v_prediction" and "edm" networks on a `DiscreteVP` path, whose
                ``scheduler_config.json`` is left out otherwise.
        """
        from .artifact import write_sampler

        return write_sampler(self, directory, path)

    @staticmethod
    def load(directory: str | Path) -> "Sampler":
        """Read a directory that `save` wrote; bit-equal.

        Raises:
            ArtifactError: anything else, in one line.
        """
        from .artifact import read_sampler

        return read_sampler(directory)


def substitute(a: Tensor, b: Tensor, *, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite rows over outputs u as rows over outputs w, where u_j = p_j w_j + q_j x_j.

    Each x_j is itself a row, so the new rows follow in order: the one place where a table changes its basis.
    """
    n = b.shape[1]
    new = torch.zeros(n + 1, n + 1, dtype=torch.float64)  # column 0: noise, column 1 + j: output w_j
    for i in range(n + 1):
        new[i, 0] = a[i]
        for j in range(i):
            if b[i, j] != 0:
                new[i] += b[i, j] * q[j] * new[j]
                new[i, 1 + j] += b[i, j] * p[j]
    return new[:, 0].contiguous(), new[:, 1:].contiguous()


def _bar(times: tuple[float, ...], progress: bool):
    if not progress:
        return times
    from rich.progress import track

    return track(times, description="sampling", transient=True)
