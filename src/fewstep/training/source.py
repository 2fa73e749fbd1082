"""Models whose paths start at other data than noise: the samples that they start from."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from .._model import SourcePoints
from .._types import FewstepError
from ..field import Model
from ..keyed import Keyed
from .data import Source, open_source
from .ingredients import facts, other

APART = 0x5EED
"""Keys of the source's samples apart from those of the data, which may be the same."""


def with_source(model: Model, source: Source | None = None) -> Model:
    """The model with the samples that its paths start from, which `tune`, `generate` and the command line then draw.

    A model without a `source` is returned as it is, unless a source is given.

    Args:
        model: as `fewstep.load` gives it, which knows the source by name only.
        source: instead of the data of that name.

    Raises:
        FewstepError: the data are not where or what they were, have another shape than the model's samples, or are made by a
            function, which a model's folder must not run.
    """
    if source is None:
        if model.source is None or model.source.points is not None:
            return model
        source = _opened(model.name, model.source)
    if model.shape is not None and source.shape != model.shape:
        raise FewstepError(f"{model.name} starts at samples of shape {model.shape}, {source.description} has {source.shape}")
    name = model.source.name if model.source is not None else source.description
    return replace(model, source=SourcePoints(name, partial(_points, source), facts(source)))


def _opened(model: str, known: SourcePoints) -> Source:
    if ":" in known.name:
        raise FewstepError(
            f"{model} starts at samples that {known.name} makes: a model's folder must not run code; if you trust it, pass "
            f'them: with_source(model, open_source("{known.name}"))'
        )
    source = open_source(known.name)
    differing = {} if known.facts is None else other(known.facts, facts(source))
    if differing:
        listed = ", ".join(f"{key} = {then} (now {now})" for key, (then, now) in differing.items())
        raise FewstepError(
            f"{model} starts at samples of {known.name}, which are not those it was trained from: {listed}; run this where "
            "those data are, or pass them to with_source(model, source)"
        )
    return source


def _points(source: Source, seed: int, first: int, last: int) -> Tensor:
    return source.draw(Keyed(seed ^ APART, 0, first, last), last)[0]
