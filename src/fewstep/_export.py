"""A table as a diffusers pipeline needs it: over the network's bare outputs, with the levels of its inputs."""

import re
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from . import path as paths
from .path import AffinePath, raw_mix

if TYPE_CHECKING:
    from .sampler import Sampler


def scheduler_config(
    sampler: "Sampler", path: AffinePath | None = None, sigma_data: float | None = None
) -> dict[str, Any] | None:
    """The table as a diffusers pipeline needs it: over the bare outputs of the network, at the network's own times.

    Args:
        sampler: the table; `Provenance.raw` says what the network's bare output is.
        path: needed for raw="v_prediction" and "edm", and where the rows combine another prediction than the network's.
            Default: rebuilt from `Provenance.path`, which works for CondOT, Cosine, VP, VE and EDM.
        sigma_data: of the preconditioning that raw="edm" stands for; default: `Provenance.sigma_data`.

    Returns:
        The content of ``scheduler_config.json``, or None if the path is needed and unknown (`DiscreteVP`, or none was given)
        or the bare table is not finite. `write_sampler` then writes no ``scheduler_config.json``.
    """
    made = sampler.provenance
    path = path or path_from_repr(made.path)
    try:
        bare = sampler.raw_table(path, made.raw, made.sigma_data if sigma_data is None else sigma_data)
        a, b = (value.detach() for value in bare)
    except (ValueError, ArithmeticError):
        return None
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return None
    return {
        "_class_name": "TableScheduler",
        "_fewstep_version": __version__,
        "times": sampler.times.tolist(),
        "timesteps": (sampler.times if sampler.clock is None else sampler.clock).tolist(),
        "a": a.tolist(),
        "b": b.tolist(),
        "num_train_timesteps": 1000,
    }


def path_from_repr(text: str) -> AffinePath | None:
    """The path with this repr, from a fixed list of classes and plain numbers; None for any other text."""
    match = re.fullmatch(r"(CondOT|Cosine|VP|VE|EDM)\((.*)\)", text)
    if match is None:
        return None
    try:
        arguments = dict(pair.split("=") for pair in match[2].split(", ")) if match[2] else {}
        return getattr(paths, match[1])(**{name: float(value) for name, value in arguments.items()})
    except (ValueError, TypeError):
        return None


def input_levels(sampler: "Sampler", path: AffinePath | None, sigma_data: float | None) -> list[list[float]] | None:
    """Data and noise weights of the network's input at every call; None if the path is not known."""
    path = path or path_from_repr(sampler.provenance.path)
    if path is None:
        return None
    made = sampler.provenance
    inputs = "edm" if made.raw == "edm" else "plain"  # the only network whose input is not the state
    scale = raw_mix(path, sampler.times, inputs, made.sigma_data if sigma_data is None else sigma_data)[0]
    alpha, sigma, *_ = path.coefficients(sampler.times)
    return torch.stack([scale * alpha, scale * sigma], dim=1).tolist()
