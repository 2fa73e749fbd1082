"""PFDiff against a simulation of the published algorithm, step by step, in numpy."""

import numpy as np
import pytest
import torch

from fewstep import VP, BudgetError, CondOT, TimeGrid, methods
from fewstep._tabulate import write_table
from methods.published import Schedule, singlestep
from problems import Recorder, ShearedSpiral, mixture, randn, rms, slope

PAIRS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
every_pair = pytest.mark.parametrize(("k", "l"), PAIRS)


def first_order(schedule, velocity, g, x, k, l, frozen):
    """The algorithm for first-order solvers: a past prediction jumps ahead, the future one found there steps from x.

    Returns the sample, the times at which the network was called, and the fine knot at which it ended.
    """
    asked = []

    def model(y, i):
        asked.append(g[i])
        v = velocity(y, g[i])
        data, noise = schedule.both(v, y, g[i])
        return {"velocity": v, "noise": noise, "data": data}[frozen]

    def phi(q, y, i, j):
        (alpha_a, sigma_a), (alpha_b, sigma_b) = schedule.pair(g[i]), schedule.pair(g[j])
        if frozen == "velocity":
            return y + (g[j] - g[i]) * q
        if frozen == "noise":
            return alpha_b * (y - sigma_a * q) / alpha_a + sigma_b * q
        return alpha_b * q + sigma_b * (y - alpha_a * q) / sigma_a

    q = model(x, 0)
    if frozen == "noise" and schedule.pair(g[0])[0] == 0.0:  # pure noise: the data comes from the same fresh velocity
        data, noise = schedule.both(velocity(x, g[0]), x, g[0])
        x = schedule.pair(g[1])[0] * data + schedule.pair(g[1])[1] * noise
    else:
        x = phi(q, x, 0, 1)
    i = 1
    while i < len(g) - 1:
        y = phi(q, x, i, i + l)
        q = model(y, i + l)
        x = phi(q, x, i, i + k + 1)
        i += k + 1
    return x, asked, i


def higher_order(schedule, predict, g, x, k, l, order, plus):
    """The algorithm for p > 1: buffered stages carry the state l knots for free, a real p-stage step covers the rest."""
    x, stages = singlestep(schedule, predict, x, g[0], g[1], order, plus)
    i = 1
    while i < len(g) - 1:
        y, _ = singlestep(schedule, predict, x, g[i], g[i + l], order, plus, buffered=stages)
        x, stages = singlestep(schedule, predict, y, g[i + l], g[i + k + 1], order, plus)
        i += k + 1
    return x, i


@pytest.mark.usefixtures("unchecked")
@every_pair
@pytest.mark.parametrize("frozen", ["velocity", "noise", "data"])
@pytest.mark.parametrize("path", [CondOT(), VP()], ids=["CondOT", "VP"])
def test_the_steps_are_the_published_ones(path, frozen, k, l):
    problem, schedule, noise = mixture(path), Schedule(path), randn(3, 2)
    method = methods.pfdiff(k, l, methods.ddim(path), frozen)
    for calls in (1, 2, 3, 5, 8, 20):
        fine = calls * (k + 1) - k
        assert method.intervals(calls) == fine
        grid = TimeGrid.power(fine, 1.2)
        field = Recorder(problem.velocity)
        sample = method(field, grid, noise)
        knots = grid.knots.tolist()
        expected, asked, end = first_order(
            schedule, lambda x, t: problem.velocity(torch.from_numpy(x), t).numpy(), knots, noise.numpy(), k, l, frozen
        )
        assert end == fine, "the last step ends at clean data"
        assert len(field.times) == calls
        assert field.times == pytest.approx(asked, abs=1e-15)
        assert field.times[-1] < 1.0, "the network is never asked at the end"
        np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("unchecked")
@every_pair
def test_every_budget_is_spent_in_full_and_the_end_is_reached(k, l):
    for calls in range(1, 21):
        method = methods.pfdiff(k, l)
        grid = TimeGrid.power(method.intervals(calls), 1.2)
        sampler = write_table(method, grid)
        assert sampler.nfe == calls
        assert float(sampler.b[-1].sum()) == pytest.approx(1.0, abs=1e-12), "a unit velocity must carry from 0 to 1"
        ahead = [0, *(1 + (j - 1) * (k + 1) + l for j in range(1, calls))]  # the knots of the FLUX variant's timesteps
        assert sampler.times.tolist() == grid.knots[ahead].tolist()


