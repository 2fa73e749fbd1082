"""What decides the weights of a training run, as plain data; imports no torch, so that help and printing are instant."""

import sys
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from .._disk import one_line, short
from .._errors import FewstepError

NETWORK_OPTIONS = ("width", "blocks", "channels", "layers", "patch", "heads", "attention", "dropout")
"""Fields of `Recipe` that belong to some kinds of network and not to others."""


def _integers(_: Any, tokens: Any) -> tuple[int, ...] | None:
    if [token.value.lower() for token in tokens] == ["none"]:  # as of any other setting that may be unset
        return None
    return tuple(int(piece) for token in tokens for piece in token.value.split(",") if piece.strip())


@Parameter(name="*")
@dataclass(frozen=True)
class Recipe:
    """A point of coupling x time law x path x objective, with its data, network and loop."""

    data: str = ""
    """Parquet file, image folder, .npy, .npz, digits, a 2-D density, or package.module:function."""
    source: str = ""
    """Where paths start: data like the above; default: standard normal noise."""
    hold_out: int = 0
    """Keep one of every k samples aside to measure the loss on; 0: none."""
    flip: Annotated[bool, Parameter(negative="--no-flip")] = False
    """Mirror half of the images."""
    size: int | None = None
    """Scale images to cover this side and crop the middle; needed where they differ in size."""
    classes: int | None = None
    """Number of classes, if it is not the highest label plus one."""
    dequantize: Annotated[bool, Parameter(negative="--no-dequantize")] = False
    """Spread 8-bit values uniformly over their bins, as bits/dim asks for."""

    path: str = "CondOT()"
    """CondOT(), Cosine(), VP(), VE() or EDM(), with arguments if you like."""
    predicts: Literal["velocity", "noise", "data"] = "velocity"
    """What the network predicts."""
    raw: Literal["plain", "v_prediction", "edm"] = "plain"
    """v_prediction: the network gives alpha noise - sigma data (predicts noise, on VP). edm: the preconditioning of Karras et
    al. is around it (predicts data, on EDM)."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for raw = edm and weight = edm."""
    coupling: str = "independent"
    """How noise and data are paired: independent, minibatch_ot, or another file of training/coupling."""
    time: Literal["uniform", "logit_normal", "log_snr", "normal_log_snr"] = "uniform"
    """Law of the training times."""
    time_mean: float = 0.0
    """Mean of logit_normal and normal_log_snr; the law of EDM is normal_log_snr with mean 1.2 and standard deviation 1.2."""
    time_std: float = 1.0
    """Their standard deviation."""
    stratified: Annotated[bool, Parameter(negative="--no-stratified")] = False
    """One time in each equal part of the law instead of independent ones."""

    target: Literal["", "velocity", "noise", "data"] = ""
    """What is regressed on; default: what the network predicts."""
    weight: Literal["uniform", "velocity", "snr", "min_snr", "edm"] = "uniform"
    """Weight of the squared error over time."""
    huber: float | None = None
    """Pseudo-Huber loss with this constant instead of the squared error."""
    divergence: float = 0.0
    """Weight of the divergence mismatch (FDM) beside the regression; 0: off."""
    divergence_form: Literal["vector", "two_probes", "exact"] = "vector"
    """Estimator of the mismatch."""
    divergence_share: float = 0.0625
    """Part of the batch on which it is computed."""
    divergence_every: int = 1
    """Only at every k-th step."""
    probes: Literal["rademacher", "gaussian"] = "rademacher"
    """Law of its random probes."""

    start: str = ""
    """Model whose weights are the first ones: a folder that fewstep train left, of this network and path; default: random."""
    network: Literal["mlp", "unet2d", "unet1d", "dit"] = "mlp"
    """Architecture; the next eight set what it has of them."""
    width: int | None = None
    blocks: int | None = None
    channels: Annotated[tuple[int, ...] | None, Parameter(n_tokens=1, converter=_integers)] = None
    layers: int | None = None
    patch: int | None = None
    heads: int | None = None
    attention: Annotated[bool | None, Parameter(negative="--no-attention")] = None
    dropout: float | None = None

    steps: int = 10_000
    """Optimiser steps."""
    batch: int = 256
    """Samples per step, over all processes and accumulated pieces."""
    accumulate: int = 1
    """Pieces of a step's batch that are computed one after another to save memory."""
    lr: float = 1e-3
    """Highest learning rate of AdamW."""
    warmup: int = 200
    """Steps over which it rises."""
    decay: Literal["constant", "cosine"] = "cosine"
    """Where it goes afterwards."""
    weight_decay: float = 0.01
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    ema: float = 0.999
    """Decay of the weights' moving average, which is what is saved."""
    label_dropout: float = 0.1
    """Share of samples shown without their label, for guidance."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    seed: int = 0
    """Of everything random."""

    def network_options(self) -> dict[str, Any]:
        """The options of the network that are set."""
        return {name: value for name in NETWORK_OPTIONS if (value := getattr(self, name)) is not None}

    def pieces(self, processes: int) -> int:
        """Equal pieces that a step's batch is cut into.

        Raises:
            FewstepError: it does not divide.
        """
        count = processes * self.accumulate
        if self.batch % count:
            raise FewstepError(
                f"a batch of {self.batch} does not divide among {processes} processes with {self.accumulate} pieces each; "
                f"choose a multiple of {count}"
            )
        return count

    def check(self, *, data: bool = True) -> None:
        """Refuse settings that no run can have.

        Args:
            data: whether there must be data.

        Raises:
            FewstepError: the setting, what it must be, and what came.
        """
        check_types(self)
        at_least = {"steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "hold_out": 0, "divergence_every": 1, "seed": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise FewstepError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("weight_decay", "clip", "divergence"):
            if getattr(self, name) < 0.0:
                raise FewstepError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        for name in ("lr", "sigma_data", "time_std"):
            if getattr(self, name) <= 0.0:
                raise FewstepError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("ema", "label_dropout", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise FewstepError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.divergence_share <= 1.0:
            raise FewstepError(f"divergence_share must lie in (0, 1], got {self.divergence_share}")
        if self.seed >= 2**63:
            raise FewstepError(f"seed must be below 2**63, got {self.seed}")
        if self.hold_out == 1:
            raise FewstepError("hold_out = 1 would keep every sample aside; use 2 or more, or 0 for none")
        if self.raw != "plain":
            from .._types import RAW_PREDICTS  # imports torch

            if self.predicts != (meant := RAW_PREDICTS[self.raw]):
                raise FewstepError(f'raw = "{self.raw}" goes with predicts = "{meant}", got "{self.predicts}"')
        if data and not self.data:
            raise FewstepError("data must be given: --data FILE, FOLDER or NAME")


_CIFAR10 = Recipe(
    hold_out=50, flip=True, network="unet2d", channels=(48, 96), layers=2, patch=2, attention=True, batch=64, steps=100_000,
    lr=6e-4, warmup=200, decay="constant", weight_decay=0.0, stratified=True, ema=0.998,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        data="digits", hold_out=6, batch=512, stratified=True, network="mlp", width=192, blocks=3, dropout=0.25, clip=0.0
    ),
    "density2d": Recipe(
        data="checkerboard", batch=512, network="mlp", width=128, blocks=3, steps=5000, weight_decay=0.0, ema=0.99
    ),
    "cifar10-flow": replace(_CIFAR10, time="logit_normal"),
    "cifar10-vp": replace(
        _CIFAR10, path="VP(beta_min=0.1, beta_max=20.0)", predicts="noise", raw="v_prediction", weight="edm",
        time="normal_log_snr", time_mean=0.5, time_std=1.4,
    ),
    "cifar10-edm": replace(
        _CIFAR10, path="EDM(sigma_min=0.002, sigma_max=80.0)", predicts="data", raw="edm", weight="edm", time="normal_log_snr",
        time_mean=1.2, time_std=1.2,
    ),
}  # fmt: skip
"""Recipes by name; each is a starting point that flags override."""


def check_types(settings: Any) -> None:
    """Refuse values that the fields of a dataclass do not allow: a caller in Python can pass anything.

    Raises:
        FewstepError: the field, what it may be, and what came.
    """
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value, hint = getattr(settings, f.name), hints[f.name]
        kinds = [hint] if get_origin(hint) in (None, Literal, tuple) else list(get_args(hint))
        unset = isinstance(value, float) and value == f.default  # a default may be infinite
        if not unset and not any(_is(value, kind) for kind in kinds):
            words = " or ".join(map(_in_words, kinds))
            raise FewstepError(one_line(f"{f.name} must be {words}, got {short(repr(value))}"))


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(each, int) for each in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # an integer can be larger
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{word}"' for word in get_args(kind))
    kinds = {int: "an integer", float: "a finite number", bool: "True or False", str: "text", type(None): "None"}
    return kinds.get(kind, "a tuple of integers")


def changed(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values."""
    return {k: (theirs.get(k), mine.get(k)) for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)}


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe in JSON's types."""
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@Parameter(name="*")
@dataclass(frozen=True)
class Keeping:
    """What a run shows and keeps; none of it changes the weights."""

    every: int = 500
    """Steps between checkpoints, which are also the points of the loss curve."""
    keep: int = 2
    """Checkpoints that are kept."""
    preview: int = 0
    """Steps between pictures of samples in OUT/previews; 0: none."""
    stored: Literal["float32", "bfloat16"] = "float32"
    """Precision of the saved weights."""
    tracker: str | None = None
    """An accelerate tracker that is installed, such as tensorboard or trackio, beside OUT/curve.jsonl."""
    seconds: float = float("inf")
    """End the run after this much training time, at the step where it is."""

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            FewstepError: the setting, what it must be, and what came.
        """
        check_types(self)
        for name, least in {"every": 1, "keep": 1, "preview": 0}.items():
            if getattr(self, name) < least:
                raise FewstepError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.seconds > 0:
            raise FewstepError(f"seconds must be positive, got {self.seconds}")
