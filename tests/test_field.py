import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewstep import EDM, VE, VP, CondOT, Cosine, CountedField, DiscreteVP, FieldError, JointField, adapt, flow_timestep
from fewstep.composite import path_of, start_scale
from problems import GaussianFlow, Recorder, SmoothNetwork, gaussian_flow, randn

LEVELS = torch.linspace(0.9999, 0.003, 400)
PATHS = [CondOT(), Cosine(), VP(), VE(), EDM(), DiscreteVP(LEVELS)]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
TIMES = (0.2, 0.45, 0.8)


class Seen:
    """A network that remembers the inputs of its calls."""

    def __init__(self, function) -> None:
        self.function, self.inputs, self.times, self.conditions = function, [], [], []

    def __call__(self, x, t, **condition):
        self.inputs.append(x)
        self.times.append(t)
        self.conditions.append(condition)
        return self.function(x, t, **condition)


def agrees(field, flow, *, atol=1e-9):
    """The field has the flow's velocity, at numbers, 0-d tensors and times per sample, and all its other predictions."""
    x = randn(3, 3, seed=7)
    for t in (*TIMES, torch.tensor(0.3, dtype=torch.float64)):
        truth = {"velocity": flow.velocity(x, t), "data": flow.data(x, t)}
        torch.testing.assert_close(field(x, t), truth["velocity"], rtol=1e-9, atol=atol)
        for target in ("velocity", "data"):
            torch.testing.assert_close(field.predict(x, t, target), truth[target], rtol=1e-9, atol=atol)
    each = torch.cat([field(x[i : i + 1], t) for i, t in enumerate(TIMES)])
    torch.testing.assert_close(field(x, torch.tensor(TIMES, dtype=torch.float64)), each, rtol=1e-9, atol=atol)


def column(t):
    """Times (batch,) of a network shaped to multiply (batch, 3)."""
    return t[:, None]


class OverTime:
    """A flow asked at times (batch,)."""

    def __init__(self, flow: GaussianFlow) -> None:
        self.flow, self.path = flow, flow.path

    def velocity(self, x, t):
        return self.flow.velocity(x, column(t))

    def data(self, x, t):
        return self.flow.data(x, column(t))

    def noise(self, x, t):
        alpha, sigma, _, _ = self.path.coefficients(column(t))
        return sigma * (x - alpha * self.flow.mean) / self.flow.spread(column(t)) ** 2

    def score(self, x, t):
        return -self.noise(x, t) / self.path.coefficients(column(t)).sigma


@every_path
@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_networks_of_every_prediction_become_the_same_field(path, predicts):
    flow = gaussian_flow(path)
    network = Seen(getattr(OverTime(flow), predicts))
    field = adapt(network, path=path, predicts=predicts, clock=lambda t: t).given()
    agrees(field, flow)
    assert {tuple(t.shape) for t in network.times} == {(3,), (1,)}, "networks are given one time per sample"


@pytest.mark.parametrize("wrap", [lambda u: u, lambda u: SimpleNamespace(sample=u), lambda u: (u,), lambda u: (u, None)])
def test_outputs_are_unwrapped(wrap):
    flow = gaussian_flow(CondOT())
    agrees(adapt(lambda x, t: wrap(OverTime(flow).velocity(x, t))).given(), flow)


def test_flow_models_of_diffusers_run_backwards_on_a_clock_of_1000():
    flow = gaussian_flow(CondOT())
    network = Seen(lambda x, timestep: -OverTime(flow).velocity(x, 1 - timestep / 1000))
    agrees(adapt(network, raw="negated", clock=flow_timestep).given(), flow)
    assert network.times[0].tolist() == [800.0] * 3
    assert flow_timestep(1.0) == 0.0


def test_discrete_networks_are_asked_at_fractional_timesteps():
    path = DiscreteVP(LEVELS)
    flow = gaussian_flow(path)
    network = Seen(lambda x, timestep: OverTime(flow).noise(x, path.time(timestep)))
    field = adapt(network, path=path, predicts="noise").given()
    agrees(field, flow)
    field(randn(1, 3), 0.0)
    assert network.times[-1].item() == 399.0
    assert network.times[0].tolist() == [0.8 * 400 - 1] * 3
    field(randn(1, 3), 1.0)
    assert network.times[-1].item() == 0.0, "clean data is asked at the last level"


def test_v_prediction_networks():
    path = DiscreteVP(LEVELS)
    flow = OverTime(gaussian_flow(path))

    def network(x, timestep):
        t = path.time(timestep)
        alpha, sigma, _, _ = path.coefficients(column(t))
        return alpha * flow.noise(x, t) - sigma * flow.data(x, t)

    agrees(adapt(network, path=path, predicts="noise", raw="v_prediction").given(), flow.flow)


