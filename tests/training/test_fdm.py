import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from fewstep import EDM, VE, VP, CondOT, Cosine, FewstepError, adapt
from fewstep.keyed import Keyed
from fewstep.training.batch import Batch, pieces_of
from fewstep.training.objective import FlowAndDivergence, Regression
from fewstep.training.objective.fdm import Mismatch
from fewstep.zoo.mixtures import mixture
from problems import SmoothNetwork, randn

FORMS = ["exact", "vector", "two_probes"]
PATHS = [CondOT(), VP(), VE(), Cosine(), EDM()]
MEANS = torch.tensor([[1.2, 0.9], [-1.0, -0.6], [0.3, -0.5]], dtype=torch.float64)
STD = 0.4


def batch_of(n=6, shape=(3,), step=0, label=None):
    t = torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    return Batch(randn(n, *shape), randn(n, *shape, seed=1), t, label, Keyed(0, step, 0, n))


def term(model, batch, **options):
    """The divergence term of every sample, by itself."""
    objective = FlowAndDivergence(weight=1.0, **{"share": 1.0, **options})
    return objective(model, batch).each - objective.base(model, batch).each


# At the true field: per-sample gradients along perturbations of it.


def at_truth(path, bend, amount=0.0, n=20_000):
    """A batch of a Gaussian mixture and its true field plus a_i times a perturbation, with a_i per sample."""
    true = mixture(MEANS, torch.tensor(STD**2), path).network
    a = torch.full((n,), amount, dtype=torch.float64, requires_grad=True)

    def network(x, t):
        alpha, sigma, _, d_sigma = path.coefficients(t)
        y = x / (alpha**2 + sigma**2).sqrt()[:, None]
        return true(x, t) + (a * d_sigma)[:, None] * bend(y)

    data = MEANS[torch.arange(n) % 3] + STD * randn(n, 2, seed=2)
    t = 0.02 + 0.96 * torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return adapt(network, path), Batch(randn(n, 2, seed=4), data, t, None, Keyed(5, 0, 0, n)), a


def stretch(y):
    return y


def shear(y):
    return y.flip(1)


def waves(y):
    return torch.sin(2 * y) + 0.3 * torch.sin(y.flip(1))


def mean_and_error(each, a):
    (gradient,) = torch.autograd.grad(each.sum(), a)
    return float(gradient.mean()), float(gradient.std()) / math.sqrt(len(gradient))


@pytest.mark.parametrize("path", PATHS[:3], ids=repr)
@pytest.mark.parametrize("form", FORMS)
def test_the_true_field_is_stationary(form, path, unchecked):
    base = Regression("noise")  # weights the velocity error of VE, which spans four decades, as its noise error
    for bend in (stretch, shear, waves):
        model, batch, a = at_truth(path, bend)
        mean, error = mean_and_error(term(model, batch, form=form, base=base), a)
        assert abs(mean) <= 4 * error  # both zero where shear has no divergence
    model, batch, a = at_truth(path, waves, amount=0.6)
    away, _ = mean_and_error(term(model, batch, form=form, base=base), a)
    assert away > 15 * error  # from outside, the gradient points back


def test_gaussian_probes_are_stationary_too(unchecked):
    for form in ("vector", "two_probes"):
        model, batch, a = at_truth(CondOT(), waves)
        mean, error = mean_and_error(term(model, batch, form=form, probes="gaussian"), a)
        assert abs(mean) < 4 * error


def residual_of(model, batch, *, fixed=True, probe=None):
    """Sigma R in the plane, with the choices that the library does not offer."""
    pair = model.path.interpolate(batch.x0, batch.x1, batch.t)
    x = pair.xt.requires_grad_()
    v = model.given()(x, batch.t)
    m = Mismatch.at(model.path, pair._replace(xt=x), v)
    if not fixed:
        m = m._replace(gap=v - pair.ut)
    return m.residual(m.trace() if probe is None else (m.pull(probe) * probe).sum(1))


def signs(n):
    return torch.randint(0, 2, (n, 2), generator=torch.Generator().manual_seed(9)).double() * 2 - 1


REJECTED = {
    "the square without stop-gradient": lambda model, batch: residual_of(model, batch, fixed=False).square(),
    "the absolute value": lambda model, batch: residual_of(model, batch).abs(),
    "the square of a one-probe estimate": lambda model, batch: residual_of(model, batch, probe=signs(len(batch.t))).square(),
}


