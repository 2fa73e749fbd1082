"""One reader per kind of data; each returns checked samples in memory. Nothing is ever unpickled."""

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._disk import one_line, short
from .checks import LABEL, check_labels, pick, pick_labels, refuse, spread
from .images import Reading, Unreadable, decode_all, skipped_note

SPLITS = {"train", "training", "test", "val", "valid", "validation", "eval"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Samples(NamedTuple):
    """What a reader found.

    Attributes:
        data: (n, *shape) uint8 or float32.
        labels: (n,) int64.
        classes: number of classes.
        origin: what and from where, for the description.
    """

    data: Tensor
    labels: Tensor | None
    classes: int | None
    origin: str


def read_digits(classes: int | None, limit: int | None) -> Samples:
    """scikit-learn's 1,797 digits, float32 (1, 8, 8) in [-1, 1]; no network access.

    Raises:
        FewstepError: scikit-learn is not installed, or `classes` are less than ten.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise refuse("the digits come with scikit-learn, which is missing: pip install 'fewstep[train]'") from error
    pixels, target = load_digits(return_X_y=True)
    rows = spread(len(pixels), limit, "digits")
    data = torch.tensor(pixels[rows] / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)  # pixels are 0..16
    labels, count = check_labels(target, len(pixels), "digits", classes)
    return Samples(data, labels[torch.from_numpy(rows)], count, "scikit-learn's digits")


def read_folder(folder: Path, files: list[Path], classes: int | None, reading: Reading) -> Samples:
    """A folder of images; sub-folders are classes, numbered by sorted name.

    Args:
        folder: of the images.
        files: the images in it and below.
        classes: expected number of classes.
        reading: see `Reading`.

    Raises:
        FewstepError: images both in the folder and in sub-folders, an empty sub-folder, splits instead of classes, or
            images that `decode_all` refuses.
    """
    tops = [file.relative_to(folder).parts[0] if file.parent != folder else "" for file in files]
    names = sorted(set(tops))
    if len(names) > 1 and "" in names:
        raise refuse(f"{folder} holds images itself and in sub-folders; put each into its class's sub-folder, or use none")
    if "" not in names:
        if {name.lower() for name in names} <= SPLITS:
            raise refuse(f"{folder} holds splits, not classes: {', '.join(names)}; pass one of them, as {folder / names[0]}")
        idle = sorted({p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")} - set(names))
        if idle:
            raise refuse(f'the sub-folder "{idle[0]}" of {folder} is to be a class but holds no image; fill or remove it')
    rows = spread(len(files), reading.limit, str(folder))
    items = ((str(files[row]), files[row].read_bytes) for row in rows)
    data, found = decode_all(items, len(rows), str(folder), reading)
    labels, count = None, None
    if "" not in names:
        values = np.array([names.index(top) for top in tops])
        every, count = check_labels(values, len(files), str(folder), classes)
        labels = every[torch.from_numpy(rows[found])]
    return Samples(
        torch.from_numpy(data), labels, count, f"images in {folder.resolve().name}{skipped_note(len(rows), len(found))}"
    )


def read_parquet(files: list[Path], where: str, note: str, classes: int | None, reading: Reading) -> Samples:
    """Parquet files with the columns ``img`` (or ``image``), encoded images or structures with ``bytes``, and ``label``.

    Args:
        files: of one table, in order.
        where: for messages.
        note: which of the files were chosen, for the description.
        classes: expected number of classes; None takes what the file's metadata (Hugging Face) say, or the highest label.
        reading: see `Reading`.

    Raises:
        FewstepError: pyarrow is missing, a file is not parquet, has other columns or bad labels, or an image is refused.
    """
    try:
        return _table([_parquet_file(file) for file in files], files, where, note, classes, reading)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise refuse(f"cannot read {where}: {short(error)}; expected sound parquet files") from error


def _table(tables: list[Any], files: list[Path], where: str, note: str, classes: int | None, reading: Reading) -> Samples:
    count = sum(table.metadata.num_rows for table in tables)
    if not count:
        raise refuse(f"{where} holds no rows; expected one per image")
    columns = [pick(table.schema_arrow.names, ("img", "image"), str(file), "column") for table, file in _pairs(tables, files)]
    named = [pick_labels(table.schema_arrow.names, (LABEL,), str(file), "column") for table, file in _pairs(tables, files)]
    if None in named and LABEL in named:
        raise refuse(f'{files[named.index(None)]} has no column "{LABEL}", but other files of {where} have; add or remove it')
    labels = None
    if LABEL in named:
        values = np.concatenate([_column(table, file) for table, file in _pairs(tables, files)])
        labels, classes = check_labels(values, count, where, classes or _class_names(tables[0]))
    rows = spread(count, reading.limit, where)
    items = _cells(tables, files, columns, set(rows.tolist()))
    data, found = decode_all(items, len(rows), where, reading)
    labels = None if labels is None else labels[torch.from_numpy(rows[found])]
    origin = f"images in {Path(where).resolve().name}{note}{skipped_note(len(rows), len(found))}"
    return Samples(torch.from_numpy(data), labels, classes if labels is not None else None, origin)


def read_array(file: Path, classes: int | None, limit: int | None) -> Samples:
    """A ``.npy`` array, or ``.npz`` with ``x``, ``images`` or ``data`` and perhaps ``y`` or ``labels``.

    uint8 arrays are images: (n, height, width) gets a channel. Of (n, a, b, c) with c = 1, 3 or 4 and a, b > 4 the channels
    come last and are moved to the front; the fourth of uint8 is transparency and dropped.

    Raises:
        FewstepError: the file cannot be read, holds objects, other arrays or types, bad labels, or images whose values are
            levels from 0 to 255 as floats.

    Warns:
        UserWarning: of what may be images whose values were not scaled.
    """
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return _array(loaded, None, file, classes, limit)
            x = loaded[pick(loaded.files, ("x", "images", "data"), str(file), "array")]
            key = pick_labels(loaded.files, ("y", "labels", LABEL), str(file), "array")
            return _array(x, None if key is None else loaded[key], file, classes, limit)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error):
            raise refuse(
                f"{file} holds Python objects, which are never loaded (they can run code); save plain numbers"
            ) from None
        raise refuse(f"cannot read {file}: {short(error)}; save it again with numpy.save or numpy.savez") from error


def _array(x: np.ndarray, y: np.ndarray | None, file: Path, classes: int | None, limit: int | None) -> Samples:
    if x.ndim < 2 or not len(x) or 0 in x.shape:
        raise refuse(f"{file}: expected an array (samples, ...) with at least one number per sample, got shape {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise refuse(f"{file}: expected uint8 (images, scaled to [-1, 1]) or float (used as it is), got {x.dtype}; convert it")
    labels, count = (None, None) if y is None else check_labels(y, len(x), str(file), classes)
    rows = spread(len(x), limit, str(file))
    x = x if limit is None else x[rows]
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what is too large becomes inf, which the source refuses
            x = np.asarray(x, np.float32)
    x, note = _channels_first(x)
    _check_scaled(x, file)
    labels = None if labels is None else labels[torch.from_numpy(rows)]
    return Samples(torch.from_numpy(np.ascontiguousarray(x)), labels, count, f"samples in {file.name}{note}")


def _channels_first(x: np.ndarray) -> tuple[np.ndarray, str]:
    image = x.dtype == np.uint8
    if image and x.ndim == 3:
        return x[:, None], ""
    # Up to 4 in front may be channels, and up to 4 in the middle a small map of features whose channels come first.
    if x.ndim != 4 or x.shape[3] not in (1, 3, 4) or min(x.shape[1:3]) <= 4:
        return x, ""
    if image and x.shape[3] == 4:  # four channels of floats may be anything, as latents: all are kept
        return x[..., :3].transpose(0, 3, 1, 2), " (channels moved to the front, transparency dropped)"
    return x.transpose(0, 3, 1, 2), " (channels moved to the front)"


def _check_scaled(x: np.ndarray, file: Path) -> None:
    """Float images must not have 8-bit levels, beside which the noise is nothing; what only may be such gets a warning."""
    if x.dtype == np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
        return
    low, high = float(x.min()), float(x.max())
    if not 0 <= low < 2 < high <= 255:
        return
    came = f"{file}: the values run from {low:g} to {high:g}; float images are used as they are and should lie in [-1, 1]"
    if high > 127 and np.array_equal(x[:1000], np.floor(x[:1000])):
        raise refuse(f"{came}: divide by 127.5 and subtract 1, or save them as uint8")
    warnings.warn(one_line(f"{came}: scale them if these are images"), UserWarning, stacklevel=2)


def _parquet_file(file: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise refuse("reading parquet files needs pyarrow, which is missing: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise refuse(f"cannot read {file}: {short(error)}; expected a parquet file") from error


def _column(table: Any, file: Path) -> np.ndarray:
    column = table.read(columns=[LABEL])[LABEL]
    if column.null_count:
        raise refuse(f'{file}: {column.null_count} of {len(column)} rows have no "{LABEL}"; fill or remove them')
    return column.to_numpy()


def _class_names(table: Any) -> int | None:
    """The number of classes that a Hugging Face data set notes in its metadata."""
    try:
        noted = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
        return len(noted["info"]["features"][LABEL]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None


def _cells(
    tables: list[Any], files: list[Path], columns: list[str], chosen: set[int]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    start = 0
    for (table, file), column in zip(_pairs(tables, files), columns, strict=True):
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for cell in batch.column(0):
                if start + row in chosen:
                    yield f"{file}, row {row}", lambda cell=cell: _cell_bytes(cell.as_py())
                row += 1
        start += row


def _cell_bytes(cell: object) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise Unreadable(f'expected encoded bytes, or a structure with "bytes", got {type(data).__name__}')
    return data


def _pairs(tables: list[Any], files: list[Path]) -> Iterator[tuple[Any, Path]]:
    return zip(tables, files, strict=True)
