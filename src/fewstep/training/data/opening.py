"""From what a user names to a source."""

import glob
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ..._disk import short
from .checks import nearest, refuse
from .images import Progress, Reading
from .readers import SUFFIXES, Samples, read_array, read_digits, read_folder, read_parquet
from .source import EndlessSource, FiniteSource, Source
from .toys import TOYS

DIGITS_HOLD_OUT = 6
"""The bundled model's choice; other models are measured on the digits that it has not seen, every sixth."""

_KINDS = (
    "a parquet file, a folder of images or parquet files, a .npy or .npz file, package.module:function, digits, "
    + ", ".join(TOYS)
)


def open_source(
    where: str | Path,
    *,
    hold_out: int | None = None,
    flip: bool = False,
    dequantize: bool = False,
    limit: int | None = None,
    skip_unreadable: bool = False,
    size: int | tuple[int, int] | None = None,
    classes: int | None = None,
    progress: Progress | None = None,
) -> Source:
    """The data that a name or path stands for.

    Args:
        where: "digits"; a density in the plane ("checkerboard", "pinwheel", "8gaussians", "moons"); a ``.parquet`` file, or
            a folder or pattern of them, with columns ``img`` and ``label`` (of a folder with several splits, the files with
            "train" in their name); a folder of images, whose sub-folders are classes; a ``.npy`` or ``.npz`` file; or
            ``package.module:function``, called as ``function(rng, count)``, see `EndlessSource`. Write ``./digits`` for a
            folder of your own with such a name.
        hold_out: keep one sample in so many aside, see `FiniteSource`; 0 for none; None: none, but every sixth of the digits.
        flip: mirror half of the images left to right.
        dequantize: uniform noise inside each of the 256 levels, see `FiniteSource`.
        limit: use only so many samples, one of each of as many equal parts.
        skip_unreadable: leave out images that cannot be read; the description says how many.
        size: scale images to cover this side, or (height, width), and crop the middle.
        classes: number of classes, if it is not the highest label plus one; refused where there are no labels.
        progress: ``progress(done, total)`` while images are decoded.

    Raises:
        FewstepError: nothing of that name (the nearest is suggested), or data or options that cannot be used.

    Example:
        >>> open_source("checkerboard").description
        'the density "checkerboard": endless samples of shape 2'
    """
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise refuse(f"size is the side in pixels, or height and width, each at least 1; got {size}")
    if classes is not None and classes < 1:
        raise refuse(f"classes is the number of classes, at least 1; got {classes}")
    given = {"hold_out": hold_out, "flip": flip, "dequantize": dequantize, "limit": limit, "size": sides}
    if isinstance(where, str) and where in TOYS:
        toy = TOYS[where]
        _nothing({**given, "classes": classes}, where)
        return EndlessSource(toy.sample, where, f'the density "{where}"', log_density=toy.log_density)
    if not os.path.exists(where) and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", str(where)):
        _nothing(given, str(where))
        make = _function(str(where))
        return EndlessSource(make, str(where), str(where), classes if classes else getattr(make, "classes", None))
    found = _read(where, classes, Reading(limit, sides, skip_unreadable, progress))
    if classes is not None and found.labels is None:
        raise refuse(f"{where} has no labels, but classes={classes} was asked for; leave it out, or add labels")
    digits = where == "digits"
    keep = hold_out if hold_out is not None else DIGITS_HOLD_OUT if digits else 0
    return FiniteSource(
        found.data, found.labels, found.classes, found.origin, keep, flip, dequantize,
        values=(-1.0, 1.0) if digits else None, regular=digits and keep == DIGITS_HOLD_OUT,
    )  # fmt: skip


def _nothing(given: dict[str, object], where: str) -> None:
    used = [name for name, value in given.items() if value]
    if used:
        raise refuse(f"{where} makes endless samples, for which {used[0]} has no meaning; leave it out")


def _read(where: str | Path, classes: int | None, reading: Reading) -> Samples:
    path = Path(where)
    if where == "digits":
        _no_size(reading, "digits")
        return read_digits(classes, reading.limit)
    if path.is_dir():
        return _read_directory(path, classes, reading)
    if path.suffix == ".parquet" and path.is_file():
        return read_parquet([path], str(path), "", classes, reading)
    if path.suffix in (".npy", ".npz") and path.is_file():
        _no_size(reading, str(path))
        return read_array(path, classes, reading.limit)
    if path.is_file():
        raise refuse(f'{path} is of no kind that can be read ("{path.suffix}"); data are {_KINDS}')
    if glob.has_magic(str(where)):
        return _read_pattern(str(where), classes, reading)
    raise _missing(path)


def _no_size(reading: Reading, where: str) -> None:
    if reading.size is not None:
        raise refuse(f"size scales image files, {where} is an array; leave size out, or scale the array before")


def _read_directory(folder: Path, classes: int | None, reading: Reading) -> Samples:
    def shown(file: Path) -> bool:
        return file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)

    files = sorted(file for file in folder.rglob("*") if shown(file))
    tables = [file for file in files if file.suffix == ".parquet"]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if tables and images:
        raise refuse(f"{folder} holds both images and parquet files; pass one of the files, or a folder with one kind")
    if tables:
        train = [file for file in tables if "train" in file.name.lower()]
        chosen, note = (
            (train, f" (its {len(train)} train files of {len(tables)})") if 0 < len(train) < len(tables) else (tables, "")
        )
        return read_parquet(chosen, str(folder), note, classes, reading)
    if images:
        return read_folder(folder, images, classes, reading)
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    remedy = f"pass the file itself: {arrays[0]}" if arrays else "put images (png, jpg, webp, ...) or parquet files into it"
    raise refuse(f"{folder} holds no images and no parquet files; {remedy}")


def _read_pattern(pattern: str, classes: int | None, reading: Reading) -> Samples:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    other = [file for file in files if file.suffix != ".parquet"]
    if not files or other:
        came = f"it also matches {other[0]}" if other else "it matches nothing"
        raise refuse(f'a pattern names parquet files, but of "{short(pattern)}" {came}; check it')
    return read_parquet(files, pattern, "", classes, reading)


def _missing(path: Path) -> Exception:
    """Names that are near: files beside it, and data that need no file."""
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    near = nearest(path.name, [*beside, "digits", *TOYS])
    lost = "" if path.parent.is_dir() else f"there is no folder {path.parent}; "
    return refuse(f'no data called "{short(path)}": {lost}{near}data are {_KINDS}')


def _function(name: str) -> Callable:
    place, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)  # a console script's search path lacks the folder that the user stands in
    try:
        module = importlib.import_module(place)
    except Exception as error:  # the module runs code of the user's, which can raise anything
        why = f"importing {place} gave {type(error).__name__}: {short(error, 300)}"
        raise refuse(f'cannot use the data "{short(name)}": {why}') from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    made = getattr(module, attribute, None)
    if not callable(made):
        found = f'{place} has no function "{attribute}"; {nearest(attribute, dir(module))}'
        raise refuse(f'cannot use the data "{short(name)}": {found}it is called as {attribute}(rng, count)')
    return made
