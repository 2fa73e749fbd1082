"""diffusers in both directions: its schedulers as tables, and tables as one scheduler for its pipelines.

`from_diffusers` imports a scheduler, `adapt_like` wraps a network the way a scheduler takes it to be, and `TableScheduler`
replays any table inside any pipeline. Importing this module imports diffusers' scheduler base class.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ._conventions import adapt_like as adapt_like
from ._export import input_levels, scheduler_config
from ._plan import Stepper, resume, shared
from ._types import ArtifactError, BudgetError
from ._unit_vectors import from_diffusers as from_diffusers
from .artifact import SAMPLER, SCHEDULER, read_sampler
from .path import AffinePath
from .sampler import Sampler

NEAR = 1e-3
"""Two timesteps of a table are the same if they differ by less than this, relative to max(1, timestep)."""


class TableScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that replays a table of numbers, in any pipeline.

    The table is over the network's bare outputs, as the pipeline hands them to `step`; its timesteps are what the pipeline
    hands to the network. The schedule is part of the table: `sigmas`, `mu` and `timesteps` that pipelines pass to
    `set_timesteps` by default are counted and otherwise ignored. States are kept in at least float32 between the steps,
    whatever the pipeline computes in. Make one with `from_sampler` or `from_pretrained`.

    Args:
        times: (n,) on fewstep's clock, 0 = noise, 1 = data; `sigmas` is 1 - times and a final 0.
        timesteps: (n,) handed to the network.
        a: (n + 1,) weights of the noise.
        b: (n + 1, n) weights of the outputs.
        num_train_timesteps: what ``len(scheduler)`` returns.
        levels: (n, 2) data and noise weights of the network's input at every call, for `add_noise` and `scale_noise`.
        use_flow_sigmas: makes the Flux pipelines leave the schedule to the scheduler.

    Raises:
        ValueError: the numbers are missing or are not a table.
    """

    _compatibles = []  # noqa: RUF012 (the name and the type are diffusers')
    order = 1

    @register_to_config
    def __init__(
        self,
        times: list[float] | None = None,
        timesteps: list[float] | None = None,
        a: list[float] | None = None,
        b: list[list[float]] | None = None,
        num_train_timesteps: int = 1000,
        levels: list[list[float]] | None = None,
        use_flow_sigmas: bool = True,
    ) -> None:
        if times is None or timesteps is None or a is None or b is None:
            raise ValueError(
                "TableScheduler needs a table: use TableScheduler.from_sampler(sampler) or "
                "TableScheduler.from_pretrained(directory of Sampler.save)"
            )
        if not a or a[0] == 0.0:
            raise ValueError("a pipeline starts at scheduler.init_noise_sigma = a[0] times noise; a[0] must not be 0")
        numbers = [torch.tensor(value, dtype=torch.float64) for value in (times, timesteps, a, b)]
        # Over the state at which the pipeline starts, rather than over standard normal noise.
        self._table = Sampler(numbers[0], numbers[2] / a[0], numbers[3], clock=numbers[1])
        if levels is not None and (len(levels) != self._table.nfe or any(len(pair) != 2 for pair in levels)):
            raise ValueError(f"levels must hold one [alpha, sigma] per call, {self._table.nfe} in all, got {len(levels)}")
        self._clock: list[float] = [float(t) for t in timesteps]
        self._levels = None if levels is None else torch.as_tensor(levels, dtype=torch.float64)
        self.init_noise_sigma = float(a[0])
        self.sigmas = torch.cat([1.0 - self._table.times, torch.zeros(1)]).float()
        self._reset(None, None)

    @classmethod
    def from_sampler(cls, sampler: Sampler, *, path: AffinePath | None = None, sigma_data: float = 0.5) -> "TableScheduler":
        """The scheduler that gives a pipeline the images of `sampler`, to float32 rounding.

        Args:
            sampler: `sampler.provenance.raw` says what the pipeline's network returns, `sampler.clock` what it is handed.
            path: the path of that network. Default: rebuilt from `sampler.provenance.path`, which cannot be done for
                `DiscreteVP`; needed for raw="v_prediction" and "edm", and for `add_noise` and `scale_noise`.
            sigma_data: of the preconditioning that raw="edm" stands for; default: the sampler's provenance.

        Raises:
            ValueError: the table over bare outputs needs the path and it is not known, or is not finite; or `path` is not
                the sampler's.
        """
        known = sampler.provenance.path
        if path is not None and known not in ("", repr(path)):
            raise ValueError(f"this sampler was made for {known}, got path={path!r}")
        config = scheduler_config(sampler, path=path, sigma_data=sigma_data)
        if config is None:
            raise ValueError(
                f'no finite table over "{sampler.provenance.raw}" outputs can be made on path '
                f"{known or 'unknown'}; give the network's path: from_sampler(sampler, path=...)"
            )
        table = {key: value for key, value in config.items() if not key.startswith("_")}
        return cls(**table, levels=input_levels(sampler, path, sigma_data))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # diffusers' own signature, less what does not concern a folder
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # diffusers' loader passes its hub options along
    ) -> Any:
        """Load what `Sampler.save` or ``pipeline.save_pretrained`` wrote.

        Raises:
            ArtifactError: a sampler directory that was edited, or that holds no table over bare outputs.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / SAMPLER).is_file():
            sampler = read_sampler(folder)
            if not (folder / SCHEDULER).is_file():
                raise ArtifactError(
                    f"{folder} has no {SCHEDULER}: its table over bare outputs needs the network's path; use "
                    "TableScheduler.from_sampler(Sampler.load(directory), path=...)"
                )
            kwargs = {"levels": input_levels(sampler, None, None), **kwargs}
        return super().from_pretrained(
            str(pretrained_model_name_or_path), subfolder=subfolder, return_unused_kwargs=return_unused_kwargs, **kwargs
        )

    @property
    def step_index(self) -> int | None:
        """Index of the next call; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first call, where a pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this call (image-to-image pipelines)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Get ready for a run; everything that an earlier run left is forgotten.

        Args:
            num_inference_steps: must be the table's number of calls, if given.
            device: where `timesteps` shall be; `sigmas` stay on the CPU.
            sigmas: the pipeline's own schedule: must have the table's length, values are ignored.
            mu: ignored: a resolution-dependent shift would be another table.
            timesteps: as for `sigmas`.

        Raises:
            BudgetError: another number of steps than the table has.
        """
        n = self._table.nfe
        counts = {"num_inference_steps": num_inference_steps}
        counts |= {name: len(value) for name, value in (("sigmas", sigmas), ("timesteps", timesteps)) if value is not None}
        for name, count in counts.items():
            if count is not None and count != n:
                raise BudgetError(
                    f"this table makes exactly {n} network calls, got {count} {name}; call the pipeline with "
                    f"num_inference_steps={n}, or load a table for {count}"
                )
        self._reset(n, device)

    def _reset(self, steps: int | None, device: str | torch.device | None) -> None:
        self.num_inference_steps = steps
        self.timesteps = torch.tensor(self._clock, dtype=torch.float32, device=device)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._stepper: Stepper | None = None
        self._returned: Tensor | None = None
        self._version: int | None = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample: the table's states are what the network sees."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The call at this timestep; if several are, and it is not an element of `timesteps` itself, the first.

        Raises:
            ValueError: the table has none there.
        """
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and shared(timestep, self.timesteps):
            return int(timestep.storage_offset())  # one of ours: its place says which, without waiting for the device
        value = float(timestep)
        index = min(range(len(self._clock)), key=lambda i: abs(self._clock[i] - value))
        if abs(self._clock[index] - value) > NEAR * max(1.0, abs(value)):
            raise ValueError(f"timestep {value:g} is not in this table; its timesteps are {self._clock}")
        return index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the network's output at `sample` and return the next state.

        If the pipeline changed the sample since the last step (inpainting, callbacks), in place or not, the table goes on
        from the changed one. If it starts at a later call (image-to-image), the missing outputs are taken to equal the
        first one: exact for one-step methods, first order at this step for others.

        Args:
            model_output: (batch, *shape), the network's bare output.
            timestep: one of `timesteps`; only looked at in the first step, if no `begin_index` is set.
            sample: (batch, *shape).
            generator: unused, tables are deterministic.
            return_dict: return ``SchedulerOutput(prev_sample)`` rather than a tuple.

        Returns:
            The next state, in the dtype of `sample`.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or at a timestep that is not the table's.
        """
        if self.num_inference_steps is None:
            raise ValueError(f"call set_timesteps({self._table.nfe}) before step")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= self._table.nfe:
            raise ValueError(f"all {self._table.nfe} steps of this table are done; call set_timesteps for another run")
        if self._stepper is None:
            state = sample.to(torch.promote_types(sample.dtype, torch.float32), copy=True)
            self._stepper = resume(self._table.plan, self._table.a, self._table.b, self._step_index, state, model_output)
        else:
            self._follow(self._stepper, sample)
        state = self._stepper.advance(model_output)
        self._step_index += 1
        # A copy, where the pipeline might otherwise write to one of several tensors that hang together.
        copy = state.dtype == sample.dtype and not self._stepper.alone
        result = state.clone() if copy else state.to(sample.dtype)
        self._returned, self._version = result, _version(result)
        if self._step_index == self._table.nfe:
            self._forget()
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _follow(self, stepper: Stepper, sample: Tensor) -> None:
        """Move the stepper to the sample that came back, if it is not what was handed out."""
        version = _version(sample)
        if sample is self._returned and version is not None and version == self._version:
            return
        state = stepper.state
        stepper.shift(sample.to(state.dtype) - state.to(sample.dtype).to(state.dtype), self._table.a.tolist())

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state on the path between data and noise at these timesteps (one, or one per sample).

        Raises:
            ValueError: the table does not know its path, or has no such timestep.
        """
        if self._levels is None:
            raise ValueError("this table does not know its path; make it with TableScheduler.from_sampler(sampler, path=...)")
        index = [self.index_for_timestep(t) for t in torch.as_tensor(timesteps).reshape(-1)]
        levels = self._levels[index].to(original_samples.device, torch.promote_types(original_samples.dtype, torch.float32))
        alpha, sigma = levels.view(-1, 2, *[1] * (original_samples.ndim - 1)).unbind(1)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow pipelines use."""
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]


def _version(x: Tensor) -> int | None:
    """Counts writes to `x`; unknown for tensors of `torch.inference_mode`."""
    return None if x.is_inference() else x._version