def test_raw_networks_inside_the_preconditioning_of_edm():
    path, sigma_data = EDM(), 0.7
    flow = OverTime(gaussian_flow(path))

    def network(y, clock):  # the inner network F of Karras et al., from what the whole denoiser must give
        sigma = torch.exp(4 * clock)[:, None]
        x = y * (sigma**2 + sigma_data**2).sqrt()
        skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (flow.data(x, 1 - sigma[:, 0] / path.sigma_max) - skip * x) / out

    agrees(adapt(network, path=path, predicts="data", raw="edm", sigma_data=sigma_data).given(), flow.flow, atol=1e-7)


def test_denoisers_called_with_sigma():
    path = EDM()
    flow = OverTime(gaussian_flow(path))
    network = Seen(lambda x, sigma: flow.data(x, 1 - sigma / path.sigma_max))
    agrees(adapt(network, path=path, predicts="data", clock=lambda t: path.coefficients(t).sigma).given(), flow.flow, atol=1e-7)
    assert network.times[0].tolist() == pytest.approx([64.0] * 3)


def test_outside_its_span_the_network_is_asked_at_the_nearest_time_inside():
    network = Seen(lambda x, t: x)
    field = adapt(network, predicts="data").given()
    field(randn(2, 3), 1.0)
    field(randn(2, 3), torch.tensor([0.5, 1.0]))
    assert [t.tolist() for t in network.times] == [[0.999] * 2, pytest.approx([0.5, 0.999])]
    field = adapt(network, predicts="noise").given()
    field(randn(2, 3), 0.0)
    assert network.times[-1].tolist() == [0.001] * 2


class Labelled(nn.Module):
    """velocity = (weights of the label) * x + t, with a null class at the end."""

    def __init__(self, classes=4) -> None:
        super().__init__()
        self.table = nn.Parameter(randn(classes + 1, 3))

    def forward(self, x, t, label, strength=1.0):
        return strength * self.table[label] * x + t[:, None]


@pytest.mark.parametrize("label", [2, torch.tensor(3), torch.tensor([0, 2, 3, 1, 0])], ids=["number", "scalar", "per sample"])
@pytest.mark.parametrize("guidance", [0.0, 2.5, -1.0])
def test_guidance_is_its_formula_in_one_doubled_batch(label, guidance):
    network = Labelled()
    seen = Seen(network)
    model = adapt(seen, null_label=4, classes=4)
    x, t = randn(5, 3), 0.3
    plain = {name: adapt(network).given(value)(x, t) for name, value in (("label", label), ("null", 4))}
    field = model.given(label, guidance=guidance)
    torch.testing.assert_close(field(x, t), plain["null"] + guidance * (plain["label"] - plain["null"]))
    assert [len(inputs) for inputs in seen.inputs] == [10], "one call of the network, on a doubled batch"
    assert field.passes == 2
    assert model.given(label).passes == 1
    times = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    each = torch.cat(
        [
            model.given(int(torch.as_tensor(label).expand(5)[i]), guidance=guidance)(x[i : i + 1], float(times[i]))
            for i in range(5)
        ]
    )
    torch.testing.assert_close(field(x, times), each)


@pytest.mark.parametrize(
    ("path", "raw", "predicts"),
    [(CondOT(), "negated", "velocity"), (VP(), "v_prediction", "noise"), (EDM(), "edm", "data"), (VP(), "plain", "score")],
)
def test_guidance_of_any_prediction_is_guidance_of_the_velocity(path, raw, predicts):
    model = adapt(Labelled(), path=path, raw=raw, predicts=predicts, null_label=4, clock=lambda t: t)
    x, t, w = randn(5, 3), 0.3, 3.0
    null, given = model.given(4)(x, t), model.given(1)(x, t)
    torch.testing.assert_close(model.given(1, guidance=w)(x, t), null + w * (given - null), rtol=1e-8, atol=1e-8)


