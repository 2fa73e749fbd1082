"""Learnt knots of any method."""

import pytest
import torch

from fewstep import VP, BudgetError, FieldError, GridError, TimeGrid, methods, reference, tabulate
from fewstep.problem import Problem
from fewstep.tuners import Boss, LearnedKnots
from fewstep.zoo.mixtures import mixture
from problems import Recorder, randn, rms

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of field calls


def cloud(path=None, dimensions=4, seed=0):
    return mixture(1.2 * randn(5, dimensions, seed=seed), torch.full((dimensions,), 0.1, dtype=torch.float64), path).given()


def error(sampler, field, noise):
    return rms(sampler(field, noise) - reference(field, noise).end)


def kept_aside(field, noise):
    split = len(noise) - round(0.25 * len(noise))
    return Problem(field, noise, reference(field, noise)).part(split, len(noise))


UNEVEN = TimeGrid(torch.tensor([0.0, 0.05, 0.3, 0.35, 0.8, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("path", [None, VP()], ids=str)
@pytest.mark.parametrize("method", [methods.euler, methods.midpoint, methods.pfdiff(1, 1)], ids=lambda m: m.name)
def test_the_numbers_of_a_grid_write_its_table(method, path, decoupled):
    nfe = method.calls(5)
    write, theta = LearnedKnots(method, decoupled=decoupled).numbers(cloud(path), UNEVEN, nfe)
    assert len(theta) == 4 + (nfe if decoupled else 0)
    found, plain = write(theta), tabulate(method, UNEVEN)
    for name in ("times", "a", "b"):
        assert torch.allclose(getattr(found, name), getattr(plain, name), rtol=1e-12, atol=1e-12)
    assert found.provenance.method == f"learned-knots({method.name})"


def test_the_start_scale_of_the_path_is_kept():
    from fewstep import EDM

    field = cloud(EDM())
    write, theta = LearnedKnots(methods.ddim(EDM())).numbers(field, TimeGrid.uniform(3), 3)
    assert float(write(theta).a[0]) == 80.0


@pytest.mark.parametrize("method", [methods.euler, methods.pfdiff(1, 1)], ids=lambda m: m.name)
def test_learnt_knots_are_better_than_boss_and_uniform_on_fresh_noise(method):
    field, noise, fresh = cloud(), randn(64, 4), randn(256, 4, seed=9)
    steps = method.intervals(5)
    boss = tabulate(method, Boss().grids(field, noise, (steps,))[steps])
    uniform = tabulate(method, TimeGrid.uniform(steps))
    learnt = LearnedKnots(method, log_loss=False)(field, noise, nfe=5)
    ratios = [error(start, field, fresh) / error(learnt, field, fresh) for start in (boss, uniform)]
    print(f"{method.name}: boss / learnt {ratios[0]:.2f}, uniform / learnt {ratios[1]:.2f}")
    assert learnt.nfe == 5
    assert min(ratios) > 1.03
    assert kept_aside(field, noise).score(learnt) <= kept_aside(field, noise).score(boss)


def test_the_learnt_table_is_the_methods_on_increasing_knots():
    field, noise = cloud(), randn(64, 4)
    learnt = LearnedKnots(methods.euler, TimeGrid.uniform(4), log_loss=False)(field, noise, nfe=4)
    again = tabulate(methods.euler, TimeGrid(torch.cat([learnt.times, torch.ones(1, dtype=torch.float64)])))
    assert torch.allclose(learnt.b, again.b, rtol=0, atol=1e-14)
    assert rms(learnt.times - torch.arange(4) / 4) > 1e-3


def test_decoupled_times_are_learnt_apart_from_the_coefficients():
    field, noise, fresh = cloud(), randn(96, 4), randn(256, 4, seed=9)
    start = TimeGrid.uniform(4)
    coupled, apart = (
        LearnedKnots(methods.euler, start, decoupled=d, log_loss=False)(field, noise, nfe=4) for d in (False, True)
    )
    knots = torch.cat([torch.zeros(1, dtype=torch.float64), apart.b[-1].cumsum(0)])[:-1]
    print(f"coupled / decoupled {error(coupled, field, fresh) / error(apart, field, fresh):.2f}")
    assert rms(apart.times - knots) > 1e-3
    assert rms(coupled.times - torch.cat([torch.zeros(1, dtype=torch.float64), coupled.b[-1].cumsum(0)])[:-1]) < 1e-14
    assert 0.0 <= float(apart.times.min()) <= float(apart.times.max()) <= 1.0
    assert error(apart, field, fresh) < 0.9 * error(coupled, field, fresh)


def test_a_diffusion_model_is_learnt_in_the_clock_where_it_is_smooth():
    field, noise, fresh = cloud(VP()), randn(64, 4), randn(256, 4, seed=9)
    method, grid = methods.ddim(VP()), TimeGrid.uniform(4)
    learnt, start = LearnedKnots(method, grid, iterations=3, log_loss=False)(field, noise, nfe=4), tabulate(method, grid)
    print(f"VP uniform / learnt {error(start, field, fresh) / error(learnt, field, fresh):.2f}")
    assert error(learnt, field, fresh) < 0.9 * error(start, field, fresh)
    assert kept_aside(field, noise).score(learnt) < kept_aside(field, noise).score(start)


def test_the_network_is_never_asked_outside_the_path():
    seen = Recorder(cloud())
    LearnedKnots(methods.heun, TimeGrid.uniform(2), decoupled=True, iterations=3)(seen, randn(48, 4), nfe=4)
    assert 0.0 <= min(seen.times) <= max(seen.times) <= 1.0


def test_one_step_has_nothing_to_learn():
    noise = randn(16, 4)
    learnt = LearnedKnots(methods.euler)(cloud(), noise, nfe=1)
    assert torch.equal(learnt.b, tabulate(methods.euler, TimeGrid.uniform(1)).b)
    assert rms(LearnedKnots(methods.euler, decoupled=True)(cloud(), noise, nfe=1).times) > 0.0  # but where to ask


def test_tuning_again_gives_the_same_numbers():
    field, noise = cloud(), randn(48, 4)
    first, second = (LearnedKnots(methods.pfdiff(1, 1), decoupled=True, iterations=3)(field, noise, nfe=4) for _ in range(2))
    assert torch.equal(first.times, second.times)
    assert torch.equal(first.b, second.b)


# What it refuses


@pytest.mark.parametrize(
    ("grid", "got"), [(TimeGrid.uniform(4), "4 from 0 to 1"), (TimeGrid([0.1 * i for i in range(1, 7)]), "5 from 0.1 to 0.6")]
)
def test_another_grid_is_refused(grid, got):
    with pytest.raises(GridError, match=rf"pfdiff1_1 spends 3 calls on 5 steps from 0 to 1, the grid has {got}"):
        LearnedKnots(methods.pfdiff(1, 1), grid)(cloud(), randn(32, 4), nfe=3)


def test_a_budget_that_the_method_cannot_spend_is_refused():
    with pytest.raises(BudgetError, match="midpoint cannot spend exactly 5 calls"):
        LearnedKnots(methods.midpoint)(cloud(), randn(32, 4), nfe=5)


def test_too_little_noise_is_refused():
    with pytest.raises(FieldError, match=r"learning 15 numbers needs at least 20 noises of 4 elements .* got 12"):
        LearnedKnots(methods.euler, decoupled=True)(cloud(), randn(12, 4), nfe=8)
