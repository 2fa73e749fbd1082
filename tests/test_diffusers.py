"""diffusers in both directions: imported tables against the real schedulers, and `TableScheduler` in real pipelines."""

import copy
import inspect
import json
import math

import diffusers.schedulers as schedulers
import pytest
import torch
from diffusers import DDPMPipeline, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from diffusers.models import AutoencoderKL

from fewstep import (
    EDM,
    VE,
    VP,
    ArtifactError,
    BudgetError,
    CondOT,
    Cosine,
    DiscreteVP,
    FewstepError,
    FieldError,
    NotLinearError,
    Provenance,
    Sampler,
    TableScheduler,
    TimeGrid,
    adapt,
    adapt_like,
    from_diffusers,
    methods,
    tabulate,
)
from fewstep._plan import Plan, Stepper, Term, make_plan
from fewstep._unit_vectors import _Doubles, _promote, prepared

# diffusers hands tensors to numpy in a way that numpy 2 announces to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x, timestep):
    """Non-linear in the state and in the timestep, whatever the scheduler takes its output for."""
    timestep = torch.as_tensor(timestep).to(x.dtype)
    timestep = timestep.reshape(-1, 1) if timestep.ndim else timestep
    return torch.tanh(x @ WEIGHT.to(x)) + 0.3 * torch.sin(timestep / 300) * x


def noise(batch=6, seed=3, dtype=torch.float32):
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_a_pipeline_does(ready, x, net=network):
    """Drive a scheduler that was set to its steps."""
    scale = getattr(ready, "scale_model_input", lambda sample, _: sample)
    x = x * float(getattr(ready, "init_noise_sigma", 1.0))
    for t in ready.timesteps:
        x = ready.step(net(scale(x, t), t), t, x, return_dict=False)[0]
    return x


def relative(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


def make(name, settings):
    if not hasattr(schedulers, f"{name}Scheduler"):
        pytest.skip(f"this diffusers has no {name}Scheduler")
    return getattr(schedulers, f"{name}Scheduler")(**settings)


def off(timestep):
    return 0


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
ONCE = {"lower_order_final": True}
ANY, ODD = (1, 4, 7), (1, 3, 7)

# Class, settings, budgets, and how well the scheduler's own float32 run agrees. Where that is worse than 5e-6, the formula
# of the scheduler loses digits in float32 (differences divided by a sigma of 0.001; a table over noise that is made of
# v at alpha = 0.006); the float64 comparison holds at 1e-10 for all.
CASES = [
    ("FlowMatchEulerDiscrete", {}, ANY, 1e-6),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, ANY, 1e-6),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, ANY, 1e-6),
    ("FlowMatchEulerDiscrete", KARRAS, ANY, 1e-6),
    ("FlowMatchHeunDiscrete", {}, ODD, 1e-4),
    ("FlowMapEulerDiscrete", {}, ANY, 1e-6),
    ("LTXEulerAncestralRF", {"eta": 0.0}, ANY, 1e-6),
    ("DPMSolverMultistep", {}, ANY, 5e-6),
    ("DPMSolverMultistep", {"solver_order": 3}, ANY, 5e-6),
    ("DPMSolverMultistep", {"solver_type": "heun"}, ANY, 5e-6),
    ("DPMSolverMultistep", KARRAS, ANY, 5e-6),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}, ANY, 5e-6),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing"}, ANY, 5e-6),
    ("DPMSolverMultistep", {"prediction_type": "sample"}, ANY, 5e-6),
    ("DPMSolverMultistep", V, ANY, 1e-4),
    ("DPMSolverMultistep", FLOW, ANY, 5e-6),
    ("DPMSolverMultistep", FLOW | {"solver_order": 3, "flow_shift": 3.0}, ANY, 5e-6),
    ("DPMSolverSinglestep", ONCE, ANY, 5e-6),
    ("DPMSolverSinglestep", ONCE | {"solver_order": 3}, ANY, 5e-6),
    ("DPMSolverSinglestep", ONCE | FLOW, ANY, 5e-6),
    ("UniPCMultistep", {}, ANY, 5e-6),
    ("UniPCMultistep", {"solver_order": 3}, ANY, 5e-6),
    ("UniPCMultistep", V, ANY, 1e-4),
    ("UniPCMultistep", FLOW, ANY, 5e-6),
    ("UniPCMultistep", FLOW | {"solver_order": 3}, ANY, 5e-6),
    ("DEISMultistep", {}, ANY, 5e-6),
    ("DEISMultistep", {"solver_order": 3}, ANY, 5e-6),
    ("DEISMultistep", FLOW, ANY, 2e-4),
    ("SASolver", {"tau_func": off}, ANY, 5e-6),
    ("SASolver", FLOW | {"tau_func": off}, ANY, 5e-6),
    ("DDIM", {"clip_sample": False}, ANY, 5e-6),
    ("DDIM", {"clip_sample": False} | V, ANY, 5e-6),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, ANY, 5e-6),
    ("DDIMParallel", {"clip_sample": False}, ANY, 5e-6),
    ("CogVideoXDDIM", {}, ANY, 5e-6),
    ("EulerDiscrete", {}, ANY, 5e-6),
    ("EulerDiscrete", KARRAS, ANY, 5e-6),
    ("EulerDiscrete", V, ANY, 2e-4),
    ("HeunDiscrete", {}, ODD, 5e-5),
    ("KDPM2Discrete", {}, ODD, 5e-6),
    ("LMSDiscrete", {}, ANY, 5e-6),
    ("PNDM", {}, (13, 15), 5e-6),
    ("PNDM", {"skip_prk_steps": True}, (3, 5, 8), 5e-6),
    ("IPNDM", {}, (2, 5, 8), 5e-6),
    ("EDMEuler", {}, ANY, 1e-4),
    ("EDMEuler", {"sigma_schedule": "exponential"}, ANY, 1e-4),
    ("EDMDPMSolverMultistep", {}, ANY, 5e-6),
    ("EDMDPMSolverMultistep", {"solver_order": 3, "sigma_data": 0.7}, ANY, 5e-6),
]

