"""Bespoke solvers: the transformation, its steps and their bound (2310.19075), and what training gains."""

import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import EDM, VP, BudgetError, FieldError, JointField, TimeGrid, adapt, load, methods, reference, tabulate
from fewstep.composite import start_scale
from fewstep.coordinates import Coordinates
from fewstep.problem import Problem
from fewstep.tuners import Bespoke, NonStationary
from fewstep.tuners.bespoke import precondition, table_of
from fewstep.tuners.scale_time import STAGES, ScaleTime, bound, lipschitz_products, run, step
from fewstep.zoo.mixtures import mixture
from problems import ShearedSpiral, SmoothNetwork, cancelling_wave, randn, rms, slope

BASES = ["euler", "midpoint"]


def cloud(path=None, dimensions=4, seed=0):
    """Wide enough clusters that no sample sits on the edge between two and errs a hundred times more than the others."""
    return mixture(1.2 * randn(5, dimensions, seed=seed), torch.full((dimensions,), 0.3, dtype=torch.float64), path).given()


def random_transformation(calls, seed=0, size=0.5):
    return ScaleTime.of(size * randn(4 * calls - 1, seed=seed))


def smooth(calls):
    """Samples of a fixed smooth transformation with s_1 = exp(0.5) at `calls` + 1 equally spaced r."""
    r = torch.arange(calls + 1, dtype=torch.float64) / calls
    t = r + 0.3 * torch.sin(math.pi * r) ** 2 / math.pi
    dt = 1 + 0.3 * torch.sin(2 * math.pi * r)
    s = torch.exp(0.5 * r + 0.2 * torch.sin(math.pi * r))
    ds = s * (0.5 + 0.2 * math.pi * torch.cos(math.pi * r))
    return ScaleTime(t, dt[:-1], s, ds[:-1])


def kept_aside(field, noise, tol=1e-4):
    split = len(noise) - round(0.25 * len(noise))
    return Problem(field, noise, reference(field, noise, tol=tol)).part(split, len(noise))


# The transformation


@pytest.mark.parametrize(("base", "n", "numbers"), [("euler", 5, 19), ("midpoint", 5, 39), ("midpoint", 10, 79)])
@pytest.mark.usefixtures("unchecked")
def test_the_paper_counts_the_same_numbers(base, n, numbers):
    q = ScaleTime.of(torch.zeros(numbers, dtype=torch.float64))
    assert q.calls == STAGES[base] * n
    noise = randn(4, 3)
    with pytest.raises(FieldError, match=f"learning {numbers} numbers needs"):
        Bespoke(base=base)(lambda x, t: -x, noise, nfe=STAGES[base] * n)


@given(st.integers(1, 12), st.integers(0, 2**31), st.floats(0, 4))
def test_times_increase_and_scales_are_positive_whatever_the_numbers(calls, seed, size):
    q = random_transformation(calls, seed, size)
    assert float(q.t[0]) == 0.0
    assert float(q.t[-1]) == 1.0
    assert bool((q.t.diff() > 0).all())
    assert bool((q.s > 0).all())
    assert float(q.s[0]) == 1.0
    assert bool((q.dt > 0).all())
    assert [len(v) for v in (q.t, q.dt, q.s, q.ds)] == [calls + 1, calls, calls + 1, calls]


@pytest.mark.parametrize("n", [1, 4, 10])
@pytest.mark.parametrize("base", BASES)
def test_zeros_are_the_base_method(base, n):
    q = ScaleTime.of(torch.zeros(4 * n * STAGES[base] - 1, dtype=torch.float64))
    found, plain = table_of(q, base), tabulate(getattr(methods, base), TimeGrid.uniform(n))
    for name in ("times", "a", "b"):
        assert torch.allclose(getattr(found, name), getattr(plain, name), rtol=0, atol=1e-14)
    assert found.provenance.method == f"bespoke-{base}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("base", BASES)
def test_the_table_does_what_the_steps_do(base, seed):
    q, network, noise = random_transformation(6, seed), SmoothNetwork(3, seed=seed), 2 * randn(8, 3)
    table = table_of(q, base)
    assert table.nfe == 6
    with torch.no_grad():
        assert rms(table(network, noise) - run(network, q, base, noise)) < 1e-10 * rms(noise)
        wide = table_of(q, base, 80.0)
        assert rms(wide(network, noise) - run(network, q, base, 80 * noise)) < 1e-10 * 80 * rms(noise)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("base", BASES)
