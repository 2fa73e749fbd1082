import itertools
import math

import pytest
import torch
from torchdiffeq import odeint

from fewstep import TimeGrid, methods
from problems import Recorder, ShearedSpiral, randn


@pytest.mark.parametrize(
    ("method", "theirs"), [(methods.euler, "euler"), (methods.midpoint, "midpoint"), (methods.heun, "heun2")]
)
def test_one_step_methods_are_those_of_torchdiffeq(method, theirs):
    field, grid, noise = ShearedSpiral().velocity, TimeGrid.power(6, 1.4), randn(4, 2)
    expected = odeint(lambda t, x: field(x, t), noise, grid.knots, method=theirs)[-1]
    torch.testing.assert_close(method(field, grid, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "order"), [(methods.euler, 1), (methods.midpoint, 2), (methods.heun, 2), (methods.rk4, 4)])
def test_a_step_on_a_linear_field_is_the_exponential_up_to_the_order(method, order):
    rate = -1.7
    got = method(lambda x, t: rate * x, TimeGrid([0.0, 1.0]), torch.ones(1, 1, dtype=torch.float64))
    assert float(got) == pytest.approx(sum(rate**k / math.factorial(k) for k in range(order + 1)), rel=1e-13)


def test_rk4_on_time_alone_is_simpsons_rule():
    got = methods.rk4(lambda x, t: torch.full_like(x, math.sin(float(t))), TimeGrid([0.2, 1.0]), torch.zeros(1, 1).double())
    assert float(got) == pytest.approx(0.8 / 6 * (math.sin(0.2) + 4 * math.sin(0.6) + math.sin(1.0)), rel=1e-13)


@pytest.mark.parametrize(
    ("method", "nodes"),
    [(methods.euler, [0.0]), (methods.midpoint, [0.0, 0.5]), (methods.heun, [0.0, 1.0]), (methods.rk4, [0.0, 0.5, 0.5, 1.0])],
)
def test_the_field_is_asked_at_the_nodes_of_every_step(method, nodes):
    field, knots = Recorder(lambda x, t: x), [0.0, 0.3, 1.0]
    method(field, TimeGrid(knots), torch.ones(1, 1))
    expected = [s + c * (t - s) for s, t in itertools.pairwise(knots) for c in nodes]
    assert field.times == pytest.approx(expected, abs=1e-15)
    assert method.stages == len(nodes)
