"""The networks that fewstep trains and stores: its own small MLP, and diffusers' U-Nets and DiT called the same way.

Each is called as ``network(x, t, label=None)`` with ``t`` in the network's clock, and is described by numbers alone: a kind,
a shape, a number of classes and a small config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from .._types import FewstepError
from .network import ResidualMLP

TIME_SCALE = 1000.0
"""diffusers' sinusoidal time embeddings are made for times up to a thousand."""

_Width = Annotated[int, Field(ge=1, le=2**14)]
_Depth = Annotated[int, Field(ge=0, le=256)]
_Share = Annotated[float, Field(ge=0.0, lt=1.0)]

MOST_POSITIONS = 2**28
"""Numbers in a table of positional embeddings."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MLPConfig(_Config):
    """`ResidualMLP` beyond shape and classes."""

    width: _Width = 192
    blocks: _Depth = 3
    dropout: _Share = 0.0


class UNet2DConfig(_Config):
    """diffusers' UNet2DModel.

    Attributes:
        channels: of each resolution, finest first.
        layers: residual blocks per resolution.
        patch: the image is first folded into patches of this side (pixel-unshuffle), which saves most of the time.
        attention: self-attention at the coarsest resolution.
        dropout: inside the blocks, while training.
    """

    channels: Annotated[tuple[_Width, ...], Field(min_length=1, max_length=8)] = (64, 128)
    layers: Annotated[int, Field(ge=1, le=16)] = 2
    patch: Annotated[int, Field(ge=1, le=32)] = 1
    attention: bool = True
    dropout: _Share = 0.0


class UNet1DConfig(_Config):
    """diffusers' UNet1DModel on (channels, length), without classes; see `UNet2DConfig`."""

    channels: Annotated[tuple[_Width, ...], Field(min_length=2, max_length=8)] = (32, 64, 128)
    layers: Annotated[int, Field(ge=1, le=16)] = 1


class DiTConfig(_Config):
    """diffusers' DiTTransformer2DModel on patches of side `patch`."""

    width: _Width = 192
    blocks: Annotated[int, Field(ge=1, le=256)] = 6
    heads: Annotated[int, Field(ge=1, le=256)] = 6
    patch: Annotated[int, Field(ge=1, le=32)] = 2
    dropout: _Share = 0.0


class DiffusersNetwork(nn.Module):
    """A diffusers network under fewstep's calling convention; made by `build`.

    Args:
        inner: the network, called as ``inner(sample, 1000 t[, class_labels]).sample``.
        kind: its name in `KINDS`.
        shape: of one sample.
        classes: number of classes; index ``classes`` is the null class. 0: no condition.
        config: what `inner` was built from.
        patch: side of the patches that are folded into channels.
    """

    def __init__(
        self, inner: nn.Module, kind: str, shape: tuple[int, ...], classes: int, config: _Config, patch: int = 1
    ) -> None:
        super().__init__()
        self.inner, self.kind, self.shape, self.classes, self.patch = inner, kind, shape, classes, patch
        self.config = config.model_dump()

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """The prediction (batch, *shape) at states `x` and times `t`."""
        times = TIME_SCALE * torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
        extra = {}
        if self.classes or self.kind == "dit":
            extra["class_labels"] = torch.full((x.shape[0],), self.classes, device=x.device) if label is None else label
        folded = nn.functional.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        out = self.inner(folded, times, **extra).sample
        return nn.functional.pixel_shuffle(out, self.patch) if self.patch > 1 else out


