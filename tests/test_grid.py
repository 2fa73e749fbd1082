import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import EDM, VE, VP, CondOT, Cosine, DiscreteVP, GridError, TimeGrid

PATHS = [CondOT(), Cosine(), VP(), VE(), EDM(), DiscreteVP(torch.linspace(0.999, 0.002, 100))]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def test_knots_are_kept_exactly_as_given():
    knots = [0.0, 0.1, 0.30000000000000004, 1.0]
    grid = TimeGrid(knots)
    assert grid.knots.tolist() == knots
    assert grid.knots.dtype == torch.float64
    assert grid.intervals == 3
    assert [(float(s), float(t)) for s, t in grid.pairs()] == list(itertools.pairwise(knots))
    assert TimeGrid(torch.tensor([0.25, 0.5], dtype=torch.float32)).knots.tolist() == [0.25, 0.5]


def test_knots_keep_their_graph():
    knots = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    TimeGrid(knots).knots[1].backward()
    assert knots.grad.tolist() == [0.0, 1.0, 0.0]


@given(n=st.integers(1, 60))
def test_every_schedule_runs_from_noise_to_data_in_n_steps(n):
    grids = [TimeGrid.uniform(n), TimeGrid.power(n, 1.7), TimeGrid.quadratic(n), TimeGrid.shifted(n, 3.0)]
    for path in PATHS:
        grids += [TimeGrid.log_snr(n, path), TimeGrid.karras(n, path)]
    for grid in grids:
        assert grid.intervals == n
        assert (float(grid.knots[0]), float(grid.knots[-1])) == (0.0, 1.0)


def test_uniform_steps_are_not_accumulated():
    assert TimeGrid.uniform(10).knots.tolist() == [i / 10 for i in range(11)]


def test_the_warped_schedules_have_their_formulas():
    assert TimeGrid.power(4, 2.0).knots.tolist() == [0.0, 0.0625, 0.25, 0.5625, 1.0]
    assert TimeGrid.quadratic(4).knots.tolist() == [0.0, 0.4375, 0.75, 0.9375, 1.0]
    # Stable Diffusion 3's shift 3 of sigma = 0.5 is 0.75; a shift of 1 shifts nothing.
    assert TimeGrid.shifted(2, 3.0).knots.tolist() == [0.0, 0.25, 1.0]
    torch.testing.assert_close(TimeGrid.shifted(7, 1.0).knots, TimeGrid.uniform(7).knots)


def test_shifts_compose_by_multiplication():
    s = 1 - TimeGrid.shifted(5, 2.0).knots
    torch.testing.assert_close(1 - 3.0 * s / (1 + 2.0 * s), TimeGrid.shifted(5, 6.0).knots)


@every_path
def test_log_snr_steps_are_equal_in_log_snr(path):
    inner = path.log_snr(TimeGrid.log_snr(12, path).knots[1:-1])
    torch.testing.assert_close(inner.diff(), inner.diff()[:1].expand(10), rtol=1e-6, atol=0)


@every_path
def test_karras_steps_are_equal_in_the_seventh_root_of_sigma(path):
    sigma = torch.exp(-path.log_snr(TimeGrid.karras(12, path).knots[1:-1]))
    steps = (sigma ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(10), rtol=1e-6, atol=1e-12)


def test_karras_on_edm_gives_the_papers_sigmas():
    """Karras et al., eq. 5: sigma_i for i < n, then zero."""
    path, n, rho = EDM(0.002, 80.0), 18, 7
    sigmas = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    got = path.coefficients(TimeGrid.karras(n, path).knots).sigma.tolist()
    # The first knot is sigma_max itself; the grid spans the levels between the path's margins.
    assert got[0] == pytest.approx(80.0)
    assert got[1:-1] == pytest.approx(sigmas[1:], rel=1e-4)
    assert got[-1] == 0.0


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize(
    "schedule",
    [
        TimeGrid.uniform,
        TimeGrid.quadratic,
        lambda n: TimeGrid.power(n, 2.0),
        lambda n: TimeGrid.shifted(n, 3.0),
        lambda n: TimeGrid.log_snr(n, VP()),
        lambda n: TimeGrid.karras(n, VP()),
    ],
)
def test_a_grid_without_steps_is_refused(schedule, n):
    with pytest.raises(GridError, match=f"a time grid needs at least one step, got n = {n}"):
        schedule(n)


@pytest.mark.parametrize("knots", [[0.5], [], [[0.0, 1.0]]], ids=str)
def test_a_grid_needs_two_knots_in_a_row(knots):
    with pytest.raises(GridError, match=r"at least two knots in one row, got shape \("):
        TimeGrid(torch.tensor(knots))


@pytest.mark.parametrize("knots", [[-0.1, 1.0], [0.0, 1.5], [0.0, math.nan], [0.0, 0.5, math.inf]], ids=str)
def test_knots_outside_the_clock_are_refused(knots):
    with pytest.raises(GridError, match=r"knots must lie in \[0, 1\] \(0 = noise, 1 = data\), got \[-?[0-9]"):
        TimeGrid(knots)


@pytest.mark.parametrize("knots", [[0.0, 0.5, 0.5, 1.0], [1.0, 0.0], [0.0, 0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 1.0]], ids=str)
def test_knots_that_do_not_rise_are_refused(knots):
    with pytest.raises(GridError, match="knots must be strictly increasing") as caught:
        TimeGrid(knots)
    assert ("..." in str(caught.value)) == (len(knots) > 6)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(GridError, match=r"shift must be positive \(1 is uniform\), got"):
        TimeGrid.shifted(4, shift)


def test_a_grid_error_is_a_value_error():
    assert issubclass(GridError, ValueError)
