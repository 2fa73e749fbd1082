"""From any network convention to one velocity field: `adapt` once per network, `.given` once per condition."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from ._affine import AffinePath
from ._model import Model, SourcePoints
from ._model import ModelField as ModelField
from ._types import RAW_PREDICTS, Prediction, Raw
from .calling import Call, Clock, call_network
from .path import CondOT, DiscreteVP


def adapt(
    network: Callable[..., Any],
    path: AffinePath | None = None,
    predicts: Prediction = "velocity",
    shape: Sequence[int] | None = None,
    call: Call | None = None,
    clock: Clock | None = None,
    *,
    raw: Raw = "plain",
    sigma_data: float = 0.5,
    label_key: str = "label",
    null_label: int | None = None,
    classes: int | None = None,
    max_batch: int | None = None,
    name: str | None = None,
    source: SourcePoints | None = None,
) -> Model:
    """Wrap any network, once.

    Args:
        network: called as ``network(x, time, **condition)`` unless `call` says otherwise; time has shape (batch,).
        path: the path it was trained on; default `CondOT()`.
        predicts: "velocity" (data - noise on CondOT), "noise", "data" or "score".
        shape: shape of one sample; default: ``network.shape``, or in_channels and sample_size of a diffusers config. Needed
            by `tune(model, ...)` and the command line, not by fields.
        call: ``call(network, x, time, condition) -> output``; default `call_network`, which also unwraps diffusers outputs.
        clock: fewstep time (0 = noise, 1 = data) -> the network's own time. Default: the fractional timestep on
            `DiscreteVP`, log(sigma) / 4 for ``raw="edm"``, otherwise t itself. For ``net(x, sigma)`` denoisers pass
            ``clock=lambda t: path.coefficients(t).sigma``; for diffusers' flow models `flow_timestep` with raw="negated".
        raw: "plain", "negated" (velocity = noise - data), "v_prediction" (predicts="noise") or "edm" (predicts="data").
        sigma_data: of the EDM preconditioning; unused otherwise.
        label_key: the network's class keyword, e.g. "class_labels" for diffusers' UNet2DModel.
        null_label: class index that stands for no condition; enables guidance.
        classes: number of classes; labels are then checked.
        max_batch: evaluate larger batches in pieces of this size.
        name: what reports call the model; default: the class or function name.
        source: what the paths start from, if not standard normal noise; see `fewstep.training.with_source`.

    Raises:
        ValueError: `raw` or `predicts` is unknown, or they contradict each other.

    Example:
        >>> model = adapt(lambda x, t: -x, shape=(2,))
        >>> model.given()(torch.ones(1, 2), 0.5)
        tensor([[-1., -1.]])
    """
    path = path or CondOT()
    for what, value, known in (("predicts", predicts, get_args(Prediction)), ("raw", raw, get_args(Raw))):
        if value not in known:
            raise ValueError(f'{what} must be one of {", ".join(known)}, got "{value}"')
    meant = RAW_PREDICTS.get(raw, predicts)
    if predicts != meant:
        raise ValueError(f'raw="{raw}" networks have predicts="{meant}", got "{predicts}"')
    if clock is None:
        clock = _default_clock(path, raw)
    known = _shape_of(network) if shape is None else tuple(shape)
    return Model(
        network, path, predicts, known, call or call_network, clock, raw, sigma_data,
        label_key, null_label, classes, max_batch, name or getattr(network, "__name__", type(network).__name__),
        source,
    )  # fmt: skip


def _shape_of(network: Any) -> tuple[int, ...] | None:
    """A sample's shape, where the network says it: ``network.shape``, or the config of a diffusers network."""
    shape = getattr(network, "shape", None)
    if isinstance(shape, tuple | list) and all(isinstance(n, int) for n in shape):
        return tuple(shape)
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping) or not isinstance(config.get("in_channels"), int):
        return None
    size = config.get("sample_size")
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else None
    return None if sides is None else (config["in_channels"], *sides)


def _default_clock(path: AffinePath, raw: Raw) -> Clock:
    if raw == "edm":
        return lambda t: path.coefficients(t).sigma.log() / 4
    if isinstance(path, DiscreteVP):
        return path.timestep
    return lambda t: t
