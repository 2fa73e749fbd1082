"""GITS, OSS and Align Your Steps: published grids as options of the one program, against their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import (
    EDM,
    VE,
    VP,
    Boss,
    BudgetError,
    CondOT,
    Cosine,
    CountedField,
    DiscreteVP,
    FieldError,
    GridError,
    TimeGrid,
    load,
    methods,
    record,
    reference,
    tabulate,
)
from fewstep.composite import start_scale
from fewstep.coordinates import Coordinates
from fewstep.trajectory import Trajectory
from fewstep.tuners import bellman as programs
from fewstep.tuners import truncation
from fewstep.tuners.bellman import bellman, student_schedules
from fewstep.tuners.truncation import chord_deviations, truncation_errors
from fewstep.zoo.mixtures import mixture
from problems import SmoothNetwork, randn

PATHS = [None, VP(), EDM()]
SD = DiscreteVP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))


def plane_field(path=None):
    return mixture(1.2 * randn(5, 2, seed=3), torch.full((2,), 0.05, dtype=torch.float64), path).given()


def curved_path(steps, batch=5, size=4, seed=0):
    """An Euler path of a curved field on uneven knots."""
    gaps = 0.2 + torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grid = TimeGrid(torch.cat([gaps.new_zeros(1), (gaps.cumsum(0) / gaps.sum())[:-1], gaps.new_ones(1)]))
    network = SmoothNetwork(size, seed=seed)
    slope = lambda z, i: 3 * network(z, float(grid.knots[i])).detach()  # noqa: E731
    return record(lambda x, t: 3 * network(x, t), grid, randn(batch, size, seed=seed + 9)), slope


def all_schedules(n, k):
    return [(0, *inner, n) for inner in itertools.combinations(range(1, n), k - 1)]


# The discount


def discounted(costs, knots, discount):
    return sum(discount**m * costs[i, j] for m, (i, j) in enumerate(itertools.pairwise(knots)))


@given(st.integers(1, 8), st.sampled_from([0.8, 1.0, 1.15, 2.0]), st.integers(0, 10_000))
def test_discounted_schedules_equal_brute_force_even_with_negative_costs(n, discount, seed):
    costs = np.random.default_rng(seed).standard_normal((n + 1, n + 1))
    found = bellman(costs, n, discount=discount)
    for k in range(1, n + 1):
        least = min(discounted(costs, knots, discount) for knots in all_schedules(n, k))
        assert found.costs[k] == pytest.approx(least, abs=1e-10)
        assert discounted(costs, found.knots[k], discount) == pytest.approx(least, abs=1e-10)


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_the_discount_is_that_of_the_recursion_from_the_end(n, seed):
    costs, gamma = np.random.default_rng(seed).random((n + 1, n + 1)), 1.15
    remaining = {(j, 1): costs[j, n] for j in range(n)}
    for k in range(2, n + 1):
        for j in range(n - k + 1):
            remaining[j, k] = min(costs[j, i] + gamma * remaining[i, k - 1] for i in range(j + 1, n - k + 2))
    found = bellman(costs, n, discount=gamma)
    assert all(found.costs[k] == pytest.approx(remaining[0, k]) for k in range(1, n + 1))


@given(st.integers(2, 9), st.integers(0, 10_000))
def test_a_larger_discount_never_makes_the_last_of_two_steps_worse(n, seed):
    costs = np.random.default_rng(seed).random((n + 1, n + 1))
    last = [costs[bellman(costs, 2, discount=g).knots[2][1], n] for g in (0.5, 1.0, 1.15, 2.0, 8.0)]
    assert last == sorted(last, reverse=True)


def test_no_discount_changes_no_bit():
    costs = np.random.default_rng(0).random((31, 31))
    plain, one = bellman(costs, 30), bellman(costs, 30, discount=1.0)
    assert plain.costs == one.costs
    assert all(np.array_equal(plain.knots[k], one.knots[k]) for k in plain.knots)


# GITS


def deviations_pair_by_pair(path):
    """The published cost: distance of a step's end to the chord, less that of the path's state there."""
    start, end = path.states[0], path.states[-1]

    def distance(x):
        unit = (end - start) / (end - start).norm(dim=1, keepdim=True)
        return ((x - end) - ((x - end) * unit).sum(1, keepdim=True) * unit).norm(dim=1)

    costs = np.zeros((len(path.times), len(path.times)))
    for i, j in itertools.combinations(range(len(path.times)), 2):
        landing = path.states[i] + (path.times[j] - path.times[i]) * path.velocities[i]
        costs[i, j] = float((distance(landing) - distance(path.states[j])).mean())
    return costs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [1, 2, 9, 24])
def test_deviations_equal_their_definition(steps, seed):
    path, _ = curved_path(steps, seed=seed)
    found = truncation_errors(path, "deviation")
    assert np.allclose(found, deviations_pair_by_pair(path), rtol=1e-7, atol=1e-9)
    assert not np.tril(found, 1).any()


def test_a_step_that_stays_nearer_to_the_chord_than_the_path_costs_less_than_nothing():
    times = torch.linspace(0, 1, 4, dtype=torch.float64)
    velocities = torch.tensor([[3.0, 0.3], [3.0, 3.0], [3.0, -3.3]], dtype=torch.float64)[:, None]
    states = torch.cat([torch.zeros(1, 1, 2, dtype=torch.float64), velocities.cumsum(0) / 3])
    costs = chord_deviations(Trajectory(times, states, velocities))
    assert costs[[0, 0, 1], [2, 3, 3]].tolist() == pytest.approx([0.2 - 1.1, 0.3, 2.1])


def test_deviations_in_pieces_of_float32_images_are_the_same(monkeypatch):
    path, _ = curved_path(12, batch=7, size=12)
    whole = chord_deviations(path)
    images = Trajectory(path.times, path.states.view(13, 7, 3, 2, 2).float(), path.velocities.view(12, 7, 3, 2, 2).float())
    monkeypatch.setattr(truncation, "CHUNK", 1)
    assert np.allclose(chord_deviations(images), whole, atol=1e-5)


def test_a_path_that_returns_to_its_start_has_distances_to_that_point():
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    velocities = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 1, 1)
    path = Trajectory(times, torch.zeros(5, 1, 1, dtype=torch.float64), velocities)
    assert chord_deviations(path)[0].tolist() == [0, 0, 0, 0.5, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_deviations_refuse_velocities_that_are_not_finite(bad):
    path, _ = curved_path(6)
    path.velocities[4, 1, 0] = bad
    with pytest.raises(ValueError, match="need finite velocities; the recorded trajectory holds NaN or infinity"):
        chord_deviations(path)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_one_recorded_path_gives_the_grids_of_every_cost_without_further_calls(path):
    field, noise = CountedField(plane_field(path)), randn(16, 2)
    recorded = Boss(knots=12).record(field, noise)
    tau = Coordinates.of(field).tau
    for tuner in (Boss(), Boss(cost="norm", discount=1.15), Boss(cost="deviation", discount=1.15)):
        costs = truncation_errors(recorded.trajectory, tuner.cost)
        for k, grid in tuner.grids_on(recorded, (1, 2, 3, 5)).items():
            places = (tau(grid.knots) * 12).round().long().tolist()
            least = min(discounted(costs, knots, tuner.discount) for knots in all_schedules(12, k))
            assert discounted(costs, places, tuner.discount) == pytest.approx(least, abs=1e-9)
    assert field.calls == 12
    same = Boss(knots=12, cost="deviation", discount=1.15).grids(field, noise, (3,))[3]
    assert torch.equal(same.knots, Boss(cost="deviation", discount=1.15).grids_on(recorded, (3,))[3].knots)


def test_tables_are_named_after_the_method_that_made_their_grid():
    field, noise = plane_field(), randn(4, 2)
    tuners = {
        "boss-euler": [Boss(knots=8), Boss(knots=8, cost="norm")],
        "gits-euler": [Boss(knots=8, cost="deviation"), Boss(knots=8, cost="norm", discount=1.15)],
        "oss-euler": [Boss(knots=8, states="student")],
    }
    for name, several in tuners.items():
        assert [tuner(field, noise, nfe=3).provenance.method for tuner in several] == [name] * len(several)


@pytest.mark.parametrize("discount", [0.0, -1.0, math.inf, math.nan])
def test_a_discount_that_is_not_positive_is_refused(discount):
    for work in (lambda: Boss(discount=discount), lambda: bellman(np.ones((4, 4)), 2, discount=discount)):
        with pytest.raises(ValueError, match=r"discount must be positive \(1 is none, GITS takes 1\.15\), got"):
            work()


def test_an_unknown_cost_is_refused(unchecked):
    with pytest.raises(ValueError, match='cost is one of squared, norm, deviation, got "deviaton"'):
        Boss(cost="deviaton")


# OSS


def students_one_by_one(path, slope, most, allowed=lambda i, j: True):
    """OSS's definition for every sample alone: end errors and walks by number of steps."""
    n, batch, times = len(path.times) - 1, path.states.shape[1], path.times.tolist()
    walks, errors = [], []
    for s in range(batch):
        level, mine, ends = {0: (path.states[0], (0,))}, {}, {}
        for k in range(1, most + 1):
            following = {}
            for j in range(1, n + 1):
                least = math.inf
                for i in (i for i in level if i < j and allowed(i, j)):
                    states, walk = level[i]
                    landing = states + (times[j] - times[i]) * slope(states, i)
                    error = float((landing - path.states[j])[s].square().mean())
                    if error < least:
                        least, following[j] = error, (landing, (*walk, j))
                if j == n and j in following:
                    mine[k], ends[k] = following[j][1], least
            level = following
        walks.append(mine)
        errors.append(ends)
    return walks, errors


