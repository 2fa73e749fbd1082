import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import EDM, VP, BudgetError, CountedField, FieldError, TimeGrid, methods, record, tabulate
from fewstep.candidates import angle_grid
from fewstep.composite import start_scale
from fewstep.coordinates import Coordinates
from fewstep.trajectory import Trajectory
from fewstep.tuners import Boss, truncation
from fewstep.tuners.boss import bellman, truncation_errors
from fewstep.zoo.mixtures import mixture
from problems import Recorder, SmoothNetwork, randn


def uneven_knots(n, seed=0):
    gaps = 0.2 + torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([gaps.new_zeros(1), gaps.cumsum(0) / gaps.sum()])


def euler_path(n, batch, size, seed=0, dtype=torch.float64):
    """Velocities that wander as a network's do, on uneven knots, and the Euler path through them."""
    times, steps = uneven_knots(n, seed), randn(n, batch, size, seed=seed + 1)
    velocities = (randn(batch, size, seed=seed + 2) + 0.3 * steps.cumsum(0)).to(dtype)
    start = randn(1, batch, size, seed=seed + 3)
    moves = (times.diff()[:, None, None] * velocities.double()).cumsum(0)
    return Trajectory(times, torch.cat([start, start + moves]).to(dtype), velocities)


def loop_over_pairs(trajectory, cost):
    """The paper's equation 5, pair by pair, on the Euler path in float64."""
    times, velocities = trajectory.times, trajectory.velocities.double()
    moves = (times.diff()[:, None, None] * velocities).cumsum(0)
    states = trajectory.states[:1].double() + torch.cat([torch.zeros_like(moves[:1]), moves])
    errors = np.zeros((len(times), len(times)))
    for i, j in itertools.combinations(range(len(times)), 2):
        miss = states[j] - states[i] - (times[j] - times[i]) * velocities[i]
        squares = miss.square().sum(1)
        errors[i, j] = (squares if cost == "squared" else squares.sqrt()).mean()
    return errors


def plane_model(path=None):
    return mixture(1.2 * randn(5, 2, seed=3), torch.full((2,), 0.05, dtype=torch.float64), path)


def indices(grid, field, knots):
    """Where the times of a BOSS grid lie among its knots."""
    places = Coordinates.of(field).tau(grid.knots) * knots
    assert torch.allclose(places, places.round(), atol=1e-6)
    return places.round().long().tolist()


# Local truncation errors


@pytest.mark.parametrize("cost", ["squared", "norm"])
@pytest.mark.parametrize(("n", "batch", "size"), [(1, 3, 2), (2, 3, 2), (3, 1, 1), (17, 6, 11), (40, 5, 3)])
def test_truncation_errors_equal_the_loop_over_pairs(n, batch, size, cost):
    trajectory = euler_path(n, batch, size)
    expected = loop_over_pairs(trajectory, cost)
    # Neighbouring knots have no error at all; the loop itself leaves rounding errors of its states there.
    assert np.allclose(truncation_errors(trajectory, cost), expected, rtol=1e-8, atol=1e-13)
    assert not np.tril(truncation_errors(trajectory, cost)).any()


@pytest.mark.parametrize("cost", ["squared", "norm"])
def test_one_step_between_neighbouring_knots_has_exactly_no_error(cost):
    assert not np.diagonal(truncation_errors(euler_path(12, 4, 3), cost), 1).any()


@pytest.mark.parametrize("cost", ["squared", "norm"])
@pytest.mark.parametrize("seed", range(4))
def test_float32_velocities_give_the_schedules_of_the_float64_loop_for_all_budgets(cost, seed):
    trajectory = euler_path(40, 16, 48, seed=10 * seed, dtype=torch.float32)
    fast = bellman(truncation_errors(trajectory, cost), 40)
    slow = bellman(loop_over_pairs(trajectory, cost), 40)
    assert fast.knots.keys() == set(range(1, 41))
    for k in range(1, 41):
        assert fast.knots[k].tolist() == slow.knots[k].tolist(), k


@pytest.mark.parametrize("cost", ["squared", "norm"])
def test_the_recorded_path_of_a_float32_network_gives_the_float64_schedules(cost):
    field = SmoothNetwork(6, dtype=torch.float32)
    trajectory = record(lambda x, t: 2 * field(x, t), TimeGrid(uneven_knots(30)), randn(32, 6, dtype=torch.float32))
    fast, slow = (bellman(errors(trajectory, cost), 12) for errors in (truncation_errors, loop_over_pairs))
    assert all(fast.knots[k].tolist() == slow.knots[k].tolist() for k in range(1, 13))