@pytest.mark.parametrize("name", REJECTED)
def test_forms_that_are_not_offered_pull_away_from_the_true_field(name, unchecked):
    pulls = []
    for bend in (stretch, shear, waves):
        model, batch, a = at_truth(CondOT(), bend)
        mean, error = mean_and_error(REJECTED[name](model, batch), a)
        pulls.append(abs(mean) / max(error, 1e-9))
    assert max(pulls) > 10


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_at_the_true_field_the_residual_has_mean_zero_whatever_the_state(path):
    model, batch, _ = at_truth(path, stretch)
    d_sigma = path.coefficients(batch.t).d_sigma
    residual = residual_of(model, batch).detach() / d_sigma
    x = path.interpolate(batch.x0, batch.x1, batch.t).xt
    for weight in (torch.ones(len(x)), torch.tanh(x[:, 0]), torch.cos(x[:, 1]) * torch.sin(3 * batch.t)):
        values = residual * weight
        assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(len(x))


# Against brute force.


def jacobians(model, x, t):
    """dv/dx of every sample, (batch, d, d)."""
    return torch.stack(
        [
            torch.autograd.functional.jacobian(lambda y, k=k: model.given()(y[None], t[k : k + 1])[0], x[k])
            for k in range(len(x))
        ]
    )


def log_density(path, x, x1, t):
    alpha, sigma, _, _ = path.coefficients(t)
    return torch.distributions.Normal(alpha[:, None] * x1, sigma[:, None]).log_prob(x).sum(1)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_exact_form_is_the_residual_of_the_conditional_continuity_equation(path):
    model, batch = adapt(SmoothNetwork(), path), batch_of()
    x, t = path.interpolate(batch.x0, batch.x1, batch.t).xt.requires_grad_(), batch.t.clone().requires_grad_()
    by_x, by_t = torch.autograd.grad(log_density(path, x, batch.x1, t).sum(), (x, t))
    trace = jacobians(model, x.detach(), batch.t).diagonal(dim1=1, dim2=2).sum(1)
    residual = trace + (model.given()(x, batch.t) * by_x).sum(1) + by_t
    expected = (path.coefficients(batch.t).sigma * residual) ** 2 / 3
    torch.testing.assert_close(term(model, batch, form="exact"), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
def test_the_probed_forms_equal_their_formulas_with_the_whole_jacobian(probes):
    path, batch = VP(), batch_of()
    model = adapt(SmoothNetwork(), path)
    pair = path.interpolate(batch.x0, batch.x1, batch.t)
    c = path.coefficients(batch.t)
    score = -batch.x0 / c.sigma[:, None]
    gap, jacobian = model.given()(pair.xt, batch.t) - pair.ut, jacobians(model, pair.xt, batch.t)
    whole = jacobian + gap[:, :, None] * score[:, None, :] - (c.d_sigma / c.sigma)[:, None, None] * torch.eye(3)
    draw = batch.keyed.normal if probes == "gaussian" else batch.keyed.signs
    z1, z2 = draw("probe", 3).double(), draw("second probe", 3).double()
    vector = c.sigma**2 * torch.einsum("bij,bi->bj", whole, z1).square().mean(1)
    torch.testing.assert_close(term(model, batch, form="vector", probes=probes), vector, rtol=1e-8, atol=1e-9)
    fixed = (gap * score).sum(1) - 3 * c.d_sigma / c.sigma
    first, second = (torch.einsum("bij,bi,bj->b", jacobian, z, z) + fixed for z in (z1, z2))
    ours = term(model, batch, form="two_probes", probes=probes)
    torch.testing.assert_close(ours, c.sigma**2 * first * second / 3, rtol=1e-8, atol=1e-9)


def test_two_probes_give_twice_the_first_estimate_times_the_gradient_of_the_second():
    model, batch = adapt(network := SmoothNetwork()), batch_of()
    names = ("probe", "second probe")
    first, second = (residual_of(model, batch, probe=batch.keyed.signs(what, 3).double()) for what in names)
    expected = torch.autograd.grad((2 * first.detach() * second / 3).sum(), list(network.parameters()))
    ours = torch.autograd.grad(term(model, batch, form="two_probes").sum(), list(network.parameters()))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("form", ["vector", "two_probes"])
def test_probes_average_to_what_they_estimate(form):
    n = 20_000
    one = batch_of(1)
    same = Batch(one.x0.expand(n, 3), one.x1.expand(n, 3), one.t.expand(n), None, Keyed(0, 0, 0, n))
    model = adapt(SmoothNetwork())
    each = term(model, same, form=form).detach()
    if form == "two_probes":
        expected = term(model, one, form="exact")
    else:
        rows = torch.eye(3, dtype=torch.float64)
        pair = CondOT().interpolate(one.x0, one.x1, one.t)
        x = pair.xt.requires_grad_()
        m = Mismatch.at(CondOT(), pair._replace(xt=x), model.given()(x, one.t))
        expected = sum(m.vector(row[None]).square().sum() for row in rows) / 3
    error = each.std() / math.sqrt(n)
    assert abs(each.mean() - expected.detach()) < 4 * error
    assert error < 0.05 * expected.detach().abs()


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("predicts", ["noise", "data"])
@pytest.mark.parametrize("form", FORMS)
def test_the_network_may_predict_anything(form, predicts, path):
    batch, network = batch_of(), SmoothNetwork()
    model = adapt(network, path, predicts)
    same = adapt(lambda x, t: path.convert(network(x, t), x, t, source=predicts, target="velocity"), path)
    torch.testing.assert_close(term(model, batch, form=form), term(same, batch, form=form), rtol=1e-7, atol=1e-8)


def test_the_term_carries_the_weight_of_the_regression_on_the_velocity():
    model, batch = adapt(SmoothNetwork(), EDM(), "data"), batch_of()
    base = Regression("data", "edm")
    plain = term(model, batch, form="exact")
    sigma = EDM().coefficients(batch.t).sigma
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (sigma / 80.0) ** 2  # data error = sigma / sigma' times velocity error
    torch.testing.assert_close(term(model, batch, form="exact", base=base), weight * plain, rtol=1e-7, atol=1e-9)


# On part of the batch, and of the steps.


def test_a_share_has_the_mean_of_the_whole_and_each_row_one_pass(unchecked):
    rows = []

    def network(x, t, label):
        rows.append(len(x))
        return torch.tanh(x * (1 + label[:, None]))

    model, steps = adapt(network), 100
    batch = batch_of(10, label=torch.arange(10) % 3)
    objective = FlowAndDivergence(weight=1.0, form="exact", share=0.25)
    whole = FlowAndDivergence(weight=1.0, form="exact", share=1.0)(model, batch)
    rows.clear()
    losses = [objective(model, at_step(batch, step)) for step in range(steps)]
    assert sum(rows) == 10 * steps
    each = torch.stack([loss.each for loss in losses])
    error = each.std(0) / math.sqrt(steps)
    assert bool(((each.mean(0) - whole.each).abs() < 4 * error).all())
    assert {int((one - objective.base(model, batch).each != 0).sum()) for one in each[:20]} == {2, 3}
    watched = torch.stack([loss.parts["divergence"] for loss in losses]).mean()
    assert float(watched) == pytest.approx(float(whole.parts["divergence"].mean()), rel=0.2)
    torch.testing.assert_close(whole.each - objective.base(model, batch).each, whole.parts["divergence"])  # weight 1


def at_step(batch, step, start=0, stop=None):
    label = None if batch.label is None else batch.label[start:stop]
    keyed = Keyed(batch.keyed.seed, step, start, stop or len(batch.t))
    return Batch(batch.x0[start:stop], batch.x1[start:stop], batch.t[start:stop], label, keyed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.1, 1 / 3, 1.0])
