import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import (
    EDM,
    VP,
    BudgetError,
    CountedField,
    FieldError,
    JointField,
    Sampler,
    TimeGrid,
    adapt,
    load,
    methods,
    reference,
    tabulate,
)
from fewstep.candidates import angle_grid
from fewstep.composite import start_scale
from fewstep.coordinates import Coordinates
from fewstep.problem import Problem
from fewstep.tuners import Boss, LeastSquares, least_squares
from fewstep.tuners.least_squares import fit
from problems import Recorder, SmoothNetwork, cancelling_wave, randn, rms

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of field calls


def smooth_field(seed):
    """A random network that bends its paths strongly."""
    network = SmoothNetwork(4, seed=seed)
    return torch.no_grad()(lambda x, t: 2.5 * network(x, t))


def cloud(path=None, dimensions=6, seed=0):
    from fewstep.zoo.mixtures import mixture

    return mixture(1.2 * randn(5, dimensions, seed=seed), torch.full((dimensions,), 0.05, dtype=torch.float64), path).given()


def uniform_euler(n):
    return tabulate(methods.euler, TimeGrid.uniform(n))


def error(sampler, field, noise, tol=1e-4):
    return rms(sampler(field, noise) - reference(field, noise, tol=tol).end)


def kept_aside(field, noise, share=0.25):
    """The last quarter of the noises, with its solution: what the tuner validates on."""
    split = len(noise) - round(share * len(noise))
    return Problem(field, noise, reference(field, noise)).part(split, len(noise))


# What it is for


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "base", [None, uniform_euler(4), tabulate(methods.midpoint, TimeGrid.uniform(2))], ids=["boss", "euler", "midpoint"]
)
def test_a_fit_to_a_smooth_network_is_better_than_its_start_on_fresh_noise(base, seed):
    field, noise, fresh = smooth_field(seed), randn(96, 4, seed=seed + 50), randn(256, 4, seed=seed + 90)
    start = base or Boss()(field, noise, nfe=4)
    fitted = LeastSquares(base)(field, noise, nfe=4)
    held = kept_aside(field, noise)
    assert held.score(fitted) <= held.score(start)
    assert error(fitted, field, fresh) < error(start, field, fresh)


@pytest.mark.parametrize("size", [6, 9, 16])
@pytest.mark.parametrize("seed", range(4))
def test_with_little_noise_it_is_still_never_worse_on_the_part_kept_aside(size, seed):
    field, noise = smooth_field(seed), randn(size, 4, seed=seed)
    start = tabulate(methods.adams(2), TimeGrid.uniform(3))
    held = kept_aside(field, noise)
    assert held.score(LeastSquares(start)(field, noise, nfe=3)) <= held.score(start)


def test_a_fit_that_is_worse_than_its_start_is_not_used():
    # Euler is exact on a constant field, so nothing can be gained; every ridge returns at best the same.
    start = uniform_euler(3)
    fitted = LeastSquares(start)(lambda x, t: torch.ones_like(x), randn(16, 3), nfe=3)
    assert error(fitted, lambda x, t: torch.ones_like(x), randn(64, 3, seed=9)) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nfe", [2, 6])
def test_a_fit_to_a_mixture_is_much_better_than_boss_on_fresh_noise(nfe, seed):
    field, noise, fresh = cloud(seed=seed), randn(128, 6, seed=seed), randn(256, 6, seed=seed + 7)
    boss, fitted = Boss()(field, noise, nfe=nfe), LeastSquares()(field, noise, nfe=nfe)
    assert torch.equal(boss.times, fitted.times)
    assert error(fitted, field, fresh) < 0.9 * error(boss, field, fresh)


def test_a_fit_to_the_bundled_model_is_less_than_half_as_wrong_as_boss():
    model = load("digits")
    field = model.given(torch.arange(32) % 10)
    noise, fresh = (randn(32, *model.shape, seed=seed, dtype=torch.float32) for seed in (0, 1))
    boss, fitted = Boss()(field, noise, nfe=6), LeastSquares()(field, noise, nfe=6)
    assert error(fitted, field, fresh) < 0.5 * error(boss, field, fresh)


@pytest.mark.parametrize("path", [VP(), EDM()], ids=str)
def test_on_diffusion_paths_the_fit_improves_on_ddim(path):
    field = cloud(path)
    noise, fresh = randn(128, 6), randn(256, 6, seed=8)
    ddim = tabulate(methods.ddim(path), angle_grid(Coordinates.of(field), 5), start_scale=start_scale(field))
    fitted = LeastSquares(ddim)(field, noise, nfe=5)
    assert error(fitted, field, fresh) < 0.6 * error(ddim, field, fresh)
    assert float(fitted.a[0]) == pytest.approx(start_scale(field))


