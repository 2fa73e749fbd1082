import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch

from fewstep import JointField, Report, Sampler, TimeGrid, adapt, compare, load, methods, reference, tabulate
from fewstep.composite import CountedField
from fewstep.evaluation import Estimate, Row, frechet, markdown_cell, measure
from fewstep.trajectory import Reference
from problems import SmoothNetwork, randn, rms


def euler(n):
    return tabulate(methods.euler, TimeGrid.uniform(n))


def exploding():
    huge = torch.tensor([[0.0], [1e308]], dtype=torch.float64)
    return Sampler(torch.zeros(1), huge[:, 0], huge)


@pytest.fixture(scope="module")
def field():
    return torch.no_grad()(SmoothNetwork(4))


@pytest.fixture(scope="module")
def noise():
    return randn(200, 4)


@pytest.fixture(scope="module")
def solved(field, noise):
    return reference(field, noise, tol=1e-8)


def known_errors(scale=0.1, count=400, seed=0):
    """A sample whose error per element is known, with the solution that it misses."""
    return scale * randn(count, 3, seed=seed), still(count, 3)


@cache
def still(count, size):
    """The solution of a field that does not move, from zero."""
    return reference(lambda x, t: 0 * x, torch.zeros(count, size, dtype=torch.float64))


def measured(sample, solution, **settings):
    return measure("it", sample, solution, CountedField(lambda x, t: x), **settings)


# The numbers


def test_rmse_and_psnr_are_numpys(field, noise, solved):
    tables = {"two": euler(2), "seven": euler(7)}
    report = compare(tables, field, noise, reference=solved)
    for row in report.rows:
        gap = tables[row.name](field, noise).numpy() - solved.end.numpy()
        expected = np.sqrt(np.mean(gap**2))
        assert row.metrics["rmse"].value == pytest.approx(expected, rel=1e-12)
        assert row.metrics["psnr"].value == pytest.approx(10 * np.log10(2.0**2 / np.mean(gap**2)), rel=1e-12)
    assert [row.nfe for row in report.rows] == [2, 7]


def test_the_reference_is_solved_where_none_is_given(field, noise, solved):
    given, own = (compare([euler(3)], field, noise, reference=r).rows[0].metrics["rmse"].value for r in (solved, None))
    assert own == pytest.approx(given, rel=1e-2)


def test_float32_samples_are_measured_in_float64():
    sample, solution = known_errors(1e-3)
    single = Reference(solution.coordinates, solution.knots, solution.states.float(), solution.rates.float(), 0.0, 0)
    gap = sample.float().double() - single.end.double()
    assert measured(sample.float(), single).metrics["rmse"].value == pytest.approx(rms(gap), rel=1e-4)


def test_a_perfect_sample_has_no_error_and_a_finite_psnr():
    _, solution = known_errors()
    metrics = measured(solution.end, solution).metrics
    assert (metrics["rmse"].value, metrics["rmse"].low, metrics["rmse"].high) == (0.0, 0.0, 0.0)
    assert 200 < metrics["psnr"].value < math.inf


def test_the_bootstrap_interval_covers_the_true_error_about_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        sample, solution = known_errors(0.1, count=60, seed=seed)
        rmse = measured(sample, solution, metrics=("rmse",), seed=seed).metrics["rmse"]
        assert rmse.low < rmse.value < rmse.high
        inside += rmse.low <= 0.1 <= rmse.high
    assert 180 <= inside <= 199  # 190 expected; standard deviation 3.1, and resampling 60 loses a little


def test_the_interval_narrows_with_the_root_of_the_number_of_noises():
    widths = []
    for count in (100, 1600):
        sample, solution = known_errors(count=count)
        rmse = measured(sample, solution).metrics["rmse"]
        widths.append(rmse.high - rmse.low)
    assert widths[0] / widths[1] == pytest.approx(4.0, rel=0.35)


