"""The stock schedulers of diffusers as tables: what every claim of fewstep is made against.

One row per scheduler and setting. Where a scheduler is defective as shipped, it is listed as shipped ("stock") and with the
schedule that it should have had ("corrected"); schedulers are imported one by one, when first used.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import torch

from ._conventions import convention
from ._types import BudgetError, NotLinearError
from ._unit_vectors import as_table, prepared, quiet
from .path import EDM, VP, AffinePath, CondOT, DiscreteVP
from .sampler import Sampler


@dataclass(frozen=True)
class Stock:
    """A stock scheduler as a table; `group` is "stock" for settings that diffusers offers, "corrected" for mended schedules."""

    sampler: Sampler
    group: Literal["stock", "corrected"]


def _shipped(scheduler: Any, nfe: int) -> Any:
    return prepared(scheduler, nfe)


def _even(scheduler: Any, nfe: int) -> Any:
    """The default of FlowMatchEuler spends its last call at sigma = 0.001, and shifts sigma_min twice; Flux passes these."""
    return prepared(scheduler, nfe, sigmas=torch.linspace(1.0, 1.0 / nfe, nfe, dtype=torch.float64).tolist())


def _even_heun(scheduler: Any, nfe: int) -> Any:
    """The same for FlowMatchHeun, which takes no sigmas but spaces them evenly down to sigma_min; n steps cost 2 n - 1."""
    scheduler = copy.copy(scheduler)
    scheduler.sigma_min = 2.0 / (nfe + 1)
    return prepared(scheduler, nfe)


def _finished(scheduler: Any, nfe: int) -> Any:
    """DEIS and SASolver repeat the last sigma of a flow, so that noise is left; 0 itself is singular in their formulas."""
    ready = prepared(scheduler, nfe)
    ready.sigmas[-1] = 1e-4
    return ready


def _ode(timestep: Any) -> int:
    """SASolver's noise, switched off."""
    return 0


@dataclass(frozen=True)
class _Row:
    """Name, module below diffusers.schedulers, class (less "Scheduler"), its settings, and how it is set to a budget."""

    name: str
    module: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    group: Literal["stock", "corrected"] = "stock"
    prepare: Callable[[Any, int], Any] = _shipped


_EULER = ("scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscrete")
_FLOW_HEUN = ("scheduling_flow_match_heun_discrete", "FlowMatchHeunDiscrete")
_MULTI = ("scheduling_dpmsolver_multistep", "DPMSolverMultistep")
_SINGLE = ("scheduling_dpmsolver_singlestep", "DPMSolverSinglestep")
_UNIPC = ("scheduling_unipc_multistep", "UniPCMultistep")
_DEIS = ("scheduling_deis_multistep", "DEISMultistep")
_SA = ("scheduling_sasolver", "SASolver")
_DDIM = ("scheduling_ddim", "DDIM")
_VE_EULER = ("scheduling_euler_discrete", "EulerDiscrete")
_HEUN = ("scheduling_heun_discrete", "HeunDiscrete")
_KDPM2 = ("scheduling_k_dpm_2_discrete", "KDPM2Discrete")
_PNDM = ("scheduling_pndm", "PNDM")
_EDM_MULTI = ("scheduling_edm_dpmsolver_multistep", "EDMDPMSolverMultistep")
_EDM_EULER = ("scheduling_edm_euler", "EDMEuler")

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_KARRAS = {"use_karras_sigmas": True}
_TRAILING = {"timestep_spacing": "trailing"}
_ONCE = {"lower_order_final": True}  # else Singlestep says on stderr, at each of its orders, that it switches this on