def test_the_loss_does_not_depend_on_how_the_batch_is_divided(form, share):
    model, batch, objective = adapt(SmoothNetwork()), batch_of(90), FlowAndDivergence(weight=0.3, form=form, share=share)
    for step in range(3):
        pieces = [objective(model, at_step(batch, step, start, start + 30)) for start in (0, 30, 60)]
        whole = objective(model, at_step(batch, step))
        torch.testing.assert_close(torch.cat([piece.each for piece in pieces]), whole.each, rtol=1e-10, atol=1e-12)
        watched = torch.cat([piece.parts["divergence"] for piece in pieces])
        torch.testing.assert_close(watched, whole.parts["divergence"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_piece_by_piece_the_gradient_is_that_of_the_whole_and_each_row_has_one_pass(share):
    rows, inner = [], SmoothNetwork()

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64))

        def forward(self, x, t):
            rows.append(len(x))
            return inner(x * self.scale, t)

    network, batch, objective = Watched(), batch_of(20), FlowAndDivergence(weight=0.5, form="exact", share=share)
    model = adapt(network)
    (expected,) = torch.autograd.grad(objective(model, batch).each.mean(), network.scale)
    rows.clear()
    pieces = pieces_of(objective, model, batch)
    assert rows == []  # nothing is computed before a piece is asked for: one graph at a time
    sizes = []
    for piece in pieces:
        loss = piece()
        assert rows == [*sizes, len(loss.each)]
        sizes.append(len(loss.each))
        (loss.each.sum() / 20).backward()
    assert sizes == ([14, 6] if share < 1 else [20])
    assert network.scale.grad is not None
    torch.testing.assert_close(network.scale.grad, expected, rtol=1e-10, atol=1e-12)
    assert len(pieces_of(objective.base, model, batch)) == 1


