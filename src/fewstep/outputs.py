"""Samples on disk: the tensor, and a picture where it is an image."""

from pathlib import Path

import torch
from torch import Tensor

from .artifact import atomic_write


def save_samples(samples: Tensor, directory: Path, labels: Tensor | None = None) -> list[Path]:
    """Write ``samples.safetensors`` (samples, labels) and, for images in [-1, 1], ``samples.png``; returns the files."""
    from safetensors.torch import save

    tensors = {"samples": samples.detach().cpu().contiguous()}
    if labels is not None:
        tensors["labels"] = labels.cpu().contiguous()
    files = [directory / "samples.safetensors"]
    atomic_write(files[0], save(tensors))
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        files.append(directory / "samples.png")
        atomic_write(files[1], _png(contact_sheet(samples)))
    return files


def contact_sheet(images: Tensor, gap: int = 1) -> Tensor:
    """Images (n, channels, height, width) in [-1, 1] as one near-square picture (height, width, 3) of bytes."""
    count, _, height, width = images.shape
    columns = int(count**0.5 + 0.999999)
    rows = -(-count // columns)
    sheet = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    bytes_ = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(count, 3, height, width)
    for k in range(count):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = bytes_[k]
    scale = max(1, 640 // max(sheet.shape[1:]))
    return sheet.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).contiguous()


def _png(picture: Tensor) -> bytes:
    import io

    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture.numpy(), format="png")
    return buffer.getvalue()