REFUSED = [
    ("DDIM", {}, "clips or thresholds the data prediction; use clip_sample=False"),
    ("DDIM", {"clip_sample": False, "thresholding": True}, "use thresholding=False"),
    (
        "DDIM",
        {"clip_sample": True, "clip_sample_range": 10.0, "thresholding": True},
        "clip_sample=False and thresholding=False",
    ),
    ("DDIMParallel", {}, "use clip_sample=False"),
    ("DPMSolverMultistep", {"thresholding": True}, "use thresholding=False"),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, r'draws noise; use algorithm_type="dpmsolver\+\+"'),
    ("DDPM", {"clip_sample": False}, "draws noise; use eta=0"),
    ("DDPMParallel", {}, "draws noise"),
    ("EulerAncestralDiscrete", {}, "draws noise"),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "draws noise; use eta=0, stochastic_sampling=False"),
    ("FlowMatchLCM", {}, "draws noise"),
    ("LCM", {}, "draws noise"),
    ("LTXEulerAncestralRF", {}, "draws noise"),
    ("SASolver", {}, "draws noise"),
    ("TCD", {}, "draws noise"),
    ("UnCLIP", {}, "draws noise"),
    ("UniPCMultistep", FLOW | {"solver_type": "bh1"}, 'gives NaN or infinity after call .* for UniPC use solver_type="bh2"'),
    ("DDIMInverse", {}, "walks from data to noise"),
    ("DPMSolverMultistepInverse", {}, "walks from data to noise"),
    ("CogVideoXDPM", {}, "step needs more than a model output, a timestep and a sample"),
    ("RePaint", {}, "step needs more than a model output, a timestep and a sample"),
    ("SCM", {}, "cannot tell what network SCMScheduler .prediction_type='trigflow'. belongs to"),
    ("CMStochasticIterative", {}, "cannot tell what network"),
    ("EDMEuler", V, "cannot tell what network"),
    ("EulerDiscrete", V | {"timestep_type": "continuous"}, "cannot tell what network"),
    ("DDIM", V | {"clip_sample": False, "rescale_betas_zero_snr": True}, "use rescale_betas_zero_snr=False"),
]


def label(case):
    name, settings, *_ = case
    return "-".join([name, *(f"{k}={getattr(v, '__name__', v)}" for k, v in settings.items())])