def _unet2d(shape: tuple[int, ...], classes: int, config: UNet2DConfig) -> DiffusersNetwork:
    from diffusers.models.unets.unet_2d import UNet2DModel

    channels, height, width = shape
    down, levels = config.patch * 2 ** (len(config.channels) - 1), len(config.channels)
    if height % down or width % down:
        raise ValueError(f"images of {height}x{width} do not divide by {down}, which patch and channels ask for")
    inside = channels * config.patch**2
    inner = UNet2DModel(
        sample_size=(height // config.patch, width // config.patch), in_channels=inside, out_channels=inside,
        block_out_channels=config.channels, layers_per_block=config.layers, dropout=config.dropout,
        down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
        add_attention=config.attention, attention_head_dim=min(32, config.channels[-1]),
        norm_num_groups=_groups(config.channels), resnet_time_scale_shift="scale_shift",
        num_class_embeds=classes + 1 if classes else None,
    )  # fmt: skip
    return DiffusersNetwork(inner, "unet2d", shape, classes, config, config.patch)


def _groups(channels: tuple[int, ...]) -> int:
    """The most groups up to 32, of at least four channels, that divide every width."""
    return max(g for g in range(1, 33) if all(c % g == 0 and (c >= 4 * g or g == 1) for c in channels))


def _unet1d(shape: tuple[int, ...], classes: int, config: UNet1DConfig) -> DiffusersNetwork:
    from diffusers.models.unets.unet_1d import UNet1DModel

    if classes:
        raise ValueError("diffusers' UNet1DModel takes no classes; use mlp, or data without labels")
    channels, length = shape
    levels = len(config.channels)
    if length % 2 ** (levels - 1):
        raise ValueError(f"a length of {length} does not divide by {2 ** (levels - 1)}, which {levels} channels ask for")
    if any(width % 8 for width in config.channels):
        raise ValueError(f"the channels of unet1d must divide by 8, got {config.channels}")
    inner = UNet1DModel(
        sample_size=length, in_channels=channels, out_channels=channels, time_embedding_type="positional",
        use_timestep_embedding=True, freq_shift=0.0, down_block_types=("DownResnetBlock1D",) * levels,
        up_block_types=("UpResnetBlock1D",) * (levels - 1), mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock", block_out_channels=config.channels, layers_per_block=config.layers,
        act_fn="silu", norm_num_groups=8,
    )  # fmt: skip
    return DiffusersNetwork(inner, "unet1d", shape, 0, config)


def _dit(shape: tuple[int, ...], classes: int, config: DiTConfig) -> DiffusersNetwork:
    from diffusers.models.embeddings import LabelEmbedding
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    channels, height, width = shape
    if height != width or height % config.patch:
        raise ValueError(f"dit wants square images that divide by its patch {config.patch}, got {height}x{width}")
    if (height // config.patch) ** 2 * config.width > MOST_POSITIONS:
        raise ValueError(f"{(height // config.patch) ** 2} patches of width {config.width} are more than it can hold")
    if config.width % config.heads:
        raise ValueError(f"the width of dit must divide by its heads, got {config.width} and {config.heads}")
    inner = DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, in_channels=channels,
        out_channels=channels, num_layers=config.blocks, patch_size=config.patch, sample_size=height,
        dropout=config.dropout, num_embeds_ada_norm=max(classes, 1), norm_num_groups=1,
    )  # fmt: skip
    for module in inner.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # it would drop labels by itself, outside the run's keyed random numbers
    return DiffusersNetwork(inner, "dit", shape, classes, config)


def _mlp(shape: tuple[int, ...], classes: int, config: MLPConfig) -> ResidualMLP:
    return ResidualMLP(shape, classes, config.width, config.blocks, config.dropout)


@dataclass(frozen=True)
class Kind:
    """One architecture: its config, how many axes a sample has (None: any), and how it is built."""

    config: type[_Config]
    axes: int | None
    make: Callable[[tuple[int, ...], int, Any], nn.Module]


KINDS: Mapping[str, Kind] = {
    "mlp": Kind(MLPConfig, None, _mlp),
    "unet2d": Kind(UNet2DConfig, 3, _unet2d),
    "unet1d": Kind(UNet1DConfig, 2, _unet1d),
    "dit": Kind(DiTConfig, 3, _dit),
}


def build(kind: str, shape: tuple[int, ...], classes: int, config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network (from PyTorch's global generator).

    Args:
        kind: "mlp", "unet2d", "unet1d" or "dit".
        shape: of one sample: (channels, height, width), (channels, length), or anything for "mlp".
        classes: number of classes, 0 for none; the null class is added.
        config: of the kind, e.g. ``{"channels": (64, 128), "patch": 2}``; what is left out takes its default.

    Raises:
        FewstepError: an unknown kind or option, or a shape that it cannot take.

    Example:
        >>> build("mlp", (2,), 0, {"width": 64})(torch.zeros(1, 2), 0.5).shape
        torch.Size([1, 2])
    """
    if kind not in KINDS:
        raise FewstepError(f"network must be one of {', '.join(KINDS)}, got {kind!r}")
    found = KINDS[kind]
    try:
        settings = found.config.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(found.config.model_fields)
        where = ".".join(map(str, first["loc"]))
        raise FewstepError(f"network {kind}: {where}: {first['msg']}; its options are {known}") from None
    if found.axes is not None and len(shape) != found.axes:
        raise FewstepError(f"network {kind} takes samples with {found.axes} axes, the data have shape {shape}; use mlp")
    try:
        return found.make(shape, classes, settings)
    except ValueError as error:
        raise FewstepError(f"network {kind}: {error}") from error


def kind_of(network: object) -> str | None:
    """The kind of a network that `build` made, None for any other."""
    return "mlp" if isinstance(network, ResidualMLP) else network.kind if isinstance(network, DiffusersNetwork) else None