def test_a_share_that_misses_a_small_part_leaves_the_regression():
    model, batch = adapt(SmoothNetwork()), batch_of(2)
    objective = FlowAndDivergence(share=0.01)
    loss = objective(model, batch)
    assert torch.equal(loss.each, objective.base(model, batch).each)
    assert loss.parts["divergence"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("options", "step"), [({"every": 3}, 4), ({"weight": 0.0}, 0)])
def test_switched_off_it_is_the_regression_and_costs_as_much(options, step):
    asked = []

    def network(x, t):
        asked.append(x.requires_grad)
        return x.sin()

    model, batch = adapt(network), batch_of(step=step)
    loss = FlowAndDivergence(**options)(model, batch)
    assert asked == [False]
    assert torch.equal(loss.each, Regression("velocity")(model, batch).each)
    assert not loss.parts


def test_every_third_step_it_counts_three_times():
    model, batch = adapt(SmoothNetwork()), batch_of(step=6)
    torch.testing.assert_close(term(model, batch, form="exact", every=3), 3 * term(model, batch, form="exact"))


def test_the_cost_in_passes():
    assert FlowAndDivergence(form="vector", share=0.25).passes(3072) == 3.75
    assert FlowAndDivergence(form="two_probes", share=0.125, every=2).passes(3072) == 3.25
    assert FlowAndDivergence(form="exact", share=1.0).passes(2) == 9.0
    assert FlowAndDivergence(weight=0.0).passes(2) == 3.0


def test_it_can_be_watched_without_gradients():
    model, batch = adapt(SmoothNetwork()), batch_of()
    with torch.no_grad():
        watched = FlowAndDivergence()(model, batch).each
    torch.testing.assert_close(watched, FlowAndDivergence()(model, batch).each, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["vector", "two_probes"])
def test_it_runs_through_a_u_net_with_attention(form):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ).double()  # fmt: skip
    model, batch = adapt(network), batch_of(3, (1, 8, 8))
    objective = FlowAndDivergence(weight=1.0, form=form, share=0.5)
    objective(model, batch).each.mean().backward()
    assert all(
        bool(p.grad.isfinite().all()) and bool(p.grad.any())
        for n, p in network.named_parameters()
        if "conv_in" in n or "to_q" in n
    )
    pair = CondOT().interpolate(batch.x0, batch.x1, batch.t)
    v, (z1, z2), h = model.given(), (batch.keyed.signs(what, 64).double() for what in ("probe", "second probe")), 1e-5
    if form == "two_probes":
        with torch.no_grad():
            trace = [
                (
                    (v(pair.xt + h * z.view_as(pair.xt), batch.t) - v(pair.xt - h * z.view_as(pair.xt), batch.t)).flatten(1) * z
                ).sum(1)
                for z in (z1, z2)
            ]
            inner = ((v(pair.xt, batch.t) - pair.ut) * batch.x0).flatten(1).sum(1)
        first, second = ((1 - batch.t) * one / (2 * h) - inner + 64 for one in trace)
        torch.testing.assert_close(term(model, batch, form=form), first * second / 64, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight of the divergence must be 0 or more, got -1"),
        ({"weight": math.nan}, "weight of the divergence must be 0 or more, got nan"),
        ({"form": "l1"}, 'form must be one of vector, two_probes, exact, got "l1"'),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0; weight=0 switches the divergence off"),
        ({"every": 0}, "every must be 1 or more steps, got 0"),
        ({"probes": "sphere"}, 'probes must be one of rademacher, gaussian, got "sphere"'),
        ({"probes": "gaussian", "form": "exact"}, 'form="exact" has no probes, got probes="gaussian"'),
    ],
)
def test_bad_settings_are_refused(arguments, message, unchecked):
    with pytest.raises(FewstepError, match=message):
        FlowAndDivergence(**arguments)


def test_the_exact_form_refuses_images():
    with pytest.raises(FewstepError, match=r"one backward pass per dimension, here 3072 \(at most 256\); use form=\"vector\""):
        term(adapt(lambda x, t: x), batch_of(2, (3, 32, 32)), form="exact")
