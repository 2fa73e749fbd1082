"""The state of an unfinished training run as one file: tensors, and everything else as JSON in the same file's header.

One file is replaced whole or not at all, so weights, optimiser and step number always belong together. Nothing in it is code.
"""

import copy
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .. import __version__
from .._disk import atomic_write, refusal, short

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Run:
    """A training run at some step.

    Attributes:
        recipe: its settings; a checkpoint is only continued under the same.
        network: what the optimiser trains.
        ema: the exponential moving average of its weights, which is what gets shipped.
        optimizer: AdamW.
        step: optimiser steps done.
        seconds: wall-clock time spent.
        cpu_seconds: processor time spent.
        pending: losses since the last entry of `curve`.
        curve: entries of the loss curve.
        saved: step of the checkpoint on disk, if there is one.
    """

    recipe: Mapping[str, int | float]
    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pending: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    saved: int | None = None

    @staticmethod
    def begin(recipe: Mapping[str, int | float], network: nn.Module, optimizer: torch.optim.Optimizer) -> "Run":
        """Step 0."""
        return Run(recipe, network, copy.deepcopy(network).eval().requires_grad_(False), optimizer)

    def update_average(self, decay: float) -> None:
        """Move `ema` towards the network, ema <- decay ema + (1 - decay) network; over the first steps its memory is shorter.

        Without that, the random first weights would stay visible for thousands of steps.
        """
        decay = min(decay, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, weight in zip(self.ema.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(weight, 1 - decay)

    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.network.parameters())

    def save(self, file: Path) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            ArtifactError: the file cannot be written.
        """
        rest = {name: getattr(self, name) for name in ("step", "seconds", "cpu_seconds", "pending", "curve")}
        header = {"run": json.dumps({"recipe": dict(self.recipe), **rest}), "versions": json.dumps(versions())}
        atomic_write(file, save_tensors(self._tensors(), metadata=header))
        self.saved = self.step

    def restore(self, file: Path) -> None:
        """Continue where `save` left off.

        Raises:
            ArtifactError: the file is damaged, or belongs to another recipe or other versions.
        """
        header, tensors = _read(file)
        rest, mine = json.loads(header["run"]), versions()
        theirs = json.loads(header["versions"])
        _same("was made with", rest.pop("recipe"), dict(self.recipe), file)
        _same("was made under", theirs, mine, file)
        state = self.optimizer.state_dict()
        names = ("step", "exp_avg", "exp_avg_sq")
        count = len(state["param_groups"][0]["params"])
        try:
            for module, prefix in ((self.network, "network."), (self.ema, "ema.")):
                module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
            state["state"] = {i: {name: tensors[f"adam.{i}.{name}"].clone() for name in names} for i in range(count)}
        except (KeyError, RuntimeError) as error:
            raise refusal(f"{file} is not a checkpoint of this run ({short(error)}); delete it and start afresh") from error
        self.optimizer.load_state_dict(state)
        for name, value in rest.items():
            setattr(self, name, value)
        self.saved = self.step

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        found |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": value for name, value in state.items()}
        return {name: value.detach().clone() for name, value in found.items()}


def stored_recipe(file: Path) -> dict[str, Any]:
    """The settings of the run that a checkpoint belongs to.

    Raises:
        ArtifactError: there is no sound checkpoint.
    """
    return json.loads(_read(file)[0]["run"])["recipe"]


def versions() -> dict[str, str]:
    """What decides the numbers beside the seed."""
    return {"fewstep": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _same(verb: str, theirs: Mapping[str, Any], mine: Mapping[str, Any], file: Path) -> None:
    changed = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if changed:
        said = ", ".join(f"{name} = {short(theirs.get(name))} (now {short(mine.get(name))})" for name in changed)
        raise refusal(f"{file} {verb} {said}; a run can only continue as it began: start afresh in another --out")


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not file.is_file():
        raise refusal(f"there is no unfinished run in {file.parent} ({file.name} is missing); start one without --resume")
    try:
        with safe_open(str(file), framework="pt") as opened:  # type: ignore[no-untyped-call]
            header, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        missing = {"recipe", "step", "curve"} - json.loads(header["run"]).keys() or json.loads(header["versions"]).keys() < {
            "torch"
        }
        if missing:
            raise ValueError(f"its header lacks {missing}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise refusal(f"{file} is not a checkpoint that fewstep wrote ({short(error)}); delete it and start afresh") from error
    return header, tensors