def test_a_step_is_the_base_methods_on_the_transformed_field(base, seed):
    """Equations 14-16: x-bar' = (s' / s) x-bar + t' s u(x-bar / s, t), stepped by Euler or midpoint, then divided by s."""
    q, network, x = random_transformation(8, seed), SmoothNetwork(3, seed=seed), randn(5, 3, seed=seed)

    def transformed(y, k):
        return q.ds[k] / q.s[k] * y + q.dt[k] * q.s[k] * network(y / q.s[k], q.t[k])

    h = STAGES[base] / 8
    with torch.no_grad():
        for i in range(0, 8, STAGES[base]):
            y = q.s[i] * x
            half = y + h / 2 * transformed(y, i)
            after = y + h * (transformed(y, i) if base == "euler" else transformed(half, i + 1))
            assert rms(step(network, q, base, i, x) - after / q.s[i + STAGES[base]]) < 1e-12


@pytest.mark.parametrize("base", BASES)
def test_steps_from_a_place_per_sample_are_those_from_each_place(base):
    q, network = random_transformation(8), SmoothNetwork(3)
    places = torch.arange(0, 8, STAGES[base])
    x = randn(len(places), 3)
    with torch.no_grad():
        together = step(network, q, base, places, x)
        alone = [step(network, q, base, int(i), x[k : k + 1]) for k, i in enumerate(places)]
    assert rms(together - torch.cat(alone)) < 1e-14


@pytest.mark.parametrize(("base", "order"), [("euler", 1), ("midpoint", 2)])
def test_the_order_is_the_base_methods_for_a_fixed_smooth_transformation(base, order):
    spiral, x, steps = ShearedSpiral(), 0.3 * randn(16, 2), [32, 64, 128]
    exact = spiral.solution(x, 0.0, 1.0)
    errors = [rms(run(spiral.velocity, smooth(n * STAGES[base]), base, x) - exact) for n in steps]
    assert abs(slope(errors, steps) - order) < 0.25
    wrong = smooth(128 * STAGES[base])
    wrong = ScaleTime(wrong.t, wrong.dt, wrong.s, 0.5 * wrong.ds)  # a derivative that is not that of the scale
    assert rms(run(spiral.velocity, wrong, base, x) - exact) > 5 * errors[-1]


# The bound


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", BASES)
def test_the_lipschitz_products_are_those_of_the_paper(base, seed):
    q, constant, stages = random_transformation(8, seed), 1.7, STAGES[base]
    n = 8 // stages
    h, t, s = 1 / n, q.dt.tolist(), q.s.tolist()

    def rate(k):
        return abs(float(q.ds[k])) / s[k] + t[k] * constant

    lengths = []
    for i in range(n):
        k = i * stages
        inside = 1 + h * rate(k) if base == "euler" else 1 + h * rate(k + 1) * (1 + h / 2 * rate(k))
        lengths.append(s[k] / s[k + stages] * inside)
    expected = [math.prod(lengths[j] for j in range(i, n)) for i in range(1, n + 1)]
    assert lipschitz_products(q, base, constant).tolist() == pytest.approx(expected, rel=1e-13)


def tanh_field(seed, size=3):
    """u = W tanh(V x + c t) and an upper bound of its Lipschitz constant."""
    first, second = randn(size, size, seed=seed), randn(size, size, seed=seed + 100)
    constant = float(torch.linalg.matrix_norm(first, 2) * torch.linalg.matrix_norm(second, 2))
    turn = randn(size, seed=seed + 200)

    def field(x, t):
        t = torch.as_tensor(t, dtype=x.dtype).expand(x.shape[0])[:, None]
        return torch.tanh(x @ second.T + turn * t) @ first.T

    return field, constant


def one_step(field, q, base, i, x):
    return step(field, q, base, i, x[None])[0]


def step_lengths(q, base, constant):
    """L_i of every step but the first, from their products."""
    products = lipschitz_products(q, base, constant)
    return products[:-1] / products[1:]


