import math

import numpy as np
import pytest
import scipy.linalg
import torch
from problems import Recorder, ShearedSpiral, SmoothNetwork, gaussian_flow, mixture, randn, rms

from fewstep import CondOT, CountedField, JointField, Provenance, Report, Sampler, TimeGrid, adapt, compare, methods, reference, tabulate
from fewstep.evaluation import Estimate, Row, _from_squares, frechet, markdown_cell, measure, squared_errors


def plane():
    problem = mixture(CondOT())
    return adapt(lambda x, t: problem.velocity(x, t[0])).given()


def table(method, n) -> Sampler:
    return tabulate(method, TimeGrid.uniform(n))


def row(name, nfe, value, group="other", metric="rmse"):
    return Row(name, nfe, nfe, group, {metric: Estimate(value, value, value)})


def test_errors_are_root_mean_squares_to_the_solution():
    problem, noise = gaussian_flow(CondOT()), randn(64, 3)
    field = adapt(lambda x, t: problem.velocity(x, t[0])).given()
    samplers = [table(methods.euler, 4), table(methods.midpoint, 4)]
    report = compare(samplers, field, noise, reference=reference(field, noise, tol=1e-8))
    exact = problem.solution(noise, 0.0, 1.0)
    for sampler, found in zip(samplers, report.rows, strict=True):
        error = rms(sampler(problem.velocity, noise) - exact)
        assert found.metrics["rmse"].value == pytest.approx(error, rel=1e-5)
        assert found.metrics["psnr"].value == pytest.approx(10 * math.log10(4 / error**2), abs=1e-3)
        for estimate in found.metrics.values():
            assert estimate.low < estimate.value < estimate.high
    assert [(r.nfe, r.passes) for r in report.rows] == [(4, 4), (8, 8)]
    assert report.facts["noises"] == 64


def test_the_reference_is_solved_where_none_is_given():
    field, noise = plane(), randn(32, 2)
    ours, given = compare([table(methods.heun, 3)], field, noise), compare([table(methods.heun, 3)], field, noise, reference=reference(field, noise))
    assert ours == given
    assert ours.facts["reference error"] <= 1e-4
    assert ours.facts["reference nfe"] == reference(field, noise).nfe


def test_a_bootstrap_interval_covers_the_true_error_about_as_often_as_it_says():
    """Squared errors of an exponential law, whose mean is 1."""
    covered = 0
    for seed in range(200):
        squares = torch.distributions.Exponential(1.0).icdf(torch.rand(100, generator=torch.Generator().manual_seed(seed)).double())
        estimate = _from_squares(squares, "rmse", seed)
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_psnr_is_that_of_data_between_minus_one_and_one():
    squares = torch.full((8,), 0.01, dtype=torch.float64)
    assert _from_squares(squares, "psnr", 0).value == pytest.approx(20 * math.log10(2 / 0.1))
    assert math.isfinite(_from_squares(torch.zeros(8, dtype=torch.float64), "psnr", 0).value)


def test_squared_errors_are_means_over_one_sample():
    x, y = randn(3, 2, 5), randn(3, 2, 5, seed=1)
    expected = [np.mean((x[i] - y[i]).numpy() ** 2) for i in range(3)]
    assert squared_errors(x.float(), y.float()).tolist() == pytest.approx(expected, rel=1e-6)


def test_frechet_is_the_distance_between_gaussian_fits():
    x = randn(400, 4, seed=1) @ randn(4, 4, seed=2) + 1.0
    y = randn(300, 4, seed=3) @ randn(4, 4, seed=4)
    cx, cy = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(cx @ cy)
    expected = np.sum((x.mean(0) - y.mean(0)).numpy() ** 2) + np.trace(cx + cy - 2 * root.real)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-8)
    assert frechet(x, x + torch.tensor([3.0, 0, 0, 4.0])) == pytest.approx(25.0, rel=1e-9)
    assert frechet(x.view(400, 2, 2), y.view(300, 2, 2)) == pytest.approx(expected, rel=1e-8), "images are flattened"


def test_samples_of_a_good_sampler_are_nearer_to_the_data():
    problem = gaussian_flow(CondOT())
    field = adapt(lambda x, t: problem.velocity(x, t[0])).given()
    data = problem.mean + problem.std * randn(4000, 3, seed=9)
    report = compare({"bad": table(methods.euler, 2), "good": table(methods.rk4, 4)}, field, randn(2000, 3), data=data, metrics=["frechet"])
    bad, good = (r.metrics["frechet"] for r in report.rows)
    assert good.value < 0.02 < bad.low
    assert good.low <= good.value <= good.high


def test_frechet_needs_data_of_the_right_shape_and_enough_of_it():
    field, noise, sampler = plane(), randn(16, 2), [table(methods.euler, 2)]
    solution = reference(field, noise)

    def measured(data, noise=noise):
        return compare(sampler, field, noise, reference=solution, data=data, metrics=["frechet"])

    with pytest.raises(ValueError, match='metric "frechet" compares with real samples: pass data='):
        measured(None)
    with pytest.raises(ValueError, match=r"data must have the samples' shape \(2,\), got \(3,\)"):
        measured(randn(16, 3))
    with pytest.raises(ValueError, match="a Frechet distance in 2 dimensions needs more than 2 samples on both sides, got 2"):
        measured(randn(2, 2))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"metrics are \"rmse\", \"psnr\" and \"frechet\", got \['fid'\]"):
        compare([], SmoothNetwork(), randn(2, 3), metrics=["fid"])


