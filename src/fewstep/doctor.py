"""What can be wrong with an installation, looked at without changing anything."""

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Literal

from . import __version__

NEEDED = ("torch", "numpy", "scipy", "diffusers", "torchdiffeq", "safetensors", "pydantic", "cyclopts", "rich", "matplotlib")
OPTIONAL = ("scikit-learn", "accelerate", "transformers")
ROOM = 2 << 30
"""Bytes of free disk under which tuning a large model may fail."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at; BAD things break fewstep and say what to do."""

    what: str
    state: Literal["ok", "note", "BAD"]
    detail: str


def examine() -> list[Finding]:
    """Look at versions, torchvision, threads, accelerators and disk."""
    return [*_versions(), _torchvision(), _import_diffusers(), _threads(), _accelerator(), _disk()]


def _versions() -> list[Finding]:
    found = [Finding("fewstep", "ok", f"{__version__} on Python {platform.python_version()}, {platform.platform()}")]
    for name in (*NEEDED, *OPTIONAL):
        try:
            found.append(Finding(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            needed = name in NEEDED
            found.append(
                Finding(name, "BAD" if needed else "note", f"not installed{f'; pip install {name}' if needed else ''}")
            )
    return found


def _torchvision() -> Finding:
    """A torchvision built for another torch makes diffusers and torchmetrics fail on import."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "ok", "not installed, and not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever a mismatched binary raises (RuntimeError, OSError, ImportError) is the finding
        return Finding("torchvision", "BAD", f"{version} does not fit this torch ({error}); pip uninstall torchvision")
    return Finding("torchvision", "ok", f"{version}, fits this torch")


def _import_diffusers() -> Finding:
    try:
        importlib.import_module("diffusers.schedulers.scheduling_utils")
    except Exception as error:  # as above: the reason is what the user needs
        return Finding("diffusers", "BAD", f"does not import: {error}")
    return Finding("diffusers", "ok", "imports")


def _threads() -> Finding:
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    detail = f"{threads} torch threads on {cores} cores, OMP_WAIT_POLICY {policy}"
    if threads > cores:
        return Finding("threads", "note", f"{detail}; more threads than cores is slow, set OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", detail)


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("accelerator", "ok", torch.cuda.get_device_name(0))
    return Finding("accelerator", "note", "none; everything runs on the CPU")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    detail = f"{free / 1e9:.1f} GB free here"
    return Finding(
        "disk", "ok" if free > ROOM else "note", detail if free > ROOM else f"{detail}; references of large models need more"
    )
