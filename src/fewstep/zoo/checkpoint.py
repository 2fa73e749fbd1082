"""A model as a directory: ``model.safetensors`` (weights) and ``config.json`` (everything else), numbers and never code.

``config.json`` names the SHA-256 of the weights that belong to it: a folder that was saved half-way or edited is refused.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from .._disk import disk_errors, refusal, short, staged
from .._errors import ArtifactError
from .._model import SourcePoints
from .._schema import first_complaint, read_versioned
from .._types import FewstepError
from ..artifact import path_from_repr
from ..calling import call_network
from ..field import Model, adapt
from .network import ResidualMLP
from .networks import KINDS, DiffusersNetwork, build, kind_of
from .records import ModelConfig, Precision, TrainingRecord

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SCHEMA_VERSION = 1
SIZE_LIMIT = {CONFIG: 2**20, WEIGHTS: 2**31}
"""Bytes; what a small bundled model stays far below."""

_AGAIN = "save the model again with fewstep.zoo.save_model"


def save_model(
    model: Model,
    directory: str | Path,
    *,
    stored: Precision = "float32",
    data_range: tuple[float, float] | None = None,
    training: TrainingRecord | None = None,
) -> Path:
    """Save a model whose network `fewstep.zoo.networks.build` made, so that ``load(directory)`` gives it back.

    Args:
        model: from ``adapt(network, ...)``, with no clock or call of its own.
        directory: made if it is missing.
        stored: "float32" gives the network back bit for bit, "bfloat16" rounds its weights and halves the file.
        data_range: what values the data take.
        training: how the weights came about.

    Returns:
        The directory.

    Raises:
        ArtifactError: another network, a convention or path that the format cannot hold, weights that are not finite, or a
            folder that cannot be written.
    """
    folder = Path(directory)
    kind, network = _storable(model)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    if (bad := _not_finite(tensors)) is not None:
        raise refusal(f"cannot save {model.name}: its weight {bad} holds NaN or infinity; go back to the last good checkpoint")
    if stored != "float32":
        tensors = {name: value.to(getattr(torch, stored)) for name, value in tensors.items()}
    weights = save_tensors(tensors)
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "name": model.name,
        "network": network.config,
        "stored": stored,
        "path": repr(model.path),
        "predicts": model.predicts,
        "raw": model.raw,
        "sigma_data": model.sigma_data,
        "shape": list(network.shape),
        "classes": network.classes or None,
        "null_label": model.null_label,
        "data_range": None if data_range is None else [float(v) for v in data_range],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "training": training,
        "source": None if model.source is None else {"name": model.source.name, "facts": model.source.facts},
    }
    try:
        unsaid = {"source"} if model.source is None else set()
        config = ModelConfig.model_validate(content).model_dump_json(indent=2, exclude=unsaid) + "\n"
    except ValidationError as error:
        raise refusal(f"cannot save {model.name}: {first_complaint(error)}; correct it and save again") from error
    with disk_errors(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        new_weights = stack.enter_context(staged(folder / WEIGHTS, weights))
        new_config = stack.enter_context(staged(folder / CONFIG, config.encode()))
        os.replace(new_weights, folder / WEIGHTS)
        os.replace(new_config, folder / CONFIG)
    return folder


def read_model(directory: str | Path) -> Model:
    """The model that `save_model` wrote: in eval mode, on the CPU, no gradients to its weights.

    Raises:
        ArtifactError: anything that is not sound, in one line that names the file and the remedy.
    """
    folder = Path(directory)
    config = read_config(folder)
    try:
        path = path_from_repr(config.path)
    except ArtifactError as error:
        raise refusal(f"{folder / CONFIG}: {error}") from error
    if path is None:
        raise refusal(
            f"{folder / CONFIG}: path must be CondOT(), Cosine(), VP(...), VE(...) or EDM(...), got {short(config.path)}"
        )
    if config.null_label not in (None, config.classes):
        raise refusal(f"{folder / CONFIG}: null_label must be {config.classes} or null, got {config.null_label}; {_AGAIN}")
    weights = _read(folder / WEIGHTS)
    actual = hashlib.sha256(weights).hexdigest()
    if actual != config.weights_sha256:
        raise refusal(
            f"{folder / WEIGHTS} was edited, cut off or belongs to another {CONFIG}: expected SHA-256 "
            f"{config.weights_sha256[:12]}, got {actual[:12]}; {_AGAIN}"
        )
    network = _network(config, _tensors(folder / WEIGHTS, weights), folder / WEIGHTS)
    return adapt(
        network,
        path=path,
        predicts=config.predicts,
        raw=config.raw,
        sigma_data=config.sigma_data,
        shape=config.shape,
        null_label=config.null_label,
        classes=config.classes,
        name=config.name,
        source=None if config.source is None else SourcePoints(config.source.name, facts=config.source.facts),
    )


def read_config(directory: str | Path) -> ModelConfig:
    """The validated ``config.json`` of a model directory.

    Raises:
        ArtifactError: there is none, or it is not what fewstep wrote.
    """
    file = Path(directory) / CONFIG
    data = _read(file)
    content = read_versioned(file, data, what="model", version=SCHEMA_VERSION, remedy=_AGAIN)
    try:
        return ModelConfig.model_validate(content)
    except ValidationError as error:
        raise refusal(f"{file} does not describe a model: {first_complaint(error)}; {_AGAIN}") from error


def _storable(model: Model) -> tuple[str, ResidualMLP | DiffusersNetwork]:
    """The network and its kind, if the format can say everything about how this model asks it."""
    network = model.network
    kind = kind_of(network)
    if kind is None or not isinstance(network, ResidualMLP | DiffusersNetwork):
        raise refusal(
            f"only networks of fewstep.zoo.networks ({', '.join(KINDS)}) are saved as numbers, {model.name} is a "
            f"{type(network).__name__}; keep it in your own format and name a function that builds it: package.module:function"
        )
    if path_from_repr(repr(model.path)) != model.path:
        raise refusal(
            f"cannot save {model.name}: a directory holds models on CondOT, Cosine, VP, VE or EDM, not {model.path!r}"
        )
    usual = adapt(network, path=model.path, predicts=model.predicts, raw=model.raw).clock
    same_clock = all(float(model.clock(torch.tensor(t))) == float(usual(torch.tensor(t))) for t in (0.25, 0.5))
    if model.label_key != "label" or model.call is not call_network or not same_clock:
        raise refusal(
            f'cannot save {model.name}: a directory holds models with label_key="label" and no call or clock of their own'
        )
    classes = network.classes or None
    if (
        model.shape not in (None, network.shape)
        or model.classes not in (None, classes)
        or model.null_label not in (None, classes)
    ):
        raise refusal(
            f"cannot save {model.name}: the network has shape {network.shape}, classes {classes} and null label {classes}, "
            f"the model says {model.shape}, {model.classes} and {model.null_label}"
        )
    return kind, network


def _network(config: ModelConfig, tensors: Mapping[str, Tensor], file: Path) -> nn.Module:
    arguments = config.kind, tuple(config.shape), config.classes or 0, config.network
    try:
        with torch.device("meta"):  # before that much memory is taken
            expected = build(*arguments).state_dict()
    except FewstepError as error:
        raise refusal(f"{file.with_name(CONFIG)} does not describe a model: {error}; {_AGAIN}") from error
    if expected.keys() != tensors.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise refusal(f"{file} does not hold this network: missing {short(missing)}, not asked for {short(extra)}; {_AGAIN}")
    stored = getattr(torch, config.stored)
    for name, value in tensors.items():
        if value.shape != expected[name].shape or value.dtype != stored:
            raise refusal(
                f"{file}: {name} must be {config.stored} of shape {tuple(expected[name].shape)}, "
                f"got {value.dtype} of shape {tuple(value.shape)}; {_AGAIN}"
            )
    if (bad := _not_finite(tensors)) is not None:
        raise refusal(f"{file}: weight {bad} holds NaN or infinity; {_AGAIN}")
    with torch.random.fork_rng(devices=[]):
        network = build(*arguments)
    # Copied, not assigned: a tensor inside the file's bytes can lie at an odd address, which costs speed and exact repetition.
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _tensors(file: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(data)
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise refusal(f"{file} is not a safetensors file ({short(error)}); {_AGAIN}") from error


def _read(file: Path) -> bytes:
    limit = SIZE_LIMIT[file.name]
    try:
        if not file.is_file():  # a pipe or device could block for ever
            raise refusal(f"expected a model folder with the file {file}, but it is missing; pass a folder that fewstep saved")
        if file.stat().st_size > limit:
            raise refusal(f"{file} has more than {limit} bytes, no model that fewstep saved is that large; {_AGAIN}")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise refusal(f"cannot read {file}: {short(error)}; check its name and permissions") from error


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
