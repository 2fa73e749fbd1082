"""What all tuners check about their settings when they are made, so that a wrong one fails before any network call."""

import math
from collections.abc import Sequence
from typing import Any, get_args


def one_of(name: str, value: Any, literal: Any) -> None:
    """ValueError unless `value` is among those of a Literal type."""
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f'{name} is one of {", ".join(choices)}, got "{value}"')


def positive(**values: float) -> None:
    """ValueError unless all are finite and above zero."""
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


def share(name: str, value: float) -> None:
    """ValueError unless it is a part of the noise that leaves some to fit."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is a share of the noise between 0 and 1, such as 0.25, got {value}")


def positives(name: str, values: Sequence[float]) -> None:
    """ValueError unless there are some, all finite and above zero."""
    if not values or not all(0.0 < value < math.inf for value in values):
        raise ValueError(f"{name} must be positive numbers, such as (1.0,), got {values}")
