import dataclasses
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import EDM, VP, CondOT, CountedField, FieldError, Provenance, Sampler, TimeGrid, adapt, methods, tabulate
from fewstep._plan import Stepper, make_plan
from fewstep.path import raw_mix
from fewstep.sampler import substitute
from problems import Recorder, SmoothNetwork, mixture, randn


def dense(sampler, field, noise):
    """Every state straight from the definition: x_i = a_i x_0 + sum_j b_ij u_j."""
    outputs, states = [], []
    for i in range(sampler.nfe + 1):
        x = sampler.a[i] * noise
        for j, u in enumerate(outputs):
            x = x + sampler.b[i, j] * u
        states.append(x)
        if i < sampler.nfe:
            outputs.append(field(x, float(sampler.times[i])))
    return torch.stack(states)


def make(times, a, b, **rest) -> Sampler:
    return Sampler(*(torch.tensor(values) for values in (times, a, b)), **rest)


def euler_table() -> Sampler:
    return tabulate(methods.euler, TimeGrid.uniform(4))


DATA = tabulate(methods.ddim(VP()), TimeGrid.log_snr(5, VP())).rebase(VP(), "data")
TABLES = {
    "euler": tabulate(methods.euler, TimeGrid.uniform(6)),
    "heun": tabulate(methods.heun, TimeGrid.uniform(3)),
    "rk4": tabulate(methods.rk4, TimeGrid.uniform(2)),
    "adams3": tabulate(methods.adams(3), TimeGrid.quadratic(7)),
    "pfdiff": tabulate(methods.pfdiff(2, 1), TimeGrid.uniform(16)),
    "pfdiff-data": tabulate(methods.pfdiff(1, 1, methods.ddim(CondOT()), "data"), TimeGrid.uniform(11)),
    "data": dataclasses.replace(DATA, predicts="velocity"),  # its last row is the last output and nothing else
    "newest": make([0.0, 0.3, 0.6], [1.0, 0.0, 0.0, 0.0], [[0.0] * 3, [1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]),
    "random": Sampler(torch.linspace(0, 0.9, 5), randn(6, seed=8), randn(6, 5, seed=9).tril(-1)),
}
every_table = pytest.mark.parametrize("sampler", TABLES.values(), ids=TABLES)


@st.composite
def tables(draw):
    """Random tables with the features that plans look for: zeros, ones, recurrences and forgotten noise."""
    n = draw(st.integers(1, 8))
    seed = draw(st.integers(0, 10_000))
    a, b = randn(n + 1, seed=seed), randn(n + 1, n, seed=seed + 1).tril(-1)
    keep = torch.rand(n + 1, n, generator=torch.Generator().manual_seed(seed)) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    b = b * keep
    for i in draw(st.sets(st.integers(1, n))):  # x_i continues x_(i-1)
        a[i], b[i, : i - 1] = a[i - 1], b[i - 1, : i - 1]
    for i in draw(st.sets(st.integers(1, n))):  # the newest output as it stands
        if draw(st.booleans()):
            a[i], b[i] = 0.0, 0.0
            b[i, i - 1] = 1.0
    if draw(st.booleans()):
        a[0] = 1.0
    return torch.linspace(0, 0.9, n), a, b


@given(table=tables(), seed=st.integers(0, 100))
def test_plans_execute_any_table_as_it_is_defined(table, seed):
    sampler = Sampler(*table)
    field, noise = SmoothNetwork(seed=seed), randn(3, 3, seed=seed)
    kept = noise.clone()
    expected = dense(sampler, field, noise)
    torch.testing.assert_close(sampler(field, noise), expected[-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sampler(field, noise, trajectory=True), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(noise, kept), "the caller's noise was written to"


@every_table
def test_every_table_is_executed_in_float32_to_rounding(sampler):
    noise = randn(3, 3)
    single = sampler(SmoothNetwork(dtype=torch.float32), noise.float())
    torch.testing.assert_close(single.double(), dense(sampler, SmoothNetwork(), noise)[-1], rtol=2e-5, atol=2e-5)


@every_table
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.view_as(x),
        lambda x: x.transpose(1, 2),
        lambda x: x[:1].expand_as(x),
        lambda x: x.flip(0),
        lambda x: x.detach(),
    ],
    ids=["itself", "view", "transpose", "expand", "copy", "detach"],
)
def test_a_field_may_return_its_argument_or_a_view_of_it(sampler, view):
    noise = randn(3, 2, 2)
    kept = noise.clone()
    torch.testing.assert_close(sampler(lambda x, t: view(x), noise), dense(sampler, lambda x, t: view(x).clone(), noise)[-1])
    assert torch.equal(noise, kept)


@every_table
def test_a_field_may_return_the_same_memory_at_every_call(sampler):
    constant, noise = randn(3, 3, seed=3), randn(3, 3)
    kept = constant.clone()
    sample = sampler(lambda x, t: constant, noise)
    torch.testing.assert_close(sample, dense(sampler, lambda x, t: constant, noise)[-1])
    assert torch.equal(constant, kept), "the field's own tensor was written to"
    sample.zero_()
    assert torch.equal(constant, kept), "the sample shares memory with the field"


def test_a_sample_does_not_share_memory_with_the_noise():
    noise = torch.ones(2, 2)
    idle = make([0.0], [1.0, 1.0], [[0.0], [0.0]])
    idle(lambda x, t: x, noise).zero_()
    assert bool((noise == 1).all())


def test_outputs_of_higher_precision_do_not_promote_the_state():
    sample = euler_table()(lambda x, t: x.double(), torch.ones(1, 1))
    assert sample.dtype == torch.float32
    assert float(sample) == pytest.approx(1.25**4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_in_half_precision_becomes_a_float32_state(dtype):
    noise = randn(3, 3, dtype=dtype)
    seen = Recorder(lambda x, t: x)
    sample = euler_table()(seen, noise)
    assert {x.dtype for x in seen.states} == {torch.float32}
    torch.testing.assert_close(sample, noise.float() * 1.25**4)


@pytest.mark.parametrize(
    ("method", "alive"),
    [
        (methods.euler, 3),  # the state, the next one and the output between them
        (methods.adams(2), 4),
        (methods.adams(3), 5),
        (methods.pfdiff(1, 1), 4),  # the springboards follow a two-step recurrence: no base state is carried
        (methods.pfdiff(3, 2), 4),
        (methods.midpoint, 4),
        (methods.ddim(VP()), 3),
    ],
    ids=lambda m: getattr(m, "name", ""),
)
def test_the_plan_keeps_alive_what_the_recurrence_needs_and_no_more(method, alive):
    for calls in (8, 24):
        assert tabulate(method, TimeGrid.uniform(method.intervals(calls))).plan.alive == alive


def test_a_table_without_structure_keeps_everything():
    n = 5
    assert TABLES["random"].plan.alive == n + 3  # noise, n outputs and two states


def test_a_step_of_euler_is_one_fused_addition():
    rows = euler_table().plan.rows
    assert [tuple(term) for term in rows[3]] == [(1.0, "x", 2), (0.25, "u", 2)]
    assert [tuple(term) for term in rows[0]] == [(1.0, "x", -1)]


def test_recurrences_that_would_cancel_in_float32_are_not_used():
    a = np.array([1.0, 0.3, 0.7, 1e-4, 1.0])
    b = np.zeros((5, 4))
    b[1, 0], b[2, :2], b[4] = 0.2, [0.5, 0.1], 1.0
    a[3], b[3, :3] = 0.1, [0.1, 0.1, 1.0]
    assert [tuple(term)[1:] for term in make_plan(a, b).rows[4]] == [("x", 3), ("u", 2), ("u", 3)]  # ten times x_3 is harmless
    a[3], b[3, :3] = 1e-4, [1e-4, 1e-4, 1.0]
    assert all(abs(term.coefficient) <= 64 for term in make_plan(a, b).rows[4])  # 10000 x_3 - 9999 u_2 is useless arithmetic


@pytest.mark.parametrize(("method", "most"), [(methods.euler, 1), (methods.adams(2), 2), (methods.adams(3), 3)])
def test_outputs_are_released_as_soon_as_no_row_needs_them(method, most):
    born: list[weakref.ref] = []

    def field(x, t):
        assert sum(ref() is not None for ref in born) <= most - 1, "an output outlived its last use"
        u = torch.ones_like(x)
        born.append(weakref.ref(u))
        return u

    tabulate(method, TimeGrid.uniform(8))(field, torch.zeros(2, 2))
    assert len(born) == 8
    assert not any(ref() is not None for ref in born)


@pytest.mark.parametrize("method", [methods.euler, methods.adams(2), methods.adams(3), methods.pfdiff(1, 1)])
def test_states_are_written_over_dead_ones(method):
    where = set()

    def field(x, t):
        where.add(x.data_ptr())
        return torch.ones_like(x)

    noise = torch.zeros(2, 2)
    tabulate(method, TimeGrid.uniform(method.intervals(10)))(field, noise)
    assert len(where) <= 2, "the noise itself and one buffer are enough"
    assert noise.data_ptr() in where


@every_table
def test_the_loop_never_waits_for_the_device(sampler):
    """Meta tensors have no values: whatever looks at one fails."""
    noise = torch.empty(2, 3, device="meta")
    assert sampler(lambda x, t: torch.empty_like(x), noise).is_meta


@every_table
def test_no_graph_is_kept_unless_the_noise_asks_for_one(sampler):
    field = SmoothNetwork()
    assert not sampler(field, randn(2, 3)).requires_grad
    leaf, twin = (randn(2, 3).requires_grad_(True) for _ in range(2))
    with torch.no_grad():
        assert not sampler(field, leaf).requires_grad
    sampler(field, leaf).sum().backward()
    dense(sampler, field, twin)[-1].sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-9)


def test_the_loop_compiles_into_one_graph():
    """In a process of its own: dynamo does not look through the shape checks of this session."""
    script = """
import torch
from fewstep import CondOT, TimeGrid, adapt, methods, tabulate
torch.manual_seed(0)
weight = torch.randn(3, 3)
field = adapt(lambda x, t: torch.tanh(x @ weight) * t[:, None], predicts="velocity").given(guidance=1.0)
noise = torch.randn(4, 3)
for method in (methods.adams(2), methods.pfdiff(1, 1, methods.ddim(CondOT()), "data")):
    sampler = tabulate(method, TimeGrid.uniform(method.intervals(4)))
    run = torch.compile(lambda x: sampler(field, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(noise), sampler(field, noise))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_a_progress_bar_changes_nothing(capsys):
    noise = randn(2, 3)
    assert torch.equal(euler_table()(SmoothNetwork(), noise, progress=True), euler_table()(SmoothNetwork(), noise))


def test_states_of_a_trajectory_stay_as_they_were():
    path = euler_table()(lambda x, t: torch.ones_like(x), torch.zeros(1, 1), trajectory=True)
    assert path.flatten().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("reuse", [False, True])
def test_a_moved_state_carries_on_from_where_it_was_moved_to(reuse):
    """What a diffusers pipeline does when it blends latents between steps: all as if the noise had led there."""
    noise, delta, outputs = randn(2, 3), randn(2, 3, seed=1), randn(10, 2, 3, seed=2)
    for name in ("euler", "adams3", "pfdiff", "rk4", "random"):
        sampler = TABLES[name]
        stepper = Stepper(sampler.plan, noise, reuse=reuse)
        for i in range(sampler.nfe):
            stepper.advance(outputs[i].clone())
            if i == 1:
                before = stepper.state.clone()
                stepper.shift(delta, sampler.a.tolist())
                torch.testing.assert_close(stepper.state, before + delta)
        counter = iter(outputs)
        expected = dense(sampler, lambda x, t, counter=counter: next(counter), noise + delta / sampler.a[2])
        torch.testing.assert_close(stepper.state, expected[-1])


def test_a_stepper_knows_when_its_state_is_all_that_is_left():
    for name, alone in (("euler", True), ("adams3", True), ("rk4", False)):
        stepper = Stepper(TABLES[name].plan, randn(2, 3), reuse=False)
        stepper.advance(randn(2, 3))
        assert stepper.alone is alone


def test_a_field_of_another_shape_is_refused():
    with pytest.raises(FieldError, match=r"the field must return the state's shape \(4, 3\), got \(4, 1\)"):
        euler_table()(lambda x, t: x[:, :1], randn(4, 3))


def test_a_table_must_have_matching_shapes():
    for arguments in (([], [1.0], []), ([0.0], [1.0], [[0.0], [1.0]]), ([0.0], [1.0, 1.0], [[0.0, 0.0], [1.0, 0.0]])):
        with pytest.raises(
            ValueError, match=r"a table of n calls has times \(n,\), a \(n \+ 1,\) and b \(n \+ 1, n\) with n >= 1"
        ):
            make(*arguments)


def test_a_clock_needs_one_entry_per_call():
    with pytest.raises(ValueError, match=r"clock must have one entry per call, \(1,\), got \(2,\)"):
        make([0.0], [1.0, 1.0], [[0.0], [1.0]], clock=torch.tensor([999.0, 500.0]))


@pytest.mark.parametrize("where", ["times", "a", "b", "clock"])
def test_a_table_must_be_finite(where):
    numbers = {"times": [0.0], "a": [1.0, 1.0], "b": [[0.0], [1.0]], "clock": [0.0]}
    numbers = {key: torch.tensor(value) for key, value in numbers.items()}
    numbers[where].view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match="a table must be finite; got NaN or infinity"):
        Sampler(**numbers)


def test_a_row_may_not_use_an_output_that_is_yet_to_come():
    with pytest.raises(ValueError, match="row i may only use outputs j < i"):
        make([0.0, 0.5], [1.0, 1.0, 1.0], [[0.0, 0.0], [0.5, 0.1], [0.5, 0.5]])


def test_another_path_is_refused():
    sampler = make([0.0], [1.0, 1.0], [[0.0], [1.0]], provenance=Provenance(path=repr(CondOT())))
    assert sampler(adapt(SmoothNetwork()).given(), randn(1, 3)).shape == (1, 3)
    assert sampler(SmoothNetwork(), randn(1, 3)).shape == (1, 3), "a bare function has no path to contradict"
    for field in (adapt(SmoothNetwork(), path=VP()).given(), CountedField(adapt(SmoothNetwork(), path=VP()).given())):
        with pytest.raises(FieldError, match=r"made for CondOT\(\), the field lives on VP\(beta_min=0.1, beta_max=20.0\)"):
            sampler(field, randn(1, 3))


def test_a_bare_function_cannot_give_other_predictions():
    for field in (SmoothNetwork(), CountedField(SmoothNetwork())):
        with pytest.raises(FieldError, match='combines "data" predictions, a bare velocity field cannot give them; use adapt'):
            DATA(field, randn(1, 3))


def test_a_renamed_table_is_the_same_table():
    renamed = TABLES["heun"].named("mine")
    assert renamed.provenance.method == "mine"
    assert torch.equal(renamed.b, TABLES["heun"].b)
    assert renamed.nfe == 6


@pytest.mark.parametrize("target", ["noise", "data", "score"])
@pytest.mark.parametrize("path", [VP(), EDM(sigma_max=5.0)], ids=["VP", "EDM"])
def test_a_rebased_table_gives_the_same_samples(path, target):
    problem = mixture(path)
    field = adapt(lambda x, t: problem.data(x, t[0]), path=path, predicts="data").given()
    sampler = tabulate(methods.adams(2), TimeGrid.log_snr(6, path), start_scale=path.start_scale)
    rebased = sampler.rebase(path, target)
    assert rebased.predicts == target
    noise = randn(8, 2)
    torch.testing.assert_close(rebased(field, noise), sampler(field, noise), rtol=1e-9, atol=1e-9)
    back = rebased.rebase(path, "velocity")
    torch.testing.assert_close(back.b, sampler.b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.a, sampler.a, rtol=1e-9, atol=1e-9 * path.start_scale)
    assert sampler.rebase(path, "velocity") is sampler


class Buffers:
    """A network that writes its outputs into a fixed number of buffers in turn, as CUDA graphs do into one."""

    def __init__(self, network, count):
        self.network, self.buffers, self.calls = network, [None] * count, 0

    def __call__(self, x, t):
        place, value = self.calls % len(self.buffers), self.network(x, t)
        self.calls += 1
        if self.buffers[place] is None:
            self.buffers[place] = torch.empty_like(value)
        return self.buffers[place].copy_(value)


@pytest.mark.parametrize("method", [methods.adams(1), methods.adams(3), methods.heun, methods.rk4, methods.pfdiff(1, 1)])
@pytest.mark.parametrize("diffusers", [False, True])
def test_a_network_may_return_one_buffer_at_every_call(method, diffusers):
    sampler, network, noise = tabulate(method, TimeGrid.uniform(7)), SmoothNetwork(), randn(4, 3)
    static = Buffers(network, 1)
    if not diffusers:
        torch.testing.assert_close(sampler(static, noise), sampler(network, noise), rtol=0, atol=0)
        return
    with torch.no_grad():  # as a pipeline does
        stepper = Stepper(sampler.plan, noise, reuse=False)
        for t in sampler.times.tolist():
            stepper.advance(static(stepper.state, t))
    torch.testing.assert_close(stepper.state, sampler(network, noise), rtol=1e-12, atol=1e-12)


def test_a_network_that_writes_over_an_output_in_another_way_is_refused():
    with pytest.raises(FieldError, match=r"wrote its output over an earlier one .* \(output\.clone\(\)\)"):
        tabulate(methods.adams(4), TimeGrid.uniform(6))(Buffers(SmoothNetwork(), 2), randn(4, 3))


def test_an_ordinary_networks_outputs_are_copied_once_at_most():
    copies = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.clone:
                copies.append(args[0])
            return function(*args, **(kwargs or {}))

    for method, most in ((methods.euler, 0), (methods.adams(3), 1)):
        sampler = tabulate(method, TimeGrid.uniform(8))
        copies.clear()
        with Watch():
            sampler(SmoothNetwork(), randn(2, 3))
        assert len(copies) == most


def test_rebasing_at_a_singular_time_names_the_time():
    with pytest.raises(
        ValueError, match=r"at t = 0 on CondOT\(\) the noise prediction and the state do not determine the velocity"
    ):
        euler_table().rebase(CondOT(), "noise")


@given(table=tables(), seed=st.integers(0, 1000))
def test_substituting_outputs_changes_the_numbers_and_not_the_samples(table, seed):
    """u_j = p_j w_j + q_j x_j: rows over u, fed u, and rows over w, fed w, walk through the same states."""
    sampler = Sampler(*table)
    n, noise, field = sampler.nfe, randn(2, 3, seed=seed), SmoothNetwork(seed=seed)
    p, q = randn(n, seed=seed) + 2.0, randn(n, seed=seed + 1)
    order = {float(t): k for k, t in enumerate(sampler.times)}
    a, b = substitute(sampler.a, sampler.b, p=p, q=q)
    rewritten = Sampler(sampler.times, a, b)
    expected = dense(sampler, lambda x, t: p[order[t]] * field(x, t) + q[order[t]] * x, noise)
    torch.testing.assert_close(dense(rewritten, field, noise), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("path", "raw", "predicts"),
    [
        (CondOT(), "plain", "velocity"),
        (CondOT(), "negated", "velocity"),
        (VP(), "v_prediction", "noise"),
        (EDM(sigma_max=5.0), "edm", "data"),
    ],
)
def test_the_raw_table_runs_on_the_networks_bare_inputs_and_outputs(path, raw, predicts):
    network = SmoothNetwork()
    field = adapt(network, path=path, raw=raw, predicts=predicts, clock=lambda t: t).given()
    grid = TimeGrid.log_snr(5, path) if raw != "negated" else TimeGrid.uniform(5)
    sampler = tabulate(methods.adams(2), grid, start_scale=path.start_scale).rebase(path, predicts)
    a, b = sampler.raw_table(path, raw)
    noise, outputs = randn(2, 3), []
    for i in range(sampler.nfe + 1):
        y = a[i] * noise + sum(b[i, j] * w for j, w in enumerate(outputs))
        if i < sampler.nfe:
            torch.testing.assert_close(
                y, raw_mix(path, float(sampler.times[i]), raw)[0] * sampler(field, noise, trajectory=True)[i]
            )
            outputs.append(network(y, float(sampler.times[i])))
    torch.testing.assert_close(y, sampler(field, noise), rtol=1e-9, atol=1e-9)


def test_a_raw_table_that_depends_on_the_path_needs_one():
    with pytest.raises(ValueError, match='a table over "edm" outputs needs the path'):
        euler_table().raw_table(None, "edm")
    _, b = euler_table().raw_table(None, "negated")
    assert torch.equal(b, -euler_table().b)


def test_numbers_near_the_end_of_the_range_are_planned_without_overflow():
    sampler = Sampler(torch.linspace(0, 0.9, 5), 1e155 * randn(6, seed=8), 1e155 * randn(6, 5, seed=9).tril(-1))
    field, noise = (lambda x, t: torch.tanh(1e-155 * x)), randn(2, 3)
    torch.testing.assert_close(sampler(field, noise), dense(sampler, field, noise)[-1], rtol=1e-10, atol=0)
