"""What every reader checks: numbers, labels, names. Each refusal is one line that says what came and what to do."""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..._disk import one_line, short
from ..._errors import FewstepError
from ...keyed import generator

LABEL = "label"


def refuse(message: str) -> FewstepError:
    """The error to raise, on one line whatever the names that it quotes."""
    return FewstepError(one_line(message))


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean "..."? `, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"? ' if near else ""


def pick(found: Sequence[str], accepted: Sequence[str], where: str, kind: str) -> str:
    """The one of the accepted names that was found.

    Args:
        found: names of the file's columns or arrays.
        accepted: names that are understood.
        where: the file, for messages.
        kind: "column" or "array", for messages.

    Raises:
        FewstepError: none of them, or more than one.
    """
    hits = [name for name in accepted if name in found]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise refuse(f"{where} has the {kind}s {_listed(hits)}, of which one is expected; remove or rename the others")
    near = [name for want in accepted for name in difflib.get_close_matches(want, found, n=1, cutoff=0.6)]
    advice = f'rename "{near[0]}"' if near else f"rename the {kind} that holds the samples"
    raise refuse(f"{where} has no {kind} {_listed(accepted, ' or ')}, only {_listed(found)}; {advice}")


def pick_labels(found: Sequence[str], accepted: Sequence[str], where: str, kind: str) -> str | None:
    """As `pick`, or None where nothing found looks like labels: the data then have none.

    Raises:
        FewstepError: a name that was probably meant, or more than one.
    """
    suspects = [name for name in found if difflib.get_close_matches(name.split("_")[-1], accepted, n=1, cutoff=0.75)]
    return pick(suspects, accepted, where, kind) if suspects else None


def check_labels(values: np.ndarray, samples: int, where: str, classes: int | None) -> tuple[Tensor, int]:
    """Labels (samples,) int64 with their number of classes.

    Args:
        values: as read.
        samples: how many there must be.
        where: what they belong to, for messages.
        classes: how many classes there are; None takes the highest label.

    Raises:
        FewstepError: another shape, no whole numbers, negative ones, or too large ones.
    """
    if values.shape != (samples,):
        remedy = "give the number of the class, not one column per class" if values.ndim == 2 else "give one label per sample"
        raise refuse(f"{where}: expected {samples} labels, shape ({samples},), got shape {values.shape}; {remedy}")
    if values.dtype.kind not in "iuf":
        example = short(values[0], 30)
        raise refuse(
            f'{where}: labels must be whole numbers, got {values.dtype} such as "{example}"; number the classes from 0'
        )
    _first_bad(~(np.isfinite(values) & (values == np.floor(values))), values, where, "is no whole number")
    _first_bad(values < 0, values, where, "is negative")
    count = int(values.max()) + 1 if classes is None else classes
    _first_bad(values >= count, values, where, f"is out of range: there are {count} classes, 0 to {count - 1}")
    if classes is None and count > samples:
        raise refuse(
            f"{where}: the highest label is {count - 1}, but there are only {samples} samples; number the classes from 0 "
            "without gaps, or say how many there are: classes="
        )
    return torch.from_numpy(values.astype(np.int64)), count


def check_finite(values: np.ndarray, where: str) -> None:
    """Refuse NaN and infinities, as float32, by the number of the first bad sample.

    Raises:
        FewstepError: there is one.
    """
    for start in range(0, len(values), 4096):  # in parts: a mask of the whole would cost a quarter of the data's memory
        part = values[start : start + 4096].reshape(len(values[start : start + 4096]), -1)
        bad = ~np.isfinite(part).all(1)
        if bad.any():
            sample = part[int(bad.argmax())]
            value = sample[int((~np.isfinite(sample)).argmax())]
            raise refuse(
                f"{where}: sample {start + int(bad.argmax())} holds {value}; every value must be a finite float32: mend or "
                "remove such samples"
            )


def spread(count: int, limit: int | None, where: str) -> np.ndarray:
    """Numbers of the samples to use: all, or one of each of `limit` equal parts, drawn at random but the same in every run.

    So every class is met of data that are sorted, and of data whose labels go round.

    Raises:
        FewstepError: there are fewer than `limit`.

    Example:
        >>> rows = spread(10, 4, "data")
        >>> ((rows >= [0, 2, 5, 7]) & (rows < [2, 5, 7, 10])).tolist()
        [True, True, True, True]
    """
    if limit is None:
        return np.arange(count)
    if not 1 <= limit <= count:
        raise refuse(f"{where} holds {count} samples, but limit={limit} was asked for; ask for 1 to {count}")
    edges = np.arange(limit + 1) * count // limit
    places = torch.rand(limit, generator=generator(0, "limit"), dtype=torch.float64).numpy()
    return edges[:-1] + (places * np.diff(edges)).astype(int)


def _first_bad(bad: np.ndarray, values: np.ndarray, where: str, why: str) -> None:
    if bad.any():
        place = int(bad.argmax())
        raise refuse(f"{where}: the label of sample {place}, {values[place]}, {why}; labels are whole numbers from 0")


def _listed(names: Sequence[str], between: str = ", ") -> str:
    shown = [f'"{short(name, 40)}"' for name in names[:8]] + (["..."] if len(names) > 8 else [])
    return between.join(shown) or "none"