# --- imported tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=label)
def test_an_imported_table_is_the_scheduler(case):
    name, settings, budgets, tolerance = case
    scheduler = make(name, settings)
    model = adapt_like(network, scheduler, shape=(8,))
    for nfe in budgets:
        sampler = from_diffusers(scheduler, nfe)
        assert sampler.nfe == nfe
        replay = TableScheduler.from_sampler(sampler, path=model.path, sigma_data=model.sigma_data)
        # The scheduler's formulas, with its own constants, in float64.
        exact = prepared(scheduler, nfe)
        assert torch.equal(sampler.clock, exact.timesteps.double())
        _promote(exact)
        with _Doubles():
            expected = as_a_pipeline_does(exact, noise(dtype=torch.float64))
        replay.set_timesteps(nfe)
        replay.timesteps = sampler.clock  # float32 timesteps are part of the replay, not of the table
        assert relative(as_a_pipeline_does(replay, noise(dtype=torch.float64)), expected) < 1e-10
        # The scheduler as it is, the executor and the replay, all in float32.
        shipped = as_a_pipeline_does(prepared(scheduler, nfe), noise())
        replay.set_timesteps(nfe)
        assert relative(sampler(model.given(), noise()), shipped) < tolerance
        assert relative(as_a_pipeline_does(replay, noise()), shipped) < tolerance


@pytest.mark.parametrize("case", REFUSED, ids=label)
def test_a_scheduler_that_is_no_table_is_refused(case):
    name, settings, message = case
    with pytest.raises(NotLinearError, match=message):
        from_diffusers(make(name, settings), 4)


def test_every_other_scheduler_of_diffusers_is_imported_or_refused_by_name():
    known = {name for name, *_ in CASES + REFUSED}
    refusals = {}
    for name in (
        name for name in dir(schedulers) if name.endswith("Scheduler") and name.removesuffix("Scheduler") not in known
    ):
        try:
            scheduler = getattr(schedulers, name)()
        except Exception:  # needs another package, or arguments that only its own pipeline has
            continue
        try:
            from_diffusers(scheduler, 4)
        except (FewstepError, ValueError) as error:
            refusals[name] = str(error)
    assert all(name in message for name, message in refusals.items())


def test_probing_draws_nothing_from_the_caller_and_leaves_the_scheduler_alone():
    scheduler = schedulers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(7)
    state, steps = torch.get_rng_state(), scheduler.timesteps.clone()
    with pytest.raises(NotLinearError):
        from_diffusers(scheduler, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scheduler.timesteps, steps)
    assert scheduler.sigmas.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "nfe", "message"),
    [
        ("FlowMatchHeunDiscrete", {}, 6, "cannot make exactly 6 network calls; it can make 5 and 7"),
        ("HeunDiscrete", {}, 2, "it can make 1 and 3"),
        ("PNDM", {}, 8, "cannot make exactly 8 network calls; it can make 13"),
        ("DDIM", {"clip_sample": False}, 0, "at least one network call, got nfe=0"),
    ],
)
def test_a_budget_that_a_scheduler_cannot_spend(name, settings, nfe, message):
    with pytest.raises(BudgetError, match=message):
        from_diffusers(make(name, settings), nfe)


