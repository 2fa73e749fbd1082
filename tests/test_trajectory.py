import copy
import math
from dataclasses import replace

import pytest
import torch

from fewstep import (
    EDM,
    VE,
    VP,
    CondOT,
    Cosine,
    DiscreteVP,
    FieldError,
    TimeGrid,
    adapt,
    dopri5,
    methods,
    record,
    reference,
    tabulate,
)
from fewstep.composite import CountedField, JointField
from fewstep.coordinates import Coordinates
from fewstep.trajectory import Solve
from fewstep.zoo import load
from problems import GaussianFlow, Recorder, ShearedSpiral, SmoothNetwork, gaussian_flow, mixture, randn, rms

PATHS = [CondOT(), Cosine(), VP(), VE(), EDM(), DiscreteVP(torch.linspace(0.9999, 0.003, 400))]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def gaussian_field(path):
    flow = gaussian_flow(path)
    field = adapt(lambda x, t: flow.data(x, t[0]), path=path, predicts="data", clock=lambda t: t).given()
    return flow, field


def test_a_record_is_eulers_method_with_everything_kept():
    field, grid, noise = Recorder(SmoothNetwork()), TimeGrid.quadratic(5), randn(3, 3)
    times, states, velocities = record(field, grid, noise)
    assert torch.equal(times, grid.knots)
    assert field.times == grid.knots[:-1].tolist(), "n calls, none at the end"
    torch.testing.assert_close(states, tabulate(methods.euler, grid)(SmoothNetwork(), noise, trajectory=True))
    for i in range(5):
        torch.testing.assert_close(velocities[i], SmoothNetwork()(states[i], float(times[i])).detach())
    assert not states.requires_grad


def test_a_record_keeps_the_precision_of_its_start():
    _, states, velocities = record(SmoothNetwork(dtype=torch.float32), TimeGrid.uniform(2), randn(3, 3, dtype=torch.float32))
    assert states.dtype == velocities.dtype == torch.float32


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_a_reference_converges_to_the_solution_as_fast_as_it_says(tol):
    problem, noise = ShearedSpiral(), randn(16, 2)
    solution = reference(problem.velocity, noise, tol=tol)
    error = rms(solution.end - problem.solution(noise, 0.0, 1.0))
    assert solution.error <= tol
    assert error <= 3 * solution.error, "the stated error must not be much smaller than the true one"
    assert error >= solution.error / 30, "nor a wild exaggeration"


def test_a_reference_is_as_good_between_its_knots():
    problem, noise = ShearedSpiral(), randn(16, 2)
    solution = reference(problem.velocity, noise, tol=1e-6)
    for t in torch.linspace(0, 1, 23, dtype=torch.float64).tolist():
        assert rms(solution.at(t) - problem.solution(noise, 0.0, t)) <= 3 * solution.error
    assert torch.equal(solution.at(1.0), solution.end)
    assert torch.equal(solution.at(0.0), noise)


@every_path
def test_references_reach_the_closed_form_on_every_path(path):
    flow, field = gaussian_field(path)
    noise = randn(32, 3, seed=3)
    solution = reference(field, noise, tol=1e-5)
    start = noise * path.start_scale
    for t in (0.0, 0.3, 0.7, 0.95, 1.0):
        exact = flow.solution(start, 0.0, t)
        # Outside its span the network is asked at the nearest time inside: a few margins of difference.
        assert rms(solution.at(t) - exact) <= 1.1e-4 * max(1.0, float(path.coefficients(t).sigma))
    # ... 1.05e-4 in the limit of many steps with 400 noise levels
    assert rms(solution.end - flow.solution(start, 0.0, 1.0)) <= 1.1e-4


@pytest.mark.parametrize("predicts", ["velocity", "data", "score"])
@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=repr)
@pytest.mark.usefixtures("unchecked")
def test_the_stated_error_is_honest_whatever_the_network_predicts(path, predicts):
    """A network of data or scores is asked at the nearest time of its span next to the ends: no order 4 across that."""
    problem = mixture(path)

    def network(x, t):
        return path.convert(problem.velocity(x, t[0]), x, t[0], source="velocity", target=predicts)

    field = adapt(network, path, predicts).given()
    noise = randn(8, 2)
    truth = reference(field, noise, tol=2e-8).end
    for tol in (1e-4, 1e-5):
        solution = reference(field, noise, tol=tol)
        error = rms(solution.end - truth)
        assert 0.7 * error <= solution.error <= tol


