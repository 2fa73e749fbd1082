"""Tuners: each starts from a table and returns a better one."""

from .boss import Boss as Boss
from .least_squares import LeastSquares as LeastSquares