@pytest.mark.parametrize("base", BASES)
def test_no_step_stretches_more_than_its_bound(base):
    ratios = []
    for seed in range(20):
        field, constant = tanh_field(seed)
        q = random_transformation(8, seed, 1.0)
        for i, length in enumerate(step_lengths(q, base, constant).tolist(), start=1):
            x = 0.3 * randn(3, seed=seed)
            jacobian = torch.autograd.functional.jacobian(partial(one_step, field, q, base, i * STAGES[base]), x)
            ratios.append(float(torch.linalg.matrix_norm(jacobian, 2)) / length)
    assert max(ratios) <= 1 + 1e-12
    assert max(ratios) > 0.5


@pytest.mark.parametrize("base", BASES)
def test_the_bound_of_a_step_is_reached_by_a_field_that_grows_along_with_the_scale(base):
    theta = 0.5 * randn(31)
    theta[-8:] = theta[-8:].abs()
    q = ScaleTime.of(theta)
    grown = [
        float(step(lambda x, t: 2.5 * x, q, base, i, torch.ones(1, 1, dtype=torch.float64))) for i in range(0, 8, STAGES[base])
    ]
    assert grown[1:] == pytest.approx(step_lengths(q, base, 2.5).tolist(), rel=1e-13)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("unchecked")
