"""Where training samples come from: finite data drawn epoch by epoch, or generators that never end.

Which samples a step sees depends on the seed, the step and the place in the batch alone: a process draws its rows without
knowing of the others, and a resumed run goes on with the samples that the undisturbed run would have seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..._types import State
from ...keyed import BLOCK, Keyed, generator
from .checks import check_finite, check_labels, refuse

Made = Tensor | tuple[Tensor, Tensor]
"""What a generating function returns: samples (count, *shape), and labels (count,) if there are classes."""


@runtime_checkable
class Source(Protocol):
    """Samples to train on.

    Attributes:
        shape: of one sample.
        classes: number of classes; None without labels.
        size: samples to train on; None where they never end.
        description: one line for model cards: what, how many, from where, how many kept aside.
        data_range: smallest and largest possible value, where that is known.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102  # above
    @property
    def classes(self) -> int | None: ...  # noqa: D102  # above
    @property
    def size(self) -> int | None: ...  # noqa: D102  # above
    @property
    def description(self) -> str: ...  # noqa: D102  # above
    @property
    def data_range(self) -> tuple[float, float] | None: ...  # noqa: D102  # above

    def draw(self, keyed: Keyed, total: int) -> tuple[State, Tensor | None]:
        """The samples of rows `keyed.start` to `keyed.stop` of the batch of `total` samples at `keyed.step`.

        Two sources that must not go in step (a pair of distributions) are drawn with different seeds. A run calls this in a
        thread of its own while a step computes: random numbers come from `keyed` alone, never from PyTorch's global generator.

        Returns:
            float32 (len(keyed), *shape) on the CPU, and labels int64 (len(keyed),) if there are classes.
        """
        ...

    def held_out(self) -> tuple[State, Tensor | None] | None:
        """Samples that `draw` never gives, with their labels; None where none are kept aside."""
        ...


