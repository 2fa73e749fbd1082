import pytest
import torch

from fewstep import NotLinearError, TimeGrid, methods, tabulate
from fewstep._tabulate import MOST_CALLS, write_table
from fewstep.tuners import Boss
from problems import SmoothNetwork, randn


def walk(step):
    """A method from its step ``step(u, x, t0, t1) -> x``."""

    def method(u, grid, x):
        for t0, t1 in grid.pairs():
            x = step(u, x, t0, t1)
        return x

    return method


def test_a_plain_function_is_a_method():
    def forward(u, grid, x):
        for t0, t1 in grid.pairs():
            x = x + (t1 - t0) * u(x, t0)
        return x

    sampler = tabulate(forward, TimeGrid([0.0, 0.25, 1.0]))
    assert sampler.a.tolist() == [1.0, 1.0, 1.0]
    assert sampler.b.tolist() == [[0.0, 0.0], [0.25, 0.0], [0.25, 0.75]]
    assert sampler.times.tolist() == [0.0, 0.25]
    assert sampler.provenance.method == "forward"
    assert tabulate(methods.heun, TimeGrid.uniform(1)).provenance.method == "heun"
    assert tabulate(walk(lambda u, x, t0, t1: x + u(x, t0)), TimeGrid.uniform(1)).provenance.method == "method"


def test_a_callable_object_is_named_after_its_class():
    class Backward:
        def __call__(self, u, grid, x):
            return x - u(x, 1.0)

    assert tabulate(Backward(), TimeGrid.uniform(1)).provenance.method == "Backward"


def test_a_method_may_move_its_state_in_place():
    def careless(u, grid, x):
        for t0, t1 in grid.pairs():
            k = u(x, t0)
            k *= t1 - t0
            x += k
        return x

    grid = TimeGrid.quadratic(4)
    assert torch.equal(tabulate(careless, grid).b, tabulate(methods.euler, grid).b)


@pytest.mark.parametrize(
    "method", [methods.euler, methods.midpoint, methods.adams(3), methods.pfdiff(1, 1)], ids=lambda m: m.name
)
def test_gradients_of_the_table_reach_the_knots(method):
    inner = torch.tensor([0.2, 0.5, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    weight = randn(2 * 5 + 1, seed=3)

    def score(knots):
        sampler = tabulate(method, TimeGrid(torch.cat([ends[:1], knots, ends[1:]])))
        return (sampler.b[-1] * weight[: sampler.nfe]).sum() + sampler.times @ weight[: sampler.nfe]

    assert torch.autograd.gradcheck(score, (inner,))


def test_the_start_scale_is_carried_by_the_noise():
    field, noise, grid = SmoothNetwork(), randn(3, 3), TimeGrid.uniform(4)
    sampler = tabulate(methods.heun, grid, start_scale=80.0)
    assert sampler.a.tolist() == [80.0] * 9
    torch.testing.assert_close(sampler(field, noise), methods.heun(field, grid, 80.0 * noise))


def test_the_unchecked_table_is_the_same_table():
    grid = TimeGrid.uniform(5)
    assert torch.equal(write_table(methods.adams(3), grid).b, tabulate(methods.adams(3), grid).b)


@pytest.mark.parametrize(
    "step",
    [
        lambda u, x, t0, t1: (x + (t1 - t0) * u(x, t0)).clamp(-1, 1),
        lambda u, x, t0, t1: x + (t1 - t0) * u(x, t0).clamp(-1, 1),
        lambda u, x, t0, t1: x + (t1 - t0) * u(x, t0) / (1 + 1e-3 * x.norm()),
        lambda u, x, t0, t1: x + (t1 - t0) * u(x, t0) + 1e-4,
        lambda u, x, t0, t1: x + (t1 - t0) * u(x, t0) + 0.1 * torch.randn_like(x),
        lambda u, x, t0, t1: x + (t1 - t0) * torch.where(x.abs() > 6, x, u(x, t0)),
    ],
    ids=["clips states", "clips outputs", "normalises", "offset", "draws noise", "thresholds"],
)
def test_methods_that_are_no_tables_are_refused(step):
    with pytest.raises(
        NotLinearError, match=r'"method" is not a table: .*put a clip into the field instead, or use it as a baseline'
    ):
        tabulate(walk(step), TimeGrid.uniform(3))


def test_a_method_that_returns_another_shape_is_refused():
    with pytest.raises(NotLinearError, match="is not a table"):
        tabulate(lambda u, grid, x: (x + u(x, 0.0))[:1], TimeGrid.uniform(1))


def test_a_method_that_does_not_stop_asking_is_refused():
    def restless(u, grid, x):
        while float(u(x, 0.5).abs().max()) < 1.0:
            pass
        return x

    with pytest.raises(NotLinearError, match=f"asked the field more than {MOST_CALLS} times; adaptive methods are not tables"):
        tabulate(restless, TimeGrid.uniform(1))


@pytest.mark.parametrize("more", [True, False])
def test_a_method_whose_number_of_calls_depends_on_the_state_is_refused(more):
    def adaptive(u, grid, x):
        x = x + u(x, 0.0)
        return x + u(x, 0.5) if (x.shape[1] > 1) == more else x

    with pytest.raises(NotLinearError, match=r'"adaptive" asked the field \d times, then \d; adaptive methods are not tables'):
        tabulate(adaptive, TimeGrid.uniform(1))


def test_a_method_that_never_asks_is_refused():
    with pytest.raises(NotLinearError, match="the method never asked the field"):
        tabulate(lambda u, grid, x: x, TimeGrid.uniform(1))


def test_tuned_samplers_are_tables_of_known_methods():
    sampler = Boss(knots=10)(SmoothNetwork(), randn(4, 3), nfe=3)
    again = tabulate(methods.euler, TimeGrid([*sampler.times.tolist(), 1.0]))
    assert torch.equal(sampler.b, again.b)
