"""Data to train on: `open_source` turns a name or a path into a `Source`, which the training loop draws from."""

from .images import Progress as Progress
from .opening import open_source as open_source
from .source import EndlessSource as EndlessSource
from .source import FiniteSource as FiniteSource
from .source import Source as Source
from .toys import TOYS as TOYS
from .toys import Toy as Toy