def test_float32_noise_is_fitted_as_float64_noise_is():
    double, single = cloud(), randn(96, 6).float()
    fitted, exact = LeastSquares()(double, single, nfe=5), LeastSquares()(double, single.double(), nfe=5)
    assert fitted.b.dtype == torch.float64
    fresh = randn(256, 6, seed=3)
    assert error(fitted, double, fresh) == pytest.approx(error(exact, double, fresh), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tuning_again_gives_the_same_numbers(dtype):
    field, noise = cloud(), randn(48, 6, dtype=dtype)
    first, second = (LeastSquares()(field, noise, nfe=4) for _ in range(2))
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


def test_the_fit_for_several_conditions_serves_each_of_them():
    model = adapt(lambda x, t, label: torch.sin(x + t[:, None]) * label[:, None], shape=(4,))
    field = JointField([model.given(label=1), model.given(label=3)])
    noise, fresh = randn(96, 4), randn(256, 4, seed=1)
    start = uniform_euler(4)
    fitted = LeastSquares(start)(field, noise, nfe=4)
    solved = Problem(field, fresh, reference(field, fresh))
    alone = LeastSquares(start)(field.fields[0], noise[:48], nfe=4)
    assert solved.score(fitted, "worst") < 0.6 * solved.score(start, "worst")
    assert solved.score(fitted, "worst") < 0.9 * solved.score(alone, "worst")


# What it computes


def test_every_row_is_numpys_least_squares_solution():
    field, noise, start = smooth_field(0), randn(40, 4), tabulate(methods.midpoint, TimeGrid(torch.tensor([0.0, 0.4, 1.0])))
    solution = reference(field, noise, tol=1e-6)
    fitted, residual = fit(field, noise, solution, start, ridge=0.0)
    state, outputs = noise, [noise]
    for i in range(1, start.nfe + 1):
        outputs.append(field(state, float(start.times[i - 1])))
        known = np.stack([u.numpy().ravel() for u in outputs], axis=1)
        target = solution.at(float(start.times[i])) if i < start.nfe else solution.end
        row, *_ = np.linalg.lstsq(known, target.numpy().ravel(), rcond=None)
        found = torch.cat([fitted.a[i, None], fitted.b[i, :i]]).numpy()
        assert np.allclose(found, row, rtol=1e-7, atol=1e-9)
        state = torch.from_numpy(known @ row).view(noise.shape)
    assert not fitted.b.triu().any()
    assert residual == pytest.approx(rms(state - solution.end), rel=1e-6)
    assert rms(fitted(field, noise) - state) < 1e-9


def test_a_table_that_first_asks_later_than_the_start_has_its_first_row_fitted_too():
    field, noise = cloud(), randn(64, 6)
    rows = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.3, 0.4]])
    start = Sampler(torch.tensor([0.3, 0.6]), torch.ones(3), rows)
    solution = reference(field, noise)
    fitted, residual = fit(field, noise, solution, start)
    target = solution.at(0.3).ravel()
    assert float(fitted.a[0]) == pytest.approx(float(noise.ravel() @ target / noise.square().sum()), rel=1e-6)
    assert residual < 0.9 * rms(start(field, noise) - solution.end)


def test_the_fit_reaches_round_off_where_the_end_point_is_a_combination_of_the_calls():
    rates = torch.tensor([-1.0, 0.5, -2.0], dtype=torch.float64)
    noise, fresh = randn(64, 3), randn(64, 3, seed=4)
    solution = reference(lambda x, t: rates * x, noise, tol=1e-12)
    fitted, residual = fit(lambda x, t: rates * x, noise, solution, uniform_euler(2), ridge=0.0)
    assert residual < 1e-8
    assert rms(fitted(lambda x, t: rates * x, fresh) - fresh * rates.exp()) < 1e-9


def test_a_field_along_the_state_leaves_nothing_to_choose_and_is_still_fitted():
    # dx/dt = -x: every output is a multiple of the noise, so the Gram matrix has rank one and only the ridge decides.
    noise, fresh, start = randn(32, 4), randn(32, 4, seed=4), uniform_euler(3)
    fitted = LeastSquares(start, tol=1e-10)(lambda x, t: -x, noise, nfe=3)
    assert rms(start(lambda x, t: -x, fresh) - fresh * math.exp(-1)) > 1e-2
    assert rms(fitted(lambda x, t: -x, fresh) - fresh * math.exp(-1)) < 1e-8