@pytest.mark.usefixtures("unchecked")
@every_pair
@pytest.mark.parametrize("plus", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("order", [2, 3])
def test_higher_order_bases_follow_the_published_past_only_scheme(order, plus, k, l):
    path, noise = VP(), randn(3, 2)
    problem, frozen = mixture(path), "data" if plus else "noise"
    method = methods.pfdiff(k, l, methods.dpm_single(path, order, frozen), frozen)
    for steps in (1, 2, 4):
        fine = steps * (k + 1) - k
        knots = TimeGrid.uniform(fine).knots * 0.95
        field = Recorder(problem.velocity)
        sample = method(field, TimeGrid(knots), noise)

        def predict(x, t):
            return problem._expected(torch.from_numpy(x), t)[0 if plus else 1].numpy()

        expected, end = higher_order(Schedule(path), predict, knots.tolist(), noise.numpy(), k, l, order, plus)
        assert end == fine
        assert len(field.times) == method.calls(fine) == order * steps
        np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("k", "l", "share"), [(2, 1, 1 / 3), (2, 2, 1 / 3), (3, 1, 1 / 2), (3, 3, 1 / 2)], ids=["2_1", "2_2", "3_1", "3_3"]
)
def test_first_order_settings_have_a_third_or_half_of_eulers_error(k, l, share):
    problem, noise, calls = ShearedSpiral(), randn(8, 2, seed=1), 320
    exact = problem.solution(noise, 0.0, 1.0)

    def error(method):
        return rms(method(problem.velocity, TimeGrid.uniform(method.intervals(calls)), noise) - exact)

    assert error(methods.pfdiff(k, l)) / error(methods.euler) == pytest.approx(share, rel=0.05)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("k", "l"), [(1, 1), (3, 2)])
def test_the_midpoint_settings_are_of_second_order(k, l):
    problem, noise, errors = ShearedSpiral(), randn(8, 2, seed=1), []
    exact, method = problem.solution(noise, 0.0, 1.0), methods.pfdiff(k, l)
    for calls in (160, 320):
        errors.append(rms(method(problem.velocity, TimeGrid.uniform(method.intervals(calls)), noise) - exact))
    assert slope(errors, [160, 320]) == pytest.approx(2, abs=0.1)
    assert method.order == 2


def test_far_skips_find_their_grids():
    for skip in (4, 9, 15):
        for calls in (1, 2, 8, 20):
            assert methods.pfdiff(skip, 1).intervals(calls) == calls * (skip + 1) - skip


@pytest.mark.parametrize(("skip", "ahead"), [(0, 0), (1, 0), (1, 2), (3, 4), (-1, -1)])
def test_the_springboard_lies_inside_the_step(skip, ahead):
    with pytest.raises(ValueError, match=f"pfdiff needs 1 <= ahead <= skip, got skip={skip}, ahead={ahead}"):
        methods.pfdiff(skip, ahead)


@pytest.mark.parametrize("intervals", [2, 4, 30])
def test_a_grid_that_does_not_fit_is_refused(intervals):
    with pytest.raises(BudgetError, match=rf"pfdiff with skip=1 needs a grid of N \* 2 - 1 steps, got {intervals}"):
        methods.pfdiff(1, 1)(lambda x, t: x, TimeGrid.uniform(intervals), randn(1, 2))


def test_a_budget_between_two_is_refused_with_both():
    with pytest.raises(BudgetError, match="pfdiff1_1-dpmpp2s cannot spend exactly 5 calls; the nearest budgets are 4 and 6"):
        methods.pfdiff(1, 1, methods.dpm_single(VP(), 2), "data").intervals(5)


@pytest.mark.parametrize(
    "base", [methods.midpoint, methods.rk4, methods.adams(2), methods.dpmpp(VP(), 2)], ids=lambda m: m.name
)
def test_bases_without_a_frozen_step_are_refused(base):
    with pytest.raises(ValueError, match=f"pfdiff's base is euler, ddim.path. or dpm_single.path, order., got {base.name}"):
        methods.pfdiff(1, 1, base)


def test_the_frozen_quantity_must_suit_the_base():
    with pytest.raises(ValueError, match="freezing the noise prediction needs a path: use base=ddim"):
        methods.pfdiff(1, 1, frozen="noise")
    with pytest.raises(
        ValueError, match='dpmpp2s does not hold "noise"; give frozen="data" for dpmpp and "noise" for dpm bases'
    ):
        methods.pfdiff(1, 1, methods.dpm_single(VP(), 2, "data"), "noise")
    with pytest.raises(ValueError, match="not the velocity"):
        methods.pfdiff(1, 1, methods.dpm_single(VP(), 2, "data"))


def test_names_tell_the_settings_apart():
    path = VP()
    names = [
        methods.pfdiff(2, 1).name,
        methods.pfdiff(2, 1, methods.ddim(path), "noise").name,
        methods.pfdiff(2, 1, methods.ddim(path), "data").name,
        methods.pfdiff(2, 1, methods.dpm_single(path, 2), "data").name,
        methods.pfdiff(2, 1, methods.dpm_single(path, 3, "noise"), "noise").name,
    ]
    assert names == ["pfdiff2_1", "pfdiff2_1-noise", "pfdiff2_1-data", "pfdiff2_1-dpmpp2s", "pfdiff2_1-dpm3s"]