_FLOW_ROWS = (
    _Row("FlowMatchEuler", *_EULER),
    _Row("FlowMatchEuler-shift3", *_EULER, {"shift": 3.0}),
    _Row("FlowMatchEuler-karras", *_EULER, _KARRAS),
    _Row("FlowMatchEuler-beta", *_EULER, {"use_beta_sigmas": True}),
    _Row("FlowMatchEuler-even", *_EULER, {}, "corrected", _even),
    _Row("FlowMatchEuler-even-shift3", *_EULER, {"shift": 3.0}, "corrected", _even),
    _Row("FlowMatchHeun", *_FLOW_HEUN),
    _Row("FlowMatchHeun-even", *_FLOW_HEUN, {}, "corrected", _even_heun),
    _Row("FlowMatchHeun-even-shift3", *_FLOW_HEUN, {"shift": 3.0}, "corrected", _even_heun),
    _Row("DPMSolverMultistep2", *_MULTI, _FLOW),
    _Row("DPMSolverMultistep3", *_MULTI, _FLOW | {"solver_order": 3}),
    _Row("DPMSolverMultistep2-shift3", *_MULTI, _FLOW | {"flow_shift": 3.0}),
    _Row("DPMSolverMultistep3-shift3", *_MULTI, _FLOW | {"solver_order": 3, "flow_shift": 3.0}),
    _Row("DPMSolverSinglestep2", *_SINGLE, _FLOW | _ONCE),
    _Row("DPMSolverSinglestep3", *_SINGLE, _FLOW | _ONCE | {"solver_order": 3}),
    _Row("UniPC2", *_UNIPC, _FLOW),
    _Row("UniPC3", *_UNIPC, _FLOW | {"solver_order": 3}),
    _Row("UniPC2-shift3", *_UNIPC, _FLOW | {"flow_shift": 3.0}),
    _Row("UniPC3-shift3", *_UNIPC, _FLOW | {"solver_order": 3, "flow_shift": 3.0}),
    _Row("UniPC2-karras", *_UNIPC, _FLOW | _KARRAS),
    _Row("DEIS2", *_DEIS, _FLOW),
    _Row("DEIS3", *_DEIS, _FLOW | {"solver_order": 3}),
    _Row("DEIS2-finished", *_DEIS, _FLOW, "corrected", _finished),
    _Row("DEIS3-finished", *_DEIS, _FLOW | {"solver_order": 3}, "corrected", _finished),
    _Row("SASolver-ode", *_SA, _FLOW | {"tau_func": _ode}),
    _Row("SASolver-ode-finished", *_SA, _FLOW | {"tau_func": _ode}, "corrected", _finished),
)  # fmt: skip

_VP_ROWS = (
    _Row("DDIM", *_DDIM, {"clip_sample": False}),
    _Row("DDIM-trailing", *_DDIM, {"clip_sample": False} | _TRAILING),
    _Row("DPMSolverMultistep2", *_MULTI),
    _Row("DPMSolverMultistep3", *_MULTI, {"solver_order": 3}),
    _Row("DPMSolverMultistep2-trailing", *_MULTI, _TRAILING),
    _Row("DPMSolverMultistep3-trailing", *_MULTI, {"solver_order": 3} | _TRAILING),
    _Row("DPMSolverMultistep2-karras", *_MULTI, _KARRAS),
    _Row("DPMSolverMultistep3-karras", *_MULTI, {"solver_order": 3} | _KARRAS),
    _Row("DPMSolverMultistep2-lu", *_MULTI, {"use_lu_lambdas": True}),
    _Row("DPMSolverSinglestep2", *_SINGLE, _ONCE),
    _Row("DPMSolverSinglestep3", *_SINGLE, _ONCE | {"solver_order": 3}),
    _Row("DPMSolverSinglestep2-karras", *_SINGLE, _ONCE | _KARRAS),
    _Row("UniPC2", *_UNIPC),
    _Row("UniPC3", *_UNIPC, {"solver_order": 3}),
    _Row("UniPC2-trailing", *_UNIPC, _TRAILING),
    _Row("UniPC3-trailing", *_UNIPC, {"solver_order": 3} | _TRAILING),
    _Row("UniPC2-karras", *_UNIPC, _KARRAS),
    _Row("DEIS2", *_DEIS),
    _Row("DEIS3", *_DEIS, {"solver_order": 3}),
    _Row("DEIS2-trailing", *_DEIS, _TRAILING),
    _Row("DEIS3-trailing", *_DEIS, {"solver_order": 3} | _TRAILING),
    _Row("SASolver-ode", *_SA, {"tau_func": _ode}),
    _Row("Euler", *_VE_EULER),
    _Row("Euler-trailing", *_VE_EULER, _TRAILING),
    _Row("Euler-karras", *_VE_EULER, _KARRAS),
    _Row("Heun", *_HEUN),
    _Row("Heun-karras", *_HEUN, _KARRAS),
    _Row("KDPM2", *_KDPM2),
    _Row("KDPM2-karras", *_KDPM2, _KARRAS),
    _Row("LMS", "scheduling_lms_discrete", "LMSDiscrete"),
    _Row("PNDM", *_PNDM, {"set_alpha_to_one": True}),
    _Row("PLMS", *_PNDM, {"set_alpha_to_one": True, "skip_prk_steps": True}),
    _Row("PLMS-trailing", *_PNDM, {"set_alpha_to_one": True, "skip_prk_steps": True} | _TRAILING),
)  # fmt: skip

