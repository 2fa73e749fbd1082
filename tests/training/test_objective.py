import pytest
import torch

from fewstep import EDM, VE, VP, CondOT, Cosine, FewstepError, adapt
from fewstep.keyed import Keyed
from fewstep.training.batch import Batch
from fewstep.training.objective import FlowAndDivergence, Regression
from problems import SmoothNetwork, randn

PATHS = [CondOT(), Cosine(), VP(), VE(), EDM()]
WEIGHTS = ["velocity", "snr", "min_snr", "edm"]


def batch_of(n=16, shape=(3,), times=(0.1, 0.9), label=None):
    t = torch.linspace(*times, n, dtype=torch.float64)
    return Batch(randn(n, *shape), randn(n, *shape, seed=1), t, label, Keyed(0, 0, 0, n))


def loss(objective, model, batch):
    return objective(model, batch).each


def truth(batch, path, target):
    return {"velocity": path.interpolate(batch.x0, batch.x1, batch.t).ut, "noise": batch.x0, "data": batch.x1}[target]


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("target", ["velocity", "noise", "data"])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_any_network_regresses_on_any_target(predicts, target, path):
    batch = batch_of()
    model = adapt(SmoothNetwork(), path, predicts)
    expected = model.given().predict(path.interpolate(batch.x0, batch.x1, batch.t).xt, batch.t, target)
    expected = (expected - truth(batch, path, target)).square().mean(1)
    torch.testing.assert_close(loss(Regression(target), model, batch), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("predicts", "target"), [("velocity",) * 2, ("noise",) * 2, ("data",) * 2, ("score", "noise")])
