"""The state of an unfinished training run as one file: tensors, and everything else as JSON in the same file's header.

One file is replaced whole or not at all, so weights, optimiser and step number always belong together. Nothing in it is code.
"""

import json
import platform
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import __version__
from .._disk import atomic_write, refusal, short
from .ingredients import LONGEST, other
from .recipe import changed

PATTERN = "checkpoint-*.safetensors"
LEFT_OVER = f".{PATTERN}.*.tmp"


@dataclass
class Run:
    """A training run at some step.

    Attributes:
        recipe: its settings; a checkpoint is only continued under the same.
        made_of: what else must be the same: what tells network and objective of the caller's own, and facts of the data.
        network: what the optimiser trains, unwrapped.
        ema: the network with the exponential moving average of its weights, which is what gets saved.
        optimizer: AdamW.
        decay: of that average.
        step: optimiser steps done.
        passes: network passes in units of one forward pass of one sample; a backward pass counts as two.
        seconds: wall-clock time spent.
        cpu_seconds: processor time spent, over all processes.
        curve: entries of the loss curve.
        scaler: state of the gradient scaler of fp16.
        before: the record of the model whose weights were the first ones, if there is one.
        saved: step of the newest checkpoint on disk, if there is one.
    """

    recipe: Mapping[str, Any]
    network: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    decay: float
    step: int = 0
    passes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, float] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    saved: int | None = None
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def begin(
        recipe: Mapping[str, Any],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: float,
        made_of: Mapping[str, Any] | None = None,
    ) -> "Run":
        """Step 0."""
        average = deepcopy(network).eval().requires_grad_(False)
        return Run(recipe, network, average, optimizer, ema, made_of=made_of or {})

    def __post_init__(self) -> None:
        # Listed once: to walk the modules at every step costs several times the blending.
        self._means: list[Tensor] = list(self.ema.parameters())
        self._weights: list[Tensor] = list(self.network.parameters())
        self._buffers = list(zip(self.ema.buffers(), self.network.buffers(), strict=True))

    @torch.no_grad()
    def blend(self) -> None:
        """Move the averages towards the weights of the step that is about to be counted."""
        # Over the first steps its memory is shorter: else the random first weights stay visible for thousands of steps.
        decay = min(self.decay, self.step / (self.step + 10))
        get_ema_multi_avg_fn(decay)(self._means, self._weights, self.step)
        for mean, value in self._buffers:
            mean.copy_(value)

    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.network.parameters())

    def save(self, folder: Path, keep: int) -> None:
        """Write the checkpoint of this step, whole or not at all, and let go of all but the last `keep`.

        Raises:
            ArtifactError: the file cannot be written; earlier checkpoints are as they were.
        """
        names = ("step", "passes", "seconds", "cpu_seconds", "curve", "scaler", "before")
        rest = {name: getattr(self, name) for name in names} | {"made_of": dict(self.made_of)}
        header = {"run": json.dumps({"recipe": dict(self.recipe), **rest}), "versions": json.dumps(versions())}
        atomic_write(folder / f"checkpoint-{self.step:08d}.safetensors", save_tensors(self._tensors(), metadata=header))
        self.saved = self.step
        for old in [*checkpoints(folder)[:-keep], *folder.glob(LEFT_OVER)]:  # the latter from a life that was killed
            old.unlink(missing_ok=True)

    def restore(self, file: Path) -> str | None:
        """Continue where `save` left off.

        Returns:
            What has changed in the versions of packages that decide the numbers, in words; None where nothing has.

        Raises:
            ArtifactError: the file is damaged, belongs to another recipe, data, network or objective (what differs is
                listed), or is of a version that may have kept other samples aside.
        """
        header, tensors = _read(file)
        rest = json.loads(header["run"])
        theirs = rest.pop("made_of", {})
        differing = changed(rest.pop("recipe"), dict(self.recipe)) | self._mixed(theirs)
        if differing:
            told = {name: (short(old, LONGEST), short(new, LONGEST)) for name, (old, new) in differing.items()}
            said = ", ".join(f"{name} = {old} (now {new})" for name, (old, new) in told.items())
            raise refusal(
                f"{file} was made with {said}; a run can only continue as it began: start afresh in another --out, or drop "
                "the settings and keep those of the run"
            )
        if not theirs and self.recipe.get("hold_out"):
            raise refusal(
                f"{file} is of an earlier version of fewstep, which may have kept other samples aside: these would be trained "
                "on now; start afresh in another --out"
            )
        self._load(tensors, file)
        for name, value in rest.items():
            setattr(self, name, value)
        self.saved = self.step
        news = changed(json.loads(header["versions"]), versions())
        return ", ".join(f"{name} {old} then, {new} now" for name, (old, new) in news.items()) or None

    def _mixed(self, theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What differs beside the recipe, with both values; of what an earlier version did not say nothing does."""
        found: dict[str, tuple[Any, Any]] = {}
        for name in theirs.keys() & self.made_of.keys():
            then, now = theirs[name], self.made_of[name]
            if isinstance(then, Mapping) and isinstance(now, Mapping):
                found |= {f"{what} of {name}": both for what, both in other(then, now).items()}
            elif then != now:
                found[name] = (then or "none", now or "none")
        return found

    def _load(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        state = self.optimizer.state_dict()
        names = ("step", "exp_avg", "exp_avg_sq")
        count = len(state["param_groups"][0]["params"])
        try:
            for module, prefix in ((self.network, "network."), (self.ema, "ema.")):
                module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()})
            state["state"] = {
                i: {name: tensors[f"adam.{i}.{name}"].clone() for name in names}
                for i in range(count)
                if f"adam.{i}.step" in tensors
            }
        except (KeyError, RuntimeError) as error:
            raise refusal(f"{file} is not a checkpoint of this run ({short(error)}); delete it and start afresh") from error
        self.optimizer.load_state_dict(state)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        found |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": value for name, value in state.items()}
        return {name: value.detach().cpu().clone() for name, value in found.items()}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob(PATTERN))


def newest(folder: Path) -> Path:
    """The newest checkpoint in a folder.

    Raises:
        ArtifactError: there is none.
    """
    found = checkpoints(folder)
    if not found:
        raise refusal(f"there is no unfinished run in {folder} ({PATTERN} is missing); start one without --resume")
    return found[-1]


def stored_recipe(folder: Path) -> dict[str, Any]:
    """The settings of the run whose newest checkpoint lies in a folder.

    Raises:
        ArtifactError: there is no sound checkpoint.
    """
    return json.loads(_read(newest(folder))[0]["run"])["recipe"]


def versions() -> dict[str, str]:
    """What decides the numbers beside recipe and seed."""
    return {"fewstep": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(file), framework="pt") as opened:  # type: ignore[no-untyped-call]  # from Rust
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it has no iterator
        missing = {"recipe", "step", "curve"} - json.loads(header["run"]).keys() or {"torch"} - json.loads(
            header["versions"]
        ).keys()
        if missing:
            raise ValueError(f"its header lacks {missing}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(
            f"{file} is not a checkpoint that fewstep wrote ({short(error)}); delete it and resume from an older one, or "
            "start afresh"
        ) from error
    return header, tensors
