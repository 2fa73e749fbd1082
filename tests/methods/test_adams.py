import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial

from fewstep import TimeGrid, methods, tabulate
from problems import Recorder, ShearedSpiral, randn, rms, slope, small_start


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_are_integrals_of_the_interpolating_polynomials(order):
    grid = TimeGrid.power(9, 1.6)
    knots = grid.knots.numpy()
    b = tabulate(methods.adams(order), grid).b.numpy()
    for i in range(9):
        times = knots[max(0, i - order + 1) : i + 1]
        step = b[i + 1] - b[i]
        for j, tj in enumerate(times):
            others = np.delete(times, j)
            lagrange = (Polynomial.fromroots(others) if len(others) else Polynomial([1.0])) / np.prod(tj - others)
            antiderivative = lagrange.integ()
            expected = antiderivative(knots[i + 1]) - antiderivative(knots[i])
            assert step[i - len(times) + 1 + j] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert not step[: max(0, i - order + 1)].any(), "no more history than the order"


def test_uniform_steps_have_the_textbook_coefficients():
    """Hairer, Norsett and Wanner, section III.1."""
    for order, weights in ((2, [-1 / 2, 3 / 2]), (3, [5 / 12, -16 / 12, 23 / 12]), (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24])):
        b = tabulate(methods.adams(order), TimeGrid.uniform(8)).b
        assert (8 * (b[8] - b[7]))[8 - order :].tolist() == pytest.approx(weights, rel=1e-9)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_polynomials_in_time_are_integrated_exactly_after_the_warm_up(order):
    grid = TimeGrid.quadratic(8)
    velocity = Polynomial(randn(order, seed=order).numpy())
    distance = velocity.integ()
    field = Recorder(lambda x, t: torch.full_like(x, velocity(float(t))))
    end = methods.adams(order)(field, grid, torch.zeros(1, 1, dtype=torch.float64))
    states = [*(float(x) for x in field.states), float(end)]
    knots = grid.knots.numpy()
    for i in range(order - 1, 8):
        assert states[i + 1] - states[i] == pytest.approx(distance(knots[i + 1]) - distance(knots[i]), abs=1e-12)
    assert states[1] - states[0] != pytest.approx(distance(knots[1]) - distance(knots[0]), abs=1e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("order", [2, 3, 4])
def test_from_a_start_that_does_not_matter_the_order_is_the_full_one(order):
    problem, noise, errors, steps = ShearedSpiral(), randn(8, 2, seed=1), [], [60, 120]
    for n in steps:
        got = methods.adams(order)(problem.velocity, small_start(n, order), noise)
        errors.append(rms(got - problem.solution(noise, 0.1, 0.9)))
    assert slope(errors, steps) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("order", [0, 5, -1])
def test_other_orders_are_refused(order):
    with pytest.raises(ValueError, match=f"adams takes order 1, 2, 3 or 4, got {order}"):
        methods.adams(order)
