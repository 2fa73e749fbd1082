import pytest
import torch

from fewstep import EDM, VP, CountedField, TimeGrid, methods, reference, tabulate
from fewstep.candidates import angle_grid
from fewstep.composite import start_scale
from fewstep.coordinates import Coordinates
from fewstep.problem import Problem
from fewstep.tuners.grid_search import plain_table, search_grid
from fewstep.tuners.least_squares import fit
from fewstep.zoo.mixtures import mixture
from problems import SmoothNetwork, randn

pytestmark = pytest.mark.usefixtures("unchecked")  # thousands of field calls


def cloud(path=None, seed=0):
    return mixture(1.2 * randn(5, 6, seed=seed), torch.full((6,), 0.05, dtype=torch.float64), path).given()


def problem(field, noises=64, size=6, seed=1):
    noise = randn(noises, size, seed=seed)
    return Problem(field, noise, reference(field, noise))


def second_half_error(solved, grid):
    """The error on the second half of the noise of a table that was fitted on the first."""
    half = solved.each // 2
    first, second = solved.part(0, half), solved.part(half, 2 * half)
    return second.score(fit(first.field, first.noise, first.solution, plain_table(first.field, grid))[0])


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("seed", range(2))
def test_the_grid_found_is_never_worse_on_the_scoring_half_than_its_start(n, seed):
    for field, size in ((cloud(seed=seed), 6), (SmoothNetwork(4, seed=seed), 4)):
        solved = problem(field, size=size, seed=seed)
        start = TimeGrid.uniform(n)
        found = search_grid(solved, start, evaluations=15)
        assert found.intervals == n
        assert second_half_error(solved, found) <= second_half_error(solved, start) * (1 + 1e-9)


def test_a_bad_grid_is_improved_by_far():
    solved = problem(cloud())
    start = TimeGrid.power(5, 3.0)
    found = search_grid(solved, start, evaluations=40)
    assert second_half_error(solved, found) < 0.7 * second_half_error(solved, start)


@pytest.mark.parametrize("path", [None, VP(), EDM()], ids=str)
def test_grids_stay_valid_on_every_path(path):
    field = cloud(path)
    solved, coordinates = problem(field, 32), Coordinates.of(field)
    found = search_grid(solved, angle_grid(coordinates, 4), evaluations=20)
    assert found.intervals == 4
    assert found.knots.dtype == torch.float64
    assert float(found.knots[0]) == 0.0
    assert float(found.knots[-1]) == 1.0
    assert bool((coordinates.tau(found.knots).diff() > 1e-3).all())


def test_a_single_step_has_no_knots_to_search():
    solved, ticks = problem(cloud(), 16), []
    start = TimeGrid.uniform(1)
    assert search_grid(solved, start, evaluations=10, tick=lambda: ticks.append(1)) is start
    assert ticks == []


def test_every_evaluation_ticks_once_and_costs_a_fit_and_a_score():
    field = CountedField(cloud())
    solved, ticks = problem(field, 32), []
    before = field.calls
    search_grid(solved, TimeGrid.uniform(3), evaluations=10, tick=lambda: ticks.append(1))
    assert field.calls - before == len(ticks) * (3 + 3)
    assert 10 <= len(ticks) <= 4 * 10


def test_searching_again_gives_the_same_grid():
    solved = problem(cloud())
    first, second = (search_grid(solved, TimeGrid.uniform(4), evaluations=15) for _ in range(2))
    assert torch.equal(first.knots, second.knots)


def test_a_start_that_cannot_be_improved_is_returned_itself():
    # On a constant field every grid is exact: nothing is strictly better.
    solved = problem(lambda x, t: torch.zeros_like(x), 16)
    start = TimeGrid.quadratic(3)
    assert search_grid(solved, start, evaluations=5) is start


def test_grids_whose_fit_fails_are_passed_over():
    calls = []

    def field(x, t):
        calls.append(float(t))
        if len(calls) > limit and float(t) not in (0.0, 0.5):
            raise RuntimeError("out of memory")
        return -x * (1 + x.square())

    limit = float("inf")
    solved = problem(field, 16)
    limit = len(calls)
    assert search_grid(solved, TimeGrid.uniform(2), evaluations=5).knots.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("path", [VP(), EDM()], ids=str)
def test_the_plain_table_is_ddim_where_velocities_are_unbounded(path):
    field = cloud(path)
    grid = angle_grid(Coordinates.of(field), 4)
    expected = tabulate(methods.ddim(path), grid, start_scale=start_scale(field))
    assert torch.equal(plain_table(field, grid).b, expected.b)
    assert torch.equal(plain_table(field, grid).a, expected.a)


def test_the_plain_table_is_euler_elsewhere():
    grid = TimeGrid.quadratic(4)
    assert torch.equal(plain_table(cloud(), grid).b, tabulate(methods.euler, grid).b)
    assert torch.equal(plain_table(lambda x, t: -x, grid).b, tabulate(methods.euler, grid).b)