def test_psnr_and_rmse_have_the_same_interval():
    sample, solution = known_errors()
    metrics = measured(sample, solution).metrics
    rmse, psnr = metrics["rmse"], metrics["psnr"]
    assert psnr.low == pytest.approx(20 * math.log10(2 / rmse.high), abs=1e-3)
    assert psnr.high == pytest.approx(20 * math.log10(2 / rmse.low), abs=1e-3)


def test_the_interval_depends_on_nothing_but_the_seed():
    sample, solution = known_errors()
    first, second, other = (measured(sample, solution, seed=seed).metrics["rmse"] for seed in (0, 0, 1))
    assert first == second
    assert first.value == other.value
    assert first.low != other.low


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_frechet_distance_is_that_of_the_matrix_root(size):
    mixing = randn(size, size, seed=5)
    x, y = randn(300, size, seed=1), randn(260, size, seed=2) @ mixing + 0.7
    cx, cy = (np.atleast_2d(np.cov(z.numpy().T)) for z in (x, y))
    root = scipy.linalg.sqrtm(cx @ cy).real
    expected = np.sum((x.numpy().mean(0) - y.numpy().mean(0)) ** 2) + np.trace(cx + cy - 2 * root)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet(y, x) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_a_set_to_itself_is_nothing():
    x = randn(50, 2, 3)
    assert abs(frechet(x, x)) < 1e-9
    assert frechet(x, x + 1.0) == pytest.approx(6.0, rel=1e-9)


def test_frechet_is_measured_between_samples_and_data(field, noise, solved):
    data = randn(500, 4, seed=9)
    found = compare([euler(4)], field, noise, reference=solved, data=data, metrics=("frechet",)).rows[0].metrics
    assert list(found) == ["frechet"]
    estimate = found["frechet"]
    assert estimate.value == pytest.approx(frechet(euler(4)(field, noise), data), rel=1e-12)
    assert estimate.low < estimate.value < estimate.high
    assert estimate.value - estimate.low == pytest.approx(estimate.high - estimate.value, rel=1e-9)


def test_the_frechet_interval_is_as_wide_as_the_distance_scatters():
    data = randn(4000, 2, seed=99)
    found = []
    for seed in range(40):
        sample = 1.0 + randn(200, 2, seed=seed)
        found.append(measured(sample, still(200, 2), data=data, metrics=("frechet",)).metrics["frechet"])
    scatter = np.std([estimate.value for estimate in found])
    assert np.mean([(e.high - e.low) / 2 for e in found]) == pytest.approx(1.96 * scatter, rel=0.35)


# The rows


def test_names_default_to_what_made_the_sampler_and_repeat_with_a_number(field, noise, solved):
    tables = [
        euler(2),
        euler(2).named("mine"),
        euler(3),
        euler(4),
        Sampler(torch.zeros(1), torch.ones(2), torch.tensor([[0.0], [1.0]])),
    ]
    names = [row.name for row in compare(tables, field, noise, reference=solved).rows]
    assert names == ["euler", "mine", "euler (2)", "euler (3)", "sampler"]


def test_groups_are_as_given_and_other_by_default(field, noise, solved):
    report = compare({"a": euler(2), "b": euler(3)}, field, noise, reference=solved, groups={"b": "tuned"})
    assert {row.name: row.group for row in report.rows} == {"a": "other", "b": "tuned"}


def test_the_report_holds_the_facts_that_a_reader_needs(field, noise, solved):
    report = compare([euler(2)], field, noise, reference=solved, seed=3)
    assert report.facts == {
        "noises": 200, "reference error": solved.error, "reference nfe": solved.nfe, "bootstrap seed": 3,
    }  # fmt: skip


def test_guided_calls_count_two_network_passes():
    network = lambda x, t, label: x * (label[:, None] - 1.0)  # noqa: E731
    model = adapt(network, shape=(2,), null_label=2, classes=2)
    noise = randn(6, 2)
    for guidance, passes in ((1.0, 3), (2.0, 6)):
        row = compare([euler(3)], model.given(label=0, guidance=guidance), noise).rows[0]
        assert (row.nfe, row.passes) == (3, passes)