def test_conditions_reach_the_network_one_row_per_sample():
    seen = Seen(lambda x, t, **condition: x)
    adapt(seen).given(condition={"prompt": randn(1, 7), "mask": randn(4, 2), "flag": True, "level": 3, "none": None})(
        randn(4, 3), 0.5
    )
    condition = seen.conditions[0]
    assert condition["prompt"].shape == (4, 7)
    assert condition["mask"].shape == (4, 2)
    assert condition["level"].tolist() == [3] * 4
    assert condition["flag"] is True
    assert condition["none"] is None
    guided = adapt(seen).given(
        condition={"prompt": randn(1, 7), "flag": True}, null={"prompt": torch.zeros(1, 7), "flag": True}, guidance=2.0
    )
    guided(randn(4, 3), 0.5)
    assert seen.conditions[-1]["prompt"].shape == (8, 7)
    assert bool((seen.conditions[-1]["prompt"][:4] == 0).all())


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("path", "raw", "predicts"),
    [(CondOT(), "plain", p) for p in ("velocity", "noise", "data", "score")]
    + [(VP(), "plain", "noise"), (VE(), "plain", "score"), (EDM(), "plain", "data"), (Cosine(), "plain", "velocity")]
    + [(CondOT(), "negated", "velocity"), (VP(), "v_prediction", "noise"), (EDM(), "edm", "data")],
)
def test_a_classifier_turns_the_prior_into_the_posterior(path, raw, predicts, t):
    """Gaussian data seen through Gaussian noise: the gradient of log p(y | x_t) makes the flow that of the posterior."""
    prior, y, spread = gaussian_flow(path), torch.tensor([0.2, 1.0, -1.0], dtype=torch.float64), 0.5
    precision = prior.std**-2 + spread**-2
    posterior = GaussianFlow(path, (prior.mean / prior.std**2 + y / spread**2) / precision, precision**-0.5)

    def log_probability(x, times):
        sigma = path.coefficients(column(times)).sigma
        left = (prior.std * sigma) ** 2 / prior.spread(column(times)) ** 2  # variance of x1 given x_t
        return torch.distributions.Normal(prior.data(x, column(times)), (left + spread**2).sqrt()).log_prob(y).sum(1)

    def network(x, times):
        flow, c = OverTime(prior), path.coefficients(column(times))
        if raw == "negated":
            return -flow.velocity(x, times)
        if raw == "v_prediction":
            return c.alpha * flow.noise(x, times) - c.sigma * flow.data(x, times)
        if raw == "edm":
            variance = c.sigma**2 + 0.25
            x = x * variance.sqrt()
            return (flow.data(x, times) - 0.25 / variance * x) / (0.5 * c.sigma / variance.sqrt())
        return getattr(flow, predicts)(x, times)

    model = adapt(network, path=path, raw=raw, predicts=predicts, clock=lambda t: t)
    field = model.given(classifier=log_probability)
    x = randn(4, 3)
    asked = min(max(t, field.first), field.last)
    expected = posterior.velocity(x, asked)
    torch.testing.assert_close(field(x, t), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    doubled = model.given(classifier=log_probability, classifier_scale=2.0)(x, t)
    torch.testing.assert_close(
        doubled - field(x, t), field(x, t) - model.given()(x, asked), rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert not field(x, t).requires_grad


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_large_batches_are_split_and_put_together_again(most):
    network, x = Labelled(), randn(5, 3)
    seen = Seen(network)
    label = torch.tensor([0, 2, 3, 1, 0])
    split = adapt(seen, null_label=4, max_batch=most).given(label, guidance=2.0)
    torch.testing.assert_close(split(x, 0.4), adapt(network, null_label=4).given(label, guidance=2.0)(x, 0.4))
    assert max(len(inputs) for inputs in seen.inputs) <= most
    assert sum(len(inputs) for inputs in seen.inputs) == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_network_is_asked_in_its_own_precision_and_the_state_keeps_its(dtype):
    network = SmoothNetwork(dtype=dtype)
    seen = Seen(network)
    field = adapt(network, call=lambda _, x, t, condition: seen(x, t)).given()
    for state in (torch.float32, torch.float64):
        assert field(randn(2, 3, dtype=state), 0.5).dtype == state
        assert seen.inputs[-1].dtype == dtype
        assert seen.times[-1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert adapt(network).device_dtype() == (torch.device("cpu"), dtype)


def test_a_plain_function_is_asked_in_the_precision_of_the_state():
    seen = Seen(lambda x, t: x)
    for dtype in (torch.float32, torch.float64):
        assert adapt(seen).given()(randn(2, 3, dtype=dtype), 0.5).dtype == dtype
        assert seen.inputs[-1].dtype == dtype
    assert adapt(seen).device_dtype() == (torch.device("cpu"), torch.float32)
    assert adapt(seen).parameters() == 0
    assert adapt(SmoothNetwork()).parameters() == 4 * 16 + 16 + 16 * 3
    assert adapt(nn.Identity()).weight() is None


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: x[:, :2], r"must return shape \(4, 3\), got \(4, 2\); use adapt\(call=...\)"),
        (lambda x: x[:2], r"must return shape \(4, 3\), got \(2, 3\)"),
        (lambda x: x.long(), r"must return a floating-point tensor of shape \(4, 3\), got a torch.int64 tensor"),
        (lambda x: {"sample": x}, r"must return a floating-point tensor of shape \(4, 3\), got a dict; see adapt\(call=...\)"),
        (lambda x: None, "got a NoneType"),
    ],
)
def test_outputs_that_no_sampler_can_use_are_refused(output, got):
    field = adapt(lambda x, t: output(x), name="mine").given()
    with pytest.raises(FieldError, match=f"mine {got}" if got.startswith("must") else got):
        field(randn(4, 3), 0.5)
    with pytest.raises(FieldError, match=r"must return shape \(1, 3\), got \(1, 2\)"):
        adapt(lambda x, t: x[:, :2], max_batch=2).given()(randn(1, 3), 0.5)