def test_a_scheduler_that_takes_no_number_of_steps():
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.set_timesteps\(4\) fails: ValueError: .*mu"):
        from_diffusers(schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_given_schedules():
    euler = schedulers.FlowMatchEulerDiscreteScheduler()
    sampler = from_diffusers(euler, 3, sigmas=[1.0, 0.7, 0.2])
    torch.testing.assert_close(sampler.times, torch.tensor([0.0, 0.3, 0.8], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(sampler.b[-1], torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), rtol=0, atol=1e-7)
    unipc = schedulers.UniPCMultistepScheduler(**FLOW)
    assert from_diffusers(unipc, 3, sigmas=[0.9, 0.7, 0.2]).clock.tolist() == [900, 700, 200]
    dpm = schedulers.DPMSolverMultistepScheduler()
    assert from_diffusers(dpm, 2, timesteps=[900, 300]).clock.tolist() == [900, 300]
    shifted = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert from_diffusers(shifted, 2, sigmas=[1.0, 0.5], mu=1.0).times[1] == pytest.approx(1 - 1 / (1 + math.exp(-1)), abs=1e-6)
    ramp = from_diffusers(schedulers.EDMEulerScheduler(), 3, sigmas=[0.0, 0.3, 1.0])  # diffusers maps a ramp to sigmas
    assert ramp.times[-1] == pytest.approx(1 - 0.002 / 80)
    with pytest.raises(BudgetError, match="makes 3 network calls on the given sigmas, not 4"):
        from_diffusers(euler, 4, sigmas=[1.0, 0.7, 0.2])
    with pytest.raises(ValueError, match=r"DDIMScheduler.set_timesteps takes no sigmas; it takes num_inference_steps, device"):
        from_diffusers(schedulers.DDIMScheduler(clip_sample=False), 3, sigmas=[1.0, 0.7, 0.2])


def test_an_import_knows_its_conventions():
    flow = from_diffusers(schedulers.FlowMatchEulerDiscreteScheduler(), 4)
    assert (flow.predicts, flow.provenance.raw, flow.provenance.path) == ("velocity", "negated", "CondOT()")
    assert flow.provenance.method == "FlowMatchEulerDiscreteScheduler"
    assert "diffusers" in flow.provenance.versions
    mochi = from_diffusers(schedulers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4)
    assert (mochi.predicts, mochi.provenance.raw, mochi.clock[0]) == ("velocity", "plain", 0.0)
    euler = schedulers.EulerDiscreteScheduler()
    diffusion = from_diffusers(euler, 4)
    assert (diffusion.predicts, diffusion.provenance.raw) == ("noise", "plain")
    assert diffusion.provenance.path == repr(DiscreteVP(euler.alphas_cumprod))
    assert diffusion.a[0] == pytest.approx(1.0, abs=1e-4)  # in the network's input, which the scheduler divides by 157
    edm = from_diffusers(schedulers.EDMEulerScheduler(), 4)
    assert (edm.predicts, edm.provenance.raw, edm.provenance.path) == ("data", "edm", repr(EDM()))
    assert edm.a[0] == pytest.approx(80.0, abs=0.01)
    with pytest.raises(FieldError, match="made for CondOT"):
        flow(adapt(lambda x, t: x, path=Cosine()).given(), noise())


# --- TableScheduler --------------------------------------------------------------------------------------------------


def table(n=4, **changes):
    euler = tabulate(methods.euler, TimeGrid.uniform(n))
    made = {"provenance": Provenance(path="CondOT()"), **changes}
    return Sampler(euler.times, euler.a, euler.b, **made)


def set_up(sampler, **options):
    scheduler = TableScheduler.from_sampler(sampler, **options)
    scheduler.set_timesteps(sampler.nfe)
    return scheduler


def test_set_timesteps_takes_what_pipelines_pass():
    scheduler = TableScheduler.from_sampler(table(clock=torch.tensor([1000.0, 750.0, 500.0, 250.0])))
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    scheduler.set_timesteps(4, "cpu", sigmas=[1.0, 0.7, 0.4, 0.1], mu=1.15)
    scheduler.set_timesteps(timesteps=[999, 600, 300, 1])
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == 4
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    assert scheduler.config["use_flow_sigmas"]
    assert scheduler.compatibles == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_inference_steps": 50},
            "makes exactly 4 network calls, got 50 num_inference_steps; call .* num_inference_steps=4",
        ),
        ({"sigmas": [1.0, 0.5]}, "got 2 sigmas"),
        ({"timesteps": [999]}, "got 1 timesteps"),
    ],
)
def test_another_number_of_steps(asked, message):
    with pytest.raises(BudgetError, match=message):
        TableScheduler.from_sampler(table()).set_timesteps(**asked)


def test_steps_out_of_turn():
    scheduler = TableScheduler.from_sampler(table(2))
    x = noise()
    with pytest.raises(ValueError, match=r"call set_timesteps\(2\) before step"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep 0.3 is not in this table; its timesteps are \[0.0, 0.5\]"):
        scheduler.step(x, 0.3, x)
    with pytest.raises(FieldError, match="the state's shape"):
        scheduler.step(x[:1], 0.0, x)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match="all 2 steps of this table are done; call set_timesteps"):
        scheduler.step(x, 0.5, x)
    scheduler.set_timesteps(2)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    assert scheduler.step(x, 0.0, x, return_dict=False)[0].shape == x.shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "TableScheduler needs a table: use TableScheduler.from_sampler"),
        ({"times": [0.0], "timesteps": [0.0], "a": [0.0, 1.0], "b": [[0.0], [1.0]]}, r"a\[0\] must not be 0"),
        ({"times": [0.0], "timesteps": [0.0], "a": [], "b": []}, r"a\[0\] must not be 0"),
        ({"times": [0.0], "timesteps": [0.0], "a": [1.0, 1.0], "b": [[1.0], [1.0]]}, "b must be zero on and above"),
        ({"times": [0.0], "timesteps": [0.0, 1.0], "a": [1.0, 1.0], "b": [[0.0], [1.0]]}, "clock must have one entry per call"),
        ({"times": [0.0], "timesteps": [0.0], "a": [1.0, 1.0], "b": [[0.0], [1.0]], "levels": [[1.0]]}, "levels must hold"),
    ],
)
def test_a_config_that_is_no_table(config, message):
    with pytest.raises(ValueError, match=message):
        TableScheduler(**config)