def test_several_conditions_are_measured_one_by_one():
    model = adapt(lambda x, t, label: torch.tanh(x) * label[:, None], shape=(2,), classes=4)
    field = JointField([model.given(label=k) for k in (0, 1, 3)])
    noise = randn(60, 2)
    solution = reference(field, noise)
    row = compare([euler(2)], field, noise, reference=solution).rows[0]
    gaps = (euler(2)(field, noise) - solution.end).chunk(3)
    assert row.by_condition == {
        "label=0": 0.0, "label=1": pytest.approx(rms(gaps[1])), "label=3": pytest.approx(rms(gaps[2])),
    }  # fmt: skip
    assert row.worst == row.by_condition["label=3"]
    assert row.metrics["rmse"].value == pytest.approx(rms(torch.cat(gaps)))
    assert row.worst > row.metrics["rmse"].value


def test_one_condition_has_no_worst(field, noise, solved):
    row = compare([euler(2)], field, noise, reference=solved).rows[0]
    assert row.by_condition == {}
    assert row.worst is None


def test_a_sampler_that_blows_up_gets_a_row_that_says_so(field, noise, solved):
    report = compare(
        {"boom": exploding(), "fine": euler(1)}, field, noise, reference=solved,
        data=noise, metrics=("rmse", "psnr", "frechet"),
    )  # fmt: skip
    boom = report.rows[0].metrics
    assert not any(math.isfinite(boom[name].value) for name in ("rmse", "psnr", "frechet"))
    assert report.best(1).name == "fine"


# The report


def estimate(value):
    return Estimate(value, value - 0.1, value + 0.1)


def row(name, nfe, rmse, psnr=10.0, group="other", by_condition=None):
    metrics = {"rmse": estimate(rmse), "psnr": estimate(psnr)}
    return Row(name, nfe, 2 * nfe, group, metrics, by_condition or {})


ROWS = (
    row("euler", 4, 0.5, 20.0, "method", {"label=1": 0.4, "label=2": 0.6}),
    row("unipc", 4, 0.3, 25.0, "stock"),
    row("boom", 4, math.nan, math.nan, "tuned"),
    row("fit", 4, 0.1, 40.0, "tuned"),
    row("infinite", 4, math.inf, -math.inf, "stock"),
    row("euler", 8, 0.05, 50.0, "method"),
)
REPORT = Report("a | title", ROWS, {"noises": 7, "list": [1, 2]})


def test_the_best_row_is_that_of_the_budget_and_the_groups():
    assert REPORT.best(4).name == "fit"
    assert REPORT.best(4, "stock", "method").name == "unipc"
    assert REPORT.best(4, "method").name == "euler"
    assert REPORT.best(8) is ROWS[-1]
    assert REPORT.best(5) is None
    assert REPORT.best(8, "stock") is None
    assert REPORT.best(4, metric="frechet") is None


def test_the_best_psnr_is_the_largest_and_never_that_of_a_sampler_that_blew_up():
    assert REPORT.best(4, metric="psnr").name == "fit"
    assert REPORT.best(4, "stock", metric="psnr").name == "unipc"
    only_bad = Report("", (ROWS[2],))
    assert only_bad.best(4, metric="psnr").name == "boom"


def test_the_table_has_the_best_first_within_each_budget_and_failures_last():
    lines = REPORT.to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["NFE", "sampler", "group", "rmse", "psnr", "worst condition (rmse)"]
    assert set(lines[1]) == {"|", "-"}
    assert lines[1].count("|") == lines[0].count("|")
    assert [line[1] for line in cells[2:5]] == ["fit", "unipc", "euler"]
    assert {line[1] for line in cells[5:7]} == {"boom", "infinite"}
    assert cells[7][:3] == ["8", "euler", "method"]
    assert cells[2][3] == "0.1 [0, 0.2]"
    assert [line[5] for line in cells[2:5]] == ["", "", "0.6"]


