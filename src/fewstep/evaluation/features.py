"""What distances between images are measured in: extractors by name or object, and the features that they give."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .._disk import atomic_write, one_line, refusal, short
from .._types import FewstepError
from ..field import adapt
from .inception import load_inception

NAMES = ("pixels", "inception")
TOLERANCE = 1e-3
"""By so much may pixels lie outside their limits: what scaling and rounding leave."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images, on the CPU in float32.

    Attributes:
        values: (count, dim).
        spatial: (count, dim of a middle layer), where the extractor gives them.
        extractor: name of what made them.
        shape: of one image.
        limits: smallest and largest pixel; None where the extractor sets no limits.
    """

    values: Tensor
    spatial: Tensor | None
    extractor: str
    shape: tuple[int, ...]
    limits: tuple[float, float] | None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Tensor) -> "Features":
        return replace(self, values=self.values[index], spatial=None if self.spatial is None else self.spatial[index])

    @staticmethod
    def join(parts: Sequence["Features"]) -> "Features":
        """Features of one extractor, one after the other."""
        first = parts[0]
        spatial = None if first.spatial is None else torch.cat([part.spatial for part in parts if part.spatial is not None])
        found = [part.limits for part in parts if part.limits is not None]
        limits = (min(low for low, _ in found), max(high for _, high in found)) if found else None
        return replace(first, values=torch.cat([part.values for part in parts]), spatial=spatial, limits=limits)

    def save(self, file: str | Path) -> None:
        """Write one safetensors file, atomically.

        Raises:
            ArtifactError: the disk refuses.
        """
        tensors = {"values": self.values, **({} if self.spatial is None else {"spatial": self.spatial})}
        words = {"extractor": self.extractor, "shape": " ".join(map(str, self.shape))}
        words["limits"] = "" if self.limits is None else " ".join(map(repr, self.limits))
        atomic_write(file, save_tensors({k: v.contiguous() for k, v in tensors.items()}, words))

    @staticmethod
    def load(file: str | Path) -> "Features":
        """Read what `save` wrote.

        Raises:
            ArtifactError: there is no such file, or it holds no features.
        """
        try:
            with safe_open(file, "pt") as stored:
                words = stored.metadata() or {}
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it has no iterator
            low_high = tuple(float(word) for word in words["limits"].split())
            shape = tuple(int(word) for word in words["shape"].split())
            limits = (low_high[0], low_high[1]) if low_high else None
            return Features(found["values"], found.get("spatial"), words["extractor"], shape, limits)
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            raise refusal(f"{file} holds no features: {short(error)}; make them again") from error


@dataclass(frozen=True, eq=False)
class Extractor:
    """Images -> features.

    Attributes:
        name: what tables call it; of a function, also what tells it from others when work is resumed.
        network: images (batch, *shape) -> features (batch, dim), or those with spatial features (batch, *any). A module, or
            one whose method this is, runs where it is, in evaluation mode.
        limits: smallest and largest value of a pixel; None for states that are no images.

    Example:
        >>> halves = Extractor("halves", lambda x: x.mean(-1))
        >>> halves(torch.ones(2, 1, 4, 4)).values.shape
        torch.Size([2, 4])
    """

    name: str
    network: Callable[[Tensor], Any]
    limits: tuple[float, float] | None = (-1.0, 1.0)

    @staticmethod
    def of(what: "str | Extractor | Callable[[Tensor], Any]") -> "Extractor":
        """By name or object.

        Args:
            what: "pixels" (flattened); "inception" (`fewstep.evaluation.inception`); ``package.module:name``, where the name is
                anything that follows; a module or function from images in [-1, 1] to features; or an extractor.

        Raises:
            FewstepError: an unknown name, or what it stands for cannot be used.

        Example:
            >>> Extractor.of("pixels")(torch.zeros(5, 1, 8, 8)).values.shape
            torch.Size([5, 64])
        """
        if isinstance(what, Extractor):
            return what
        if isinstance(what, str):
            return _named(what)
        if not callable(what):
            raise FewstepError(f"an extractor is a name or a function from images to features, got {type(what).__name__}")
        return Extractor(getattr(what, "__name__", type(what).__name__), what)

    @property
    def identity(self) -> str:
        """Name, limits and weights: what equal features come from."""
        return f"{self.name} {self.limits} {adapt(self.network if self.module is None else self.module).fingerprint()}"

    @property
    def module(self) -> nn.Module | None:
        """The network, or the module whose method it is; None for other functions."""
        owner = getattr(self.network, "__self__", self.network)
        return owner if isinstance(owner, nn.Module) else None

    def clipped(self, images: Tensor) -> Tensor:
        """Images inside the limits, as a file of them would be."""
        return images if self.limits is None else images.clamp(*self.limits)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """The features of one batch.

        Raises:
            FewstepError: images outside the limits, a network that fails on them, or features that are NaN or have no batch.
        """
        limits, network = self._check_images(images), self.network
        owner = self.module
        weight = None if owner is None else adapt(owner).weight()
        asked = images if weight is None else images.to(weight.device, weight.dtype)
        try:
            found = _in_evaluation_mode(owner, network, asked)
        except Exception as error:  # it is code of the user's, which can raise anything
            why = f"{type(error).__name__}: {error}"
            raise FewstepError(
                one_line(f"the extractor {self.name} failed on images {tuple(images.shape)}: {short(why, 300)}")
            ) from error
        values, spatial = found if isinstance(found, tuple) else (found, None)
        checked = [None if each is None else self._checked(each, len(images)) for each in (values, spatial)]
        assert checked[0] is not None
        return Features(checked[0], checked[1], self.name, tuple(images.shape[1:]), limits)

    def _check_images(self, images: Tensor) -> tuple[float, float] | None:
        if images.ndim < 2 or images.numel() == 0 or not images.is_floating_point():
            scale = "; scale 256 levels as x.float() / 127.5 - 1" if images.dtype == torch.uint8 else ""
            raise FewstepError(
                f"images must be floating-point (batch, *shape), got {images.dtype} of shape {tuple(images.shape)}{scale}"
            )
        low, high = float(images.min()), float(images.max())
        if not bool(torch.isfinite(images).all()):
            raise FewstepError("images hold NaN or infinity")
        if self.limits is None:
            return None
        if low < self.limits[0] - TOLERANCE or high > self.limits[1] + TOLERANCE:
            raise FewstepError(
                f"{self.name} takes images in [{self.limits[0]:g}, {self.limits[1]:g}], these have values from {low:g} to "
                f"{high:g}; scale them, clip what a sampler overshoots, or give the extractor other limits"
            )
        return low, high

    def _checked(self, value: Any, batch: int) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2 or len(value) != batch:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise FewstepError(f"the extractor {self.name} must return floating-point features ({batch}, dim), got {got}")
        if not bool(torch.isfinite(value).all()):
            raise FewstepError(f"the extractor {self.name} returned NaN or infinity for images that have neither")
        return value.flatten(1).float().cpu()


def features_of(
    images: Tensor | Iterable[Any], extractor: str | Extractor | Callable[[Tensor], Any] = "pixels", *, batch: int = 128
) -> Features:
    """The features of real images, batch by batch.

    Args:
        images: (count, *shape) in [-1, 1], or batches of such, also as (images, labels), as a data loader gives them.
        extractor: see `Extractor.of`.
        batch: images at once, where they are one tensor.

    Raises:
        FewstepError: see `Extractor`; no images, or of several sizes.

    Example:
        >>> len(features_of([torch.zeros(3, 1, 4, 4), torch.ones(2, 1, 4, 4)]))
        5
    """
    extract, parts = Extractor.of(extractor), []
    for given in images.split(batch) if isinstance(images, Tensor) else images:
        parts.append(extract(given[0] if isinstance(given, tuple | list) else given))
        if parts[-1].shape != parts[0].shape:
            raise FewstepError(f"images have several shapes: {parts[0].shape} and {parts[-1].shape}; scale them to one")
    if not parts:
        raise FewstepError("no images to take features of")
    return Features.join(parts)


def _in_evaluation_mode(module: nn.Module | None, network: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Else batch normalisation would make a sample's features depend on its neighbours."""
    if module is None or not module.training:
        return network(images)
    module.eval()
    try:
        return network(images)
    finally:
        module.train()


def _named(name: str) -> Extractor:
    if name == "pixels":
        return Extractor(name, lambda x: x.flatten(1))
    if name == "inception":
        return Extractor(name, load_inception())
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name):
        return _imported(name)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise FewstepError(
        one_line(f'unknown extractor "{short(name)}": {hint}known are {", ".join(NAMES)} and package.module:function')
    )


def _imported(name: str) -> Extractor:
    place, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)  # a console script's search path lacks it
    try:
        found = getattr(importlib.import_module(place), attribute)
    except Exception as error:  # the module runs code of the user's, which can raise anything
        why = f"importing it gave {type(error).__name__}: {error}"
        raise FewstepError(one_line(f'cannot use the extractor "{short(name)}": {short(why, 300)}')) from error
    finally:
        if added:
            sys.path.remove(here)
    extractor = Extractor.of(found)
    return extractor if isinstance(found, Extractor) else replace(extractor, name=name)