def median(walks):
    middle = torch.tensor(walks, dtype=torch.float64).quantile(0.5, dim=0)
    return middle.ceil().long().tolist()


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_student_schedules_equal_a_walk_of_every_sample_alone(batch):
    path, slope = curved_path(8, batch=batch, seed=2)
    found = student_schedules(slope, path, 8)
    walks, errors = students_one_by_one(path, slope, 8)
    assert list(found.knots) == list(range(1, 9))
    for k in range(1, 9):
        assert found.knots[k].tolist() == median([walk[k] for walk in walks])
        assert found.costs[k] == pytest.approx(np.mean([end[k] for end in errors]), rel=1e-9, abs=1e-20)
    assert batch == 1 or any(len({walk[k] for walk in walks}) > 1 for k in range(2, 8))  # the median has something to do


def test_student_schedules_of_two_steps_are_the_best_for_a_single_sample():
    path, slope = curved_path(12, batch=1, seed=4)
    found = student_schedules(slope, path, 3)

    def end_error(knots):
        z = path.states[0]
        for i, j in itertools.pairwise(knots):
            z = z + float(path.times[j] - path.times[i]) * slope(z, i)
        return float((z - path.states[-1]).square().mean())

    for k in (1, 2):  # from three steps on it is greedy
        assert found.costs[k] == pytest.approx(min(map(end_error, all_schedules(12, k))), rel=1e-9)
    for k in (1, 2, 3):
        assert found.costs[k] == pytest.approx(end_error(found.knots[k].tolist()), rel=1e-9)


