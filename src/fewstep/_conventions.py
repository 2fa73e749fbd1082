"""What a diffusers scheduler takes its network to be: path, prediction, sign and clock, read from its class and config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._types import NotLinearError, Prediction, Raw, Time
from .calling import Call
from .field import Model, adapt
from .path import EDM, AffinePath, CondOT, Cosine, DiscreteVP

_FLOW = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF")
_RAW: dict[str, Raw] = {"epsilon": "plain", "sample": "plain", "original_sample": "plain", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class Convention:
    """What a scheduler takes its network to be.

    Attributes:
        path: the affine path of the states that the network sees.
        predicts: what the network predicts once `raw` is undone.
        raw: how its bare output relates to that.
        clock: fewstep time -> the scheduler's timestep; None where it is `adapt`'s default for the path.
        times: scheduler after set_timesteps -> (n,) float64 times of its calls.
        sigma_data: of the EDM preconditioning.
    """

    path: AffinePath
    predicts: Prediction
    raw: Raw
    clock: Callable[[Time], Time] | None
    times: Callable[[Any], Tensor]
    sigma_data: float = 0.5


def convention(scheduler: Any) -> Convention:
    """Read path, prediction, sign and clock from a scheduler's class and config.

    Raises:
        NotLinearError: a scheduler for something else than flows, VP diffusion on discrete levels, or EDM.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "epsilon")
    if kind == "flow_prediction" or any(base.__name__.startswith(_FLOW) for base in type(scheduler).__mro__):
        return _flow(config)
    if name.startswith("EDM") and kind == "epsilon":
        return _edm(config)
    if name == "IPNDMScheduler":  # its timestep is the angle between data and noise
        return Convention(Cosine(), "noise", "v_prediction", lambda t: 1.0 - t, lambda s: _unit(1 - s.timesteps.double()))
    levels = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(levels, Tensor) or kind not in _RAW or config.get("timestep_type", "discrete") != "discrete":
        raise NotLinearError(
            f"cannot tell what network {name} (prediction_type={kind!r}) belongs to; readable are flow schedulers, those with "
            "alphas_cumprod on a discrete clock that predict epsilon, sample or v_prediction, and EDM ones that predict epsilon"
        )
    if bool((levels <= 0).any()):
        raise NotLinearError(
            f"{name} has a level with alphas_cumprod = 0, where noise and state do not determine the data; "
            "use rescale_betas_zero_snr=False"
        )
    path = DiscreteVP(levels)
    return Convention(path, "data" if "sample" in kind else "noise", _RAW[kind], None, lambda s: _unit(path.time(s.timesteps)))


def _flow(config: Mapping[str, Any]) -> Convention:
    """Flows of diffusers predict noise - data at 1000 (1 - t); with `invert_sigmas` data - noise at 1000 t."""
    count = float(config.get("num_train_timesteps", 1000))
    if config.get("invert_sigmas", False):
        return Convention(CondOT(), "velocity", "plain", lambda t: count * t, lambda s: _unit(s.timesteps.double() / count))
    return Convention(
        CondOT(), "velocity", "negated", lambda t: count * (1.0 - t), lambda s: _unit(1 - s.timesteps.double() / count)
    )


def _edm(config: Mapping[str, Any]) -> Convention:
    path = EDM(float(config["sigma_min"]), float(config["sigma_max"]))

    def times(scheduler: Any) -> Tensor:
        return _unit(1 - scheduler.sigmas[: len(scheduler.timesteps)].double() / path.sigma_max)

    return Convention(path, "data", "edm", None, times, float(config["sigma_data"]))


def _unit(times: Tensor) -> Tensor:
    """Float32 schedules overshoot the ends by a rounding error."""
    return times.detach().cpu().double().clamp(0.0, 1.0)


def adapt_like(
    network: Callable[..., Any],
    scheduler: Any,
    *,
    shape: Sequence[int] | None = None,
    call: Call | None = None,
    label_key: str = "class_labels",
    null_label: int | None = None,
    classes: int | None = None,
    max_batch: int | None = None,
    name: str | None = None,
) -> Model:
    """`adapt` a network of a diffusers pipeline; path, prediction, sign and clock are read from the pipeline's scheduler.

    Args:
        network: e.g. ``pipe.unet`` or ``pipe.transformer``.
        scheduler: e.g. ``pipe.scheduler``; only its config and `alphas_cumprod` are read.
        shape: shape of one sample.
        call: as for `adapt`; needed if the output also holds variances, for instance.
        label_key: the network's class keyword.
        null_label: class index that stands for no condition.
        classes: number of classes.
        max_batch: evaluate larger batches in pieces of this size.
        name: what reports call the model.

    Raises:
        NotLinearError: the scheduler is not for flows, VP diffusion on discrete levels, or EDM.

    Example:
        >>> import torch
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> model = adapt_like(lambda x, timestep: x * timestep[:, None], FlowMatchEulerDiscreteScheduler())
        >>> model.given()(torch.ones(1, 1), 0.25)  # asked at 750, and noise - data turned into data - noise
        tensor([[-750.]])
    """
    known = convention(scheduler)
    return adapt(
        network,
        known.path,
        known.predicts,
        shape,
        call,
        known.clock,
        raw=known.raw,
        sigma_data=known.sigma_data,
        label_key=label_key,
        null_label=null_label,
        classes=classes,
        max_batch=max_batch,
        name=name,
    )