def test_the_error_is_below_the_bound_and_equal_for_one_step(base, seed):
    field, constant = tanh_field(seed)
    noise = randn(32, 3)
    problem = Problem(field, noise, reference(field, noise, tol=1e-9))

    def both(q):
        with torch.no_grad():
            norms = (run(field, q, base, noise) - problem.solution.end).square().mean(1).sqrt()
            return float(norms.mean()), float(bound(problem, q, base, constant))

    error, above = both(random_transformation(8, seed))
    assert error <= above
    error, above = both(random_transformation(STAGES[base], seed))
    assert error == pytest.approx(above, rel=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("unchecked")
def test_the_gradient_of_the_bound_is_that_of_the_bound_along_the_true_path(base):
    """Equation 28: the reference is a constant in the graph, but moves along its velocity where the times move."""
    field, _ = tanh_field(3)
    noise, theta = randn(16, 3), 0.4 * randn(15, seed=1)
    problem = Problem(field, noise, reference(field, noise, tol=1e-10))

    def value(numbers):
        return bound(problem, ScaleTime.of(numbers), base, 1.3)

    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        differences = [
            float(value(theta + 1e-5 * e) - value(theta - 1e-5 * e)) / 2e-5 for e in torch.eye(15, dtype=torch.float64)
        ]
    assert gradient.tolist() == pytest.approx(differences, rel=1e-4, abs=1e-6)
    assert min(map(abs, differences[: 8 // STAGES[base] - 1])) > 1e-4  # times matter


@pytest.mark.usefixtures("unchecked")
def test_the_bound_of_several_conditions_is_the_mean_of_theirs():
    model = adapt(lambda x, t, label: torch.sin(x + t[:, None] * label[:, None]), shape=(3,))
    field, noise, q = (
        JointField([model.given(label=0), model.given(label=torch.arange(4))]),
        randn(8, 3),
        random_transformation(4),
    )

    def value(field, noise):
        return float(bound(Problem(field, noise, reference(field, noise, tol=1e-8)), q, "midpoint", 1.0))

    parts = [value(field.fields[0], noise[:4]), value(field.fields[1], noise[4:])]
    assert value(field, noise) == pytest.approx(sum(parts) / 2, rel=1e-5)
    single = [value(model.given(label=k), noise[4 + k : 5 + k]) for k in range(4)]
    assert parts[1] == pytest.approx(sum(single) / 4, rel=1e-5)


# Preconditioning


@pytest.mark.parametrize("sigma0", [1.0, 5.0, 10.0])
def test_the_preconditioned_table_is_euler_at_the_papers_times(sigma0):
    table, r = precondition(6, sigma0), torch.arange(6, dtype=torch.float64) / 6
    assert torch.allclose(table.times, r / (r + sigma0 * (1 - r)), rtol=0, atol=1e-15)
    constant, noise = randn(1, 3, seed=5), randn(4, 3)
    assert rms(table(lambda x, t: constant.expand_as(x), noise) - noise - constant) < 1e-14
    # Euler in the variables of the wider path, x-bar = s x, with x-bar' by the product rule
    x, h = noise, 1 / 6
    network = SmoothNetwork(3)
    with torch.no_grad():
        for k in range(6):
            s, s_end = (float(v + sigma0 * (1 - v)) for v in (r[k], r[k] + h))
            y = s * x
            y = y + h * ((1 - sigma0) / s * y + sigma0 / s**2 * s * network(x, r[k] / s))
            x = y / s_end
        assert rms(table(network, noise) - x) < 1e-13


@pytest.mark.parametrize("path", [VP(), EDM()], ids=str)
@pytest.mark.parametrize("base", ["euler", "midpoint"])
def test_the_start_on_diffusion_paths_is_the_base_method_in_the_angle(path, base):
    model = mixture(1.5 * randn(4, 3), torch.full((3,), 0.2), path)
    field, noise = model.given(), randn(16, 3)
    coordinates = Coordinates.of(field)
    rate, h = coordinates.field(field), 1 / 8
    z = noise * (path.start_scale / coordinates.scale(0.0))
    for i in range(0, 8, STAGES[base]):
        first = rate(z, i * h)
        z = z + (h * first if base == "euler" else 2 * h * rate(z + h * first, (i + 1) * h))
    q = ScaleTime.along(coordinates, 8)
    for transformation in (q, ScaleTime.of(q.theta)):
        table = table_of(transformation, base, path.start_scale)
        found = table(field, noise)
        assert rms(found - z * coordinates.scale(1.0)) < 2e-4 * rms(z)  # differences stand for derivatives
    straight = table_of(ScaleTime.widened(8, 1.0), base, path.start_scale)
    end = reference(field, noise).end
    if base == "midpoint":
        assert rms(found - end) < 0.7 * rms(straight(field, noise) - end)


@pytest.mark.parametrize("calls", [1, 2, 8])
@pytest.mark.parametrize("sigma0", [0.3, 1.0, 5.0])
def test_a_transformation_is_made_again_from_its_numbers(calls, sigma0):
    for q in (ScaleTime.widened(calls, sigma0), random_transformation(calls)):
        again = ScaleTime.of(q.theta)
        assert all(torch.allclose(getattr(again, k), getattr(q, k), rtol=1e-12, atol=1e-12) for k in ("t", "dt", "s", "ds"))
    assert torch.allclose(ScaleTime.widened(calls, 1.0).theta, torch.zeros(4 * calls - 1).double(), rtol=0, atol=1e-12)


# Training


@pytest.mark.usefixtures("unchecked")
def test_training_starts_from_the_best_of_the_widths():
    field, noise = cloud(), randn(48, 4)
    split = len(noise) - round(0.25 * len(noise))
    fitting = Problem(field, noise, reference(field, noise, tol=1e-4)).part(0, split)
    widths = (0.5, 1.0, 3.0)
    errors = [fitting.score(table_of(ScaleTime.widened(8, width), "midpoint")) for width in widths]
    start = table_of(ScaleTime.widened(8, widths[errors.index(min(errors))]), "midpoint")
    with pytest.warns(UserWarning, match="no step improved bespoke-midpoint"):
        kept = Bespoke(widths=widths, iterations=0)(field, noise, nfe=8)
    assert torch.allclose(kept.b, start.b, rtol=0, atol=1e-12)
    assert len(set(errors)) == 3


@pytest.mark.parametrize("training", ["end_to_end", "bound", "both"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("unchecked")
def test_no_training_is_worse_than_the_base_on_held_out_noise(base, training):
    field, noise = cloud(), randn(64, 4)
    held, start = kept_aside(field, noise), tabulate(getattr(methods, base), TimeGrid.uniform(4 // STAGES[base]))
    tuned = Bespoke(base, training, iterations=2, bound_iterations=20, rate=3e-2, log_loss=False)(field, noise, nfe=4)
    fresh = randn(256, 4, seed=9)
    end = reference(field, fresh).end
    assert tuned.nfe == 4
    assert held.score(tuned) < 0.97 * held.score(start)
    assert rms(tuned(field, fresh) - end) < 0.97 * rms(start(field, fresh) - end)


@pytest.mark.usefixtures("unchecked")
def test_bespoke_midpoint_halves_the_error_of_midpoint_and_beats_the_bound_on_fresh_noise():
    field, noise, fresh = cloud(), randn(160, 4), randn(256, 4, seed=9)
    end, plain = reference(field, fresh).end, tabulate(methods.midpoint, TimeGrid.uniform(4))
    trained = {
        "end_to_end": Bespoke(log_loss=False, iterations=6),
        "bound": Bespoke(training="bound", bound_iterations=40, rate=2e-2),
    }
    ratios = {
        k: rms(plain(field, fresh) - end) / rms(tuner(field, noise, nfe=8)(field, fresh) - end) for k, tuner in trained.items()
    }
    print(f"midpoint / bespoke at 8: {ratios}")
    assert ratios["end_to_end"] > 2
    assert ratios["end_to_end"] > ratios["bound"] > 1.1


@pytest.mark.parametrize("path", [VP(), EDM()], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_it_starts_where_the_path_starts(path):
    field, noise = cloud(path), randn(32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on EDM nothing may improve, uniform times are hopeless there
        tuned = Bespoke("euler", iterations=2)(field, noise, nfe=4)
    assert float(tuned.a[0]) == pytest.approx(start_scale(field))


@pytest.mark.usefixtures("unchecked")
def test_the_bundled_model_is_tuned_in_float32():
    model = load("digits")
    field = model.given(torch.arange(8) % 10)
    noise, fresh = (randn(8, *model.shape, seed=seed, dtype=torch.float32) for seed in (0, 1))
    end = reference(field, fresh).end
    tuned, plain = Bespoke(iterations=2)(field, noise, nfe=4), tabulate(methods.midpoint, TimeGrid.uniform(2))
    ratio = rms(plain(field, fresh) - end) / rms(tuned(field, fresh) - end)
    print(f"digits midpoint / bespoke at 4: {ratio:.2f}")
    assert ratio > 1.5


@pytest.mark.parametrize("training", ["end_to_end", "bound"])
@pytest.mark.usefixtures("unchecked")
def test_tuning_again_gives_the_same_numbers(training):
    field, noise = cloud(), randn(24, 4)
    first, second = (Bespoke(training=training, iterations=2, bound_iterations=20)(field, noise, nfe=4) for _ in range(2))
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.times, second.times)


# What it refuses


@pytest.mark.parametrize(("nfe", "near"), [(7, "6 and 8"), (1, "2")])
def test_an_odd_budget_is_refused_for_the_midpoint_base(nfe, near):
    with pytest.raises(BudgetError, match=rf"two calls per step; the nearest budgets? to {nfe} (are|is) {near}$"):
        Bespoke()(lambda x, t: -x, randn(32, 4), nfe=nfe)


@pytest.mark.parametrize("widths", [(), (1.0, 0.0), (float("nan"),)])
def test_widths_that_are_none_are_refused(widths):
    for tuner in (Bespoke, NonStationary):
        with pytest.raises(ValueError, match=r"widths must be positive numbers, such as \(1.0,\), got"):
            tuner(widths=widths)


@pytest.mark.parametrize("training", ["end_to_end", "bound", "both"])
@pytest.mark.usefixtures("unchecked")
def test_a_reference_that_is_less_accurate_than_the_base_is_refused(training):
    with pytest.raises(FieldError, match=r"the reference is only accurate to .*; give a lower tol"):
        Bespoke(training=training, tol=1.0)(cancelling_wave, randn(64, 3), nfe=8)


@pytest.mark.usefixtures("unchecked")
def test_training_on_the_bound_that_diverges_gives_the_base_back_and_says_so():
    field, noise = cloud(), randn(24, 4)
    with pytest.warns(UserWarning, match="the bound improved nothing on held-out noise"):
        tuned = Bespoke(training="bound", widths=(1.0,), rate=1e3, bound_iterations=30)(field, noise, nfe=4)
    assert torch.allclose(tuned.b, tabulate(methods.midpoint, TimeGrid.uniform(2)).b, rtol=0, atol=1e-14)
