"""Models whose paths start at other data than noise: the samples that they start from."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from .._model import SourcePoints
from .._types import FewstepError
from ..field import Model
from ..keyed import Keyed
from .data import Source, open_source

APART = 0x5EED
"""Keys of the source's samples apart from those of the data, which may be the same."""


def with_source(model: Model, source: Source | None = None) -> Model:
    """The model with the samples that its paths start from, which `tune`, `generate` and the command line then draw.

    A model without a `source` is returned as it is, unless a source is given.

    Args:
        model: as `fewstep.load` gives it, which knows the source by name only.
        source: instead of the data of that name.

    Raises:
        FewstepError: the data are not where they were, or have another shape than the model's samples.
    """
    if source is None:
        if model.source is None or model.source.points is not None:
            return model
        source = open_source(model.source.name)
    if model.shape is not None and source.shape != model.shape:
        raise FewstepError(f"{model.name} starts at samples of shape {model.shape}, {source.description} has {source.shape}")
    name = model.source.name if model.source is not None else source.description
    return replace(model, source=SourcePoints(name, partial(_points, source)))


def _points(source: Source, seed: int, first: int, last: int) -> Tensor:
    return source.draw(Keyed(seed ^ APART, 0, first, last), last)[0]
