"""Samples on disk: the tensor, and a picture of what it shows."""

import io
from pathlib import Path

import torch
from torch import Tensor

from .artifact import atomic_write

MOST_POINTS, MOST_CURVES = 4096, 16


def save_samples(samples: Tensor, directory: Path, labels: Tensor | None = None) -> list[Path]:
    """Write ``samples.safetensors`` (samples, labels) and ``samples.png``; returns the files."""
    from safetensors.torch import save

    tensors = {"samples": samples.detach().cpu().contiguous()}
    if labels is not None:
        tensors["labels"] = labels.cpu().contiguous()
    files = [directory / "samples.safetensors", directory / "samples.png"]
    atomic_write(files[0], save(tensors))
    atomic_write(files[1], picture(samples))
    return files


def picture(samples: Tensor) -> bytes:
    """A PNG: a contact sheet of images in [-1, 1], curves of signals, or the first two coordinates as points."""
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        return _png(contact_sheet(samples))
    from matplotlib.figure import Figure

    flat = samples.detach().float().cpu().nan_to_num()
    figure = Figure(figsize=(5.0, 5.0), layout="constrained")
    axes = figure.subplots()
    if flat.shape[-1] > 8:
        for curve in flat.reshape(len(flat), -1, flat.shape[-1])[:MOST_CURVES, 0]:
            axes.plot(curve.numpy(), linewidth=0.9)
    else:
        points = flat.flatten(1)[:MOST_POINTS]
        second = points[:, 1] if points.shape[1] > 1 else torch.linspace(-1, 1, len(points))
        axes.plot(points[:, 0].numpy(), second.numpy(), ".", markersize=3, alpha=0.6)
        axes.set_aspect("equal")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


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


def _png(sheet: Tensor) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, sheet.numpy(), format="png")
    return buffer.getvalue()
