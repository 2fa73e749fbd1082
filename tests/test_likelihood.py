import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

import fewstep.evaluation.solve as solve
from fewstep import (
    EDM,
    VE,
    VP,
    CondOT,
    CountedField,
    DiscreteVP,
    FieldError,
    GridError,
    JointField,
    Sampler,
    TimeGrid,
    adapt,
    bits_per_dim,
    log_density,
    methods,
    sample_with_log_density,
    tabulate,
)
from fewstep.evaluation import score
from fewstep.evaluation.bits import dequantised
from fewstep.zoo.mixtures import mixture
from problems import GaussianFlow, SmoothNetwork, randn, slope

PATHS = [CondOT(), VP(), VE(), EDM()]
MEANS, VARIANCES = 0.8 * randn(3, 2, seed=1), torch.tensor([[0.06, 0.3], [0.2, 0.1], [0.1, 0.1]], dtype=torch.float64)
wild = pytest.mark.usefixtures("unchecked")


def known_mixture(path, t):
    """The exact distribution of the states at `t`, by torch's own densities."""
    alpha, sigma, _, _ = path.coefficients(t)
    parts = Independent(Normal(alpha * MEANS, (alpha**2 * VARIANCES + sigma**2).sqrt()), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(MEANS), dtype=torch.float64)), parts)