def test_without_a_target_the_model_says_it(predicts, target):
    model, batch = adapt(SmoothNetwork(), VP(), predicts), batch_of()
    torch.testing.assert_close(loss(Regression(), model, batch), loss(Regression(target), model, batch), rtol=0, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_named_weighting_is_one_loss_whatever_the_target(weight, path):
    model, batch = adapt(SmoothNetwork(), path, "velocity"), batch_of()
    data, noise, velocity = (loss(Regression(target, weight), model, batch) for target in ("data", "noise", "velocity"))
    torch.testing.assert_close(noise, data, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(velocity, data, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_and_snr_weightings_are_plain_velocity_and_noise_losses(path):
    model, batch = adapt(SmoothNetwork(), path, "data"), batch_of()
    for weight, target in (("velocity", "velocity"), ("snr", "noise")):
        ours = loss(Regression(weight=weight), model, batch)
        torch.testing.assert_close(ours, loss(Regression(target), model, batch), rtol=1e-8, atol=1e-12)


def test_edm_weights_are_those_of_the_paper_and_make_every_level_count_alike():
    sd, path = 0.5, EDM()
    t = torch.linspace(0.0, 1 - path.margin, 30, dtype=torch.float64)
    sigma = 80.0 * (1.0 - t)
    bare = SmoothNetwork()
    model = adapt(bare, path, "data", raw="edm", sigma_data=sd)
    weights = Regression(weight="edm").weights(model, t)
    torch.testing.assert_close(weights, (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-9, atol=0)
    # lambda c_out^2 = 1: in terms of the raw network F the loss is a plain one (Karras et al., eq. 8)
    batch = Batch(randn(30, 3), randn(30, 3, seed=1), t, None, Keyed(0, 0, 0, 30))
    s = sigma[:, None]
    x, norm = batch.x1 + s * batch.x0, (s**2 + sd**2).sqrt()
    goal = (batch.x1 - sd**2 / norm**2 * x) / (s * sd / norm)
    plain = (bare(x / norm, sigma.log() / 4) - goal).square().mean(1)
    torch.testing.assert_close(loss(Regression(weight="edm"), model, batch), plain, rtol=1e-6, atol=1e-9)


def test_min_snr_is_cut_at_five():
    model, t = adapt(SmoothNetwork(), VE(), "data"), torch.linspace(0, 1, 50, dtype=torch.float64)
    sigma = VE().coefficients(t).sigma
    expected = torch.minimum(sigma**-2, torch.tensor(5.0))
    torch.testing.assert_close(Regression("data", "min_snr").weights(model, t), expected, rtol=1e-12, atol=0)
    expected = torch.minimum(torch.tensor(1.0), 5 * sigma**2)
    torch.testing.assert_close(Regression("noise", "min_snr").weights(model, t), expected, rtol=1e-9, atol=0)


def test_pseudo_huber_lies_between_the_squared_and_the_absolute_error():
    model, batch = adapt(SmoothNetwork()), batch_of()
    error = model.given()(path_state(batch), batch.t) - truth(batch, CondOT(), "velocity")
    torch.testing.assert_close(loss(Regression(huber=1e-9), model, batch), error.abs().mean(1), rtol=1e-6, atol=1e-8)
    wide = 2e4 * loss(Regression(huber=1e4), model, batch)
    torch.testing.assert_close(wide, error.square().mean(1), rtol=1e-6, atol=0)
    c = 0.7
    exact = ((error**2 + c**2).sqrt() - c).mean(1)
    torch.testing.assert_close(loss(Regression(huber=c), model, batch), exact, rtol=1e-12, atol=0)


def test_pseudo_huber_keeps_small_errors_and_their_gradients_in_single_precision():
    error = torch.full((1, 1), 1e-6, requires_grad=True)
    model = adapt(lambda x, t: error)
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0.5], dtype=torch.float64), None, Keyed(0, 0, 0, 1))
    each = loss(Regression(huber=1e-2), model, batch)
    assert each.item() == pytest.approx(1e-12 / 2e-2, rel=1e-4)
    (slope,) = torch.autograd.grad(each.sum(), error)
    assert float(slope) == pytest.approx(1e-4, rel=1e-4)
    error.data.zero_()
    (slope,) = torch.autograd.grad(loss(Regression(huber=1e-2), model, batch).sum(), error)
    assert float(slope) == 0.0


def path_state(batch, path=None):
    return (path or CondOT()).interpolate(batch.x0, batch.x1, batch.t).xt


def test_labels_reach_the_network():
    model = adapt(lambda x, t, label: x * label[:, None], classes=20)
    batch = batch_of(label=torch.arange(16))
    expected = (path_state(batch) * torch.arange(16)[:, None] - truth(batch, CondOT(), "velocity")).square().mean(1)
    torch.testing.assert_close(loss(Regression(), model, batch), expected)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("weight", ["uniform", *WEIGHTS])
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data"])
def test_inside_its_span_every_loss_is_finite(predicts, weight, path):
    model = adapt(SmoothNetwork(), path, predicts)
    for target in ("velocity", "noise", "data"):
        objective = Regression(target, weight)
        span = objective.span(model)
        assert 0.0 <= span[0] <= path.margin
        assert 1.0 - path.margin <= span[1] <= 1.0
        assert bool(loss(objective, model, batch_of(times=span)).isfinite().all())
        assert bool(
            loss(FlowAndDivergence(form="exact", share=1.0, base=objective), model, batch_of(times=span)).isfinite().all()
        )


def test_the_span_reaches_the_ends_where_nothing_is_singular():
    assert Regression("velocity").span(adapt(SmoothNetwork())) == (0.0, 1.0)
    assert Regression("velocity", "snr").span(adapt(SmoothNetwork())) == (0.0, 1 - 1e-3)
    assert FlowAndDivergence().span(adapt(SmoothNetwork(), VP(), "noise")) == (0.0, 1 - 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "score"}, 'target must be one of velocity, noise, data, got "score"; .* regress "noise"'),
        ({"target": "image"}, 'target must be one of velocity, noise, data, got "image"'),
        ({"weight": "p2"}, 'weight must be one of uniform, velocity, snr, min_snr, edm, got "p2"'),
        ({"huber": 0.0}, "huber must be a positive number, or None for the squared error; got 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message, unchecked):
    with pytest.raises(FewstepError, match=message):
        Regression(**arguments)


def test_a_regression_costs_a_forward_and_a_backward_pass():
    assert Regression().passes(2) == 3.0
