"""What a run needs before its first step: processes and devices, its data, its share of the batch."""

import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .._types import FewstepError
from ..zoo.checkpoint import CONFIG, WEIGHTS
from .data import Source, open_source
from .recipe import Keeping, Recipe
from .state import checkpoints


def check_folder(out: Path, *, resume: bool) -> None:
    """Whether a run may begin, or go on, in a folder.

    Raises:
        FewstepError: it is a file, or holds another run or a model.
    """
    if out.exists() and not out.is_dir():
        raise FewstepError(f"out must be a folder, {out} is a file; choose another --out")
    if not resume and checkpoints(out):
        raise FewstepError(f"{out} holds an unfinished run; continue it with --resume, or choose another --out")
    if not checkpoints(out) and ((out / CONFIG).exists() or (out / WEIGHTS).exists()):
        raise FewstepError(f"{out} holds a finished model; choose another --out")


def accelerator_for(recipe: Recipe, keeping: Keeping, out: Path) -> Accelerator:
    """Devices, processes, precision and trackers as a run asks for them.

    Raises:
        FewstepError: a tracker that is not installed.
    """
    AcceleratorState._reset_state(reset_partial_state=False)  # else a second run in this process could not change precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of absent trackers, which are an error here
        accelerator = Accelerator(
            mixed_precision=recipe.precision, cpu=not torch.cuda.is_available(), log_with=keeping.tracker, project_dir=str(out)
        )
    if keeping.tracker and not accelerator.log_with:
        raise FewstepError(f'tracker "{keeping.tracker}" is not installed: pip install {keeping.tracker}, or leave it out')
    return accelerator


def same_as_given(recipe: Recipe, data: Source) -> None:
    """What a recipe says of its data must be true of data that are given, or the card would lie.

    Raises:
        FewstepError: it is not.
    """
    for name in ("hold_out", "flip", "dequantize", "classes"):
        said, is_ = getattr(recipe, name), getattr(data, name, None)
        if said and said != is_:
            raise FewstepError(f"the recipe says {name} = {said}, of the data that are given it is {is_}; set it there as well")
    if recipe.size is not None:
        raise FewstepError("the recipe's size would do nothing to the data that are given; scale them before")


def data_of(recipe: Recipe, *, skip_unreadable: bool = False) -> Source:
    """The recipe's data.

    Raises:
        FewstepError: see `open_source`.
    """
    return open_source(
        recipe.data, hold_out=recipe.hold_out, flip=recipe.flip, dequantize=recipe.dequantize, size=recipe.size,
        classes=recipe.classes, skip_unreadable=skip_unreadable,
    )  # fmt: skip


def shares_of(recipe: Recipe, process: int, processes: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a batch that one process computes.

    Raises:
        FewstepError: the batch does not divide.
    """
    each = recipe.batch // recipe.pieces(processes)
    return [
        ((process * recipe.accumulate + k) * each, (process * recipe.accumulate + k + 1) * each)
        for k in range(recipe.accumulate)
    ]
