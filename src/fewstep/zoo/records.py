"""What ``config.json`` of a model directory says, validated on load."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .._schema import Strict
from .._types import Prediction, Raw

Precision = Literal["float32", "bfloat16"]
"""How weights are stored; they are computed with as float32 either way."""

_Size = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class TrainingRecord(Strict):
    """How the weights came about.

    Attributes:
        command: what to run for the same weights.
        data: what they were trained on.
        recipe: its settings.
        seed: of everything random.
        steps: optimiser steps.
        samples: training samples seen, repeats counted.
        network_passes: forward passes of one sample, a forward and backward pass counted as three: the unit in which
            `fewstep tune` states its own cost.
        hours: wall-clock time, over all parts of an interrupted run.
        cpu_hours: processor time of the same over all processes, which does not depend on what else the machine did.
        losses: final losses by name.
        versions: of the packages that decide the numbers.
        start: the same of the model whose weights were the first ones; its cost comes on top.
    """

    command: str
    data: str
    recipe: dict[str, Any]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    steps: _Count
    samples: _Count
    network_passes: _Count
    hours: Annotated[float, Field(ge=0)]
    cpu_hours: Annotated[float, Field(ge=0)]
    losses: dict[str, float]
    versions: dict[str, str]
    start: "TrainingRecord | None" = None

    def runs(self) -> "list[TrainingRecord]":
        """This run and those whose weights it started from, newest first."""
        return [self, *(self.start.runs() if self.start else [])]


class SourceRecord(Strict):
    """What the paths of a model start from, if not noise: see `SourcePoints`."""

    name: Annotated[str, Field(min_length=1, max_length=4096)]
    facts: dict[str, Any] | None


class ModelConfig(Strict):
    """``config.json``."""

    schema_version: Literal[1]
    kind: Literal["mlp", "unet2d", "unet1d", "dit"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    network: dict[str, Any]
    stored: Precision
    path: str
    predicts: Prediction
    raw: Raw
    sigma_data: Annotated[float, Field(gt=0)]
    shape: Annotated[list[_Size], Field(min_length=1, max_length=8)]
    classes: Annotated[int, Field(ge=1, le=2**20)] | None
    null_label: Annotated[int, Field(ge=0, le=2**20)] | None
    data_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    training: TrainingRecord | None
    source: SourceRecord | None = None