def test_an_initial_scale():
    path = VE()
    sampler = tabulate(methods.heun, TimeGrid.uniform(3), start_scale=path.start_scale)
    scheduler = set_up(sampler, path=path)
    assert scheduler.init_noise_sigma == 50.0
    torch.testing.assert_close(as_a_pipeline_does(scheduler, noise()), sampler(network, noise()))


def test_the_path_that_a_raw_table_needs():
    scheduler = schedulers.DPMSolverMultistepScheduler(**V)
    sampler = from_diffusers(scheduler, 4)
    with pytest.raises(ValueError, match=r'no finite table over "v_prediction" outputs .* from_sampler\(sampler, path=...\)'):
        TableScheduler.from_sampler(sampler)
    TableScheduler.from_sampler(sampler, path=DiscreteVP(scheduler.alphas_cumprod))
    with pytest.raises(ValueError, match=r"made for DiscreteVP.*, got path=CondOT\(\)"):
        TableScheduler.from_sampler(sampler, path=CondOT())


@pytest.mark.parametrize("target", ["velocity", "data"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_a_rebased_table_is_exported_for_the_network_that_it_was_made_for(kind, target):
    if kind == "flow":
        scheduler, path = schedulers.UniPCMultistepScheduler(**FLOW), CondOT()
    else:
        scheduler = schedulers.DPMSolverMultistepScheduler(prediction_type=kind)
        path = DiscreteVP(scheduler.alphas_cumprod)
    sampler = from_diffusers(scheduler, 4)
    rebased = sampler.rebase(path, target)
    images = [as_a_pipeline_does(set_up(s, path=path), noise(dtype=torch.float64)) for s in (sampler, rebased)]
    assert relative(images[1], images[0]) < 1e-6
    assert rebased.rebase(path, sampler.predicts).provenance == sampler.provenance


def test_a_table_made_for_no_network_is_exported_for_the_prediction_that_it_combines():
    sampler = tabulate(methods.ddim(VP()), TimeGrid.log_snr(4, VP())).rebase(VP(), "noise")
    assert sampler.provenance.raw == "plain"
    assert set_up(sampler, path=VP()).config["b"] == sampler.b.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_pipeline_keeps_a_float32_state(dtype):
    sampler = from_diffusers(schedulers.UniPCMultistepScheduler(**FLOW), 8)
    scheduler, start = set_up(sampler), noise().to(dtype)
    seen, x = [], start
    for t in scheduler.timesteps:
        seen.append(x)
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert x.dtype == dtype
    calls = iter(seen)
    # The executor on the outputs that the half-precision network gave: only the last rounding is between them.
    exact = sampler(lambda _, t: -network(next(calls), 1000 * (1 - t)).float(), start.float())
    assert relative(x.float(), exact) < torch.finfo(dtype).eps


def test_a_copy_goes_its_own_way():
    sampler = from_diffusers(schedulers.DPMSolverMultistepScheduler(**FLOW), 4)
    scheduler = set_up(sampler)
    t = scheduler.timesteps
    x = scheduler.step(network(noise(), t[0]), t[0], noise()).prev_sample
    other = copy.deepcopy(scheduler)
    ends = []
    for run in (scheduler, other):
        y = x
        for k in (1, 2, 3):
            y = run.step(network(y, t[k]), t[k], y).prev_sample
        ends.append(y)
    torch.testing.assert_close(*ends)
    torch.testing.assert_close(
        ends[0], sampler(adapt_like(network, schedulers.FlowMatchEulerDiscreteScheduler()).given(), noise())
    )


# --- latents that a pipeline edits between the steps -------------------------------------------------------------------


def edited(scheduler, x, edit, inplace, net=network):
    for k, t in enumerate(scheduler.timesteps):
        if k and inplace:
            x.copy_(edit(x, k))
        elif k:
            x = edit(x, k)
        x = scheduler.step(net(x, t), t, x).prev_sample
    return x


def blend(x, k):
    """Inpainting: a part of the state is replaced."""
    known = noise(seed=10 + k).to(x.dtype)
    return torch.cat([known[:, :3], x[:, 3:]], dim=1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_edited_latents_under_a_one_step_method(inplace, dtype):
    scheduler = set_up(table(5))
    x = noise(dtype=torch.float64).to(dtype)
    state = x.to(torch.promote_types(dtype, torch.float32))
    for k, t in enumerate(scheduler.timesteps):
        if k:
            rounded = state.to(dtype)
            state = state + (blend(rounded, k).to(state.dtype) - rounded.to(state.dtype))
        state = state + 0.2 * network(state.to(dtype), t).to(state.dtype)
    result = edited(scheduler, x.clone(), blend, inplace)
    torch.testing.assert_close(result, state.to(dtype))


@pytest.mark.parametrize("inplace", [False, True])
def test_edited_latents_under_pfdiff_move_its_base_along(inplace):
    """Against the algorithm, step by step: the base of the macro step moves by what was added to the springboard."""
    sampler = tabulate(methods.pfdiff(skip=1, ahead=1), TimeGrid.uniform(7))
    g = torch.linspace(0, 1, 8, dtype=torch.float64)
    x = noise(dtype=torch.float64)
    q = network(x, g[0])
    x = x + (g[1] - g[0]) * q
    for i in (1, 3, 5):
        y = x + (g[i + 1] - g[i]) * q
        moved = blend(y, (i + 1) // 2) - y
        q = network(y + moved, g[i + 1])
        x = x + moved + (g[i + 2] - g[i]) * q
    scheduler = set_up(sampler)
    scheduler.timesteps = sampler.times
    torch.testing.assert_close(edited(scheduler, noise(dtype=torch.float64), blend, inplace), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverSinglestep", "PNDM", "LMSDiscrete"])
def test_edits_do_not_depend_on_how_the_table_is_executed(name):
    sampler = from_diffusers(make(name, ONCE if "Single" in name else {}), 13)
    n, full = sampler.nfe, torch.cat([sampler.a[:, None], sampler.b], dim=1)
    rows = tuple(
        tuple(Term(float(full[i, c]), "u" if c else "x", c - 1) for c in range(i + 1)) for i in range(n + 1)
    )  # no recurrences, nothing dropped
    plain = Plan(rows, ((),) * (n + 1))
    ends = []
    for plan in (make_plan(sampler.a.numpy(), sampler.b.numpy()), plain):
        stepper = Stepper(plan, noise(dtype=torch.float64), reuse=False)
        for k in range(n):
            if k in (2, 5, 8):
                stepper.shift(noise(seed=k, dtype=torch.float64), sampler.a.tolist())
            stepper.advance(network(stepper.state, sampler.clock[k]))
        ends.append(stepper.state)
    assert relative(*ends) < 1e-10


def test_edits_under_inference_mode():
    with torch.inference_mode():
        scheduler = set_up(table(3))
        result = edited(scheduler, noise(), blend, inplace=False)
    torch.testing.assert_close(result, edited(set_up(table(3)), noise(), blend, inplace=False))


def test_the_pipelines_own_latents_are_never_written_to():
    sampler = from_diffusers(schedulers.UniPCMultistepScheduler(**FLOW), 5)
    scheduler, start = set_up(sampler), noise()
    seen = [start]
    for t in scheduler.timesteps:
        seen.append(scheduler.step(network(seen[-1], t), t, seen[-1]).prev_sample)
    kept = [x.clone() for x in seen]
    scheduler.set_timesteps(5)
    x = start
    for k, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(x, kept[k], rtol=0, atol=0)
        x = scheduler.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(torch.stack(seen), torch.stack(kept), rtol=0, atol=0)


# --- image to image ------------------------------------------------------------------------------------------------------


def test_starting_late_is_exact_for_one_step_methods():
    sampler, data = from_diffusers(schedulers.DDIMScheduler(clip_sample=False), 6), noise(seed=5)
    path = DiscreteVP(schedulers.DDIMScheduler().alphas_cumprod)
    scheduler = set_up(sampler, path=path)
    start = scheduler.timesteps[2:]
    x = scheduler.add_noise(data, noise(), start[:1].repeat(len(data)))
    alpha, sigma, *_ = path.coefficients(sampler.times[2])
    torch.testing.assert_close(x, (alpha * data + sigma * noise()).float())
    scheduler.set_begin_index(2)
    ours, stock = x, schedulers.DDIMScheduler(clip_sample=False)
    stock.set_timesteps(6)
    expected = x
    for t in start:
        ours = scheduler.step(network(ours, t), t, ours).prev_sample
        expected = stock.step(network(expected, t), t.long(), expected).prev_sample
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_starting_late_is_exact_on_a_constant_field_for_all():
    sampler = from_diffusers(schedulers.UniPCMultistepScheduler(**FLOW, solver_order=3), 8)
    scheduler, data = set_up(sampler), noise(seed=5, dtype=torch.float64)
    start = noise(dtype=torch.float64)
    for begin in (1, 4, 7):
        scheduler.set_timesteps(8)
        sigma = float(-(sampler.b[begin]).sum()) + 1  # where the table's own state is
        x = sigma * start + (1 - sigma) * data
        x = start + (data - start) * float(sampler.b[begin].sum()) if begin else x
        for t in scheduler.timesteps[begin:]:  # no begin index: found from the timestep
            x = scheduler.step(start - data, t, x).prev_sample
        end = start + (data - start) * float(sampler.b[-1].sum())
        torch.testing.assert_close(x, end)


def test_a_table_that_cannot_start_late():
    sampler = Sampler(
        torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    )
    scheduler = set_up(sampler)
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match=r"cannot start at call 1: .* \(a = 0\)"):
        scheduler.step(noise(), 0.5, noise())


def test_noising_flow_and_edm_states():
    scheduler = set_up(from_diffusers(schedulers.FlowMatchEulerDiscreteScheduler(), 4, sigmas=[1.0, 0.75, 0.5, 0.25]))
    data = noise(seed=5)
    torch.testing.assert_close(scheduler.scale_noise(data, scheduler.timesteps[1], noise()), 0.25 * data + 0.75 * noise())
    per_sample = scheduler.add_noise(data[:2], noise()[:2], torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(per_sample, torch.stack([0.75 * data[0] + 0.25 * noise()[0], noise()[1]]))
    edm = schedulers.EDMEulerScheduler()
    ours = set_up(from_diffusers(edm, 4))
    edm.set_timesteps(4)
    t = edm.timesteps[1:2]
    theirs = edm.scale_model_input(edm.add_noise(data, noise(), t), t[0])  # our states are what the network sees
    torch.testing.assert_close(ours.add_noise(data, noise(), t), theirs)
    assert ours.scale_noise(data.bfloat16(), t, noise().bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="does not know its path"):
        set_up(table(provenance=Provenance())).scale_noise(data, 0.0, noise())


# --- in pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


def images(pipe, nfe, **options):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(generator=generator, num_inference_steps=nfe, output_type="np", **options).images)


def drawn(sampler, field, batch=2):
    """What `DDPMPipeline` makes of the executor's samples."""
    x = sampler(field, torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


PIPELINE_CASES = [
    ("FlowMatchEulerDiscrete", {}),
    ("UniPCMultistep", FLOW),
    ("UniPCMultistep", {}),
    ("DPMSolverMultistep", V),
    ("DPMSolverMultistep", {"prediction_type": "sample"}),
]


@pytest.mark.parametrize("case", PIPELINE_CASES, ids=label)
def test_a_pipeline_gives_the_executors_images(case, unet, tmp_path):
    scheduler = make(*case)
    sampler, model = from_diffusers(scheduler, 6), adapt_like(unet, scheduler, shape=(1, 8, 8))
    pipe = DDPMPipeline(unet, TableScheduler.from_sampler(sampler, path=model.path))
    first = images(pipe, 6, batch_size=2)
    assert relative(first, drawn(sampler, model.given())) < 3e-5
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, TableScheduler)
    assert torch.equal(images(again, 6, batch_size=2), first)
    with pytest.raises(BudgetError, match="makes exactly 6 network calls"):
        images(again, 50)


def test_a_saved_sampler_in_a_pipeline(unet, tmp_path):
    flow = schedulers.FlowMatchEulerDiscreteScheduler()
    model = adapt_like(unet, flow, shape=(1, 8, 8))
    tuned = tabulate(methods.pfdiff(skip=1, ahead=1), TimeGrid.uniform(7))
    made = Provenance(method="pfdiff", path=repr(model.path), raw=model.raw)
    sampler = Sampler(tuned.times, tuned.a, tuned.b, clock=1000 * (1 - tuned.times), provenance=made)
    sampler.save(tmp_path / "fast-4")
    pipe = DDPMPipeline(unet, flow)
    pipe.scheduler = TableScheduler.from_pretrained(tmp_path / "fast-4")
    assert relative(images(pipe, 4, batch_size=2), drawn(sampler, model.given())) < 1e-5
    data = noise()
    torch.testing.assert_close(pipe.scheduler.scale_noise(data, 1000.0, 2 * data), 2 * data)  # the path came along
    below = TableScheduler.from_pretrained(str(tmp_path), subfolder="fast-4")
    assert below.config["b"] == pipe.scheduler.config["b"]


def test_an_edited_sampler_is_refused(tmp_path):
    folder = table().save(tmp_path / "fast")
    config = folder / "scheduler_config.json"
    content = json.loads(config.read_text())
    content["a"][1] = 2.0
    config.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"scheduler_config.json"):
        TableScheduler.from_pretrained(folder)


def test_a_sampler_without_a_table_over_bare_outputs(tmp_path):
    folder = from_diffusers(schedulers.DPMSolverMultistepScheduler(**V), 4).save(tmp_path / "fast")
    with pytest.raises(ArtifactError, match=r"has no scheduler_config.json: .*TableScheduler.from_sampler\(Sampler.load"):
        TableScheduler.from_pretrained(folder)


def test_a_guided_latent_pipeline_that_rebuilds_its_latents_at_every_step():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, sample_size=4).eval()
    stock = schedulers.DPMSolverMultistepScheduler(solver_order=3)
    pipe = DiTPipeline(transformer, vae, stock)
    expected = images(pipe, 7, class_labels=[1, 2], guidance_scale=2.0)
    pipe.scheduler = TableScheduler.from_sampler(from_diffusers(stock, 7))
    assert relative(images(pipe, 7, class_labels=[1, 2], guidance_scale=2.0), expected) < 1e-5


def test_the_config_is_plain_json_and_keeps_every_bit(tmp_path):
    sampler = from_diffusers(schedulers.UniPCMultistepScheduler(solver_order=3), 9)
    scheduler = TableScheduler.from_sampler(sampler)
    scheduler.save_pretrained(tmp_path)
    again = TableScheduler.from_pretrained(tmp_path)
    assert torch.equal(torch.tensor(again.config["b"], dtype=torch.float64), sampler.b)
    assert again.config["timesteps"] == sampler.clock.tolist()
    swapped = schedulers.FlowMatchEulerDiscreteScheduler.from_config({"shift": 2.0})
    with pytest.raises(ValueError, match="TableScheduler needs a table"):
        TableScheduler.from_config(swapped.config)


def test_the_signature_that_pipelines_inspect():
    parameters = set(inspect.signature(TableScheduler.set_timesteps).parameters)
    assert {"sigmas", "timesteps", "mu", "device", "num_inference_steps"} <= parameters


# --- adapt_like ------------------------------------------------------------------------------------------------------------


def test_adapt_like_reads_every_convention():
    vp = schedulers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100)
    expected = {
        schedulers.FlowMatchEulerDiscreteScheduler(): (CondOT(), "velocity", "negated", 750.0),
        schedulers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True): (CondOT(), "velocity", "plain", 250.0),
        schedulers.UniPCMultistepScheduler(**FLOW): (CondOT(), "velocity", "negated", 750.0),
        vp: (DiscreteVP(vp.alphas_cumprod), "noise", "plain", 74.0),
        schedulers.EDMEulerScheduler(sigma_max=40.0): (EDM(sigma_max=40.0), "data", "edm", torch.tensor(30.0).log().item() / 4),
        schedulers.IPNDMScheduler(): (Cosine(), "noise", "v_prediction", 0.75),
    }
    for scheduler, (path, predicts, raw, clock) in expected.items():
        model = adapt_like(network, scheduler)
        assert (model.path, model.predicts, model.raw) == (path, predicts, raw)
        assert float(model.clock(0.25)) == pytest.approx(clock)


def test_adapt_like_passes_its_options_on(unet):
    model = adapt_like(
        unet, schedulers.FlowMatchEulerDiscreteScheduler(), shape=(1, 8, 8), null_label=10, classes=10, max_batch=2, name="tiny"
    )
    assert (model.shape, model.label_key, model.null_label, model.classes) == ((1, 8, 8), "class_labels", 10, 10)
    assert (model.max_batch, model.name) == (2, "tiny")
    asked = adapt_like(unet, schedulers.FlowMatchEulerDiscreteScheduler(), call=lambda net, x, t, condition: net(x, t).sample)
    torch.testing.assert_close(asked.given()(torch.ones(1, 1, 8, 8), 0.5), model.given()(torch.ones(1, 1, 8, 8), 0.5))
    with pytest.raises(NotLinearError, match="cannot tell what network SCMScheduler"):
        adapt_like(unet, schedulers.SCMScheduler())
