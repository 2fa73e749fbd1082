import itertools

import numpy as np
import pytest
import torch

from fewstep import VP, CondOT, DiscreteVP, TimeGrid, adapt, methods, tabulate
from methods.published import Schedule, ddim_step, multistep_plus, singlestep
from problems import Recorder, ShearedSpiral, mixture, randn, rms, slope, small_start

VP_GRID = TimeGrid(torch.linspace(0.0, 0.97, 9, dtype=torch.float64) ** 0.8)


def predictor(problem, which):
    """The mixture's data or noise prediction for numpy arrays."""
    index = {"data": 0, "noise": 1}[which]
    return lambda x, t: problem._expected(torch.from_numpy(x), t)[index].numpy()


@pytest.mark.parametrize("plus", [True, False], ids=["dpmpp", "dpm"])
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_solvers_are_the_published_ones(order, plus):
    path, noise = VP(), randn(6, 2)
    problem, schedule, which = mixture(path), Schedule(path), "data" if plus else "noise"
    x, knots = noise.numpy(), VP_GRID.knots.tolist()
    for s, t in itertools.pairwise(knots):
        x, _ = singlestep(schedule, predictor(problem, which), x, s, t, order, plus)
    method = methods.dpm_single(path, order, which)
    np.testing.assert_allclose(method(problem.velocity, VP_GRID, noise).numpy(), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_solvers_are_the_published_ones(order):
    path, noise = VP(), randn(6, 2)
    problem = mixture(path)
    expected = multistep_plus(Schedule(path), predictor(problem, "data"), noise.numpy(), VP_GRID.knots.tolist(), order)
    got = methods.dpmpp(path, order)(problem.velocity, VP_GRID, noise)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [VP(), CondOT()], ids=["VP", "CondOT"])
def test_ddim_is_the_published_one(path):
    grid, noise = TimeGrid.uniform(7), randn(6, 2)
    problem, schedule = mixture(path), Schedule(path)
    x, knots = noise.numpy(), grid.knots.tolist()
    for s, t in itertools.pairwise(knots):
        v = problem.velocity(torch.from_numpy(x), s).numpy()
        x = ddim_step(schedule, x, *schedule.both(v, x, s), t)
    np.testing.assert_allclose(methods.ddim(path)(problem.velocity, grid, noise).numpy(), x, rtol=1e-9, atol=1e-9)


def test_first_order_solvers_are_all_ddim():
    noise, field = randn(4, 2), mixture(VP()).velocity
    expected = methods.ddim(VP())(field, VP_GRID, noise)
    torch.testing.assert_close(methods.dpmpp(VP(), 1)(field, VP_GRID, noise), expected, rtol=1e-9, atol=1e-9)
    problem, schedule = mixture(VP()), Schedule(VP())
    for plus in (True, False):
        x, knots = noise.numpy(), VP_GRID.knots.tolist()
        for s, t in itertools.pairwise(knots):
            x, _ = singlestep(schedule, predictor(problem, "data" if plus else "noise"), x, s, t, 1, plus)
        np.testing.assert_allclose(expected.numpy(), x, rtol=1e-8, atol=1e-8)