@dataclass(frozen=True, eq=False)
class FiniteSource:
    """A data set in memory, drawn without replacement: every epoch is a new order of all samples.

    Args:
        data: (n, *shape), float32 used as it is, or uint8 (kept so, scaled to [-1, 1] batch by batch).
        labels: (n,) int64, checked.
        classes: number of classes; default: the highest label plus one.
        origin: what and from where, for the description.
        hold_out: of each so many samples in a row one is kept aside, drawn at random but the same in every run (at a fixed
            place it would always be the same class of data whose labels go round); 0 for none.
        flip: mirror half of the samples left to right; images (channels, height, width) only.
        dequantize: spread each of the 256 levels evenly over its bin, (x + u) / 128 - 1 with u uniform in [0, 1), which
            makes the density of images finite; uint8 only.
        values: smallest and largest possible value of float data, where that is known.
        regular: keep the last of each `hold_out` samples aside instead, as for the bundled model of digits.

    Raises:
        FewstepError: NaN, infinities, an option that does not fit the data, or too few samples for it.

    Example:
        >>> source = FiniteSource(torch.arange(10.0).view(5, 2))
        >>> x, _ = source.draw(Keyed(seed=0, step=3, start=0, stop=5), 5)
        >>> sorted(x[:, 0].tolist())
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """

    data: Tensor
    labels: Tensor | None = None
    classes: int | None = None
    origin: str = "samples in memory"
    hold_out: int = 0
    flip: bool = False
    dequantize: bool = False
    values: tuple[float, float] | None = None
    regular: bool = False

    def __post_init__(self) -> None:
        if self.hold_out < 0 or self.hold_out == 1:
            raise refuse(
                f"hold_out keeps one of each so many samples aside: expected 0 (none) or 2 and more, got {self.hold_out}"
            )
        if self.hold_out > len(self.data):
            raise refuse(
                f"hold_out={self.hold_out} keeps nothing aside of {len(self.data)} samples; choose a smaller number, or 0"
            )
        if self.flip and len(self.shape) != 3:
            raise refuse(f"flip mirrors images (channels, height, width), the samples have shape {self.shape}; turn it off")
        if self.dequantize and self.data.dtype != torch.uint8:
            raise refuse("dequantize is for uint8 images of 256 levels, these samples are float; turn it off")
        if self.data.is_floating_point():
            check_finite(self.data.detach().float().cpu().numpy(), self.origin)
        if self.labels is not None:
            labels, classes = check_labels(self.labels.numpy(), len(self.data), self.origin, self.classes)
            object.__setattr__(self, "labels", labels)
            object.__setattr__(self, "classes", classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.data.shape[1:])

    @property
    def size(self) -> int:
        """Samples to train on, without those kept aside."""
        return len(self.data) - (len(self.data) // self.hold_out if self.hold_out else 0)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """(-1, 1) for uint8 images; of float data what the maker said."""
        return (-1.0, 1.0) if self.data.dtype == torch.uint8 else self.values

    @property
    def description(self) -> str:
        """One line: what, how many, from where, how many kept aside."""
        kept = f"one in {self.hold_out} kept aside: {len(self.data) - self.size:,}" if self.hold_out else "none kept aside"
        form = f"{self.size:,} of shape {'x'.join(map(str, self.shape))} to train on"
        return f"{self.origin}: {form}" + (
            f" in {self.classes} classes, {kept}" if self.classes else f" without labels, {kept}"
        )

    def draw(self, keyed: Keyed, total: int) -> tuple[State, Tensor | None]:
        """See `Source.draw`; sample number step * total + row of the run is the next one of its epoch's order."""
        if not 0 <= keyed.start < keyed.stop <= total:
            raise ValueError(f"rows {keyed.start} to {keyed.stop} are no part of a batch of {total}")
        before = keyed.step * total
        rows = epoch_rows(self.size, keyed.seed, before + keyed.start, before + keyed.stop)
        if self.hold_out:  # the j-th sample that is not kept aside
            part, place = rows // (self.hold_out - 1), rows % (self.hold_out - 1)
            rows = part * self.hold_out + place + (place >= self._places[part])
        u = keyed.uniform("dequantize", *self.shape).float() if self.dequantize else None
        x = self.data.index_select(0, rows)  # ten times as fast as indexing
        if self.flip:
            mirrored = keyed.signs("flip")[:, None, None, None] < 0
            x = torch.where(mirrored, x.flip(-1), x)
        return self._scaled(x, u), None if self.labels is None else self.labels[rows]

    def held_out(self) -> tuple[State, Tensor | None] | None:
        """See `Source.held_out`; without mirroring, and in the middle of its bin where `dequantize` would spread it."""
        if not self.hold_out:
            return None
        rows = torch.arange(len(self._places) - 1) * self.hold_out + self._places[:-1]
        u = torch.tensor(0.5) if self.dequantize else None
        return self._scaled(self.data[rows], u), None if self.labels is None else self.labels[rows]

    @cached_property
    def _places(self) -> Tensor:
        """Which of each `hold_out` samples in a row is kept aside, and that none is of the rest of fewer."""
        parts = len(self.data) // self.hold_out
        if self.regular:
            places = torch.full((parts,), self.hold_out - 1)
        else:
            places = torch.randint(self.hold_out, (parts,), generator=generator(0, "hold out"))
        return torch.cat([places, torch.tensor([self.hold_out])])

    def _scaled(self, picked: Tensor, u: Tensor | None) -> Tensor:
        if picked.dtype != torch.uint8:
            return picked
        x = picked.float()  # a copy, hence changed in place
        return x.div_(127.5).sub_(1) if u is None else x.add_(u).div_(128).sub_(1)


def epoch_rows(size: int, seed: int, first: int, stop: int) -> Tensor:
    """Rows of the run's samples `first` to `stop`, where each epoch is a permutation of `size` rows of its own.

    Example:
        >>> torch.equal(epoch_rows(4, 0, 0, 8), torch.cat([epoch_rows(4, 0, 0, 3), epoch_rows(4, 0, 3, 8)]))
        True
    """
    parts = []
    while first < stop:
        epoch, place = divmod(first, size)
        end = min(size, place + stop - first)
        parts.append(_permutation(size, seed, epoch)[place:end])
        first += end - place
    return torch.cat(parts)


@lru_cache(maxsize=4)  # a batch meets two epochs, a run has at most a source and a target
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "epoch", epoch))