def test_a_step_that_is_not_smooth_does_not_count_as_fourth_order():
    def field(x, t):
        return x * max(t - 1 / 3, 0.0)

    noise = randn(8, 2)
    for tol in (1e-4, 1e-5, 1e-6):
        solution = reference(field, noise, tol=tol)
        assert rms(solution.end - noise * math.exp((2 / 3) ** 2 / 2)) <= 1.5 * solution.error


def test_no_reference_step_crosses_the_time_at_which_a_network_stops_being_asked_at_its_own():
    _, field = gaussian_field(CondOT())
    assert {field.first, field.last} == {0.0, 0.999}
    for inside in (field, CountedField(field), JointField([field, field])):
        assert 0.999 in reference(inside, randn(4, 3)).knots.tolist()


def test_a_reference_counts_its_calls():
    field = Recorder(ShearedSpiral().velocity)
    solution = reference(field, randn(4, 2), tol=1e-4)
    assert solution.nfe == len(field.times)
    steps = len(solution.knots) - 1
    assert solution.nfe == sum(4 * n + 1 for n in (4, 8, 16, 32, 64, 128) if n <= steps)


def test_a_selection_of_a_reference_is_that_of_its_samples():
    problem, noise = ShearedSpiral(), randn(6, 2)
    solution = reference(problem.velocity, noise)
    for index in (slice(1, 4), torch.tensor([5, 0])):
        part = solution.select(index)
        assert torch.equal(part.end, solution.end[index])
        assert torch.equal(part.at(0.4), solution.at(0.4)[index])
        assert (part.error, part.nfe) == (solution.error, solution.nfe)


def test_a_reference_outside_its_clock_is_refused():
    solution = reference(ShearedSpiral().velocity, randn(2, 2))
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"a reference covers times in \[0, 1\], asked for t = {t}"):
            solution.at(t)


def test_a_reference_that_does_not_converge_says_how_far_it_came():
    with pytest.raises(FieldError, match=r"did not converge: 32 Runge-Kutta steps still change it by .* \(asked for 1e-09\)"):
        reference(lambda x, t: torch.sin(40 * x), randn(4, 2), tol=1e-9, most_steps=32)


def test_half_precision_is_named_where_it_is_what_does_not_converge():
    model = load("digits")
    rough = replace(model, network=copy.deepcopy(model.network).to(torch.bfloat16))
    field, noise = rough.given(torch.arange(4)), randn(4, 1, 8, 8)
    with pytest.raises(FieldError, match=r"; the network computes in torch.bfloat16, give tol=\S+ or the network in float32$"):
        reference(field, noise, tol=1e-5, most_steps=32)
    solution = reference(field, noise.to(torch.bfloat16), tol=1e-2)
    assert solution.end.dtype == torch.float32


def test_a_solve_goes_on_from_what_it_has_and_gives_what_a_fresh_one_gives():
    field, noise = CountedField(ShearedSpiral().velocity), randn(4, 2)
    solve = Solve(field, noise)
    coarse = solve.to(1e-2)
    assert solve.to(1e-1) is coarse
    before, fine = field.calls, solve.to(1e-7)
    fresh = reference(ShearedSpiral().velocity, noise, tol=1e-7)
    assert torch.equal(fine.states, fresh.states)
    assert (fine.error, fine.nfe) == (fresh.error, fresh.nfe)
    assert coarse.error > 1e-7 >= fine.error
    assert field.calls - before == fine.nfe - coarse.nfe > 0


def test_steps_that_blow_up_are_passed_over_and_the_estimate_still_rests_on_three_solves():
    asked = []

    def field(x, t):
        asked.append(t)
        return torch.full_like(x, torch.nan) if len(asked) == 1 else -5 * x

    noise = randn(4, 2)
    solve = Solve(field, noise)
    solution = solve.to(1.0)  # 4 steps fail, 8 have nothing to be compared with, 16 tell of no order
    assert len(solution.knots) == 33
    assert float((solution.end - noise * math.exp(-5.0)).abs().max()) < 1e-4
    assert 0 < solution.error < 1e-4


def test_nan_from_the_network_is_named_by_the_reference():
    with pytest.raises(FieldError, match=r"the network returned NaN at call 4 .*, time t = 0\.25"):
        reference(lambda x, t: x / 0 * 0 if t > 0.18 else x, randn(2, 2))