def test_guidance_without_a_condition_to_leave_out_is_refused():
    network = Labelled()
    with pytest.raises(FieldError, match="Labelled has no null label; pass null="):
        adapt(network).given(1, guidance=2.0)
    with pytest.raises(FieldError, match="Labelled has one, but no label was given; pass null="):
        adapt(network, null_label=4).given(guidance=2.0)
    with pytest.raises(FieldError, match=r"null and condition must have the same keys, got \['b'\] and \['a'\]"):
        adapt(network).given(condition={"a": randn(1, 2)}, null={"b": randn(1, 2)}, guidance=2.0)(randn(2, 3), 0.5)
    with pytest.raises(FieldError, match='null and condition differ in "strength", which has no batch; give it as a tensor'):
        adapt(network, null_label=4).given(
            condition={"label": 1, "strength": 2.0}, null={"label": 4, "strength": 0.0}, guidance=2.0
        )(randn(2, 3), 0.5)


@pytest.mark.parametrize("label", [-1, 5, torch.tensor([0, 5]), torch.tensor([-1, 2])], ids=str)
def test_labels_outside_the_classes_are_refused(label):
    model = adapt(Labelled(), classes=4, null_label=4)
    with pytest.raises(FieldError, match=r"label must lie in 0\.\.3 for Labelled, got (-1|5)"):
        model.given(label)
    model.given(4)  # the null class itself may be asked for


def test_a_condition_of_another_batch_is_refused():
    field = adapt(Labelled()).given(torch.tensor([0, 1, 2]))
    with pytest.raises(FieldError, match='condition "label" has batch 3 but the state has 5; give one per sample'):
        field(randn(5, 3), 0.5)


def test_conventions_that_contradict_each_other_are_refused():
    for raw, meant in (("negated", "velocity"), ("v_prediction", "noise"), ("edm", "data")):
        with pytest.raises(ValueError, match=f'raw="{raw}" networks have predicts="{meant}", got "score"'):
            adapt(SmoothNetwork(), raw=raw, predicts="score")


@pytest.mark.usefixtures("unchecked")
def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match='predicts must be one of velocity, noise, data, score, got "epsilon"'):
        adapt(SmoothNetwork(), predicts="epsilon")
    with pytest.raises(ValueError, match='raw must be one of plain, negated, v_prediction, edm, got "minus"'):
        adapt(SmoothNetwork(), raw="minus")


def test_the_fingerprint_is_that_of_the_weights():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # with a 0-d counter among its buffers
    twin = copy.deepcopy(network)
    assert adapt(network).fingerprint() == adapt(twin).fingerprint()
    assert len(adapt(network).fingerprint()) == 64
    with torch.no_grad():
        twin[0].weight[1, 2] += 1e-6
    assert adapt(network).fingerprint() != adapt(twin).fingerprint()
    assert adapt(network).fingerprint() != adapt(copy.deepcopy(network).bfloat16()).fingerprint()
    assert adapt(lambda x, t: x).fingerprint() == ""


def test_a_field_says_its_condition_in_words():
    model = adapt(Labelled(), null_label=4)
    assert model.given().label == "unconditional"
    assert model.given(3).label == "label=3"
    field = model.given(torch.arange(4), guidance=2.5, classifier=lambda x, t: x.sum(1), classifier_scale=0.5)
    assert field.label == "label=<4>, guidance=2.5, classifier_scale=0.5"
    assert model.name == "Labelled"


def test_the_shape_of_a_sample_is_read_off_the_network():
    network = SmoothNetwork()
    assert adapt(network).shape is None
    assert adapt(network, shape=[2, 3]).shape == (2, 3)
    network.shape = (1, 8, 8)
    assert adapt(network).shape == (1, 8, 8)
    unet = SmoothNetwork()
    for size, shape in ((32, (3, 32, 32)), ([16, 24], (3, 16, 24)), (None, None)):
        unet.config = {"in_channels": 3, "sample_size": size}
        assert adapt(unet).shape == shape


