import inspect
import itertools
import math
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import EDM, VE, VP, CondOT, Cosine, DiscreteVP
from fewstep._types import Prediction
from fewstep.path import raw_mix
from problems import gaussian_flow, randn

LEVELS = torch.linspace(0.9999, 0.002, 50, dtype=torch.float64)
PATHS = [CondOT(), Cosine(), VP(), VP(0.5, 9.0), VE(), VE(0.05, 10.0), EDM(), EDM(0.01, 5.0), DiscreteVP(LEVELS)]
PREDICTIONS = typing.get_args(Prediction)
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


@every_path
def test_derivatives_are_those_of_the_coefficients(path):
    # Away from DiscreteVP's levels, where log alpha has kinks.
    times = (torch.linspace(0.0, 0.98, 50, dtype=torch.float64) + 0.003).requires_grad_(True)
    c = path.coefficients(times)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        if value.requires_grad:
            (expected,) = torch.autograd.grad(value.sum(), times, retain_graph=True)
        else:  # alpha = 1 of VE and EDM
            expected = torch.zeros_like(times)
        torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-9)


@every_path
def test_noise_fades_as_data_appears(path):
    c = path.coefficients(torch.linspace(0, 1, 301, dtype=torch.float64))
    assert bool((c.alpha.diff() >= 0).all())
    assert bool((c.sigma.diff() < 0).all())
    assert bool((path.log_snr(torch.linspace(0, 1, 301)).diff() > 0).all())
    assert c.alpha[-1] == 1.0
    assert c.alpha.dtype == torch.float64


@every_path
def test_the_ends_are_noise_and_data(path):
    start, end = path.coefficients(0.0), path.coefficients(1.0)
    assert float(end.alpha) == 1.0
    assert float(end.sigma) == pytest.approx(path.sigma_min if isinstance(path, VE) else 0.0, rel=1e-12)
    # What is left of the data in the first state, against the noise: what `start_scale * noise` leaves out.
    assert float(start.sigma) == pytest.approx(path.start_scale, rel=5e-3)
    assert float(start.alpha / start.sigma) <= 0.2


@every_path
def test_time_of_log_snr_is_the_inverse_of_log_snr(path):
    times = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(times)), times, rtol=0, atol=1e-9)
    assert float(path.time_of_log_snr(float("inf"))) == 1.0
    assert float(path.time_of_log_snr(float("-inf"))) == 0.0
    middle = float(path.log_snr(0.4))
    assert float(path.time_of_log_snr(middle)) == pytest.approx(0.4, abs=1e-12)


@every_path
@settings(max_examples=12)
@given(t=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_converting_there_and_back_changes_nothing(path, t, seed):
    x, value = randn(3, 4, seed=seed), randn(3, 4, seed=seed + 1)
    for source, target in itertools.product(PREDICTIONS, PREDICTIONS):
        there = path.convert(value, x, t, source=source, target=target)
        back = path.convert(there, x, t, source=target, target=source)
        torch.testing.assert_close(back, value, rtol=1e-8, atol=1e-8)


@every_path
@pytest.mark.parametrize("per_sample", [False, True])
def test_all_predictions_of_one_pair_of_noise_and_data_agree(path, per_sample):
    noise, data = randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64) if per_sample else 0.3
    point = path.interpolate(noise, data, t)
    _, sigma, _, _ = path.coefficients(t)
    sigma = sigma.view(-1, 1, 1)
    truth = {"velocity": point.ut, "noise": noise, "data": data, "score": -noise / sigma}
    for source, target in itertools.product(PREDICTIONS, PREDICTIONS):
        got = path.convert(truth[source], point.xt, t, source=source, target=target)
        torch.testing.assert_close(got, truth[target], rtol=1e-9, atol=1e-9)


@every_path
def test_interpolation_runs_along_its_velocity(path):
    noise, data, h = randn(2, 3, seed=1), randn(2, 3, seed=2), 1e-6
    before, after = (path.interpolate(noise, data, 0.415 + s * h).xt for s in (-1, 1))
    point = path.interpolate(noise, data, 0.415)
    torch.testing.assert_close((after - before) / (2 * h), point.ut, rtol=1e-6, atol=1e-6)
    assert point.t.shape == (2,)


