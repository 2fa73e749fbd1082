"""Tuners: each starts from a table and returns a better one."""

from .bespoke import Bespoke as Bespoke
from .boss import Boss as Boss
from .knots import LearnedKnots as LearnedKnots
from .least_squares import LeastSquares as LeastSquares
from .nonstationary import NonStationary as NonStationary