_EDM_ROWS = (
    _Row("EDMEuler", *_EDM_EULER),
    _Row("EDMEuler-exponential", *_EDM_EULER, {"sigma_schedule": "exponential"}),
    _Row("EDMDPMSolverMultistep2", *_EDM_MULTI),
    _Row("EDMDPMSolverMultistep3", *_EDM_MULTI, {"solver_order": 3}),
    _Row("EDMDPMSolverMultistep2-exponential", *_EDM_MULTI, {"sigma_schedule": "exponential"}),
)  # fmt: skip

LEVELS = 1000
"""Timesteps of the schedulers for a continuous VP path."""


def stock_samplers(path: AffinePath, nfe: int) -> dict[str, Stock]:
    """Every stock scheduler that fits `path` and can spend exactly `nfe` network calls, by name.

    Left out: UniPC with solver_type="bh1" (NaN at the final sigma of 0), Karras sigmas on flows except UniPC's and
    FlowMatchEuler's (diffusers puts EDM's sigmas of up to 157 where a flow's should be), and schedulers that draw noise. That
    most flow modes truncate the network's timesteps to integers is left as shipped: it is worth 1 % of the error.

    Args:
        path: CondOT, `DiscreteVP`, VP (whose schedulers have 1000 of its levels, as DDPM's) or EDM; no stock scheduler is for
            another path.
        nfe: network calls.

    Example:
        >>> from fewstep import CondOT
        >>> sorted(name for name in stock_samplers(CondOT(), 4) if name.startswith("UniPC2"))
        ['UniPC2', 'UniPC2-karras', 'UniPC2-shift3']
    """
    return dict(_samplers(path, nfe))


@lru_cache(maxsize=64)
def _samplers(path: AffinePath, nfe: int) -> tuple[tuple[str, Stock], ...]:
    return tuple(_tables(path, nfe))


def _tables(path: AffinePath, nfe: int) -> Iterator[tuple[str, Stock]]:
    for row, scheduler in _schedulers(path):
        try:
            ready = row.prepare(scheduler, nfe)
            # The scheduler keeps its levels in float32: the table is named after the path that they stand for.
            table = as_table(ready, replace(convention(scheduler), path=path), row.name)
        except (BudgetError, NotLinearError, ValueError):
            continue  # this one cannot spend this budget, or gives NaN for it
        yield row.name, Stock(table, row.group)


@lru_cache(maxsize=8)
def _schedulers(path: AffinePath) -> tuple[tuple[_Row, Any], ...]:
    """Kept between budgets: some take half a second to construct."""
    rows, shared = _fitting(path)
    made = []
    with quiet():
        for row in rows:
            home = import_module(f"diffusers.schedulers.{row.module}")
            made.append((row, getattr(home, f"{row.scheduler}Scheduler")(**shared, **row.settings)))
    return tuple(made)


def _fitting(path: AffinePath) -> tuple[tuple[_Row, ...], dict[str, Any]]:
    """The rows for a path, and the settings that all of their schedulers share."""
    if isinstance(path, CondOT):
        return _FLOW_ROWS, {}
    if isinstance(path, EDM):
        return _EDM_ROWS, {"sigma_min": path.sigma_min, "sigma_max": path.sigma_max}
    if isinstance(path, VP):  # on these levels both clocks are one
        path = DiscreteVP(path.coefficients(1.0 - torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS).alpha ** 2)
    if isinstance(path, DiscreteVP):
        before = torch.cat([torch.ones(1, dtype=torch.float64), path.levels[:-1]])
        return _VP_ROWS, {"num_train_timesteps": path.count, "trained_betas": (1.0 - path.levels / before).tolist()}
    return (), {}