def test_student_schedules_in_pieces_are_the_same(monkeypatch):
    path, slope = curved_path(9, seed=1)
    whole = student_schedules(slope, path, 5)
    monkeypatch.setattr(programs, "CHUNK", 1)
    assert student_schedules(slope, path, 5).costs == whole.costs


def test_student_schedules_keep_the_step_limits():
    path, slope = curved_path(10, batch=6)
    found = student_schedules(slope, path, 10, min_step=2, max_step=3)
    assert list(found.knots) == [4, 5]
    walks, _ = students_one_by_one(path, slope, 5, lambda i, j: 2 <= j - i <= 3)
    for k, knots in found.knots.items():
        assert set(np.diff(knots).tolist()) <= {2, 3}
        assert knots.tolist() == median([walk[k] for walk in walks])
    with pytest.raises(BudgetError, match="no schedule of up to 2 steps satisfies"):
        student_schedules(slope, path, 2, max_step=3)


def test_a_student_that_blows_up_is_refused():
    path, slope = curved_path(6)
    with pytest.raises(FieldError, match="after 2 steps a state of the student is not finite; try a longer min_step or"):
        student_schedules(lambda z, i: slope(z, i) * math.inf, path, 3)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_table_of_oss_walks_as_the_student_did(path):
    field, noise = CountedField(plane_field(path)), randn(1, 2, seed=5)
    tuner = Boss(knots=20, states="student")
    recorded = tuner.record(field, noise)
    assert field.calls == 20
    found = student_schedules(recorded.slope, recorded.trajectory, 4)
    assert field.calls == 20 + 3 * (20 - 4 // 2)  # (K - 1) (N - K / 2)
    grid = tuner.grids_on(recorded, (2, 4))[4]
    table = tabulate(methods.euler if path is None else methods.ddim(path), grid, start_scale=start_scale(field))
    assert torch.equal(table.b, tuner(field, noise, nfe=4).b)
    error = float((table(field, noise) - recorded.trajectory.states[-1]).double().square().mean())
    assert error == pytest.approx(found.costs[4], rel=1e-4, abs=1e-12)


def test_oss_on_digits(unchecked):
    model, tuner = load("digits"), Boss(knots=24, states="student")
    field = model.given(label=torch.arange(20) % 10, guidance=4.0)  # without guidance, uniform steps are nearly as good
    searched, fresh = (randn(20, *model.shape, seed=seed, dtype=torch.float32) for seed in (0, 1))
    path, end = tuner.record(field, searched), reference(field, fresh, tol=1e-2).end
    found, uniform = (
        tabulate(methods.euler, grid)(field, fresh) for grid in (tuner.grids_on(path, (4,))[4], TimeGrid.uniform(4))
    )
    assert (found - end).norm() < (uniform - end).norm()
    # Two steps are not greedy yet: every sample's own are at least as good as uniform ones.
    halves = tabulate(methods.euler, TimeGrid.uniform(2))(field, searched)
    own = student_schedules(path.slope, path.trajectory, 2).costs[2]
    assert own <= float((halves - path.trajectory.states[-1]).square().mean()) * (1 + 1e-6)


@pytest.mark.parametrize("settings", [{"cost": "norm"}, {"discount": 1.15}, {"fixed": (0.5,)}])
def test_student_states_refuse_what_their_program_does_not_know(settings):
    with pytest.raises(ValueError, match="leave cost, discount and fixed at their defaults"):
        Boss(states="student", **settings)


# Align Your Steps

TIMESTEPS = {
    "sd15": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
}


@pytest.mark.parametrize("name", TIMESTEPS)
def test_the_levels_of_stable_diffusion_are_its_published_timesteps(name):
    grid = TimeGrid.ays(10, SD, name)
    assert SD.timestep(grid.knots[:-1]).tolist() == pytest.approx(TIMESTEPS[name], abs=0.7)
    assert float(grid.knots[-1]) == 1.0


def test_the_levels_of_stable_video_diffusion_are_its_published_sigmas():
    path = EDM(0.002, 700.0)
    sigmas = path.coefficients(TimeGrid.ays(10, path, "svd").knots).sigma.tolist()
    assert sigmas == pytest.approx([700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0], rel=1e-9)


def test_other_numbers_of_steps_interpolate_the_logarithms_down_to_the_lowest_level_of_the_path():
    path = EDM(0.002, 700.0)
    ten, twenty = (path.log_snr(TimeGrid.ays(n, path, "svd").knots[:-1]) for n in (10, 20))
    torch.testing.assert_close(twenty[::2], ten)
    lowest = torch.tensor([-math.log(0.002)], dtype=torch.float64)
    torch.testing.assert_close(twenty[1::2], (ten + torch.cat([ten[1:], lowest])) / 2)


@pytest.mark.parametrize("path", [CondOT(), Cosine(), VP(), VE(), EDM(), SD], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("n", [1, 2, 7, 10, 31])
def test_ays_grids_run_from_noise_to_data_on_every_path(path, n):
    for name in TIMESTEPS:
        grid = TimeGrid.ays(n, path, name)
        assert grid.intervals == n
        assert (float(grid.knots[0]), float(grid.knots[-1])) == (0.0, 1.0)


def test_ays_levels_beyond_the_path_are_refused():
    with pytest.raises(GridError, match=r"levels of svd, sigma / alpha from 700 to 0\.034, do not fit into .* 50 to 0\.01"):
        TimeGrid.ays(10, VE(), "svd")


def test_an_unknown_ays_table_is_refused(unchecked):
    with pytest.raises(GridError, match='the AYS tables are sd15, sdxl, svd, got "sd3"'):
        TimeGrid.ays(10, CondOT(), "sd3")
