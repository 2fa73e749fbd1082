"""The Inception-v3 of Frechet inception distances, for the weights that torch-fidelity and pytorch-fid use.

It is written out here because the packages that have it pull in torchvision. It differs from torchvision's network as the
original TensorFlow graph does: averages leave padding out, the last block pools by maximum, and images are resized as
TensorFlow 1 did (Heusel et al., 1706.08500).
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._disk import one_line, short
from .._types import FewstepError

NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
"""The same file, as torch-fidelity and as pytorch-fid name it; the first eight digits of its SHA-256 are in the name."""

SIDE, SPATIAL = 299, 7

Convolution = tuple[str, int, int | tuple[int, int]]
"""Name in the file, output channels, kernel."""


def load_inception() -> "Inception":
    """The network with its weights from the hub's folder (``$TORCH_HOME/hub/checkpoints``); nothing is ever downloaded.

    Raises:
        FewstepError: the file is not there, or it is another one.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if file is None:
        raise FewstepError(
            one_line(f'no weights for the extractor "inception": put {NAMES[0]} ')
            + one_line(f'(a release file of torch-fidelity, 95 MB) into {folder}, or use another extractor, such as "pixels"')
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest[:8] != _digits():
        raise FewstepError(one_line(f"{file} is damaged: its SHA-256 begins with {digest[:8]}, expected {_digits()}"))
    network = Inception()
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except Exception as error:  # a pickle can fail in any way
        raise FewstepError(one_line(f"{file} holds no Inception-v3 weights: {short(error, 200)}")) from error
    return network.eval().requires_grad_(False)


def _digits() -> str:
    return NAMES[0].removesuffix(".pth").rpartition("-")[2]


class Inception(nn.Module):
    """Images (batch, 1 or 3, height, width) in [-1, 1] -> the pooled features (batch, 2048), and spatial ones (batch, 2023).

    Images are rounded to 256 levels first, as files of images are. The spatial features are the first seven channels of
    Mixed_6d, "mixed_6/conv" in TensorFlow, at 17 x 17 places (sFID: Nash et al., 2103.03841).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _wide(192, 32), _wide(256, 64), _wide(288, 64)
        self.Mixed_6a = Block(288, [("branch3x3", 384, 3)], _DOUBLE, shrink=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_long, (128, 160, 160, 192))
        self.Mixed_7a = Block(768, *_LAST_SHRINK, shrink=True)
        self.Mixed_7b, self.Mixed_7c = _forked(1280, "average"), _forked(2048, "largest")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and spatial features."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise FewstepError(f"Inception takes images (batch, 1 or 3, height, width), got shape {tuple(x.shape)}")
        levels = ((x.expand(-1, 3, -1, -1) + 1) * 127.5).round().clamp(0, 255)
        x = (resized(levels, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, 2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :SPATIAL].flatten(1)  # the first branch comes first in the block's output
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial


class Unit(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self, inside: int, outside: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Half the side, or the same."""
        return functional.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains of convolutions side by side, and a pooled branch; a list inside a chain is a fork.

    Args:
        inside: input channels.
        chains: of convolutions, in the order of the output's channels.
        pool: channels of the pooled branch's convolution; None for none.
        pooling: "average" or "largest".
        shrink: the last convolution of every chain, and the pooling, take steps of two without padding.
    """

    def __init__(self, inside: int, *chains: list, pool: int | None = None, pooling: str = "average", shrink: bool = False):
        super().__init__()
        self.chains: list[list[tuple[str, ...]]] = []
        self.pooling, self.shrink = pooling, shrink
        for chain in chains:
            channels, names = inside, []
            for place, step in enumerate(chain):
                fork: list[Convolution] = step if isinstance(step, list) else [step]
                for name, outside, kernel in fork:
                    halve = shrink and place == len(chain) - 1
                    self.add_module(name, _unit(channels, outside, kernel, halve))
                channels = fork[0][1]
                names.append(tuple(name for name, _, _ in fork))
            self.chains.append(names)
        self.branch_pool = None if pool is None else Unit(inside, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The branches' outputs, channels side by side."""
        outputs = []
        for chain in self.chains:
            branches = [x]
            for names in chain:
                branches = [self.get_submodule(name)(branches[0]) for name in names]
            outputs += branches
        if self.shrink:
            return torch.cat([*outputs, functional.max_pool2d(x, 3, 2)], dim=1)
        if self.pooling == "largest":
            x = functional.max_pool2d(x, 3, 1, 1)
        else:
            x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        assert self.branch_pool is not None
        return torch.cat([*outputs, self.branch_pool(x)], dim=1)


def _unit(inside: int, outside: int, kernel: int | tuple[int, int], halve: bool) -> Unit:
    if halve:
        return Unit(inside, outside, kernel, stride=2)
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Unit(inside, outside, kernel, padding=(height // 2, width // 2))


_ROW, _COLUMN = (1, 7), (7, 1)
_DOUBLE = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
_LAST_SHRINK = (
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)],
    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, _ROW), ("branch7x7x3_3", 192, _COLUMN), ("branch7x7x3_4", 192, 3)],
)


def _wide(inside: int, pool: int) -> Block:
    return Block(inside, [("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], _DOUBLE, pool=pool)


def _long(c: int) -> Block:
    twice = [("branch7x7dbl_1", c, 1), *((f"branch7x7dbl_{i}", c, _ROW if i % 2 else _COLUMN) for i in (2, 3, 4))]
    once = [("branch7x7_1", c, 1), ("branch7x7_2", c, _ROW), ("branch7x7_3", 192, _COLUMN)]
    return Block(768, [("branch1x1", 192, 1)], once, [*twice, ("branch7x7dbl_5", 192, _ROW)], pool=192)


def _forked(inside: int, pooling: str) -> Block:
    once, twice = (
        [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))] for name in ("branch3x3_2", "branch3x3dbl_3")
    )  # fmt: skip
    chains = [("branch3x3_1", 384, 1), once], [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), twice]
    return Block(inside, [("branch1x1", 320, 1)], *chains, pool=192, pooling=pooling)


def resized(x: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i is input position i * size / side, without half a pixel's shift."""

    def weights(size: int) -> Tensor:
        position = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)
        low = position.long().clamp(max=size - 1)
        rows, part = torch.arange(side, device=x.device), position - low
        matrix = x.new_zeros(side, size)
        matrix[rows, low] += 1 - part
        matrix[rows, (low + 1).clamp(max=size - 1)] += part
        return matrix

    return weights(x.shape[2]) @ x @ weights(x.shape[3]).T
