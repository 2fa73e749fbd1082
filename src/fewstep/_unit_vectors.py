"""Any deterministic diffusers scheduler as a table: one run on unit vectors, in float64.

The start is e_0 and the k-th network output is e_{k+1}, so every state that the scheduler visits *is* its row. Beside the
unit vectors the same run carries random probes with non-linear answers; they must be the same combinations, or the
scheduler clips, thresholds or draws noise. Nothing here imports diffusers: schedulers are read through their public
attributes.
"""

import copy
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._conventions import Convention, convention
from ._types import BudgetError, NotLinearError
from .path import raw_mix
from .sampler import Provenance, Sampler, substitute

PROBES = 12
"""Random coordinates beside the unit vectors."""

LARGE = 30.0
"""Size of the probes: well outside every range that images or latents are clipped to."""

TOLERANCE = 1e-6
"""Largest deviation of a probe from its row, relative to the row's terms; rounding stays below 1e-10, a clip is of order 1."""


def from_diffusers(
    scheduler: Any,
    nfe: int,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Sampler:
    """A deterministic diffusers scheduler as a table over its own outputs and clock.

    Exact: the scheduler's own constants (which it keeps in float32) combined in float64. No network is called.

    Args:
        scheduler: any diffusers scheduler; it is copied, not changed.
        nfe: network calls of the table; the number of inference steps that costs as many is looked up (Heun: 2 n - 1).
        sigmas: passed to ``set_timesteps``, where the scheduler takes it.
        timesteps: likewise.
        mu: likewise (the resolution-dependent shift of Flux and its kin).

    Returns:
        A sampler that predicts "velocity" (flows), "noise", or "data", with the scheduler's timesteps as `clock`.

    Raises:
        NotLinearError: it clips, thresholds, draws noise, gives NaN, or is for another kind of network.
        BudgetError: no number of inference steps costs `nfe` calls; the message names the nearest.
        ValueError: ``set_timesteps`` does not take `sigmas`, `timesteps` or `mu`.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> sampler = from_diffusers(FlowMatchEulerDiscreteScheduler(), 2, sigmas=[1.0, 0.5])
        >>> sampler.times.tolist(), sampler.b[2].tolist()
        ([0.0, 0.5], [0.5, 0.5])
    """
    known = convention(scheduler)
    ready = prepared(scheduler, nfe, sigmas=sigmas, timesteps=timesteps, mu=mu)
    return as_table(ready, known)


def prepared(
    scheduler: Any,
    nfe: int,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Any:
    """A copy of the scheduler, set to as many inference steps as cost `nfe` network calls."""
    if nfe < 1:
        raise BudgetError(f"a sampler makes at least one network call, got nfe={nfe}")
    ready, name = copy.deepcopy(scheduler), type(scheduler).__name__
    given = {key: _numbers(value, name) for key, value in (("sigmas", sigmas), ("timesteps", timesteps)) if value is not None}
    shift = {} if mu is None else {"mu": mu}
    taken = inspect.signature(ready.set_timesteps).parameters
    for key in (*given, *shift):
        if key not in taken:
            raise ValueError(f"{name}.set_timesteps takes no {key}; it takes {', '.join(taken)}")
    if not given:
        return _searched(ready, nfe, shift)
    with quiet():
        ready.set_timesteps(**given, **shift)
    if len(ready.timesteps) != nfe:
        raise BudgetError(f"{name} makes {len(ready.timesteps)} network calls on the given {' and '.join(given)}, not {nfe}")
    return ready


def _searched(ready: Any, nfe: int, shift: Mapping[str, float]) -> Any:
    """Set the number of inference steps that costs `nfe` network calls."""
    calls: list[int] = []
    failure: Exception | None = None
    for steps in range(nfe, 0, -1):  # no scheduler makes fewer calls than steps
        try:
            with quiet():
                ready.set_timesteps(steps, **shift)
        except Exception as error:  # foreign code; some cannot take so few steps
            failure = failure or error
            continue
        calls.append(len(ready.timesteps))
        if calls[-1] == nfe:
            return ready
        if calls[-1] < nfe:
            break
    name = type(ready).__name__
    if not calls:
        raise ValueError(f"{name}.set_timesteps({nfe}) fails: {type(failure).__name__}: {failure}") from failure
    below, above = max((c for c in calls if c < nfe), default=None), min((c for c in calls if c > nfe), default=None)
    nearest = " and ".join(str(c) for c in (below, above) if c is not None)
    raise BudgetError(f"{name} cannot make exactly {nfe} network calls; it can make {nearest}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that diffusers hands tensors to numpy in an old way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array_", DeprecationWarning)
        yield


def _numbers(values: Sequence[float], name: str) -> Any:
    """UniPC wants an array, the EDM schedulers a tensor, the others take either."""
    array = np.asarray(values, dtype=np.float64)
    return torch.from_numpy(array) if name.startswith("EDM") else array


def as_table(ready: Any, known: Convention, method: str = "") -> Sampler:
    """The table of a scheduler on which ``set_timesteps`` has been called (it is used up); `method` replaces its name."""
    name = type(ready).__name__
    clock, times = ready.timesteps.detach().cpu().double(), known.times(ready)
    if times[-1] < times[0]:
        raise NotLinearError(f"{name} walks from data to noise; a sampler walks from noise to data: use its forward relative")
    run = _drive(ready, known)
    if not bool(torch.isfinite(run.rows).all()):
        call = int((~torch.isfinite(run.rows)).flatten(1).any(1).nonzero()[0])
        raise NotLinearError(
            f"{name} gives NaN or infinity after call {call} of {len(clock)} with these settings; for UniPC use "
            'solver_type="bh2", for others a last sigma above 0'
        )
    if run.deviation() > TOLERANCE:
        raise NotLinearError(f"{name} is not a table: {_reason(ready.config, run.random)}")
    a, b = run.table()
    if known.raw == "negated":
        b = -b
    elif known.raw != "plain":  # bare output w = (prediction - q x) / p
        _, p, q = raw_mix(known.path, times, known.raw, known.sigma_data)
        a, b = substitute(a, b, p=1 / p, q=-q / p)
    version = getattr(sys.modules.get("diffusers"), "__version__", "unknown")
    made = Provenance(method=method or name, path=repr(known.path), raw=known.raw, versions={"diffusers": version})
    return Sampler(times, a, b, predicts=known.predicts, clock=clock, provenance=made)


def _reason(config: Mapping[str, Any], random: bool) -> str:
    """What a failed probe means and what to do."""
    if random and str(config.get("algorithm_type", "")).startswith("sde"):
        return 'it draws noise; use algorithm_type="dpmsolver++"'
    if random:
        return "it draws noise; use eta=0, stochastic_sampling=False, tau_func=lambda t: 0, or a deterministic scheduler"
    knobs = [f"{key}=False" for key in ("clip_sample", "thresholding") if config.get(key, False)]
    return f"it clips or thresholds the data prediction; use {' and '.join(knobs) or 'a scheduler that does not'}"


@dataclass(frozen=True)
class _Run:
    """What one run visited: the first columns are unit vectors, the last `PROBES` random.

    Attributes:
        rows: (n + 1, width) the states that are rows of the table.
        outputs: (n, width) the network outputs.
        start: (width,) the noise.
        random: whether numbers were drawn from torch's generator.
    """

    rows: Tensor
    outputs: Tensor
    start: Tensor
    random: bool

    def table(self) -> tuple[Tensor, Tensor]:
        units = self.rows[:, :-PROBES]
        return units[:, 0].contiguous(), units[:, 1:].contiguous()

    def deviation(self) -> float:
        """Largest deviation of a probe from its row, relative to the sizes of the row's terms."""
        a, b = self.table()
        noise, outputs = self.start[-PROBES:], self.outputs[:, -PROBES:]
        expected = a[:, None] * noise + b @ outputs
        scale = a.abs() * noise.abs().max() + b.abs() @ outputs.abs().amax(1)
        return float(((self.rows[:, -PROBES:] - expected).abs().amax(1) / scale.clamp(min=1e-30)).max())


def _drive(scheduler: Any, known: Convention) -> _Run:
    """Run the scheduler as a pipeline does, on unit vectors and probes side by side."""
    _promote(scheduler)
    name, steps = type(scheduler).__name__, scheduler.timesteps
    units = len(steps) + 1
    generator = torch.Generator().manual_seed(1234)
    weight = torch.randn(PROBES, PROBES, generator=generator, dtype=torch.float64)
    start = torch.zeros(units + PROBES, dtype=torch.float64)
    start[0] = 1.0
    start[units:] = LARGE * torch.randn(PROBES, generator=generator, dtype=torch.float64)
    rows, outputs = [], []
    scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    # A channel per coordinate: what looks at several values at once (a quantile) looks at all of them.
    x = start.view(1, -1, 1, 1) * float(scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet(), _Doubles():
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the caller's GPUs too
        fresh = torch.get_rng_state()
        for k, t in enumerate(steps):
            seen = scale(x, t)
            rows.append((x if known.raw == "edm" else seen).flatten())
            answer = torch.zeros_like(start)
            answer[k + 1] = 1.0
            answer[units:] = LARGE * torch.sin(weight @ seen.flatten()[units:] / LARGE + k)
            outputs.append(answer)
            try:
                x = scheduler.step(answer.view_as(x), t, x, return_dict=False)[0]
            except TypeError as error:
                raise NotLinearError(f"{name}.step needs more than a model output, a timestep and a sample: {error}") from error
        rows.append(x.flatten())
        random = not torch.equal(torch.get_rng_state(), fresh)
    return _Run(torch.stack(rows), torch.stack(outputs), start, random)


def _promote(scheduler: Any) -> None:
    """Keep the scheduler's constants, which it has rounded to float32, but let it compute with them in float64."""
    for key, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(scheduler, key, value.double())


class _Doubles(TorchFunctionMode):
    """Inside this block every floating-point tensor is float64: schedulers cast to float32 wherever they compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        elif func is torch.tensor and "dtype" not in kwargs and _floats(args[0]):
            kwargs = {**kwargs, "dtype": torch.float64}
        elif func is torch.Tensor.float:
            func = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        out = func(*args, **kwargs)
        return out.double() if isinstance(out, Tensor) and out.dtype is torch.float32 else out


_CASTS = (torch.Tensor.to, torch.Tensor.type)


def _floats(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, float | np.floating) or (isinstance(value, Tensor) and value.is_floating_point())
