"""Image files to one array: decoding with Pillow, sizes and channels made one, the unreadable named."""

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..._disk import short
from .checks import refuse

Progress = Callable[[int, int], None]
"""``progress(done, total)``, called after every image."""

_RESIZE = "pass size= (the side, or height and width) to scale and crop all of them"


class Unreadable(Exception):
    """Not an image that can be used; the text says why."""


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        limit: how many, one of each of as many equal parts; None for all.
        size: height and width to scale and crop to; None keeps them, and they must all be alike.
        skip_unreadable: leave out what cannot be read instead of stopping.
        progress: called after every image.
    """

    limit: int | None = None
    size: tuple[int, int] | None = None
    skip_unreadable: bool = False
    progress: Progress | None = None


def decode(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    """One image as uint8 (1 or 3, height, width), turned as its EXIF orientation says; transparency is dropped.

    Raises:
        Unreadable: no image, a damaged one, or one with more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise Unreadable(f'its mode "{image.mode}" has more than 8 bits per channel')
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged EXIF data: the image is whole
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("P", "PA", "RGBa"):  # straight to RGB, Pillow warns of the palette's transparency
                image = image.convert("RGBA")
            image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable("it is no image that Pillow knows") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise Unreadable(f"{type(error).__name__}: {short(error)}") from error
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def decode_all(
    items: Iterable[tuple[str, Callable[[], bytes]]], count: int, where: str, reading: Reading
) -> tuple[np.ndarray, np.ndarray]:
    """All images in one array.

    Args:
        items: `count` names, for messages, with a function that reads the bytes.
        count: how many.
        where: what they belong to, for messages.
        reading: see `Reading`.

    Returns:
        uint8 (n, channels, height, width), 3 channels if one of them is in colour; and which of the items these are, (n,).

    Raises:
        FewstepError: an unreadable image, images of different sizes, or none left.
    """
    found: list[int] = []
    whole: np.ndarray = np.empty((0, 1, 1, 1), np.uint8)
    first = ""
    for place, (name, read) in enumerate(items):
        try:
            image = decode(_bytes(read), reading.size)
        except Unreadable as error:
            if not reading.skip_unreadable:
                raise refuse(
                    f"cannot read the image {name}: {error}; mend or remove it, or pass skip_unreadable to leave such out"
                ) from error
        else:
            if not found:
                whole, first = np.empty((count, *image.shape), np.uint8), name
            if image.shape[1:] != whole.shape[2:]:
                raise refuse(f"{name} is {_sides(image)}, but {first} is {_sides(whole)}; {_RESIZE}")
            if len(image) > whole.shape[1]:
                whole = np.repeat(whole, 3, axis=1)
            whole[len(found)] = image
            found.append(place)
        if reading.progress is not None:
            reading.progress(place + 1, count)
    if not found:
        raise refuse(f"{where}: none of {count} images can be read; check that they are images")
    return whole[: len(found)], np.array(found)


def skipped_note(count: int, found: int) -> str:
    """How many were left out, for the description."""
    return f" ({count - found:,} of {count:,} unreadable images left out)" if found < count else ""


def _bytes(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def _sides(image: np.ndarray) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"
