"""What one training step works on, and what an objective makes of it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from .._types import FewstepError, Prediction, State
from ..field import Model, ModelField
from ..keyed import Keyed
from ..path import AffinePath


@dataclass(frozen=True)
class Batch:
    """Pairs of source and data with a time each.

    Attributes:
        x0: (batch, *shape) source samples, standard normal noise unless the run says otherwise.
        x1: (batch, *shape) data.
        t: (batch,) float64 times, 0 = source, 1 = data, inside the span where all that is regressed on is finite.
        label: (batch,) classes, the null class where a label was dropped; None without classes.
        keyed: this step's further random numbers, e.g. an objective's probes.
    """

    x0: State
    x1: State
    t: Tensor
    label: Tensor | None
    keyed: Keyed

    def field(self, model: Model) -> ModelField:
        """The model's velocity under this batch's labels (`Model.given` without its check, which waits for the device)."""
        first, last = _span(model.path, model.predicts)
        condition = {} if self.label is None else {model.label_key: self.label}
        return ModelField(model, condition, 1.0, None, None, 1.0, first, last)


class Ahead:
    """A run's batches in order, each made by a thread while the step before it computes.

    Random numbers are keyed, so a batch is the same whoever makes it, and when.

    Args:
        make: (step, start, stop) -> batch; what it raises, `take` raises.
        pieces: (start, stop) of the pieces of every step.
        steps: of the run; nothing is made beyond.
    """

    def __init__(self, make: Callable[[int, int, int], Batch], pieces: Sequence[tuple[int, int]], steps: int) -> None:
        self._make, self._pieces, self._steps = make, pieces, steps
        self._pool = ThreadPoolExecutor(1, "fewstep-batches")
        self._waiting: dict[tuple[int, int], Future[Batch]] = {}

    def take(self, step: int, piece: int) -> Batch:
        """This piece; the next one is begun."""
        mine = self._waiting.pop((step, piece), None) or self._begin(step, piece)
        following = (step, piece + 1) if piece + 1 < len(self._pieces) else (step + 1, 0)
        if following[0] < self._steps:
            self._waiting[following] = self._begin(*following)
        return mine.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, step: int, piece: int) -> Future[Batch]:
        return self._pool.submit(self._make, step, *self._pieces[piece])


@lru_cache(maxsize=64)
def _span(path: AffinePath, predicts: Prediction) -> tuple[float, float]:
    """`AffinePath.span`, which costs more than a small network's layer."""
    return path.span(predicts)


@dataclass(frozen=True)
class Loss:
    """Losses to be averaged.

    Attributes:
        each: (batch,) one per sample, differentiable.
        parts: (batch,) each, detached: what else its mean over the batch belongs on the loss curve, by name.
    """

    each: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What is minimised; its settings are dataclass fields."""

    def __call__(self, model: Model, batch: Batch) -> Loss:
        """The losses of a batch; one pass of the network, and what the objective's own terms need."""
        ...

    def passes(self, size: int) -> float:
        """Cost per sample in forward passes, a backward pass being two, for samples of `size` numbers."""
        ...

    def span(self, model: Model) -> tuple[float, float]:
        """First and last time at which everything is finite."""
        ...


@runtime_checkable
class Piecewise(Objective, Protocol):
    """An objective whose parts of a batch can be back-propagated one after another: one graph is alive at a time."""

    def pieces(self, model: Model, batch: Batch) -> Sequence[Callable[[], Loss]]:
        """Losses of disjoint parts of the batch, each computed when called, together those of ``self(model, batch)``."""
        ...


def check_objective(objective: object) -> None:
    """Whether a caller's objective has what the loop needs.

    Raises:
        FewstepError: it has not.
    """
    if isinstance(objective, type):
        raise FewstepError(f"objective must be an object, got the class {objective.__name__}; pass {objective.__name__}()")
    missing = [name for name in ("__call__", "passes", "span") if not hasattr(objective, name)]
    if missing:
        raise FewstepError(
            f"objective must have the methods __call__, passes and span, got a {type(objective).__name__} without "
            f"{', '.join(missing)}; derive it from fewstep.training.objective.Regression, which has them"
        )


def checked(loss: object, samples: int, *, last: bool) -> Loss:
    """A loss that an objective returned, for all of `samples` or, before the last piece, some of them.

    Raises:
        FewstepError: it is no `Loss`, or has not one number for each sample: its mean would be another one.
    """
    if not isinstance(loss, Loss):
        raise FewstepError(f"an objective must return a fewstep.training.batch.Loss, got a {type(loss).__name__}")
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in {"each": loss.each, **loss.parts}.items()}
    count = (shapes["each"] or (0,))[0]
    for name, shape in shapes.items():
        if shape != (count,) or (count != samples if last else count > samples):
            raise FewstepError(
                f'the objective must give one number for each sample, "{name}" of shape ({samples},), got {shape}; '
                "average over a sample's elements, not over the batch"
            )
    return loss


def pieces_of(objective: Objective, model: Model, batch: Batch) -> Sequence[Callable[[], Loss]]:
    """The pieces of an objective that has them, else the whole."""
    return objective.pieces(model, batch) if isinstance(objective, Piecewise) else [partial(objective, model, batch)]