def test_a_strong_ridge_keeps_the_starting_table():
    field, noise, start = cloud(), randn(32, 6), uniform_euler(4)
    solution = reference(field, noise)
    assert torch.allclose(fit(field, noise, solution, start, ridge=1e12)[0].b, start.b, atol=1e-9)
    assert rms(fit(field, noise, solution, start)[0].b - start.b) > 1e-2


def test_more_ridge_fits_less_closely():
    field, noise, start = cloud(), randn(32, 6), uniform_euler(4)
    solution = reference(field, noise)
    residuals = [fit(field, noise, solution, start, ridge=ridge)[1] for ridge in (1e-8, 1e-2, 1.0)]
    assert residuals == sorted(residuals)
    assert residuals[0] < 0.8 * residuals[-1]


@pytest.mark.parametrize("pieces", [1, 7, 64 * 6 - 1])
def test_sums_over_pieces_of_any_size_are_the_same(pieces, monkeypatch):
    field, noise, start = cloud(), randn(64, 6), uniform_euler(4)
    solution = reference(field, noise)
    whole, _ = fit(field, noise, solution, start)
    monkeypatch.setattr(least_squares, "CHUNK", pieces)
    assert torch.allclose(fit(field, noise, solution, start)[0].b, whole.b, rtol=1e-5, atol=1e-6)


def test_a_walk_costs_one_call_per_row_at_the_times_of_the_start():
    field, noise = Recorder(cloud()), randn(32, 6)
    start = tabulate(methods.heun, TimeGrid.uniform(3))
    solution = reference(cloud(), noise)
    fitted, _ = fit(field, noise, solution, start)
    assert field.times == start.times.tolist()
    assert torch.equal(fitted.times, start.times)


def test_every_ridge_costs_one_walk_on_the_fitting_part_and_one_score():
    field, noise = CountedField(cloud()), randn(32, 6)
    solved = reference(cloud(), noise).nfe
    LeastSquares(uniform_euler(4), ridges=(1e-8, 1e-5, 1e-2))(field, noise, nfe=4)
    assert field.calls == solved + 4 + 3 * (4 + 4)


def test_the_fitted_table_says_what_it_was_fitted_from():
    field, noise, start = cloud(), randn(64, 6), uniform_euler(4).named("euler@uniform")
    once = LeastSquares(start)(field, noise, nfe=4)
    assert once.provenance.method == "fit(euler@uniform)"
    twice, _ = fit(field, noise, reference(field, noise), once)
    assert twice.provenance.method == "fit(euler@uniform)"


def test_what_the_start_was_measured_at_is_not_claimed_for_the_fit():
    field, noise = cloud(), randn(64, 6)
    start = uniform_euler(4)
    start = replace(start, provenance=replace(start.provenance, measured={"rmse": 0.5}))
    assert LeastSquares(start)(field, noise, nfe=4).provenance.measured == {}


# What it refuses


def test_a_start_with_another_budget_is_refused():
    with pytest.raises(BudgetError, match="the table to start from makes 4 calls, the budget is 5"):
        LeastSquares(uniform_euler(4))(cloud(), randn(32, 6), nfe=5)


def test_a_start_over_other_predictions_is_refused():
    start = tabulate(methods.ddim(VP()), TimeGrid.uniform(4)).rebase(VP(), "noise")
    message = r'rows over velocities, this table combines "noise" predictions; use sampler.rebase\(path, \'velocity\'\)'
    with pytest.raises(FieldError, match=message):
        LeastSquares(start)(cloud(VP()), randn(32, 6), nfe=4)


@pytest.mark.parametrize("shape", [(1, 64), (2, 2)])
def test_too_little_noise_is_refused(shape):
    with pytest.raises(FieldError, match=r"fitting 4 calls needs at least two noises per condition and 20 numbers in all"):
        LeastSquares(uniform_euler(4))(lambda x, t: -x, randn(*shape), nfe=4)


@pytest.mark.parametrize("base", [None, uniform_euler(3)], ids=["boss", "given"])
def test_a_network_that_returns_nan_is_refused(base):
    field = adapt(lambda x, t: x * (math.nan if float(t[0]) > 0.5 else 1.0), shape=(4,)).given()
    with pytest.raises(FieldError, match=r"the network returned NaN at call \d+"):
        LeastSquares(base)(field, randn(16, 4), nfe=3)


@pytest.mark.usefixtures("unchecked")
def test_a_reference_that_is_less_accurate_than_the_start_is_refused():
    start = tabulate(methods.midpoint, TimeGrid.uniform(4))
    with pytest.raises(FieldError, match=r"the reference is only accurate to .*; give a lower tol"):
        LeastSquares(start, tol=1.0)(cancelling_wave, randn(96, 4), nfe=8)
