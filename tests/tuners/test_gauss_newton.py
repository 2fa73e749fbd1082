"""Gauss-Newton by forward differences: its Jacobian, its normal equations, what it reaches and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from fewstep import CountedField, FieldError, JointField, TimeGrid, adapt, methods, reference, tabulate
from fewstep.problem import Problem
from fewstep.tuners import LearnedKnots, gauss_newton, jacobian
from fewstep.tuners.gauss_newton import halves, knots_of, learnt, spread_knots
from fewstep.tuners.jacobian import difference, jacobian_of, normal_equations, propagate
from fewstep.tuners.nonstationary import numbers_of, rows_of
from fewstep.tuners.scale_time import ScaleTime, run
from fewstep.zoo.mixtures import mixture
from problems import SmoothNetwork, cancelling_wave, randn, rms

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of field calls


def network_field(dtype=torch.float64, size=3, seed=0):
    return adapt(SmoothNetwork(size, seed=seed, dtype=dtype), shape=(size,)).given()


def solved(field, noise, tol=1e-6):
    return Problem(field, noise, reference(field, noise, tol=tol))


def cloud(dimensions, seed=0):
    return mixture(1.2 * randn(5, dimensions, seed=seed), torch.full((dimensions,), 0.05, dtype=torch.float64)).given()


def labelled():
    """A field whose every class moves differently."""
    return adapt(lambda x, t, label: torch.sin(x + t[:, None] * label[:, None]) * (1 + label[:, None]), shape=(3,))


def walk_rows(theta, n, field, noise):
    """x_i = a_i x_0 + sum_j b_ij u_j with times first, then the rows: written out, without a `Sampler`."""
    outputs, x, place = [noise], noise, n
    for i in range(n):
        outputs.append(field(x, theta[i]))
        x = sum(theta[place + j] * u for j, u in enumerate(outputs))
        place += len(outputs)
    assert place == len(theta)
    return x


def derivative(function, theta):
    """Of (batch, size) in every number: (p, batch, size), by automatic differentiation of the whole run."""
    found = torch.autograd.functional.jacobian(function, theta)
    assert isinstance(found, torch.Tensor)
    return found.movedim(-1, 0)


def relative(found, true):
    return float((found.double() - true).detach().norm() / true.detach().norm())


# The Jacobian


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 2e-5), (torch.float32, 1e-3)])
@pytest.mark.parametrize("start", [methods.euler, methods.adams(2)], ids=lambda m: m.name)
def test_the_jacobian_of_all_rows_is_that_of_automatic_differentiation(dtype, close, start):
    exact, field, noise = network_field(), network_field(dtype), randn(5, 3)
    table = tabulate(start, TimeGrid(torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])))
    theta = numbers_of(table)
    theta[4:] += 0.05 * randn(len(theta) - 4, seed=1)  # a general table, not a short recurrence
    true = derivative(lambda v: walk_rows(v, 4, exact, noise), theta)
    write = rows_of(table)
    end, found = propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise.to(dtype), None))
    assert relative(end, walk_rows(theta, 4, exact, noise)) < 1e-6
    assert relative(found, true) < close
    for k in range(len(theta)):  # and each number by itself
        assert relative(found[k], true[k]) < 10 * close


def test_a_time_at_the_end_of_the_path_is_moved_inwards():
    asked = []

    def field(x, t):
        asked.append(float(t))
        return torch.sin(x + 3 * t)

    table, noise = tabulate(methods.heun, TimeGrid.uniform(1)), randn(4, 3)  # asks at 0 and at 1
    theta, write = numbers_of(table), rows_of(table)
    _, found = propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise, None))
    true = derivative(lambda v: walk_rows(v, 2, lambda x, t: torch.sin(x + 3 * t), noise), theta)
    assert 0.0 <= min(asked) < max(asked) <= 1.0
    assert relative(found, true) < 5e-3


@pytest.mark.parametrize("method", [methods.euler, methods.midpoint, methods.pfdiff(1, 1)], ids=lambda m: m.name)
def test_the_jacobian_of_knots_is_that_of_the_method_itself(method):
    field, noise = network_field(), randn(5, 3)
    grid = TimeGrid(torch.tensor([0.0, 0.3, 0.5, 1.0]))
    nfe = method.calls(3)
    write, theta = LearnedKnots(method).numbers(field, grid, nfe)

    def walk(logits):
        lengths = torch.cat([logits, torch.zeros(1, dtype=torch.float64)]).exp()
        inner = (lengths / lengths.sum()).cumsum(0)[:-1]
        return method(field, TimeGrid(torch.cat([torch.zeros(1), inner, torch.ones(1)])), noise)

    true = derivative(walk, theta)
    end, found = propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise, None))
    assert rms(end - walk(theta).detach()) < 1e-12
    assert relative(found, true) < 1e-4


@pytest.mark.parametrize("base", ["euler", "midpoint"])
def test_the_jacobian_of_a_scale_time_transformation_is_that_of_its_steps(base):
    from fewstep.tuners.bespoke import table_of

    field, noise, theta = network_field(), randn(5, 3), 0.3 * randn(15, seed=2)

    def write(values):
        return table_of(ScaleTime.of(values), base)

    true = derivative(lambda v: run(field, ScaleTime.of(v), base, noise), theta)
    _, found = propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise, None))
    assert relative(found, true) < 1e-4


def test_an_iteration_asks_only_for_what_a_number_reaches():
    # 8 calls: 8 for the walk, and one for each of the 148 pairs of a number and a later call; 60 numbers.
    field, noise, table = CountedField(network_field()), randn(2, 3), tabulate(methods.adams(2), TimeGrid.uniform(8))
    theta, write = numbers_of(table), rows_of(table)
    assert len(theta) == 52
    propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise, None))
    times, coefficients = 8, sum((i + 1) * (8 - i) for i in range(1, 8))  # a row is seen by its own call and all later ones
    later = sum(8 - i - 1 for i in range(8))
    assert field.samples == 2 * (8 + times + later + coefficients)
    assert field.calls == 8 + 8 + 7  # numbers that move the time, and those that do not, are asked about together


def test_changes_are_the_same_however_many_are_asked_about_together(monkeypatch):
    model, noise, table = labelled(), randn(6, 3), tabulate(methods.adams(2), TimeGrid.uniform(4))
    field = CountedField(JointField([model.given(torch.tensor([0, 1, 2])), model.given(torch.tensor([2, 0, 1]))]))
    theta, write = numbers_of(table), rows_of(table)
    found, calls = [], []
    for together in (1, 3 * noise.numel(), 1 << 19):  # one copy, groups of three with a smaller last one, all
        monkeypatch.setattr(jacobian, "TOGETHER", together)
        field.calls = 0
        found.append(propagate(write(theta), *jacobian_of(write, theta), Problem(field, noise, None))[1])
        calls.append(field.calls)
    assert calls[0] > calls[1] > calls[2]
    for tangents in found[1:]:
        torch.testing.assert_close(tangents, found[0], rtol=1e-5, atol=1e-7)


def test_the_network_of_lower_precision_is_moved_further():
    steps = [difference(network_field(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert steps == sorted(steps)
    assert steps[0] == 1e-5
    assert steps[1] == difference(lambda x, t: x)


# The normal equations


def explicit(problem, write, theta, log_loss):
    """J^T J and J^T r written out noise by noise."""
    end, tangents = propagate(write(theta), *jacobian_of(write, theta), problem)
    normal, slope = 0.0, 0.0
    for k in range(len(end)):
        j, r = tangents[:, k].flatten(1).double(), (end[k] - problem.solution.end[k]).flatten().double()
        weight = float(1 / r.square().mean()) if log_loss else 1.0
        normal, slope = normal + weight * j @ j.T, slope + weight * j @ r
    return normal, slope


@pytest.mark.parametrize("log_loss", [False, True])
@pytest.mark.parametrize("memory", [1, 400, 1 << 25])
def test_pieces_of_any_size_add_up_to_the_samenormal_equations(memory, log_loss, monkeypatch):
    model, noise = labelled(), randn(10, 3)
    field = JointField([model.given(label=torch.arange(5)), model.given(label=2)])
    problem, table = solved(field, noise), tabulate(methods.euler, TimeGrid.uniform(3))
    theta, write = numbers_of(table), rows_of(table)
    normal, slope = explicit(problem, write, theta, log_loss)
    monkeypatch.setattr(jacobian, "MEMORY", memory)
    counted = CountedField(field)
    found, right = normal_equations(write, theta, replace(problem, field=counted), log_loss)
    assert counted.samples == 10 * (3 + (3 + 2 + 1) + (2 * 2 + 3 * 1))  # calls; those after each time; after each row's weights
    # the differences are as long as the largest state of the piece asks, hence not to rounding
    assert relative(found, normal) < 2e-3
    assert relative(right, slope) < 2e-3


def test_the_slope_under_the_log_loss_is_the_gradient_of_the_mean_log_error():
    field, noise = network_field(), randn(6, 3) * torch.tensor([0.1, 0.3, 1.0, 1.0, 2.0, 4.0])[:, None]
    problem, table = solved(field, noise), tabulate(methods.euler, TimeGrid.uniform(3))
    theta, write = numbers_of(table), rows_of(table)

    def losses(values):
        squares = (walk_rows(values, 3, field, noise) - problem.solution.end).square().mean(1)
        return squares.sum(), squares.log().sum()

    for log_loss, gradient in zip((False, True), torch.autograd.functional.jacobian(losses, theta), strict=True):
        _, slope = normal_equations(write, theta, problem, log_loss)
        assert relative(slope * 2 / 3, gradient) < 1e-3


# What it reaches


def test_on_a_field_along_the_state_it_reaches_the_reference():
    # dx/dt = -x: two calls can give exp(-1) x exactly, in many ways; J^T J has rank one.
    noise, fresh, table = randn(32, 4), randn(32, 4, seed=4), tabulate(methods.euler, TimeGrid.uniform(2))
    fitting, held = halves(lambda x, t: -x, noise, numbers=7, holdout=0.25, tol=1e-11)
    start = rms(table(lambda x, t: -x, fresh) - fresh * math.exp(-1))
    found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), fitting, held)
    assert start > 0.1
    assert rms(found.sampler(lambda x, t: -x, fresh) - fresh * math.exp(-1)) < 1e-9
    assert not found.diverged
    assert found.error == pytest.approx(held.score(found.sampler))


def test_different_rates_are_all_met_by_as_many_calls():
    # Three decays need a polynomial of third degree in the rate: three calls are enough, two are not.
    rates = torch.tensor([-1.0, 0.5, -2.0], dtype=torch.float64)
    noise, fresh = randn(32, 3), randn(64, 3, seed=4)
    errors = []
    for n in (2, 3):
        table = tabulate(methods.euler, TimeGrid.uniform(n))
        fitting, held = halves(lambda x, t: rates * x, noise, numbers=n * (n + 5) // 2, holdout=0.25, tol=1e-11)
        found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), fitting, held, iterations=12)
        errors.append(rms(found.sampler(lambda x, t: rates * x, fresh) - fresh * rates.exp()))
    assert errors[1] < 1e-7
    assert errors[0] < 0.15 * rms(
        tabulate(methods.euler, TimeGrid.uniform(2))(lambda x, t: rates * x, fresh) - fresh * rates.exp()
    )


def test_learning_for_several_conditions_serves_each_of_them():
    model = labelled()
    field, noise, fresh = JointField([model.given(label=0), model.given(label=1)]), randn(64, 3), randn(128, 3, seed=1)
    table = tabulate(methods.euler, TimeGrid.uniform(4))
    fitting, held = halves(field, noise, numbers=18, holdout=0.25, tol=1e-5)
    assert (fitting.each, held.each, fitting.conditions) == (24, 8, 2)
    found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), fitting, held, metric="worst")
    alone = halves(field.fields[0], noise[:32], numbers=18, holdout=0.25, tol=1e-5)
    single = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), *alone)
    problem = solved(field, fresh)
    assert problem.score(found.sampler, "worst") < 0.2 * problem.score(table, "worst")
    assert problem.score(found.sampler, "worst") < 0.5 * problem.score(single.sampler, "worst")
    assert found.error == pytest.approx(held.score(found.sampler, "worst"))


def test_learning_follows_labels_given_one_per_sample():
    model, noise, labels = labelled(), randn(48, 3), torch.arange(48) % 3
    table = tabulate(methods.euler, TimeGrid.uniform(4))
    fitting, held = halves(model.given(label=labels), noise, numbers=18, holdout=0.25, tol=1e-5)
    assert rms(held.solution.end - reference(model.given(label=labels[36:]), noise[36:], tol=1e-6).end) < 1e-5
    found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), fitting, held)
    problem = solved(model.given(label=torch.arange(96) % 3), randn(96, 3, seed=5))
    assert problem.score(found.sampler) < 0.4 * problem.score(table)


def test_each_loss_is_the_better_one_by_its_own_measure():
    # Three knots cannot serve all noises alike; the logarithm weighs those with small errors as much as the others.
    field, noise = cloud(2, seed=1), randn(96, 2)
    fitting, _ = halves(field, noise, numbers=3, holdout=0.25, tol=1e-6)
    write, theta = LearnedKnots(methods.euler).numbers(field, TimeGrid.uniform(4), 4)
    plain, logged = (
        gauss_newton.gauss_newton(write, theta, fitting, fitting, iterations=20, log_loss=log_loss).sampler
        for log_loss in (False, True)
    )

    def squares(sampler):
        return (sampler(field, fitting.noise) - fitting.solution.end).square().mean(1)

    assert float(squares(logged).log().mean()) < float(squares(plain).log().mean()) - 0.01
    assert float(squares(plain).mean()) < 0.98 * float(squares(logged).mean())
    assert float(squares(logged).log().mean()) < float(squares(write(theta)).log().mean()) - 0.1


def test_every_iteration_ticks_and_the_best_held_out_iterate_is_kept():
    field, noise, table = network_field(), randn(48, 3), tabulate(methods.euler, TimeGrid.uniform(3))
    fitting, held = halves(field, noise, numbers=12, holdout=0.25, tol=1e-8)
    ticks, written = [], []

    def write(theta):
        written.append(theta.detach().clone())
        return rows_of(table)(theta)

    found = gauss_newton.gauss_newton(write, numbers_of(table), fitting, held, iterations=5, tick=lambda: ticks.append(1))
    assert 1 <= found.iterations <= len(ticks) <= 5
    assert found.error == min(held.score(rows_of(table)(theta)) for theta in [*written[:1], found.theta])
    assert found.error < 0.2 * held.score(table)


def test_nothing_learnt_is_reported_with_the_start():
    constant = torch.ones(24, 3, dtype=torch.float64)
    table = tabulate(methods.euler, TimeGrid.uniform(2))
    fitting, held = halves(lambda x, t: torch.ones_like(x), constant, numbers=7, holdout=0.25, tol=1e-6)
    found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), fitting, held)
    assert found.diverged
    assert torch.equal(found.theta, numbers_of(table))


# Knots as numbers


@pytest.mark.parametrize("knots", [[0.0, 1.0], [0.0, 0.1, 0.15, 0.7, 1.0], [0.0, 0.999, 1.0]])
def test_knots_survive_being_numbers(knots):
    logits = spread_knots(knots)
    assert len(logits) == len(knots) - 2
    assert torch.allclose(knots_of(logits), torch.tensor(knots, dtype=torch.float64), rtol=0, atol=1e-15)


# What it refuses


@pytest.mark.parametrize(("numbers", "size", "needed"), [(18, 3, 32), (18, 64, 4), (52, 2, 139)])
def test_too_little_noise_names_the_number_needed(numbers, size, needed):
    message = (
        rf"learning {numbers} numbers needs at least {needed} noises of {size} elements \(25% of them only validates\), got"
    )
    with pytest.raises(FieldError, match=message):
        halves(lambda x, t: -x, randn(needed - 1, size), numbers=numbers, holdout=0.25, tol=1e-3)
    fitting, held = halves(lambda x, t: -x, randn(needed, size), numbers=numbers, holdout=0.25, tol=1e-3)
    assert fitting.each + held.each == needed
    assert fitting.noise.numel() >= 4 * numbers - size / 2  # the split is to whole noises


def test_one_noise_per_condition_cannot_validate():
    model = labelled()
    field = JointField([model.given(label=k) for k in range(4)])
    with pytest.raises(FieldError, match="at least two noises per condition, got 1"):
        halves(field, randn(4, 3), numbers=1, holdout=0.25, tol=1e-3)


def test_a_reference_that_is_less_accurate_than_the_start_is_refused():
    noise, table = randn(48, 3), tabulate(methods.midpoint, TimeGrid.uniform(4))
    write, theta = rows_of(table), numbers_of(table)
    fitting, held = halves(cancelling_wave, noise, numbers=len(theta) // 2, holdout=0.25, tol=1.0)
    assert held.score(table) < 1e-12 < held.solution.error
    with pytest.raises(
        FieldError, match=r"the reference is only accurate to \S+, the table to start from errs by \S+; give a lower tol"
    ):
        learnt(write, theta, fitting, held, iterations=2)


def test_a_table_that_is_nearer_to_the_reference_than_that_is_to_the_solution_is_told_of():
    field, noise = network_field(), randn(96, 3)
    table = tabulate(methods.euler, TimeGrid.uniform(4))
    problems = halves(field, noise, numbers=18, holdout=0.25, tol=1e-5)
    error = 0.9 * problems[1].score(table)
    fitting, held = (Problem(p.field, p.noise, replace(p.solution, error=error)) for p in problems)
    with pytest.warns(UserWarning, match=r"learnt is \S+ from a reference that is only accurate to \S+; a lower tol may lead"):
        learnt(rows_of(table), numbers_of(table), fitting, held, iterations=2)


def test_trial_steps_that_blow_up_under_a_checking_field_are_not_taken():
    # A network that returns NaN beyond the states it was trained on: neither the reference nor the start go there.
    inner, blown = network_field(), []

    def field(x, t):
        outside = x.abs() > 6
        blown.append(bool(outside.any()))
        return torch.where(outside, math.nan, inner(x, t))

    noise, table, strict = randn(32, 3), tabulate(methods.euler, TimeGrid.uniform(2)), CountedField(field)
    fitting, held = halves(strict, noise, numbers=7, holdout=0.25, tol=1e-6)
    theta, before = numbers_of(table), strict.calls

    def wild(values):  # steps that are much longer than their derivative says
        return rows_of(table)(values + 1e6 * (values - theta) ** 3)

    assert not any(blown)
    found = gauss_newton.gauss_newton(wild, theta, fitting, held)
    assert any(blown)
    assert found.error <= held.score(table)
    assert strict.calls - before > 7 * 2  # they are counted where the user counts them


def test_a_start_that_blows_up_gives_the_start_back():
    table = tabulate(methods.euler, TimeGrid.uniform(2))
    broken = Problem(lambda x, t: x * math.inf, randn(8, 3), reference(lambda x, t: -x, randn(8, 3)))
    found = gauss_newton.gauss_newton(rows_of(table), numbers_of(table), broken, broken)
    assert found.diverged
    assert found.error == math.inf
