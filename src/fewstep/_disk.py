"""Whole files or none: atomic writes, and one readable line when the disk or a file refuses."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._errors import ArtifactError

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable or choose another one"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is where a folder should be; choose another folder"),
    errno.EISDIR: "a folder is where the file should be; choose another folder",
}


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or leave the old one: a full disk, a crash or Ctrl-C never leaves half a file.

    Args:
        path: the file; its folder is made if it is missing.
        data: the content; text is encoded as UTF-8.

    Raises:
        ArtifactError: the folder or file cannot be written; one line with the reason and the remedy.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path, data.encode() if isinstance(data, str) else data) as new:
            os.replace(new, path)


def read_regular(file: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes.

    Raises:
        ArtifactError: there is none, it is no regular file, it cannot be read, or it is longer.
    """
    try:
        if not file.is_file():  # a pipe or device could block for ever
            found = "it is not a file" if os.path.lexists(file) else "it is missing"
            found = found if file.parent.is_dir() else f"{file.parent} is no folder"
            raise refusal(f"expected a sampler folder with the file {file}, but {found}; pass a folder that Sampler.save wrote")
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        raise refusal(f"cannot read {file}: {_reason(error)}; check its name and permissions") from error
    if len(data) > limit:
        raise refusal(f"{file} has more than {limit} bytes, no sampler is that large; save the sampler again with fewstep")
    return data


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[Path]:
    """A complete temporary file beside `path`, gone afterwards unless it was moved."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(new, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        yield new
    finally:
        with suppress(OSError):
            new.unlink()


@contextmanager
def set_aside(path: Path, *, until_gone: Path) -> Iterator[None]:
    """Move `path` out of the way; if `until_gone` is still there in the end, the work was cut short: put `path` back.

    A move needs no space, so this works on a full disk as well.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    existed = path.is_file()
    try:
        if existed:
            os.replace(path, aside)
        yield
    finally:
        with suppress(OSError):
            if not until_gone.exists():
                aside.unlink(missing_ok=True)
            elif aside.exists():
                os.replace(aside, path)
            elif not existed:
                path.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into one `ArtifactError`."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
        raise refusal(f"cannot write {path}: {_reason(error)}; {remedy or 'choose another folder'}") from error


def _reason(error: OSError | ValueError) -> str:
    return short((error.strerror if isinstance(error, OSError) else None) or error)


def short(value: object, most: int = 120) -> str:
    """The value in words, cut off: what a hostile file says must not flood the message."""
    text = str(value)
    return text if len(text) <= most else text[:most] + "..."


def one_line(message: str) -> str:
    """Printable, whatever the names and bytes that it quotes (line breaks, terminal escapes, lone surrogates)."""
    return "".join(c if c.isprintable() else " " for c in message)


def refusal(message: str) -> ArtifactError:
    """The error to raise, on one line."""
    return ArtifactError(one_line(message))
