"""Training: a run is a point of coupling x time law x path x objective, written down as one `Recipe`.

from fewstep.training import RECIPES, train
model = train(replace(RECIPES["digits"], steps=2000), "runs/digits")
"""

import importlib
from typing import TYPE_CHECKING, Any

from .recipe import RECIPES as RECIPES
from .recipe import Keeping as Keeping
from .recipe import Recipe as Recipe

if TYPE_CHECKING:
    from .data import open_source as open_source
    from .loop import train as train
    from .source import with_source as with_source

__all__ = ["RECIPES", "Keeping", "Recipe", "open_source", "train", "with_source"]

_HOME = {"train": "loop", "open_source": "data", "with_source": "source"}


def __getattr__(name: str) -> Any:
    """The loop needs torch, accelerate and diffusers; recipes do not."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