def test_calls_are_counted_at_the_field_and_doubled_by_guidance():
    network = SmoothNetwork()
    field = adapt(lambda x, t, label: network(x, t) * (1 + label[:, None]), null_label=1).given(0, guidance=2.0)
    (found,) = compare([table(methods.rk4, 2)], field, randn(8, 3)).rows
    assert (found.nfe, found.passes) == (8, 16)


def test_every_condition_has_its_own_error():
    network = SmoothNetwork()
    model = adapt(lambda x, t, label: network(x, t) * (1 + label[:, None]))
    fields = [model.given(0), model.given(4)]
    noise, sampler = randn(32, 3), table(methods.euler, 3)
    (found,) = compare([sampler], JointField(fields), noise).rows
    alone = [compare([sampler], f, part).rows[0].metrics["rmse"].value for f, part in zip(fields, noise.chunk(2), strict=True)]
    assert list(found.by_condition) == ["label=0", "label=4"]
    assert list(found.by_condition.values()) == pytest.approx(alone, rel=1e-2)
    assert found.worst == found.by_condition["label=4"]
    assert row("plain", 1, 0.5).worst is None


def test_conditions_that_read_alike_stay_apart():
    network = SmoothNetwork()
    model = adapt(lambda x, t, prompt: network(x, t) + prompt)
    joint = JointField([model.given(condition={"prompt": randn(1, 3, seed=s)}) for s in range(3)])
    (found,) = compare([table(methods.euler, 2)], joint, randn(12, 3)).rows
    assert list(found.by_condition) == ["prompt=<1x3>", "prompt=<1x3> (2)", "prompt=<1x3> (3)"]


def test_samplers_of_one_name_are_numbered():
    samplers = [table(methods.euler, 2), table(methods.euler, 3), table(methods.euler, 4), table(methods.heun, 2).named("")]
    assert [r.name for r in compare(samplers, plane(), randn(8, 2)).rows] == ["euler", "euler (2)", "euler (3)", "sampler"]
    assert Provenance().method == ""


def test_a_diverging_sampler_is_ranked_last_and_does_not_stop_the_others():
    wild = Sampler(torch.tensor([0.0]), torch.tensor([1.0, 1e300]), torch.tensor([[0.0], [1e300]]))
    report = compare({"wild": wild, "tame": table(methods.euler, 1)}, plane(), 1e20 * randn(8, 2), reference=reference(plane(), randn(8, 2)))
    assert [report.best(1, metric=metric).name for metric in ("rmse", "psnr")] == ["tame", "tame"]
    assert [line.split(" | ")[1] for line in report.to_markdown().splitlines()[2:]] == ["tame", "wild"]


def test_the_best_row_is_sought_among_the_asked():
    rows = (row("a", 4, 0.3, "stock"), row("b", 4, 0.2, "tuned"), row("c", 4, 0.1, "method"), row("d", 6, 0.01), row("e", 4, math.nan))
    report = Report("", rows)
    assert report.best(4).name == "c"
    assert report.best(4, "stock", "tuned").name == "b"
    assert report.best(5) is None
    assert report.best(4, "adaptive") is None
    assert report.best(4, metric="psnr") is None
    sharp = Report("", (row("a", 4, 30.0, metric="psnr"), row("b", 4, 40.0, metric="psnr"), row("c", 4, math.nan, metric="psnr")))
    assert sharp.best(4, metric="psnr").name == "b"


def test_a_report_survives_being_plain_data():
    network = SmoothNetwork()
    model = adapt(lambda x, t, label: network(x, t) * (1 + label[:, None]))
    report = compare([table(methods.euler, 3)], JointField([model.given(0), model.given(1)]), randn(8, 3), groups={"euler": "method"})
    assert Report.from_dict(report.to_dict()) == report
    assert report.rows[0].group == "method"


def test_markdown_lists_the_best_first_for_every_budget():
    rows = (row("slow", 6, 0.3), row("worse", 4, 0.4), row("better", 4, 0.123456), row("lost", 4, math.nan))
    lines = Report("", rows).to_markdown().splitlines()
    assert lines[0] == "| NFE | sampler | group | rmse |"
    assert lines[1].count("---|") == 4
    assert [line.split(" | ")[1] for line in lines[2:]] == ["better", "worse", "lost", "slow"]
    assert "0.1235 [0.1235, 0.1235]" in lines[2]
    conditions = Row("two", 4, 4, "tuned", {"psnr": Estimate(20.0, 19.0, 21.0)}, {"label=0": 0.1, "label=1": 0.25})
    mixed = Report("", (*rows, conditions)).to_markdown()
    assert "worst condition (rmse)" in mixed
    assert "| 4 | two | tuned |  | 20 [19, 21] | 0.25 |" in mixed
    assert Report("", ()).to_markdown().startswith("| NFE | sampler | group |")


def test_names_cannot_break_the_table():
    assert markdown_cell("a | b\n<img>`*[x]") == r"a \| b \<img>\`\*\[x]"


def test_a_row_is_measured_from_what_the_field_counted():
    problem, noise = ShearedSpiral(), randn(16, 2)
    counted, solution = CountedField(Recorder(problem.velocity)), reference(problem.velocity, noise, tol=1e-6)
    sample = methods.heun(counted, TimeGrid.uniform(5), noise)
    found = measure("mine", sample, solution, counted, group="adaptive")
    assert (found.name, found.nfe, found.group) == ("mine", 10, "adaptive")
    assert found.metrics["rmse"].value == pytest.approx(rms(sample - problem.solution(noise, 0.0, 1.0)), rel=1e-3)
