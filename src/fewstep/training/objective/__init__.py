"""Objectives: what a training step minimises. One file each; one of your own is passed as ``train(..., objective=...)``."""

from .fdm import FlowAndDivergence as FlowAndDivergence
from .regression import Regression as Regression
