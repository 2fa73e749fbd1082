"""What is measured while a flow trains: its loss on samples kept aside, and what it draws."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .._disk import atomic_write
from .._tabulate import write_table
from ..composite import start_scale
from ..coordinates import Coordinates
from ..field import Model
from ..grid import TimeGrid
from ..keyed import Keyed
from ..methods import ddim
from ..outputs import picture
from .assemble import Parts
from .batch import Batch
from .timelaw import draw_times

HELD = 1024
"""Samples kept aside that the loss is measured on, at most; always the same ones with the same times and noises."""

DRAWN, CALLS = 64, 32
"""Samples of a preview, and the network calls that each takes."""


def held_out_loss(parts: Parts, network: nn.Module) -> dict[str, float]:
    """The regression loss of `network` on samples kept aside, coupled with noise; nothing where there are none, or no noise."""
    held = parts.data.held_out()
    if held is None or parts.source is not None:
        return {}
    rows = torch.linspace(0, len(held[0]) - 1, min(len(held[0]), HELD)).long()  # sorted data: some of every class
    x1, labels = held[0][rows], None if held[1] is None else held[1][rows]
    whole = Keyed(seed=0x4E1D, step=0, start=0, stop=len(rows))
    x0 = whole.normal("noise", *parts.data.shape)
    x0 = x0.index_select(0, parts.coupling(x0, x1, labels))
    t = draw_times(parts.law, whole, len(rows), parts.path, parts.span, True)
    device, losses = next(network.parameters()).device, []
    piece = max(1, parts.recipe.batch // parts.recipe.accumulate)  # what training has memory for
    for start in range(0, len(rows), piece):
        part = slice(start, min(start + piece, len(rows)))
        keyed = whole.share(part.start, part.stop)
        label = None if labels is None else labels[part].to(device)
        batch = Batch(x0[part].to(device), x1[part].to(device), t[part].to(device), label, keyed)
        with torch.no_grad():
            loss = parts.regression(parts.model(network), batch)
        losses.append(loss.each)
    return {"held_out": float(torch.cat(losses).mean())}


def draw(model: Model, seed: int, count: int = DRAWN) -> Tensor:
    """Samples of a model, classes in turn, by `CALLS` calls on even steps."""
    assert model.shape is not None
    device = model.device_dtype()[0]
    if model.source is None:
        noise = torch.randn(count, *model.shape, generator=torch.Generator().manual_seed(seed))
    else:
        noise = model.source(seed, 0, count)
    noise = noise.to(device)
    label = None if model.classes is None else torch.arange(count, device=device) % model.classes
    field = model.given(label)
    inner = Coordinates.of(field).time(torch.linspace(0, 1, CALLS + 1, dtype=torch.float64)[1:-1])
    grid = TimeGrid(torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]))
    return write_table(ddim(model.path), grid, start_scale=start_scale(field))(field, noise)


def write_preview(model: Model, out: Path, step: int, seed: int) -> Path:
    """A picture of what the model draws at this step."""
    file = out / "previews" / f"step-{step:08d}.png"
    atomic_write(file, picture(draw(model, seed)))
    return file