@every_path
def test_the_score_of_gaussian_data_is_the_gradient_of_its_density(path):
    flow, t = gaussian_flow(path), 0.37
    x = randn(5, 3).requires_grad_(True)
    alpha = path.coefficients(t).alpha
    density = torch.distributions.Normal(alpha * flow.mean, flow.spread(t))
    (expected,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    x = x.detach()
    score = path.convert(flow.velocity(x, t), x, t, source="velocity", target="score")
    torch.testing.assert_close(score, expected, rtol=1e-8, atol=1e-8)


def test_conversion_keeps_the_precision_of_the_state():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, value = randn(2, 3, dtype=dtype), randn(2, 3, seed=1, dtype=dtype)
        for t in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.25])):
            assert VP().convert(value, x, t, source="noise", target="data").dtype == dtype


@pytest.mark.parametrize(
    ("path", "source", "span"),
    [
        (CondOT(), "velocity", (0.0, 1.0)),
        (CondOT(), "data", (0.0, 0.999)),
        (CondOT(), "noise", (0.001, 1.0)),
        (CondOT(), "score", (0.001, 0.999)),
        (VP(), "noise", (0.0, 1.0 - 1e-5)),
        (VP(), "data", (0.0, 1.0 - 1e-5)),
        (EDM(0.002, 80.0), "data", (0.0, 1.0 - 0.002 / 80.0)),
        (VE(), "noise", (0.0, 1.0)),
        (DiscreteVP(LEVELS), "noise", (0.0, 1.0 - 1 / 50)),
    ],
)
def test_the_span_is_where_a_prediction_determines_the_velocity(path, source, span):
    assert path.span(source) == pytest.approx(span, abs=1e-15)
    for t in span:
        p, q = path.mix(t, source, "velocity")
        assert bool(torch.isfinite(p) & torch.isfinite(q))


def test_a_prediction_that_leaves_another_open_says_where_to_ask_instead():
    x = torch.ones(1, 2)
    message = (
        r"at t = 1 on CondOT\(\) the data prediction and the state do not determine the velocity; ask inside \(0.0, 0.999\)"
    )
    with pytest.raises(ValueError, match=message):
        CondOT().convert(x, x, 1.0, source="data", target="velocity")
    with pytest.raises(ValueError, match=r"at t = 0 .* the noise prediction and the state do not determine the data"):
        CondOT().convert(x, x, 0.0, source="noise", target="data")
    assert CondOT().convert(x, x, 1.0, source="data", target="data") is x


def test_the_noisy_end_of_the_sigma_paths_is_scaled_noise():
    assert VE(0.01, 50.0).start_scale == 50.0
    assert EDM(0.002, 80.0).start_scale == 80.0
    assert EDM(0.002, 80.0).margin == pytest.approx(0.002 / 80.0)
    assert float(EDM().coefficients(1 - EDM().margin).sigma) == pytest.approx(0.002, rel=1e-9)
    assert VE(0.01, 50.0).coefficients(torch.tensor([0.0, 0.5, 1.0])).sigma.tolist() == pytest.approx([50.0, 0.5**0.5, 0.01])
    assert {CondOT().start_scale, VP().start_scale, Cosine().start_scale} == {1.0}


def test_vp_follows_its_noise_rate():
    """d log alpha / dt = beta / 2 with beta falling linearly from beta_max to beta_min."""
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    c = VP(0.1, 20.0).coefficients(times)
    torch.testing.assert_close(2 * c.d_alpha / c.alpha, 20.0 + (0.1 - 20.0) * times)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(times))


