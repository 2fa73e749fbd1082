"""A network with its conventions, and its velocity field under one condition; `fewstep.field.adapt` makes them.

Every convention of the outside (clocks, signs, preconditioning, guidance, half precision) is translated here and nowhere
else.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ._affine import AffinePath, per_sample, raw_mix
from ._types import FieldError, Prediction, Raw, State, Time
from .calling import Call, Clock, Condition, LogProbability, checked, cut, expand, per_sample_time, stack


@dataclass(frozen=True, eq=False)
class SourcePoints:
    """What the paths of a model start from, where that is not standard normal noise.

    Attributes:
        name: as ``fewstep train --source`` took it.
        points: ``points(seed, first, last)`` -> (last - first, *shape), sample i depending on the seed and i alone; None where
            only the name is known.
        facts: what tells the data that the model was trained from, from others of that name; None where that is not known.
    """

    name: str
    points: Callable[[int, int, int], Tensor] | None = None
    facts: Mapping[str, Any] | None = None

    def __call__(self, seed: int, first: int, last: int) -> Tensor:
        """Samples `first` to `last` of a seed.

        Raises:
            FieldError: only the name is known.
        """
        if self.points is None:
            raise FieldError(
                f"this model's paths start at samples of {self.name}, not at noise: give it them with "
                "fewstep.training.with_source(model)"
            )
        return self.points(seed, first, last)


@dataclass(frozen=True, eq=False)
class Model:
    """A network with everything that is needed to ask it for velocities; made by `adapt`, used through `given`.

    Attributes:
        network: the callable, usually an `nn.Module`.
        path: the affine path that it was trained on.
        predicts: what it predicts once `raw` is undone.
        shape: shape of one sample, if known.
        call: how it is called.
        clock: fewstep time -> the network's own time.
        raw: how bare inputs and outputs relate to state and prediction, see `fewstep.path.raw_mix`.
        label_key: name of the network's class argument.
        null_label: the class that means "no condition".
        classes: number of classes, if the network is class-conditional.
        max_batch: larger batches are split.
        name: what reports call it.
        source: what its paths start from; None: standard normal noise.
    """

    network: Callable[..., Any]
    path: AffinePath
    predicts: Prediction
    shape: tuple[int, ...] | None
    call: Call
    clock: Clock
    raw: Raw
    sigma_data: float
    label_key: str
    null_label: int | None
    classes: int | None
    max_batch: int | None
    name: str
    source: SourcePoints | None = None

    def given(
        self,
        label: int | Tensor | None = None,
        *,
        guidance: float = 1.0,
        condition: Condition | None = None,
        null: Condition | None = None,
        classifier: LogProbability | None = None,
        classifier_scale: float = 1.0,
    ) -> "ModelField":
        """The velocity field under one condition.

        Args:
            label: class for the whole batch, or one per sample, shape (batch,).
            guidance: classifier-free guidance scale w in v_null + w (v_label - v_null); 1 asks the network once, any
                other value runs one doubled batch (one field call, two network passes).
            condition: further keyword arguments of the network; tensors of batch 1 are expanded.
            null: what replaces `condition` in the unconditional half; default: `condition` with the null label.
            classifier: log p(y | x, t) of shape (batch,), differentiable in x: classifier guidance (Dhariwal & Nichol,
                2105.05233) adds `classifier_scale` times its gradient to the score.
            classifier_scale: see `classifier`.

        Raises:
            FieldError: guidance without a null label or `null`, or a label outside the network's classes.
        """
        shared = dict(condition or {})
        if label is not None:
            self._check_label(label)
            shared[self.label_key] = label
        shared = self._placed(shared)
        unconditional: Condition | None = None
        if guidance != 1.0:
            unconditional = self._null_condition(shared, null)
        first, last = self.path.span(self.predicts)
        if classifier is not None:  # the score's weight in the velocity is infinite where alpha is zero
            first = max(first, self.path.margin)
        return ModelField(self, shared, guidance, unconditional, classifier, classifier_scale, first, last)

    def _placed(self, given: Condition) -> dict[str, Any]:
        """With its tensors on the network's GPU, if it is on one, so that calls need not move them."""
        weight = self.weight()
        if weight is None or not weight.is_cuda:  # weights that are offloaded are elsewhere
            return dict(given)
        return {k: v.to(weight.device) if isinstance(v, Tensor) else v for k, v in given.items()}

    def _check_label(self, label: int | Tensor) -> None:
        if self.classes is None:
            return
        low, high = (int(label.min()), int(label.max())) if isinstance(label, Tensor) else (label, label)
        top = self.classes if self.null_label is None else max(self.classes, self.null_label + 1)
        if low < 0 or high >= top:
            raise FieldError(f"label must lie in 0..{self.classes - 1} for {self.name}, got {low if low < 0 else high}")

    def _null_condition(self, shared: Condition, null: Condition | None) -> Condition:
        if null is not None:
            return self._placed(null)
        if self.null_label is None or self.label_key not in shared:
            raise FieldError(
                f"guidance needs a condition and its absence: {self.name} has "
                f"{'no null label' if self.null_label is None else 'one, but no label was given'}; "
                "pass null={...} or adapt(..., null_label=...)"
            )
        return {**shared, self.label_key: self.null_label}

    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of the network's weights ("" for a plain function)."""
        if not isinstance(self.network, nn.Module):
            return ""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        return digest.hexdigest()

    def parameters(self) -> int:
        """Number of weights (0 for a plain function)."""
        return sum(p.numel() for p in self.network.parameters()) if isinstance(self.network, nn.Module) else 0

    def device_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the network lives and in which precision it computes (CPU float32 for a plain function)."""
        weight = self.weight()
        return (torch.device("cpu"), torch.float32) if weight is None else (weight.device, weight.dtype)

    def weight(self) -> Tensor | None:
        """The first floating-point weight: the network is asked in its precision, without one in the state's."""
        weights = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return next((p for p in weights if p.is_floating_point()), None)


