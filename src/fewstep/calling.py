"""How a network is called: times per sample, conditions with a batch, and a look at what comes back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._types import FieldError, Time

Condition = Mapping[str, Any]
Call = Callable[[Callable[..., Any], Tensor, Tensor, Condition], Any]
Clock = Callable[[Time], Time]
LogProbability = Callable[[Tensor, Tensor], Tensor]


def call_network(network: Callable[..., Any], x: Tensor, time: Tensor, condition: Condition) -> Any:
    """The default `call`: ``network(x, time, **condition)``, unwrapping a ``.sample`` or a one-element tuple."""
    output = network(x, time, **condition)
    if hasattr(output, "sample") and isinstance(output.sample, Tensor):
        return output.sample
    return output[0] if isinstance(output, tuple) else output


def flow_timestep(t: Time) -> Time:
    """The clock of diffusers' flow models: 1000 at noise, 0 at data."""
    return 1000.0 * (1.0 - t)


def per_sample_time(t: Time, batch: int, x: Tensor) -> Tensor:
    """The time as (batch,), float32 (or float64 beside a float64 state), on the state's device."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(t, Tensor):
        return t.to(x.device, dtype).expand(batch)
    return torch.full((batch,), t, dtype=dtype, device=x.device)


def expand(condition: Condition, batch: int, device: torch.device) -> dict[str, Any]:
    """Give every entry the batch: integers and 0-d int64 tensors become labels, tensors of batch 1 are repeated."""
    out: dict[str, Any] = {}
    for key, value in condition.items():
        if isinstance(value, int) and not isinstance(value, bool):
            out[key] = torch.full((batch,), value, device=device)
        elif isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.int64:
            out[key] = value.to(device).expand(batch)
        elif isinstance(value, Tensor) and value.ndim > 0:
            if value.shape[0] not in (1, batch):
                raise FieldError(f'condition "{key}" has batch {value.shape[0]} but the state has {batch}; give one per sample')
            out[key] = value.to(device).expand(batch, *value.shape[1:])
        else:
            out[key] = value
    return out


def stack(null: Condition, given: Condition) -> dict[str, Any]:
    """Both halves of a guided batch, the unconditional one first."""
    if null.keys() != given.keys():
        raise FieldError(f"null and condition must have the same keys, got {sorted(null)} and {sorted(given)}")
    for key, value in given.items():
        if not (isinstance(value, Tensor) and value.ndim) and not (value is null[key] or str(value) == str(null[key])):
            raise FieldError(
                f'null and condition differ in "{key}", which has no batch; give it as a tensor, one row per sample'
            )
    return {
        key: torch.cat([null[key], value]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in given.items()
    }


def cut(condition: Condition, start: int, size: int, batch: int) -> Condition:
    """The part of every per-sample entry that belongs to samples start .. start + size."""
    if size >= batch:
        return condition
    return {
        k: v[start : start + size] if isinstance(v, Tensor) and v.ndim and v.shape[0] == batch else v
        for k, v in condition.items()
    }


def checked(output: Any, expected: tuple[int, ...], name: str) -> Tensor:
    """The network's output, if it is a floating-point tensor of the expected shape."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"{output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
        raise FieldError(f"{name} must return a floating-point tensor of shape {expected}, got a {got}; see adapt(call=...)")
    if tuple(output.shape) != expected:
        raise FieldError(
            f"{name} must return shape {expected}, got {tuple(output.shape)}; "
            "use adapt(call=...) to pick the part that is the prediction"
        )
    return output