def mixture_data(count=6, seed=0):
    spread = VARIANCES.sqrt().repeat(count // 3 + 1, 1)[:count]
    return MEANS.repeat(count // 3 + 1, 1)[:count] + 1.2 * spread * randn(count, 2, seed=seed)


@dataclass
class Rotated:
    """A Gaussian flow whose covariance is not diagonal."""

    flow: GaussianFlow

    @property
    def turn(self):
        return torch.linalg.qr(randn(3, 3, seed=4))[0]

    @property
    def path(self):
        return self.flow.path

    def __call__(self, x, t):
        return self.flow.velocity(x @ self.turn, t) @ self.turn.T

    def pushed_forward(self, end):
        """Where the flow takes N(0, start_scale^2): an affine image of it."""
        start = torch.zeros(1, 3, dtype=torch.float64)
        mean = self.flow.solution(start, 0.0, end)[0]
        map_ = (self.flow.solution(torch.eye(3, dtype=torch.float64), 0.0, end) - mean) @ self.turn.T
        root = self.path.start_scale * map_
        return MultivariateNormal(self.turn @ mean, root.T @ root)


def gaussian(path):
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in ([0.5, -0.3, 1.0], [0.3, 0.6, 1.5]))
    return Rotated(GaussianFlow(path, mean, std))


def smooth(size=3, seed=0):
    return SmoothNetwork(size, seed=seed)


def euler(n, path=None):
    path = path or CondOT()
    return tabulate(methods.euler, TimeGrid.uniform(n), start_scale=path.start_scale)


# Closed forms


@pytest.mark.parametrize("solver", ["dopri5", 40])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_mixtures_log_density_is_known_to_a_thousandth_of_a_nat(path, solver):
    x, field = mixture_data(), mixture(MEANS, VARIANCES, path).given()
    found = log_density(field, x, solver=solver, source=known_mixture(path, 0.0).log_prob)
    end = path.span("velocity")[1]
    torch.testing.assert_close(found.value, known_mixture(path, end).log_prob(x), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.value, known_mixture(path, 1.0).log_prob(x), atol=1e-3, rtol=0)
    assert found.standard_error.eq(0).all()


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_gaussian_from_the_paths_own_noise(path):
    field, end = gaussian(path), path.span("velocity")[1]
    known = field.pushed_forward(end)
    x = known.mean + randn(6, 3)
    torch.testing.assert_close(log_density(field, x, tol=1e-6).value, known.log_prob(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("path", [VE(), EDM()], ids=repr)
def test_the_start_scale_counts_once_per_dimension(path):
    """The published VE likelihood subtracts log(sigma_max) once instead of once per dimension."""
    x = 30 * randn(4, 2, 3)
    found = log_density(lambda x, t: 0 * x, x, path=path)
    known = Normal(0.0, torch.tensor(path.start_scale, dtype=torch.float64)).log_prob(x).sum((1, 2))
    torch.testing.assert_close(found.value, known)
    torch.testing.assert_close(found.noise, x / path.start_scale)


@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_predictions_are_integrated_inside_their_span(predicts):
    path, velocity = VP(), mixture(MEANS, VARIANCES, VP()).given()

    def network(x, t):
        return velocity.predict(x, t.clamp(max=1 - 1e-5), predicts)

    field = adapt(network, path, predicts).given()
    x = mixture_data(4)
    found = log_density(field, x, source=known_mixture(path, 0.0).log_prob)
    torch.testing.assert_close(found.value, known_mixture(path, 1.0).log_prob(x), atol=1e-3, rtol=0)


def test_an_end_before_the_data_gives_the_density_of_that_time():
    x, field = mixture_data(4), mixture(MEANS, VARIANCES, VP()).given()
    found = log_density(field, x, end=0.8, source=known_mixture(VP(), 0.0).log_prob)
    torch.testing.assert_close(found.value, known_mixture(VP(), 0.8).log_prob(x), atol=1e-4, rtol=0)


def test_a_discrete_path_starts_at_its_first_noise_level():
    path = DiscreteVP(torch.linspace(0.999, 0.9, 10, dtype=torch.float64).cumprod(0))
    field, asked = gaussian(path), []
    known = field.pushed_forward(1 - path.margin)
    x = known.mean + randn(4, 3)
    found = log_density(lambda x, t: asked.append(t) or field(x, t), x, path=path, solver=TimeGrid.uniform(20))
    assert (max(asked), min(asked)) == (1 - path.margin, 0.0)
    # its velocity jumps at each of the ten levels
    torch.testing.assert_close(found.value, known.log_prob(x), atol=1e-2, rtol=0)


def test_float32_data_are_enough():
    x, field = mixture_data(6), mixture(MEANS, VARIANCES, VP()).given()
    single, double = log_density(field, x.float()), log_density(field, x)
    assert single.value.dtype == torch.float32
    torch.testing.assert_close(single.value.double(), double.value, atol=1e-3, rtol=0)
    assert log_density(field, x.half()).value.dtype == torch.float32


# Solvers


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_sample_and_log_density_come_back(path):
    field, noise = mixture(MEANS, VARIANCES, path).given(), randn(5, 2)
    sample, forward = sample_with_log_density("dopri5", field, noise)
    backward = log_density(field, sample)
    torch.testing.assert_close(backward.value, forward.value, atol=1e-3, rtol=0)
    torch.testing.assert_close(backward.noise, noise, atol=1e-3, rtol=0)
    assert torch.equal(forward.noise, noise)


def test_fixed_steps_are_of_fourth_order():
    field, x = smooth(), randn(4, 3)
    exact = log_density(field, x, tol=1e-10).value
    errors = [float((log_density(field, x, solver=n).value - exact).abs().max()) for n in (2, 4)]
    assert slope(errors, [2, 4]) > 3.6


def test_a_grid_is_walked_backwards_whether_or_not_it_holds_the_ends():
    field, x = smooth(), randn(2, 3)
    whole, inner = TimeGrid([0.0, 0.3, 0.6, 1.0]), TimeGrid([0.3, 0.6])
    assert torch.equal(log_density(field, x, solver=whole).value, log_density(field, x, solver=inner).value)
    seen = []
    log_density(lambda x, t: seen.append(t) or field(x, t), x, solver=whole)
    assert seen == pytest.approx([1, 0.8, 0.8, 0.6, 0.6, 0.45, 0.45, 0.3, 0.3, 0.15, 0.15, 0])


def test_calls_are_counted():
    counted = CountedField(smooth())
    assert log_density(counted, randn(4, 3), solver=3).nfe == 12
    assert counted.calls == 12
    assert log_density(counted, randn(4, 3), solver=3, max_batch=3).nfe == 12
    assert counted.calls == 12 + 24
    adaptive = log_density(counted, randn(4, 3))
    assert adaptive.nfe == counted.calls - 36


# Hutchinson


def test_probes_are_unbiased_within_their_own_error():
    field, x = smooth(6), randn(40, 6)
    exact = log_density(field, x, solver=6).value
    found = log_density(field, x, solver=6, divergence="hutchinson", probes=64)
    gaps = (found.value - exact) / found.standard_error
    assert 0.75 < float(gaps.square().mean().sqrt()) < 1.25
    assert float(gaps.abs().max()) < 4
    assert found.nfe == 24


def test_one_probe_has_no_error_and_a_seed():
    field, x = smooth(), randn(4, 3)
    first, again, other = (log_density(field, x, solver=2, divergence="hutchinson", seed=s) for s in (1, 1, 2))
    assert first.standard_error.isnan().all()
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)


# Derivatives and memory


def directional(loss, weight, step):
    """A central difference of a loss that is a fixed formula in the weights."""
    ends = []
    for h in (1e-5, -1e-5):
        weight.data += h * step
        ends.append(float(loss()))
        weight.data -= h * step
    return (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize("how", [{}, {"divergence": "hutchinson", "probes": 2}], ids=str)
def test_gradients_reach_the_weights(how):
    field, x = smooth(), randn(3, 3)

    def loss(differentiable=False):
        return log_density(field, x, solver=6, differentiable=differentiable, **how).value.mean()

    loss(differentiable=True).backward()
    for weight in field.parameters():
        step = randn(*weight.shape, seed=9)
        assert float((weight.grad * step).sum()) == pytest.approx(directional(loss, weight, step), rel=1e-5)


@pytest.mark.parametrize("how", [4, euler(4)], ids=["rk4", "table"])
@pytest.mark.parametrize("density", ["sampler", "flow"])
def test_samples_and_their_densities_have_gradients_too(how, density):
    field = smooth()

    def loss(differentiable=False):
        sample, logs = sample_with_log_density(how, field, randn(3, 3), density=density, differentiable=differentiable)
        return (logs.value + sample.sum(1)).sum()

    loss(differentiable=True).backward()
    step = randn(*field.second.shape, seed=9)
    assert float((field.second.grad * step).sum()) == pytest.approx(directional(loss, field.second, step), rel=1e-5)


def test_adaptive_and_fixed_steps_agree_on_the_gradient():
    """Differences of an adaptive solve jump where its steps change, so the oracle is the fixed one, checked above."""
    found = []
    for solver in ("dopri5", 24):
        field = smooth()
        log_density(field, randn(3, 3), solver=solver, tol=1e-7, differentiable=True).value.mean().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in field.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", [CondOT(), VP()], ids=repr)
def test_the_gradient_in_the_data_is_the_score(path):
    field, x = mixture(MEANS, VARIANCES, path).given(), mixture_data(4).requires_grad_(True)
    found = log_density(field, x, end=0.9, solver=30, source=known_mixture(path, 0.0).log_prob, differentiable=True)
    (gradient,) = torch.autograd.grad(found.value.sum(), x)
    torch.testing.assert_close(gradient, score(field, x, 0.9), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("how", [{}, {"divergence": "hutchinson", "probes": 2}], ids=str)
def test_no_call_outlives_the_next(how):
    network, alive = smooth(), []

    def field(x, t):
        assert not any(output() is not None for output in alive)
        v = network(x, t) + 0.0
        alive.append(weakref.ref(v))
        return v

    found = log_density(field, randn(2, 3), solver=3, **how)
    assert not found.value.requires_grad
    assert not found.noise.requires_grad
    sample, _ = sample_with_log_density(euler(3), field, randn(2, 3), density="flow", **how)
    assert not sample.requires_grad
    assert all(weight.grad is None for weight in network.parameters())


def test_gradients_are_taken_under_no_grad_as_well():
    with torch.no_grad():
        assert log_density(smooth(), randn(2, 3), solver=2).value.isfinite().all()
        assert sample_with_log_density(euler(2), smooth(), randn(2, 3)).log_density.value.isfinite().all()


# Pieces


def test_pieces_make_no_difference():
    field, x = smooth(), randn(7, 3)
    for divergence in ("exact", "hutchinson"):
        whole, cut = (log_density(field, x, solver=3, divergence=divergence, max_batch=m) for m in (None, 3))
        torch.testing.assert_close(cut.value, whole.value)
        torch.testing.assert_close(cut.noise, whole.noise)


def test_conditions_follow_their_samples_into_the_pieces():
    model = adapt(lambda x, t, label: torch.sin(x) * (1 + label.to(x)[:, None]), classes=5)
    labels, x = torch.tensor([0, 3, 1, 2, 4, 0]), randn(6, 3)
    singly = torch.cat([log_density(model.given(int(c)), x[i : i + 1], solver=3).value for i, c in enumerate(labels)])
    per_sample = log_density(model.given(labels), x, solver=3, max_batch=4)
    torch.testing.assert_close(per_sample.value, singly)
    joint = JointField([model.given(labels[:3]), model.given(labels[3:])])
    side_by_side = log_density(joint, x, solver=3, max_batch=4)
    torch.testing.assert_close(side_by_side.value, singly)
    torch.testing.assert_close(side_by_side.noise, per_sample.noise)


def test_a_model_is_asked_without_a_condition():
    model = mixture(MEANS, VARIANCES)
    x = mixture_data(3)
    assert torch.equal(log_density(model, x, solver=2).value, log_density(model.given(), x, solver=2).value)


# Tables


@pytest.mark.parametrize(
    ("table", "path"),
    [
        (tabulate(methods.pfdiff(skip=1, ahead=1), TimeGrid.uniform(7)), CondOT()),
        (tabulate(methods.ddim(VP()), TimeGrid.uniform(5)), VP()),
        (euler(5, VE()), VE()),
    ],
    ids=["pfdiff", "ddim", "euler on VE"],
)
def test_a_tables_own_density_is_that_of_its_map(table, path):
    field = adapt(smooth(2), path, "velocity" if table.predicts == "velocity" else "noise").given()
    noise = randn(4, 2)
    sample, found = sample_with_log_density(table, field, noise)
    torch.testing.assert_close(sample, table(field, noise))
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda z: table(field, z[None])[0], noise[i])
        known = Normal(0.0, 1.0).log_prob(noise[i]).sum() - torch.linalg.slogdet(jacobian)[1]
        assert float(found.value[i]) == pytest.approx(float(known), abs=1e-9)
    assert found.nfe == table.nfe


def test_a_tables_own_density_integrates_to_one_and_the_flows_does_not():
    field, noise = (
        mixture(torch.tensor([[-0.8], [0.8]]), torch.tensor(0.16)).given(),
        torch.linspace(-6, 6, 2001)[:, None].double(),
    )
    for density, right in (("sampler", True), ("flow", False)):
        sample, found = sample_with_log_density(euler(3), field, noise, density=density)
        total = float(torch.trapezoid(found.value.exp(), sample[:, 0]))
        assert (abs(total - 1) < 1e-4) is right


def test_the_flows_density_along_a_table_has_the_tables_order():
    field, noise = smooth(), randn(4, 3)
    exact = sample_with_log_density("dopri5", field, noise, tol=1e-10).log_density.value
    tables = [tabulate(methods.heun, TimeGrid.uniform(n)) for n in (8, 16)]
    found = [sample_with_log_density(table, field, noise, density="flow") for table in tables]
    errors = [float((logs.value - exact).abs().max()) for _, logs in found]
    assert slope(errors, [8, 16]) > 1.75
    assert errors[-1] < 1e-3
    assert found[0].log_density.nfe == 16
    torch.testing.assert_close(found[0].sample, tables[0](field, noise))


def test_the_flows_density_along_a_table_of_another_prediction():
    field = mixture(MEANS, VARIANCES).given()
    table = euler(20)
    plain = sample_with_log_density(table, field, randn(4, 2), density="flow")
    other = sample_with_log_density(table.rebase(CondOT(), "data"), field, randn(4, 2), density="flow")
    torch.testing.assert_close(other.log_density.value, plain.log_density.value)
    torch.testing.assert_close(other.sample, plain.sample)


def test_the_start_scale_is_in_a_tables_density():
    known = Normal(0.0, torch.tensor(VE().start_scale, dtype=torch.float64))
    for density in ("sampler", "flow"):
        sample, found = sample_with_log_density(euler(2, VE()), lambda x, t: 0 * x, randn(4, 3), path=VE(), density=density)
        torch.testing.assert_close(found.value, known.log_prob(sample).sum(1))


# Bits per dimension


def uniform(x):
    """Evenly spread in [-1, 1]."""
    return torch.full(x.shape[:1], -x[0].numel() * math.log(2), dtype=x.dtype)


@pytest.mark.parametrize("levels", [2, 256])
def test_evenly_spread_pixels_cost_the_logarithm_of_their_levels(levels):
    pixels = torch.randint(0, levels, (10, 3, 4), generator=torch.Generator().manual_seed(0))
    found = bits_per_dim(lambda x, t: 0 * x, pixels, levels=levels, source=uniform)
    assert (found.value, found.low, found.high) == pytest.approx([math.log2(levels)] * 3, abs=1e-6)


def test_a_contraction_is_paid_for_in_full():
    """x1 = x0 / e from noise spread evenly in [-e, e]: eight bits again, from a density that is really integrated."""

    def wide(x):
        return uniform(x) - x[0].numel()

    pixels = torch.randint(0, 256, (6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert bits_per_dim(lambda x, t: -x, pixels, source=wide).value == pytest.approx(8, abs=1e-4)


def test_a_gaussian_model_of_a_known_distribution_of_pixels():
    model = gaussian_of(0.5)
    pixels = torch.randint(0, 256, (400, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = bits_per_dim(model, pixels, solver=6, repeats=2)
    nats = math.log(2 * math.pi * 0.25) / 2 + 1 / (6 * 0.25)  # cross entropy of N(0, 0.25) on an even spread over [-1, 1]
    assert found.low < 7 + nats / math.log(2) < found.high
    assert found.high - found.low < 0.1


def gaussian_of(std):
    return mixture(torch.zeros(1, 16), torch.tensor(std**2))


def test_scaled_images_are_turned_back_into_pixels():
    pixels = torch.randint(0, 256, (8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = [bits_per_dim(gaussian_of(0.7), images, solver=2) for images in (pixels, pixels.float() / 127.5 - 1)]
    assert found[0] == found[1]


def test_dequantisation_depends_on_seed_repeat_and_image_alone():
    pixels = torch.zeros(150, 2, 2)
    whole = dequantised(pixels, 256, seed=1, repeat=0)
    assert torch.equal(dequantised(pixels[:70], 256, seed=1, repeat=0), whole[:70])
    assert not torch.equal(dequantised(pixels, 256, seed=1, repeat=1), whole)
    assert not torch.equal(dequantised(pixels, 256, seed=2, repeat=0), whole)
    assert not torch.equal(whole[:64], whole[64:128])
    assert -1 <= float(whole.min()) < float(whole.max()) < -1 + 1 / 128


# Score


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_score_is_the_gradient_of_the_log_density(path):
    model, times = mixture(MEANS, VARIANCES, path), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = (randn(3, 2) * path.start_scale**0.5).requires_grad_(True)
    each = [known_mixture(path, float(t)).log_prob(x[i]) for i, t in enumerate(times)]
    (known,) = torch.autograd.grad(sum(each), x)
    torch.testing.assert_close(score(model, x, times), known)
    torch.testing.assert_close(score(model.given(), x, 0.5)[1], known[1])
    torch.testing.assert_close(score(lambda x, t: model.given()(x, t), x, times, path=path), known)


# Bad input

X = randn(3, 2)
FINE = {"solver": 2}


def nan_later(x, t):
    return x * (1.0 if t > 0.6 else math.nan)


@pytest.mark.parametrize(
    ("field", "x", "settings", "error", "message"),
    [
        (torch.no_grad()(smooth(2)), X, FINE, FieldError, r"carries no graph back to x: it runs under torch.no_grad"),
        (lambda x, t: smooth(2).bias[:2].expand(x.shape), X, FINE, FieldError, r"or does not use x \(write 0 \* x \+ c"),
        (nan_later, X, FINE, FieldError, r"the network returned NaN at call 4 .*time t = 0.5"),
        (lambda x, t: x[:, :1], X, FINE, FieldError, r"must return the state's shape \(3, 2\), got \(3, 1\)"),
        (lambda x, t: x.abs().sqrt(), 0 * X, FINE, FieldError, r"divergence is not finite at time t = 1 "),
        (smooth(2), X.long(), FINE, FieldError, r"x1 must be floating-point states .* got torch.int64 of shape \(3, 2\)"),
        (smooth(2), X[:, 0], FINE, FieldError, r"x1 must be floating-point states .* of shape \(3,\)"),
        (smooth(2), X[:0], FINE, FieldError, r"x1 must be .* of shape \(0, 2\)"),
        (smooth(2), X / 0, FINE, FieldError, r"x1 holds NaN or infinity"),
        (smooth(2), X, {"solver": "dopri"}, ValueError, r'unknown solver "dopri": did you mean "dopri5"\?'),
        (smooth(2), X, {"solver": "x"}, ValueError, r'unknown solver "x": known are dopri5'),
        (smooth(2), X, {"solver": euler(2)}, ValueError, r"use sample_with_log_density\(sampler, field, noise\)"),
        (smooth(2), X, {"solver": 0}, GridError, r"at least one step, got n = 0"),
        (smooth(2), X, {"divergence": "hutchinsen"}, ValueError, r'did you mean "hutchinson"\?'),
        (smooth(2), X, {"probes": 0}, ValueError, r"probes must be at least 1, got 0"),
        (smooth(2), X, {"max_batch": 0}, ValueError, r"max_batch must be at least 1, got 0"),
        (smooth(2), X, {"end": 1.5}, ValueError, r"end must lie in \(0, 1\] .* got 1.5"),
        (smooth(2), X, {"source": lambda x: x, **FINE}, FieldError, r"source must return .* \(3,\), got \(3, 2\)"),
    ],
)
@wild
def test_bad_input_to_log_density_is_one_clear_line(field, x, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        log_density(field, x, **settings)
    assert "\n" not in str(caught.value)


SINGULAR = Sampler(torch.zeros(1), torch.ones(2), torch.tensor([[0.0], [1.0]]))


@pytest.mark.parametrize(
    ("sampler", "field", "settings", "error", "message"),
    [
        (euler(2), smooth(2), {"density": "tables"}, ValueError, r'unknown density "tables": .*known are sampler, flow'),
        (euler(2), smooth(2), {"divergence": "hutchinson"}, ValueError, r"own samples has no estimate"),
        (euler(2), torch.no_grad()(smooth(2)), {}, FieldError, r"carries no graph back to x"),
        (SINGULAR, lambda x, t: -x, {}, FieldError, r"map is singular at 3 of 3 samples"),
        ("dopri", smooth(2), {}, ValueError, r'did you mean "dopri5"'),
        (euler(2), smooth(2), {"path": VE(), "density": "flow"}, FieldError, r"a\[0\] = a\[-1\] = 50 .* this table has 1, 1"),
        (
            tabulate(methods.dpmpp(VP(), 2), TimeGrid.uniform(4)),
            mixture(MEANS, VARIANCES, VP()).given(),
            {"density": "flow"},
            FieldError,
            r'which must integrate velocities .* ask for density="sampler"',
        ),
        (euler(2).rebase(CondOT(), "data"), smooth(2), {"density": "flow"}, FieldError, r"pass the path that they belong to"),
    ],
)
@wild
def test_bad_input_to_sampling_with_log_density_is_one_clear_line(sampler, field, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        sample_with_log_density(sampler, field, X, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        (torch.full((2, 2), 256), {}, FieldError, r"must be integers in 0 .. 255, got values from 256 to 256"),
        (torch.full((2, 2), 1.5), {}, FieldError, r"must be floats in \[-1, 1\], got values from 1.5"),
        (torch.full((2, 2), math.nan), {}, FieldError, r"must be floats in \[-1, 1\], got values from nan"),
        (torch.full((2, 2), 0.5 / 255), {}, FieldError, r"must lie on the lattice k / 127.5 - 1 of 256 levels"),
        (torch.zeros(4), {}, FieldError, r"images must be \(batch, \*shape\), got shape \(4,\)"),
        (torch.zeros(2, 2), {"levels": 1}, ValueError, r"levels must be at least 2"),
        (torch.zeros(2, 2), {"repeats": 0}, ValueError, r"repeats at least 1, got 256 and 0"),
    ],
)
def test_bad_images_are_one_clear_line(images, settings, error, message):
    with pytest.raises(error, match=message):
        bits_per_dim(smooth(2), images, **settings)


def test_a_solve_that_cannot_keep_to_its_tolerance_says_so(monkeypatch):
    monkeypatch.setattr(solve, "MOST_STEPS", 5)
    with pytest.raises(FieldError, match=r"dopri5 cannot keep to tol = 1e-12 \(max_num_steps exceeded.*raise tol"):
        log_density(smooth(2), X, tol=1e-12)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(FieldError, match=r"torch.inference_mode rules out; use torch.no_grad"):
        log_density(smooth(2), X, **FINE)


def test_scores_need_a_path_and_noise():
    with pytest.raises(FieldError, match="has a score on a known path only"):
        score(lambda x, t: x, X, 0.5)
    with pytest.raises(FieldError, match=r"infinite where sigma is zero, as at t = 1 on CondOT\(\)"):
        score(mixture(MEANS, VARIANCES), X, 1.0)
