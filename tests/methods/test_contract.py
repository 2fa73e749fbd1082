"""The contract of every registered method: a file that is dropped into `fewstep.methods` is tested the day it exists."""

import functools

import pytest
import torch

from fewstep import EDM, VP, BudgetError, CondOT, Sampler, TimeGrid, adapt, methods, tabulate
from problems import Recorder, ShearedSpiral, SmoothNetwork, randn, rms, slope

PATHS = {"CondOT": CondOT(), "VP": VP(), "EDM": EDM(sigma_max=5.0)}
CASES = [
    (name, path, method)
    for name, path in PATHS.items()
    for method in methods.registry(path).values()
    if method.path is not None or name == "CondOT"  # methods that do not know the path are the same on every one
]


def every_method(*names: str, knows_path: bool = False):
    cases = [
        pytest.param(path, method, id=f"{name}-{method.name}")
        for name, path, method in CASES
        if name in (names or PATHS) and (method.path is not None or not knows_path)
    ]
    return pytest.mark.parametrize(("path", "method"), cases)


def uneven_grid(method, calls: int = 6) -> TimeGrid:
    return TimeGrid.power(method.intervals(calls * method.stages), 1.3)


@functools.cache
def table(method) -> Sampler:
    return tabulate(method, uneven_grid(method))


@every_method()
def test_the_table_gives_what_the_method_gives(path, method):
    grid, noise = uneven_grid(method), randn(5, 3, seed=1) * path.start_scale
    direct = Recorder(SmoothNetwork())
    sampler = table(method)
    expected = method(direct, grid, noise)
    torch.testing.assert_close(sampler(direct.field, noise), expected, rtol=1e-10, atol=1e-10)
    assert sampler.times.tolist() == pytest.approx(direct.times, abs=1e-15), "the table must ask at the method's own times"


@every_method("CondOT")
def test_a_constant_field_is_integrated_exactly(path, method):
    grid, noise, constant = uneven_grid(method), randn(4, 3), randn(1, 3, seed=1)
    sample = method(lambda x, t: constant.expand_as(x), grid, noise)
    torch.testing.assert_close(sample, noise + constant, rtol=1e-12, atol=1e-12)


@every_method(knows_path=True)
def test_methods_that_know_the_path_draw_a_single_data_point_exactly(path, method):
    point, grid, noise = randn(1, 3, seed=2), uneven_grid(method), randn(4, 3) * path.start_scale

    def field(x, t):  # data and noise predictions stay what they are along the path
        alpha, sigma, d_alpha, d_sigma = path.coefficients(t)
        return d_alpha * point + d_sigma * (x - alpha * point) / sigma

    alpha, sigma, _, _ = path.coefficients(0.0)
    start = alpha * point + sigma * noise
    torch.testing.assert_close(method(field, grid, start), point.expand_as(noise), rtol=1e-9, atol=1e-9)


@every_method("CondOT", "VP")
@pytest.mark.usefixtures("unchecked")
def test_the_declared_order_is_the_measured_one(path, method):
    problem, start, end = ShearedSpiral(), 0.1, 0.9
    finest = {1: 96, 2: 192, 3: 48, 4: 32}[method.order]
    noise, errors, steps = randn(8, 2, seed=1), [], []
    for calls in (finest // 2, finest):
        grid = TimeGrid(start + (end - start) * TimeGrid.uniform(method.intervals(calls * method.stages)).knots)
        errors.append(rms(method(problem.velocity, grid, noise) - problem.solution(noise, start, end)))
        steps.append(grid.intervals)
    assert slope(errors, steps) == pytest.approx(method.order, abs=0.25)
    assert errors[-1] < 0.03, "the method must converge to the solution, not to something else"


@every_method()
@pytest.mark.usefixtures("unchecked")
def test_the_declared_number_of_calls_is_the_counted_one(path, method):
    possible = [n for n in range(1, 14) if method.calls(n) is not None][:4]
    for n in possible:
        field = Recorder(SmoothNetwork())
        method(field, TimeGrid.uniform(n), randn(2, 3) * path.start_scale)
        assert len(field.times) == method.calls(n)
        assert all(0.0 <= t <= 1.0 for t in field.times)
        assert method.intervals(method.calls(n)) == n
    assert tabulate(method, TimeGrid.uniform(possible[-1])).nfe == method.calls(possible[-1])


@every_method()
def test_an_impossible_budget_is_refused_with_the_nearest_possible_ones(path, method):
    with pytest.raises(BudgetError, match=rf"{method.name} cannot spend exactly 0 calls; the nearest budgets are \d+ and \d+"):
        method.intervals(0)


@every_method()
@pytest.mark.usefixtures("unchecked")
def test_turning_the_space_turns_the_samples(path, method):
    turn, _ = torch.linalg.qr(randn(3, 3, seed=5))
    field, grid, noise = SmoothNetwork(), uneven_grid(method), randn(4, 3) * path.start_scale
    turned = method(lambda x, t: field(x @ turn, t) @ turn.T, grid, noise @ turn.T)
    torch.testing.assert_close(turned, method(field, grid, noise) @ turn.T, rtol=1e-10, atol=1e-10)


@every_method("CondOT", "VP")
def test_a_network_in_low_precision_keeps_a_float32_state_and_no_graph(path, method):
    asked, noise = set(), randn(4, 3, dtype=torch.float32)

    def call(network, x, time, condition):
        asked.add(x.dtype)
        return network(x, time)

    for dtype in (torch.float32, torch.bfloat16):
        field = adapt(SmoothNetwork(dtype=dtype), path=path, call=call).given()
        sample = table(method)(field, noise.to(dtype))
        assert sample.dtype == torch.float32
        assert sample.device == noise.device
        assert not sample.requires_grad
        assert torch.equal(sample, table(method)(field, noise.to(dtype).float()))
    assert asked == {torch.float32, torch.bfloat16}


@every_method("CondOT", "VP")
@pytest.mark.usefixtures("unchecked")
def test_a_gradient_reaches_the_noise_when_it_is_asked_for(path, method):
    field, grid = SmoothNetwork(), uneven_grid(method, calls=3)
    leaf, twin = (randn(2, 3).requires_grad_(True) for _ in range(2))
    tabulate(method, grid)(field, leaf).square().sum().backward()
    method(field, grid, twin).square().sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-9)


@every_method("CondOT", "VP")
def test_a_saved_table_comes_back_bit_for_bit(path, method, tmp_path):
    sampler = table(method)
    loaded = Sampler.load(sampler.save(tmp_path / "sampler"))
    for name in ("times", "a", "b"):
        assert torch.equal(getattr(loaded, name), getattr(sampler, name))
    assert (loaded.predicts, loaded.clock, loaded.provenance) == (sampler.predicts, sampler.clock, sampler.provenance)


@every_method("CondOT", "VP")
def test_the_diffusers_scheduler_replays_the_executor(path, method):
    from fewstep.diffusers import TableScheduler

    sampler, field = table(method), SmoothNetwork(dtype=torch.float32)
    noise = randn(4, 3, dtype=torch.float32)
    scheduler = TableScheduler.from_sampler(sampler)
    scheduler.set_timesteps(sampler.nfe)
    sample = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            sample = scheduler.step(field(sample, float(sampler.times[i])), t, sample).prev_sample
    torch.testing.assert_close(sample, sampler(field, noise), rtol=1e-5, atol=1e-5)