@dataclass(frozen=True, eq=False)
class EndlessSource:
    """Samples made on the spot, in blocks of `BLOCK`, so that every process makes the same ones.

    Args:
        make: ``make(rng, count)`` returns `count` samples (count, *shape), and labels (count,) if `classes` is given; all
            that is random in it must come from `rng`, a `torch.Generator` on the CPU.
        name: of the random stream and in messages.
        origin: what and from where, for the description.
        classes: number of classes.
        log_density: of samples (n, *shape) in nats, (n,), where it is known.
        data_range: smallest and largest possible value, where that is known.

    Raises:
        FewstepError: what `make` returns cannot be trained on, or it raises.

    Example:
        >>> source = EndlessSource(lambda rng, count: torch.randn(count, 3, generator=rng), name="noise")
        >>> source.shape, source.draw(Keyed(seed=0, step=0, start=10, stop=90), 90)[0].shape
        ((3,), torch.Size([80, 3]))
    """

    make: Callable[[torch.Generator, int], Made]
    name: str
    origin: str = "generated samples"
    classes: int | None = None
    log_density: Callable[[Tensor], Tensor] | None = None
    data_range: tuple[float, float] | None = None
    size: None = field(default=None, init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        x, _ = self._block(generator(0, "shape", self.name))
        object.__setattr__(self, "shape", tuple(x.shape[1:]))

    @property
    def description(self) -> str:
        """One line: what, from where."""
        form = f"endless samples of shape {'x'.join(map(str, self.shape))}"
        return f"{self.origin}: {form}" + (f" in {self.classes} classes" if self.classes else "")

    def draw(self, keyed: Keyed, total: int) -> tuple[State, Tensor | None]:
        """See `Source.draw`; `total` does not matter here."""
        first, last = keyed.start // BLOCK, -(-keyed.stop // BLOCK)
        key = (keyed.seed, f"source {self.name}", keyed.step)
        blocks = [self._block(generator(*key, block)) for block in range(first, last)]
        share = slice(keyed.start - first * BLOCK, keyed.stop - first * BLOCK)
        labels = [label for _, label in blocks if label is not None]
        return torch.cat([x for x, _ in blocks])[share], torch.cat(labels)[share] if labels else None

    def held_out(self) -> None:
        """None: every draw is new."""

    def _block(self, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        try:
            made = self.make(rng, BLOCK)
        except Exception as error:  # it may be the user's code, which can raise anything
            raise refuse(f"{self.name}(rng, {BLOCK}) gave {type(error).__name__}: {error}") from error
        x, label = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        came = f"{type(x).__name__} {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or x.ndim < 2 or len(x) != BLOCK or not x.is_floating_point():
            raise refuse(f"{self.name}(rng, {BLOCK}) must return a float tensor ({BLOCK}, ...), or it and labels; got {came}")
        if getattr(self, "shape", x.shape[1:]) != x.shape[1:]:
            raise refuse(f"{self.name} returned samples of shape {tuple(x.shape[1:])} after {self.shape}; keep to one shape")
        x = x.detach().to("cpu", torch.float32)
        check_finite(x.numpy(), self.name)
        return x, self._labels(label)

    def _labels(self, label: Tensor | None) -> Tensor | None:
        if (label is None) != (self.classes is None):
            raise refuse(
                f"{self.name} returns {'no labels' if label is None else 'labels'}, but classes={self.classes}; "
                f"{'return (samples, labels) or leave classes out' if label is None else 'say how many classes there are'}"
            )
        if label is None or self.classes is None:
            return None
        return check_labels(torch.as_tensor(label).cpu().numpy(), BLOCK, self.name, self.classes)[0]
