"""A table as a diffusers pipeline needs it: over the network's bare outputs, with the levels of its inputs."""

import ast
import re
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from . import path as paths
from ._disk import one_line
from ._errors import ArtifactError
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
    path = path or _known_path(made.path)
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
    """The path that this text writes as Python would, from a fixed list of classes and plain numbers; nothing is evaluated.

    Returns:
        None for text that is no call of `CondOT`, `Cosine`, `VP`, `VE` or `EDM`.

    Raises:
        ArtifactError: such a call, with arguments that the path does not have, or values that it cannot take.

    Example:
        >>> path_from_repr("VE(0.1, sigma_max = 10)")
        VE(sigma_min=0.1, sigma_max=10.0)
    """
    # Only characters of names and numbers, and few of them: what parses is flat, and cannot exhaust the parser.
    match = re.fullmatch(r"\s*(CondOT|Cosine|VP|VE|EDM)\s*\(([\w\s.,=+-]{0,200})\)\s*", text)
    if match is None:
        return None
    kind = getattr(paths, match[1])
    try:
        return kind(**_arguments(kind(), match[2]))
    except ValueError as error:
        raise ArtifactError(f'cannot use the path "{one_line(text.strip())}": {error}') from error


def _arguments(usual: Any, text: str) -> dict[str, float]:
    """Values by name, given by place or by name, for another path of this kind.

    Raises:
        ValueError: names that are not known or come twice, too many values, or other values than numbers.
    """
    name, known = type(usual).__name__, [field.name for field in fields(usual)]
    has = f"{name} takes {' and '.join(known)}" if known else f"{name} takes no arguments"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # as of "1for": what is no number is refused below
            call = ast.parse(f"{name}({text})", mode="eval").body
    except SyntaxError:
        raise ValueError(f"its arguments are not written as in {usual!r}") from None
    assert isinstance(call, ast.Call)  # the text holds no brackets
    if len(call.args) > len(known):
        raise ValueError(f"{has}, got {len(call.args)} values")
    values: dict[str, float] = {}
    for word, value in [*zip(known, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]:
        if word not in known:
            raise ValueError(f'{has}, not "{word}"')
        if word in values:
            raise ValueError(f"{word} is given twice; give it once")
        try:
            values[word] = float(ast.unparse(value).replace(" ", ""))
        except ValueError:
            raise ValueError(f'{word} must be a number, got "{ast.unparse(value)}"') from None
    return values


def _known_path(text: str) -> AffinePath | None:
    """As `path_from_repr`, and None for what it refuses: a table is good without its path."""
    try:
        return path_from_repr(text)
    except ArtifactError:
        return None


def input_levels(sampler: "Sampler", path: AffinePath | None, sigma_data: float | None) -> list[list[float]] | None:
    """Data and noise weights of the network's input at every call; None if the path is not known."""
    path = path or _known_path(sampler.provenance.path)
    if path is None:
        return None
    made = sampler.provenance
    inputs = "edm" if made.raw == "edm" else "plain"  # the only network whose input is not the state
    scale = raw_mix(path, sampler.times, inputs, made.sigma_data if sigma_data is None else sigma_data)[0]
    alpha, sigma, *_ = path.coefficients(sampler.times)
    return torch.stack([scale * alpha, scale * sigma], dim=1).tolist()