def test_ddim_on_straight_lines_is_euler():
    grid = TimeGrid.quadratic(6)
    ddim, euler = tabulate(methods.ddim(CondOT()), grid), tabulate(methods.euler, grid)
    torch.testing.assert_close(ddim.b, euler.b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ddim.a, euler.a, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_on_discrete_levels_gives_what_diffusers_gives(order):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    steps = 20
    if order == 1:
        scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    else:
        scheduler = DPMSolverMultistepScheduler(solver_order=order, algorithm_type="dpmsolver++", timestep_spacing="trailing")
    path = DiscreteVP(scheduler.alphas_cumprod)
    problem = mixture(path, std=0.4)
    field = adapt(
        lambda x, timestep: problem._expected(x, float(path.time(timestep[0])))[1], path=path, predicts="noise"
    ).given()
    scheduler.set_timesteps(steps)
    noise = randn(16, 2)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(field.predict(x, path.time(timestep), "noise"), timestep, x).prev_sample
    grid = TimeGrid([*path.time(scheduler.timesteps).tolist(), 1.0])
    method = methods.ddim(path) if order == 1 else methods.dpmpp(path, order)
    ours = tabulate(method, grid)(field, noise)
    assert rms(ours - x) <= 2e-5, "the same up to the scheduler's float32 constants"
    if order > 1:
        assert rms(tabulate(methods.ddim(path), grid)(field, noise) - x) > 1e-2


def test_multistep_takes_a_first_order_step_next_to_an_infinite_log_snr():
    """On CondOT from pure noise to clean data: 2M's first, second and last steps have no usable neighbour."""
    grid = TimeGrid.uniform(5)
    second, first = tabulate(methods.dpmpp(CondOT(), 2), grid), tabulate(methods.ddim(CondOT()), grid)
    torch.testing.assert_close(second.b[:3], first.b[:3], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(second.b[3], first.b[3])
    assert torch.isfinite(second.b).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("path", [VP(), CondOT()], ids=["VP", "CondOT"])
def test_3m_is_of_second_order_as_published_whatever_its_start(path):
    """Its third-order term has half the weight that order 3 needs; what remains is a quarter of 2M's error."""
    problem, noise, errors, steps = ShearedSpiral(), randn(8, 2, seed=1), {2: [], 3: []}, [80, 160]
    for n in steps:
        for order, found in errors.items():
            got = methods.dpmpp(path, order)(problem.velocity, small_start(n, 3), noise)
            found.append(rms(got - problem.solution(noise, 0.1, 0.9)))
    assert slope(errors[3], steps) == pytest.approx(2, abs=0.25)
    assert errors[3][-1] < 0.3 * errors[2][-1]


@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_nodes_are_equally_spaced_in_log_snr(order):
    for path in (VP(), CondOT()):
        field = Recorder(mixture(path).velocity)
        methods.dpm_single(path, order)(field, TimeGrid([0.2, 0.7]), randn(2, 2))
        nodes = path.log_snr(torch.tensor([*field.times, 0.7], dtype=torch.float64))
        torch.testing.assert_close(nodes.diff(), nodes.diff()[:1].expand(order), rtol=1e-7, atol=0)


@pytest.mark.parametrize("predicts", ["data", "noise"])
@pytest.mark.parametrize("order", [2, 3])
def test_nodes_lie_inside_their_steps_even_next_to_an_infinite_log_snr(order, predicts):
    for path in (CondOT(), VP()):
        start = 1e-5 if predicts == "noise" and path == CondOT() else 0.0
        for knots in ([start, 5e-4, 0.5, 0.9996, 1.0], [start, 0.5, 1.0], [start, 1.0], [start, 1e-4, 1.0 - 1e-7, 1.0]):
            field = Recorder(ShearedSpiral().velocity)
            sample = methods.dpm_single(path, order, predicts)(field, TimeGrid(knots), randn(2, 2))
            assert bool(torch.isfinite(sample).all())
            for i, (s, t) in enumerate(itertools.pairwise(knots)):
                nodes = field.times[i * order : (i + 1) * order]
                assert nodes[0] == s
                assert nodes == sorted(set(nodes))
                assert nodes[-1] < t


@pytest.mark.parametrize("order", [0, 1, 4])
def test_singlestep_orders_are_2_and_3(order):
    with pytest.raises(ValueError, match=rf"dpm_single takes order 2 or 3 \(order 1 is ddim\), got {order}"):
        methods.dpm_single(VP(), order)


@pytest.mark.parametrize("order", [0, 4])
def test_multistep_orders_are_1_to_3(order):
    with pytest.raises(ValueError, match=f"dpmpp takes order 1, 2 or 3, got {order}"):
        methods.dpmpp(VP(), order)


def test_an_exponential_step_cannot_freeze_the_velocity():
    with pytest.raises(ValueError, match='a DPM-Solver step freezes "noise" or "data", not the velocity'):
        methods.dpm_single(VP(), 2, "velocity")


def test_a_held_noise_prediction_cannot_leave_pure_noise():
    with pytest.raises(ValueError, match="leaves the data open at t = 0, where alpha = 0; start the grid later"):
        methods.dpm_single(CondOT(), 2, "noise")(mixture(CondOT()).velocity, TimeGrid.uniform(2), randn(2, 2))
    assert "dpm2s" not in methods.registry(CondOT())
    assert "dpm2s" in methods.registry(VP())
