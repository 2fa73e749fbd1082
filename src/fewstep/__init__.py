"""fewstep: the best few-step sampler that a flow or diffusion model allows, as a small file of numbers.

Public names load on first use, so that ``import fewstep`` and ``fewstep --help`` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import methods as methods
    from ._tabulate import tabulate as tabulate
    from ._types import ArtifactError as ArtifactError
    from ._types import BudgetError as BudgetError
    from ._types import FewstepError as FewstepError
    from ._types import FieldError as FieldError
    from ._types import GridError as GridError
    from ._types import NotLinearError as NotLinearError
    from .calling import flow_timestep as flow_timestep
    from .climb import tune as tune
    from .composite import CountedField as CountedField
    from .composite import JointField as JointField
    from .diffusers import TableScheduler as TableScheduler
    from .diffusers import adapt_like as adapt_like
    from .diffusers import from_diffusers as from_diffusers
    from .evaluation import Extractor as Extractor
    from .evaluation import Report as Report
    from .evaluation import bits_per_dim as bits_per_dim
    from .evaluation import compare as compare
    from .evaluation import compare_images as compare_images
    from .evaluation import features_of as features_of
    from .evaluation import generate as generate
    from .evaluation import image_metrics as image_metrics
    from .evaluation import log_density as log_density
    from .evaluation import sample_with_log_density as sample_with_log_density
    from .field import Model as Model
    from .field import adapt as adapt
    from .grid import TimeGrid as TimeGrid
    from .path import EDM as EDM
    from .path import VE as VE
    from .path import VP as VP
    from .path import AffinePath as AffinePath
    from .path import CondOT as CondOT
    from .path import Cosine as Cosine
    from .path import DiscreteVP as DiscreteVP
    from .result import TuneResult as TuneResult
    from .sampler import Provenance as Provenance
    from .sampler import Sampler as Sampler
    from .trajectory import Reference as Reference
    from .trajectory import Trajectory as Trajectory
    from .trajectory import dopri5 as dopri5
    from .trajectory import record as record
    from .trajectory import reference as reference
    from .tuners import Bespoke as Bespoke
    from .tuners import Boss as Boss
    from .tuners import LearnedKnots as LearnedKnots
    from .tuners import LeastSquares as LeastSquares
    from .tuners import NonStationary as NonStationary
    from .zoo import load as load

_HOMES = {
    "_types": ("ArtifactError", "BudgetError", "FewstepError", "FieldError", "GridError", "NotLinearError"),
    "climb": ("tune",),
    "calling": ("flow_timestep",),
    "composite": ("CountedField", "JointField"),
    "diffusers": ("TableScheduler", "adapt_like", "from_diffusers"),
    "evaluation": (
        "Extractor",
        "Report",
        "bits_per_dim",
        "compare",
        "compare_images",
        "features_of",
        "generate",
        "image_metrics",
        "log_density",
        "sample_with_log_density",
    ),
    "field": ("Model", "adapt"),
    "grid": ("TimeGrid",),
    "path": ("EDM", "VE", "VP", "AffinePath", "CondOT", "Cosine", "DiscreteVP"),
    "result": ("TuneResult",),
    "sampler": ("Provenance", "Sampler"),
    "_tabulate": ("tabulate",),
    "trajectory": ("Reference", "Trajectory", "dopri5", "record", "reference"),
    "tuners": ("Bespoke", "Boss", "LearnedKnots", "LeastSquares", "NonStationary"),
    "zoo": ("load",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", "methods", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module(".methods", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