def test_discrete_vp_has_the_levels_of_diffusers_at_the_integer_timesteps():
    from diffusers import DDPMScheduler

    levels = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    path = DiscreteVP(levels)
    steps = torch.arange(1000)
    torch.testing.assert_close(path.coefficients(path.time(steps)).alpha ** 2, levels.double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(path.timestep(path.time(steps)), steps.double(), rtol=0, atol=1e-9)
    assert float(path.time(999)) == 0.0
    assert float(path.timestep(0.0)) == 999.0
    assert float(path.timestep(1.0)) == 0.0, "clean data is asked at the first timestep"
    assert float(path.coefficients(1.0).alpha) == 1.0
    between = path.coefficients(path.time(499.5)).alpha.log()
    torch.testing.assert_close(between, (levels[499].double().log() + levels[500].double().log()) / 4, rtol=1e-9, atol=0)


def test_discrete_paths_are_equal_when_their_levels_are():
    same, other = DiscreteVP(LEVELS.clone()), DiscreteVP(LEVELS**2)
    assert DiscreteVP(LEVELS) == same
    assert hash(DiscreteVP(LEVELS)) == hash(same)
    assert DiscreteVP(LEVELS) != other
    assert DiscreteVP(LEVELS) != CondOT()
    assert repr(same) != repr(other)
    assert repr(same).startswith("DiscreteVP(count=50, sha256=")


@pytest.mark.parametrize(
    "levels", [[0.9, 0.9], [0.1, 0.9], [1.0, 0.5], [0.5, 0.0], [0.5], [], [[0.9, 0.5]], [0.9, float("nan")]], ids=str
)
def test_impossible_discrete_levels_are_refused(levels):
    with pytest.raises(ValueError, match=r"alphas_cumprod must be a decreasing vector in \(0, 1\).*got shape"):
        DiscreteVP(torch.tensor(levels))


def test_raw_networks_are_undone():
    """Each convention, fed with what its ideal network would return, gives the prediction it stands for."""
    noise, data, t = randn(3, 2, seed=1), randn(3, 2, seed=2), 0.3
    for path in (VP(), EDM()):
        alpha, sigma, _, _ = path.coefficients(t)
        point = path.interpolate(noise, data, t)
        x = point.xt
        s, p, q = raw_mix(path, t, "plain")
        assert (float(s), float(p), float(q)) == (1.0, 1.0, 0.0)
        s, p, q = raw_mix(path, t, "negated")
        torch.testing.assert_close(p * -point.ut + q * x, point.ut)
        s, p, q = raw_mix(path, t, "edm", 0.7)
        # Karras et al., table 1: c_skip x + c_out F(c_in x) is the denoised data; inputs and targets of F have unit variance.
        assert float(s**2 * (sigma**2 + 0.49)) == pytest.approx(1.0)
        target = (data - q * x) / p
        torch.testing.assert_close(p * target + q * x, data)
        variance = (0.49 * (1 - q) ** 2 + q**2 * sigma**2) / p**2  # of (data - c_skip x) / c_out with data variance 0.49
        assert float(variance) == pytest.approx(1.0)
    alpha, sigma, _, _ = VP().coefficients(t)
    x = VP().interpolate(noise, data, t).xt
    _, p, q = raw_mix(VP(), t, "v_prediction")
    torch.testing.assert_close(p * (alpha * noise - sigma * data) + q * x, noise)


def test_paths_are_values():
    assert VP(0.1, 20.0) == VP()
    assert VP(0.2) != VP()
    assert repr(EDM()) == "EDM(sigma_min=0.002, sigma_max=80.0)"
    assert inspect.isabstract(type(VP()).__mro__[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: VE(50.0, 0.01),
            r"VE needs 0 < sigma_min < sigma_max, all finite; got VE\(sigma_min=50.0, sigma_max=0.01\); VE\(\)",
        ),
        (lambda: VE(0.0, 1.0), "VE needs"),
        (lambda: VE(sigma_max=math.inf), "VE needs"),
        (lambda: EDM(sigma_min=90.0), r"EDM needs 0 < sigma_min < sigma_max, .* got EDM\(sigma_min=90.0, sigma_max=80.0\)"),
        (lambda: EDM(sigma_min=-1.0), "EDM needs"),
        (lambda: VP(20.0, 0.1), r"VP needs 0 < beta_min <= beta_max, all finite; got VP\(beta_min=20.0, beta_max=0.1\)"),
        (lambda: VP(0.0, 0.0), "VP needs"),
        (lambda: VP(math.nan), "VP needs"),
    ],
)
def test_impossible_noise_levels_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_constant_noise_rate_is_a_path():
    path = VP(5.0, 5.0)
    assert float(path.time_of_log_snr(path.log_snr(0.4))) == pytest.approx(0.4)
    assert float(path.time_of_log_snr(float("-inf"))) == 0.0