def test_a_joint_field_gives_every_condition_its_part_of_the_batch():
    model = adapt(Labelled(), null_label=4)
    fields = [model.given(0), model.given(torch.tensor([1, 2]), guidance=3.0), model.given(3)]
    joint = JointField(fields)
    x = randn(6, 3)
    for t in (0.4, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)):
        times = t.chunk(3) if isinstance(t, torch.Tensor) else [t] * 3
        for ask, asked in (
            (joint, fields),
            (lambda x, t: joint.predict(x, t, "data"), [lambda x, t, f=f: f.predict(x, t, "data") for f in fields]),
        ):
            expected = torch.cat([f(part, when) for f, part, when in zip(asked, x.chunk(3), times, strict=True)])
            assert torch.equal(ask(x, t), expected)
    assert joint.path == CondOT()
    assert joint.model is model
    assert joint.passes == 2
    with pytest.raises(FieldError, match="a batch of 5 cannot be shared equally by 3 conditions"):
        joint(randn(5, 3), 0.5)


def test_fields_for_some_of_the_samples_take_their_conditions_along():
    model = adapt(Labelled(), null_label=4)
    x, label = randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    field = model.given(label, guidance=2.0, null={"label": torch.tensor([4, 4, 4, 3, 4, 4])}, condition={"label": label})
    torch.testing.assert_close(field.take(slice(2, 5))(x[2:5], 0.5), field(x, 0.5)[2:5])
    shared = model.given(condition={"label": torch.tensor([2])})
    torch.testing.assert_close(shared.take(slice(2, 5))(x[2:5], 0.5), shared(x, 0.5)[2:5])
    joint = JointField([model.given(label[:3]), model.given(3)])
    rows = torch.tensor([1, 2, 4, 5])
    torch.testing.assert_close(joint.take(slice(1, 3))(x[rows], 0.5), joint(x, 0.5)[rows])


def test_calls_samples_and_passes_are_counted():
    field = CountedField(adapt(Labelled(), null_label=4).given(1, guidance=2.0))
    parent = CountedField(SmoothNetwork())
    child = parent.over(field.field)
    for n in (5, 3):
        field(randn(n, 3), 0.5)
        field.predict(randn(n, 3), 0.5, "data")
        child(randn(n, 3), 0.5)
    assert (field.calls, field.samples, field.passes) == (4, 2 * 2 * 8, 2)
    assert (child.calls, child.samples) == (2, 16)
    assert (parent.calls, parent.samples) == (2, 16), "the calls of a child count with its parent"
    bare = CountedField(Recorder(lambda x, t: x))
    bare(randn(4, 3), 0.5)
    assert (bare.calls, bare.samples, bare.passes) == (1, 4, 1)


@pytest.mark.parametrize(
    ("value", "time", "message"),
    [
        (float("nan"), 0.25, r"the network returned NaN at call 2 \(counted from 1\), time t = 0.25 \(0 = noise\)"),
        (float("inf"), torch.tensor(0.25), "the network returned infinity at call 2 .*, time t = 0.25 "),
        (float("nan"), torch.tensor([0.25, 0.5]), r"NaN at call 2 .*, time t = 0.25\.\.0.5 "),
    ],
)
def test_the_first_output_that_is_not_finite_is_named(value, time, message):
    field = CountedField(lambda x, t: x * value)
    lenient = CountedField(lambda x, t: x * value, check=False)
    fine = CountedField(lambda x, t: x)
    fine(randn(2, 3), 0.1)
    field.calls = 1
    with pytest.raises(FieldError, match=message):
        field(randn(2, 3), time)
    assert lenient(randn(2, 3), time).shape == (2, 3)


def test_a_bare_field_of_another_shape_is_refused_by_the_counter():
    with pytest.raises(FieldError, match=r"the field must return the state's shape \(2, 3\), got \(2, 2\)"):
        CountedField(lambda x, t: x[:, :2])(randn(2, 3), 0.5)


def test_wrapped_fields_know_their_path():
    field = adapt(SmoothNetwork(), path=EDM(sigma_max=5.0)).given()
    for wrapped in (field, CountedField(field), CountedField(CountedField(field)), JointField([field])):
        assert path_of(wrapped) == EDM(sigma_max=5.0)
        assert start_scale(wrapped) == 5.0
    for bare in (SmoothNetwork(), CountedField(SmoothNetwork())):
        assert path_of(bare) is None
        assert start_scale(bare) == 1.0