def test_a_table_sorted_by_psnr_has_the_largest_first():
    rows = tuple(replace(r, metrics={"psnr": r.metrics["psnr"]}) for r in ROWS if r.nfe == 4)
    names = [line.split("|")[2].strip() for line in Report("", rows).to_markdown().splitlines()[2:]]
    assert names[:3] == ["fit", "unipc", "euler"]


def test_rows_may_have_different_metrics():
    rows = (row("a", 2, 0.2), Row("b", 2, 2, "other", {"frechet": estimate(1.0)}))
    lines = Report("", rows).to_markdown().splitlines()
    assert "rmse | psnr | frechet" in lines[0]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_an_empty_report_is_an_empty_table():
    assert Report("nothing", ()).to_markdown().splitlines() == ["| NFE | sampler | group |", "|---|---|---|"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a|b", r"a\|b"), ("<b>", r"\<b>"), ("two\nlines", "two lines"), ("`*[", r"\`\*\["), ("a\\|", "a\\\\\\|")],
)
def test_a_name_cannot_break_the_table(name, shown):
    assert markdown_cell(name) == shown
    assert shown in Report("", (row(name, 2, 0.5),)).to_markdown().splitlines()[2]


def same(one, other):
    """Equality of plain data in which NaN equals itself."""
    return repr(one) == repr(other)


def test_a_report_survives_plain_data_with_rows_that_are_not_numbers():
    assert same(Report.from_dict(REPORT.to_dict()), REPORT)


def test_a_report_survives_json(field, noise, solved):
    report = compare({"fine": euler(2), "boom": exploding()}, field, noise, reference=solved)
    assert same(Report.from_dict(json.loads(json.dumps(report.to_dict()))), report)


def test_numbers_may_be_words_as_in_report_json():
    data = json.loads(json.dumps(REPORT.to_dict()), parse_constant=str)
    assert data["rows"][2]["metrics"]["rmse"]["value"] == "NaN"
    assert same(Report.from_dict(data).rows[2:5], ROWS[2:5])


def test_a_report_without_conditions_is_read():
    data = REPORT.to_dict()
    for entry in data["rows"]:
        del entry["by_condition"]
    assert Report.from_dict(data).rows[0].by_condition == {}


def test_an_estimate_reads_as_its_value_and_interval():
    assert str(Estimate(0.12345678, 0.1, 0.15)) == "0.1235 [0.1, 0.15]"


# What is refused


def test_an_unknown_metric_is_refused_by_name(field, noise, unchecked):
    with pytest.raises(ValueError, match=r'metrics are "rmse", "median", "psnr" and "frechet", got \[\'fid\', \'mse\'\]'):
        compare([euler(2)], field, noise, metrics=("rmse", "mse", "fid"))


def test_frechet_without_data_is_refused(field, noise, solved):
    with pytest.raises(ValueError, match=r'metric "frechet" compares with real samples: pass data='):
        compare([euler(2)], field, noise, reference=solved, metrics=("frechet",))


def test_data_of_another_shape_is_refused(field, noise, solved):
    with pytest.raises(ValueError, match=r"data must have the samples' shape \(4,\), got \(2, 2\)"):
        compare([euler(2)], field, noise, reference=solved, data=randn(50, 2, 2), metrics=("frechet",))


@pytest.mark.parametrize("few", ["samples", "data"])
def test_fewer_samples_than_dimensions_are_refused(few, field):
    noise, data = (randn(4 if few == name else 50, 4) for name in ("samples", "data"))
    with pytest.raises(ValueError, match="in 4 dimensions needs more than 4 samples on both sides, got 4"):
        compare([euler(2)], field, noise, data=data, metrics=("frechet",))


def test_the_bundled_model_can_be_compared():
    model = load("digits")
    noise = torch.randn(8, *model.shape, generator=torch.Generator().manual_seed(0))
    report = compare([euler(4), euler(8)], model.given(label=3), noise)
    assert report.rows[1].metrics["rmse"].value < report.rows[0].metrics["rmse"].value