@dataclass(frozen=True, eq=False)
class ModelField:
    """``field(x, t) -> velocity`` for one condition of one model; see `Model.given`.

    Between `first` and `last` the network is asked at t; outside (where its prediction would not determine a velocity) at
    the nearer of the two.
    """

    model: Model
    condition: Condition
    guidance: float
    null: Condition | None
    classifier: LogProbability | None
    classifier_scale: float
    first: float
    last: float

    @property
    def label(self) -> str:
        """The condition in words, for reports and artifacts."""
        entries = [
            f"{k}={v}" if not isinstance(v, Tensor) else f"{k}=<{'x'.join(map(str, v.shape))}>"
            for k, v in self.condition.items()
        ]
        if self.guidance != 1.0:
            entries.append(f"guidance={self.guidance:g}")
        if self.classifier is not None:
            entries.append(f"classifier_scale={self.classifier_scale:g}")
        return ", ".join(entries) or "unconditional"

    @property
    def path(self) -> AffinePath:
        """The model's path."""
        return self.model.path

    @property
    def passes(self) -> int:
        """Network passes per call: 2 under classifier-free guidance."""
        return 1 if self.null is None else 2

    def __call__(self, x: State, t: Time) -> State:
        """The velocity dx/dt at state `x` (batch, *shape) and time `t`; one NFE.

        Raises:
            FieldError: the network's output is not a floating tensor of the state's shape, or a condition has another batch.
        """
        return self.predict(x, t, "velocity")

    def predict(self, x: State, t: Time, target: Prediction) -> State:
        """The prediction `target` at (x, t), converted from the network's own in one step; one NFE."""
        model = self.model
        t = t.clamp(self.first, self.last) if isinstance(t, Tensor) else min(max(t, self.first), self.last)
        value = self._native(x, t)
        if self.classifier is not None:
            value = value + self._classifier_term(x, t).to(value.dtype)
        if model.raw == "plain":
            return model.path.convert(value, x, t, source=model.predicts, target=target)
        # prediction = p w + q x and target = P prediction + Q x in one multiply-add per tensor
        _, p, q = raw_mix(model.path, t, model.raw, model.sigma_data)
        outer_p, outer_q = model.path.mix(t, model.predicts, target)
        return per_sample(outer_p * p, value) * value + per_sample(outer_p * q + outer_q, x) * x

    def take(self, index: slice | Tensor) -> "ModelField":
        """The field for some of the samples: conditions given per sample are cut likewise."""

        def rows(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.ndim and value.shape[0] > 1):
                return value
            return value[index.to(value.device) if isinstance(index, Tensor) else index]

        cut = {k: rows(v) for k, v in self.condition.items()}
        return replace(self, condition=cut, null=self.null and {k: rows(v) for k, v in self.null.items()})

    def _native(self, x: Tensor, t: Time) -> Tensor:
        """The network's bare output, guidance applied (guidance weights sum to one, so it commutes with conversion)."""
        if self.null is None:
            return self._ask(x, t, self.condition)
        batch = x.shape[0]
        both = stack(expand(self.null, batch, x.device), expand(self.condition, batch, x.device))
        times = t if not isinstance(t, Tensor) or t.ndim == 0 else torch.cat([t, t])
        without, given = self._ask(torch.cat([x, x]), times, both).chunk(2)
        return torch.lerp(without, given, self.guidance)

    def _ask(self, x: Tensor, t: Time, condition: Condition) -> Tensor:
        model, batch = self.model, x.shape[0]
        if model.raw == "edm":
            x = x * per_sample(raw_mix(model.path, t, model.raw, model.sigma_data)[0], x)
        weight = model.weight()
        asked = x if weight is None else x.to(weight.dtype)
        time = per_sample_time(model.clock(t), batch, asked)
        kwargs = expand(condition, batch, x.device)
        step = model.max_batch or batch
        pieces = [
            checked(model.call(model.network, asked[i : i + step], time[i : i + step], cut(kwargs, i, step, batch)),
                    (min(step, batch - i), *x.shape[1:]), model.name)
            for i in range(0, batch, step)
        ]  # fmt: skip
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return output.to(x.dtype)

    def _classifier_term(self, x: Tensor, t: Time) -> Tensor:
        """What classifier guidance adds to the native output, through its weight on the score."""
        assert self.classifier is not None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            logp = self.classifier(leaf, per_sample_time(t, x.shape[0], x))
            (gradient,) = torch.autograd.grad(logp.sum(), leaf)
        # score = -noise / sigma; unlike the score's, the weight of the noise is finite at clean data
        p = -self.model.path.coefficients(t).sigma * self.model.path.mix(t, "noise", self.model.predicts)[0]
        if self.model.raw != "plain":
            p = p / raw_mix(self.model.path, t, self.model.raw, self.model.sigma_data)[1]
        return self.classifier_scale * per_sample(p, x) * gradient