@pytest.mark.parametrize("pieces", [1, 5 * 8 * 9, 7 * 8 * 9, 1 << 30])
def test_pieces_of_any_size_give_the_same_errors(pieces, monkeypatch):
    trajectory = euler_path(9, 13, 11)  # 143 columns for the pooled matrix, 13 samples for the others
    whole = {cost: truncation_errors(trajectory, cost) for cost in ("squared", "norm")}
    monkeypatch.setattr(truncation, "CHUNKS", {"cpu": pieces})
    monkeypatch.setattr(truncation, "CHUNK", pieces if pieces == 1 else pieces * 11)
    for cost, errors in whole.items():
        assert np.allclose(truncation_errors(trajectory, cost), errors, rtol=1e-11, atol=1e-14)


def test_states_of_any_shape_are_summed_over_all_their_elements():
    flat = euler_path(6, 4, 12)
    images = Trajectory(flat.times, flat.states.view(7, 4, 3, 2, 2), flat.velocities.view(6, 4, 3, 2, 2))
    for cost in ("squared", "norm"):
        assert np.array_equal(truncation_errors(images, cost), truncation_errors(flat, cost))


@pytest.mark.parametrize("cost", ["squared", "norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_truncation_errors_refuse_velocities_that_are_not_finite(cost, bad):
    trajectory = euler_path(6, 3, 2)
    trajectory.velocities[4, 1, 0] = bad
    with pytest.raises(ValueError, match="need finite velocities; the recorded trajectory holds NaN or infinity"):
        truncation_errors(trajectory, cost)


# The Bellman program


def every_schedule(n, k):
    for inner in itertools.combinations(range(1, n), k - 1):
        yield (0, *inner, n)


def brute_force(costs, k, allowed=lambda knots: True):
    """The least cost of k steps, and every schedule that has it."""
    found = {}
    for knots in every_schedule(len(costs) - 1, k):
        if allowed(knots):
            found[knots] = sum(costs[i, j] for i, j in itertools.pairwise(knots))
    least = min(found.values(), default=math.inf)
    return least, [knots for knots, cost in found.items() if cost <= least + 1e-12]


def check_against_brute_force(costs, found, allowed=lambda knots: True):
    n = len(costs) - 1
    for k in range(1, n + 1):
        least, optimal = brute_force(costs, k, allowed)
        if math.isinf(least):
            assert k not in found.knots
            assert k not in found.costs
        else:
            assert found.costs[k] == pytest.approx(least, abs=1e-12)
            assert tuple(found.knots[k].tolist()) in optimal


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_schedules_equal_brute_force_for_every_budget(n, seed):
    costs = np.random.default_rng(seed).random((n + 1, n + 1))
    check_against_brute_force(costs, bellman(costs, n))


@given(st.data())
def test_step_limits_and_fixed_knots_equal_brute_force(data):
    n = data.draw(st.integers(2, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    costs = rng.random((n + 1, n + 1))
    times = np.concatenate([[0.0], np.cumsum(0.3 + rng.random(n))])
    shortest, longest = data.draw(st.sampled_from([None, 0.5, 0.9])), data.draw(st.sampled_from([None, 1.2, 2.5]))
    fixed = data.draw(st.sets(st.integers(0, n), max_size=2))

    def allowed(knots):
        steps = np.diff(times[list(knots)])
        return steps.min() >= (shortest or 0) and steps.max() <= (longest or np.inf) and fixed <= set(knots)

    limits = {"times": times, "min_step": shortest, "max_step": longest, "fixed": sorted(fixed)}
    if all(math.isinf(brute_force(costs, k, allowed)[0]) for k in range(1, n + 1)):
        with pytest.raises(BudgetError, match=f"no schedule of up to {n} steps satisfies min_step, max_step and fixed"):
            bellman(costs, n, **limits)
    else:
        check_against_brute_force(costs, bellman(costs, n, **limits), allowed)


def test_limits_are_met_by_steps_of_exactly_their_length():
    times = np.arange(11) / 10  # 0.3 - 0.2 is below 0.1 in floating point
    found = bellman(np.ones((11, 11)), 10, times=times, min_step=0.1, max_step=0.1)
    assert list(found.knots) == [10]
    assert found.knots[10].tolist() == list(range(11))


def test_limits_are_counted_in_knots_where_no_times_are_given():
    assert bellman(np.ones((7, 7)), 6, min_step=3).knots.keys() == {1, 2}


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_ties_take_the_earlier_knot_every_time(n, seed):
    costs = np.random.default_rng(seed).integers(0, 3, (n + 1, n + 1)).astype(float)
    found = bellman(costs, n)
    for k in range(1, n + 1):
        _, optimal = brute_force(costs, k)
        assert tuple(found.knots[k].tolist()) == min(optimal, key=lambda knots: knots[::-1])


def test_all_budgets_of_one_pass_are_those_of_separate_passes():
    costs = np.random.default_rng(0).random((31, 31))
    together = bellman(costs, 30)
    for most in (1, 7, 30):
        alone = bellman(costs, most)
        assert list(alone.knots) == list(range(1, most + 1))
        assert alone.knots[most].tolist() == together.knots[most].tolist()
        assert alone.costs[most] == together.costs[most]


def test_more_steps_than_knots_are_left_out():
    assert list(bellman(np.ones((4, 4)), 9).knots) == [1, 2, 3]


def test_infinite_costs_are_steps_that_nobody_takes():
    costs = np.random.default_rng(1).random((7, 7))
    costs[0, 1:4] = costs[5, 6] = math.inf
    found = bellman(costs, 6)
    check_against_brute_force(costs, found)
    assert 6 not in found.knots  # six steps would use 0 -> 1


def test_costs_below_the_diagonal_do_not_matter():
    costs = np.random.default_rng(2).random((6, 6))
    expected = bellman(costs, 5)
    costs[np.tril_indices(6)] = math.nan
    assert bellman(costs, 5).costs == expected.costs


def test_a_cost_that_is_not_a_number_is_refused():
    costs = np.ones((5, 5))
    costs[1, 3] = math.nan
    with pytest.raises(ValueError, match="needs costs without NaN"):
        bellman(costs, 3)


@pytest.mark.parametrize(
    "limits", [{"min_step": 6.5}, {"max_step": 0.5}, {"max_step": 2, "min_step": 4}, {"min_step": 3, "fixed": (1,)}]
)
def test_limits_that_leave_nothing_are_refused(limits):
    with pytest.raises(BudgetError, match="no schedule of up to 6 steps satisfies min_step, max_step and fixed together"):
        bellman(np.ones((7, 7)), 6, **limits)


@pytest.mark.parametrize("knot", [-1, 5])
def test_a_fixed_knot_that_does_not_exist_is_refused(knot):
    with pytest.raises(ValueError, match=rf"fixed knots are indices in 0\.\.4, got {knot}"):
        bellman(np.ones((5, 5)), 3, fixed=[knot])


# The tuner

PATHS = [None, VP(), EDM()]


def path_of_the_method(field, knots, noise):
    """The fine path in the variables where the table's steps are Euler's: t, or for DDIM x / alpha in sigma / alpha."""
    path = Coordinates.of(field).path
    if path is None:
        return record(field, TimeGrid.uniform(knots), noise)
    grid = angle_grid(Coordinates(path), knots)
    states = tabulate(methods.ddim(path), grid, start_scale=path.start_scale)(field, noise, trajectory=True)
    alpha, sigma, _, _ = path.coefficients(grid.knots)
    guesses = torch.stack([field.predict(x, float(t), "noise") for x, t in zip(states[:-1], grid.knots[:-1], strict=True)])
    scaled = states / alpha.float().view(-1, 1, 1)
    return Trajectory(-(sigma / alpha), scaled, -guesses)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("cost", ["squared", "norm"])
def test_the_total_truncation_error_is_never_above_that_of_uniform_steps(path, cost):
    knots, field, noise = 24, plane_model(path).given(), randn(32, 2)
    errors = loop_over_pairs(path_of_the_method(field, knots, noise), cost)

    def total(places):
        return sum(errors[i, j] for i, j in itertools.pairwise(places))

    budgets, gains = (1, 2, 3, 4, 6, 8, 12, 24), []
    for k, grid in Boss(knots=knots, cost=cost).grids(field, noise, budgets).items():
        chosen, uniform = total(indices(grid, field, knots)), total(range(0, knots + 1, knots // k))
        assert grid.intervals == k
        assert chosen <= uniform * (1 + 1e-9) + 1e-12
        gains.append(uniform / max(chosen, 1e-12))
    assert max(gains) > 1.05


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_all_budgets_come_from_one_recorded_path(path):
    field, noise = CountedField(plane_model(path).given()), randn(8, 2)
    together = Boss(knots=20).grids(field, noise, (1, 3, 5, 20))
    assert field.calls == 20
    assert list(together) == [1, 3, 5, 20]
    for k, grid in together.items():
        assert torch.equal(grid.knots, Boss(knots=20).grids(field, noise, (k,))[k].knots)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_table_is_the_first_order_method_on_the_grid_that_was_found(path):
    field, noise = plane_model(path).given(), randn(8, 2)
    tuner = Boss(knots=30)
    table, grid = tuner(field, noise, nfe=5), tuner.grids(field, noise, (5,))[5]
    method = methods.euler if path is None else methods.ddim(path)
    expected = tabulate(method, grid, start_scale=start_scale(field))
    assert table.nfe == 5
    assert torch.equal(table.times, grid.knots[:-1])
    assert torch.equal(table.a, expected.a)
    assert torch.equal(table.b, expected.b)
    assert table.provenance.method == f"boss-{expected.provenance.method}"


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_fixed_times_are_visited_to_the_nearest_knot(path):
    field, knots = plane_model(path).given(), 30
    wanted = (0.31, 0.9)
    grid = Boss(knots=knots, fixed=wanted).grids(field, randn(8, 2), (4,))[4]
    free = Boss(knots=knots).grids(field, randn(8, 2), (4,))[4]
    tau = Coordinates.of(field).tau
    for t in wanted:
        assert float((tau(grid.knots) - tau(t)).abs().min()) <= 0.5 / knots + 1e-9
    assert not torch.allclose(grid.knots, free.knots)


def test_step_limits_hold_in_time():
    field, noise = plane_model().given(), randn(8, 2)
    steps = Boss(knots=30, min_step=0.19, max_step=0.25).grids(field, noise, (5,))[5].knots.diff()
    free = Boss(knots=30).grids(field, noise, (5,))[5].knots.diff()
    assert 0.19 <= float(steps.min()) <= float(steps.max()) <= 0.25
    assert float(free.min()) < 0.19
    assert float(free.max()) > 0.25


def test_a_bare_field_is_stepped_in_time_and_asked_at_every_knot():
    field = Recorder(SmoothNetwork(2))
    Boss(knots=10)(field, randn(4, 2), nfe=3)
    assert field.times == pytest.approx([k / 10 for k in range(10)])


def test_tuning_again_gives_the_same_numbers():
    field, noise = plane_model().given(), randn(16, 2)
    first, second = (Boss(knots=40)(field, noise, nfe=6) for _ in range(2))
    assert torch.equal(first.b, second.b)


@pytest.mark.parametrize("nfe", [0, 21])
def test_a_budget_outside_the_knots_is_refused(nfe):
    with pytest.raises(BudgetError, match=rf"BOSS on 20 knots finds 1 to 20 steps, asked for \[{nfe}\]"):
        Boss(knots=20)(plane_model().given(), randn(4, 2), nfe=nfe)


def test_a_budget_that_only_the_limits_exclude_is_refused_by_name():
    tuner = Boss(knots=20, max_step=0.25)
    with pytest.raises(BudgetError, match="min_step, max_step and fixed leave no schedule of 3 steps"):
        tuner.grids(plane_model().given(), randn(4, 2), (3, 6))
    with pytest.raises(BudgetError, match="no schedule of up to 3 steps"):
        tuner(plane_model().given(), randn(4, 2), nfe=3)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_network_that_returns_nan_is_refused_with_the_call_that_did(path):
    from fewstep import adapt

    field = adapt(lambda x, t: x * (math.nan if float(t[0]) > 0.5 else 1.0), path, shape=(2,)).given()
    with pytest.raises(FieldError, match=r"the network returned NaN at call \d+ \(counted from 1\), time t = 0\.[5-9]"):
        Boss(knots=20)(field, randn(4, 2), nfe=3)