def test_dopri5_solves_and_counts():
    problem, noise = gaussian_flow(CondOT()), randn(8, 3)
    calls = []
    for tol in (1e-3, 1e-6):
        field = Recorder(problem.velocity)
        sample, nfe = dopri5(field, noise, tol=tol)
        assert rms(sample - problem.solution(noise, 0.0, 1.0)) <= 10 * tol
        assert nfe == len(field.times)
        calls.append(nfe)
    assert calls[1] > calls[0]


def test_dopri5_starts_where_the_path_starts():
    path = EDM(sigma_max=5.0)
    flow, field = gaussian_field(path)
    noise = randn(8, 3, dtype=torch.float32)
    sample = dopri5(field, noise, tol=1e-5, times=(0.0, 0.9)).sample
    assert sample.dtype == torch.float32
    assert rms(sample - flow.solution(noise.double() * 5.0, 0.0, 0.9)) <= 1e-3


@every_path
def test_the_coordinates_run_from_0_to_1_and_back(path):
    _, field = gaussian_field(path)
    coordinates = Coordinates.of(field)
    assert (coordinates.path is None) == isinstance(path, CondOT | Cosine)
    clock = torch.linspace(0, 1, 101, dtype=torch.float64)
    times = coordinates.time(clock)
    assert bool((times.diff() > 0).all())
    torch.testing.assert_close(coordinates.tau(times), clock, rtol=0, atol=1e-8)
    assert float(coordinates.time(0.0)) == pytest.approx(0.0, abs=1e-9)
    assert float(coordinates.time(1.0)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("path", [VP(), VE(), EDM()], ids=lambda p: type(p).__name__)
def test_the_rate_in_the_coordinates_is_the_derivative_of_the_scaled_solution(path):
    flow, field = gaussian_field(path)
    coordinates, noise, h = Coordinates.of(field), randn(4, 3), 1e-5
    start = noise * path.start_scale

    def scaled(tau):
        t = float(coordinates.time(tau))
        return flow.solution(start, 0.0, t) / coordinates.scale(t)

    rate = coordinates.field(field)
    for tau in (0.02, 0.3, 0.5, 0.7, 0.97):
        expected = (scaled(tau + h) - scaled(tau - h)) / (2 * h)
        torch.testing.assert_close(rate(scaled(tau), tau), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("predicts", "tau"), [("data", 1e-3), ("noise", 0.999)])
def test_the_rate_is_well_conditioned_where_the_prediction_is(predicts, tau):
    """In float32, a thousandth from either end: no difference of nearly equal numbers is divided by a small one."""
    path = VP()
    flow = gaussian_flow(path)

    def network(x, t):
        alpha, sigma, _, _ = path.coefficients(t[0])
        noise = sigma * (x.double() - alpha * flow.mean) / flow.spread(t[0]) ** 2
        return (noise if predicts == "noise" else flow.data(x.double(), t[0])).to(x.dtype)

    field = adapt(network, path=path, predicts=predicts, clock=lambda t: torch.tensor(t, dtype=torch.float64)).given()
    rate = Coordinates.of(field).field(field)
    z = flow.solution(randn(64, 3), 0.0, float(Coordinates(path).time(tau))).float()
    assert rms(rate(z, tau).double() - rate(z.double(), tau)) < 6e-6


def test_bare_functions_are_solved_in_t():
    problem = mixture(VP())
    assert Coordinates.of(problem.velocity).path is None
    assert Coordinates.of(lambda x, t: x).scale(0.3) == 1.0


def test_the_angle_is_bounded_where_the_velocity_is_not():
    """Almost a single data point on VP: dx/dt is unbounded at t = 1, the scaled state turns as noise and data differ."""
    path = VP()
    flow = GaussianFlow(path, torch.full((2,), 0.7, dtype=torch.float64), torch.full((2,), 1e-4, dtype=torch.float64))
    field = adapt(lambda x, t: flow.data(x, t[0]), path=path, predicts="data", clock=lambda t: t).given()
    coordinates, noise = Coordinates.of(field), randn(4, 2)
    fastest = math.pi / 2 * (rms(noise) + 0.7)
    for tau in (0.0, 0.5, 0.99, 0.9999):
        t = float(coordinates.time(tau))
        state = flow.solution(noise, 0.0, t)
        assert rms(coordinates.field(field)(state / coordinates.scale(t), tau)) <= fastest
    assert rms(field(state, t)) > 3 * fastest
