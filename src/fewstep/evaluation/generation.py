"""Drawing many samples for their features alone: in several processes, resumable, the images never kept.

Sample i starts from noise that depends on the seed and i, and takes the i-th condition in turn. So features depend neither on
the batch nor on the number of processes (up to rounding), all samplers start a seed from the same
noise, and a longer run contains the shorter one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._disk import atomic_write
from .._model import ModelField
from .._types import ArtifactError, FewstepError
from ..calling import Condition
from ..field import Model
from ..keyed import Keyed
from ..sampler import Sampler
from .features import Extractor, Features

CHUNK = 512
"""Samples in a file of features, the unit of work; not a setting, so that any two runs can share a folder."""

Given = int | Mapping[str, Any]
"""A label, or further arguments of the network, whose tensors have a batch of one."""


@dataclass(frozen=True, eq=False)
class Generated:
    """Features of generated samples.

    Attributes:
        features: of samples 0 to count - 1.
        images: the first few samples (keep, *shape), on the CPU.
        seed: of the noise.
        nfe: field calls per sample.
        passes: network passes per sample.
    """

    features: Features
    images: Tensor
    seed: int
    nfe: int
    passes: int


def generate(
    sampler: Sampler,
    model: Model,
    count: int,
    *,
    extractor: str | Extractor | Callable[[Tensor], Any] = "pixels",
    seed: int = 0,
    conditions: Sequence[Given] | None = None,
    guidance: float = 1.0,
    null: Condition | None = None,
    batch: int = 128,
    keep: int = 0,
    out: str | Path | None = None,
    progress: bool = False,
) -> Generated:
    """Draw `count` samples and keep their features: `sampler.nfe` network calls per sample.

    Started by ``torchrun`` or ``accelerate launch``, processes share the work through `out`, and all return the same. Each runs
    the network where it is: on several GPUs move it to ``accelerate.PartialState().device`` first.

    Args:
        sampler: the table.
        model: the network, whose sample's shape must be known.
        count: samples.
        extractor: see `Extractor.of`. Samples are clipped to its limits, as a file of images would clip them.
        seed: of the noise.
        conditions: taken in turn, sample by sample: labels, or mappings of further network arguments, all with the same keys.
            Default: every class of a class-conditional model, otherwise none.
        guidance: see `Model.given`.
        null: see `Model.given`.
        batch: samples at once, at most `CHUNK`.
        keep: return the first so many samples, too; they are drawn once more.
        out: folder for finished features. The same call, or one for more samples, goes on where it stopped; another sampler,
            model, seed, condition or extractor gets a sub-folder of its own. Networks are told apart by their weights,
            extractors that are functions by their name.
        progress: show a bar on stderr.

    Raises:
        FewstepError: an unknown extractor, a sample that is NaN, a model without shape, or (with `out`) without weights;
            several processes without `out`.
        ValueError: fewer than one sample, or a batch below 1.

    Example:
        >>> from fewstep import TimeGrid, load, methods, tabulate
        >>> drawn = generate(tabulate(methods.euler, TimeGrid.uniform(2)), load("digits"), 20, keep=4)
        >>> drawn.features.values.shape, drawn.images.shape, drawn.passes
        (torch.Size([20, 64]), torch.Size([4, 1, 8, 8]), 2)
    """
    if count < 1 or batch < 1 or keep < 0:
        raise ValueError(f"count and batch must be at least 1 and keep at least 0, got {count}, {batch} and {keep}")
    draw = Draw.of(sampler, model, seed, conditions, guidance, null, min(batch, CHUNK))
    extract, processes = Extractor.of(extractor), _Processes.started()
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if out is None:
        if processes.count > 1:
            raise FewstepError("several processes put their features together in a folder: pass out=")
        parts = [draw.features(extract, chunk) for chunk in _shown(chunks, progress)]
    else:
        folder = _folder(Path(out), draw.facts(extract), processes)
        for chunk in _shown(chunks[processes.index :: processes.count], progress and processes.index == 0):
            if _stored(folder, chunk) is None:
                draw.features(extract, chunk).save(_file(folder, chunk))
        processes.wait()
        parts = [Features.load(_file(folder, chunk)) for chunk in chunks]
    images = torch.cat([torch.empty(0, *draw.shape), *(x.cpu() for x in draw.images(range(keep)))])
    return Generated(Features.join(parts), images, seed, sampler.nfe, sampler.nfe * draw.field(range(1)).passes)


@dataclass(frozen=True, eq=False)
class Draw:
    """Samples by their number; see `generate`."""

    sampler: Sampler
    model: Model
    shape: tuple[int, ...]
    seed: int
    conditions: Sequence[Given]
    guidance: float
    null: Condition | None
    batch: int

    @staticmethod
    def of(
        sampler: Sampler, model: Model, seed: int, conditions: Sequence[Given] | None, guidance: float, null: Condition | None,
        batch: int,
    ) -> "Draw":  # fmt: skip
        """With the default conditions.

        Raises:
            FewstepError: the model has no shape, or conditions are of several kinds.
        """
        if model.shape is None:
            raise FewstepError(f"{model.name} does not say the shape of a sample: use adapt(..., shape=...)")
        chosen = conditions if conditions is not None else range(model.classes or 0)
        if len({type(each) is int or tuple(sorted(each)) for each in chosen}) > 1:  # type: ignore[arg-type]  # a mapping
            raise FewstepError("conditions must be labels throughout, or mappings with the same keys")
        return Draw(sampler, model, model.shape, seed, list(chosen), guidance, null, batch)

    def field(self, which: range) -> ModelField:
        """The field of some samples."""
        rows = [self.conditions[i % len(self.conditions)] for i in which] if self.conditions else []
        label = torch.tensor(rows) if rows and isinstance(rows[0], int) else None
        merged: dict[str, Any] = {}
        if rows and label is None:
            mappings = [row for row in rows if not isinstance(row, int)]  # all of them: `of` refuses a mixture
            merged = {key: _merged(key, [row[key] for row in mappings]) for key in mappings[0]}
        return self.model.given(label, guidance=self.guidance, condition=merged, null=self.null)

    def images(self, which: range) -> Iterator[Tensor]:
        """Samples, batch by batch.

        Raises:
            FewstepError: a sample is NaN or infinite.
        """
        device = self.model.device_dtype()[0]
        for start in range(which.start, which.stop, self.batch):
            part = range(start, min(start + self.batch, which.stop))
            noise = self._noise(part).to(device)
            sample = self.sampler(self.field(part), noise)
            bad = (~torch.isfinite(sample)).flatten(1).any(1)
            if bool(bad.any()):
                name, first = self.sampler.provenance.method or "the sampler", start + int(bad.int().argmax())
                raise FewstepError(
                    f"{name} gave NaN or infinity in sample {first} of seed {self.seed}, {int(bad.sum())} in all"
                )
            yield sample

    def _noise(self, part: range) -> Tensor:
        if self.model.source is not None:
            return self.model.source(self.seed, part.start, part.stop)
        return Keyed(self.seed, 0, part.start, part.stop).normal("noise", *self.shape)

    def features(self, extract: Extractor, which: range) -> Features:
        """Features of some samples."""
        return Features.join([extract(extract.clipped(images)) for images in self.images(which)])

    def facts(self, extract: Extractor) -> dict[str, Any]:
        """What equal features come from.

        Raises:
            FewstepError: the network has no weights to know it by.
        """
        model, table = self.model, self.sampler
        if not isinstance(model.network, nn.Module):
            raise FewstepError(
                f"{model.name} is a function, which a folder cannot tell from another: make it a module, or leave out="
            )
        source = {} if model.source is None else {"source": [model.source.name, _digest([model.source(self.seed, 0, 8)])]}
        numbers = [table.times, table.a, table.b, *([] if table.clock is None else [table.clock])]
        return {
            "sampler": table.provenance.method, "numbers": _digest(numbers), "predicts": table.predicts,
            "model": model.name, "weights": model.fingerprint(), "path": repr(model.path), "shape": list(self.shape),
            "kind": [model.predicts, model.raw, model.sigma_data, getattr(model.call, "__qualname__", "")],
            "seed": self.seed, "conditions": _digest(self.conditions), "guidance": self.guidance, "null": _digest(self.null),
            "extractor": extract.identity, **source,
        }  # fmt: skip


def _merged(key: str, values: list[Any]) -> Any:
    """One argument of the network for a batch, from those of its samples."""
    if isinstance(values[0], Tensor) and values[0].ndim:
        if any(len(value) != 1 for value in values):
            raise FewstepError(f'condition "{key}" must have a batch of one in each mapping, got {len(values[0])}')
        return torch.cat(values)
    if isinstance(values[0], int) and not isinstance(values[0], bool):
        return torch.tensor(values)
    if any(value is not values[0] and value != values[0] for value in values):
        raise FewstepError(f'condition "{key}" differs and has no batch; give it as a tensor of one row')
    return values[0]


@dataclass(frozen=True)
class _Processes:
    """This process among those that a launcher has started."""

    index: int
    count: int
    wait: Callable[[], None]

    @staticmethod
    def started() -> "_Processes":
        """Alone, accelerate is not needed."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return _Processes(0, 1, lambda: None)
        try:
            from accelerate import PartialState
        except ImportError:
            raise FewstepError("several processes need accelerate: pip install 'fewstep[train]'") from None
        state = PartialState(cpu=not torch.cuda.is_available())
        return _Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def _folder(out: Path, facts: Mapping[str, Any], processes: _Processes) -> Path:
    """The sub-folder for features that come from these facts, which it says in ``generation.json``."""
    text = json.dumps(facts, indent=1)
    folder = out / hashlib.sha256(text.encode()).hexdigest()[:16]
    if processes.index == 0:
        atomic_write(folder / "generation.json", text + "\n")
    return folder


def _file(folder: Path, chunk: range) -> Path:
    return folder / f"features-{chunk.start:08d}-{chunk.stop:08d}.safetensors"


def _stored(folder: Path, chunk: range) -> Features | None:
    """Finished features; a file that cannot be read is made again."""
    try:
        return Features.load(_file(folder, chunk))
    except ArtifactError:
        return None


def _digest(value: Any) -> str:
    """SHA-256 over numbers, texts and tensors inside lists and mappings."""
    if isinstance(value, Tensor):
        value = [str(value.dtype), list(value.shape), hashlib.sha256(_bytes(value)).hexdigest()]
    elif isinstance(value, Mapping):
        value = [[key, _digest(value[key])] for key in sorted(value)]
    elif isinstance(value, list | tuple):
        value = [_digest(each) for each in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _shown(chunks: Iterable[range], progress: bool) -> Iterable[range]:
    if not progress:
        return chunks
    from rich.console import Console
    from rich.progress import track

    return track(list(chunks), description="generating", console=Console(stderr=True), transient=True)
