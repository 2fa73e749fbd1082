import math

import jaxtyping
import pytest
import torch

from fewstep import CountedField, JointField, LeastSquares, Sampler, adapt, climb, load, tune
from fewstep._errors import BudgetError, FieldError
from fewstep.ladder import Climb
from fewstep.noise import TEST, draw, enough
from fewstep.trajectory import reference
from fewstep.zoo.mixtures import mixture, ring


@pytest.fixture(scope="module", autouse=True)
def _unchecked():
    """Shape checks are for the tests of the parts; whole tunings would spend most of their time on them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rmse(x, y):
    return float((x - y).double().square().mean().sqrt())


@pytest.fixture(scope="module")
def result():
    return tune(ring(), nfe=(4, 6), noise=64, seed=3)


def test_the_tuned_samplers_beat_every_stock_scheduler_on_noise_nobody_has_seen(result):
    field, noise = ring().given(), draw((512, 2), 99, 7)
    end = reference(field, noise).end
    for line in result.report.facts["summary"]:
        tuned = rmse(result[line["nfe"]](field, noise), end)
        rival = rmse(result.rivals[line["nfe"]].sampler(field, noise), end)
        assert tuned < 0.8 * rival


def test_the_reported_error_is_what_an_independent_measurement_finds(result):
    field, noise = ring().given(), draw((enough(TEST, 2), 2), 3, 2)  # the test set of seed 3
    end = reference(field, noise, tol=1e-6).end
    for n in result:
        assert result[n].provenance.measured["rmse"] == pytest.approx(rmse(result[n](field, noise), end), rel=0.02)
        counted = CountedField(field)
        result[n](counted, noise)
        assert counted.calls == n == result[n].nfe


def test_the_reference_is_ten_times_better_than_what_it_judges(result):
    errors = [row.metrics["rmse"].value for row in result.report.rows]
    assert result.report.facts["reference error"] <= min(errors) / 10


def test_the_same_seed_gives_the_same_table_and_other_seeds_and_sets_other_noise(result):
    again = tune(ring(), nfe=4, noise=64, seed=3)
    assert torch.equal(again[4].b, result[4].b)
    assert torch.equal(again[4].times, result[4].times)
    assert not torch.equal(draw((64, 2), 3, 0), draw((64, 2), 4, 0))
    assert not torch.equal(draw((64, 2), 3, 0), draw((64, 2), 3, 1))


def test_every_network_call_is_accounted_for():
    calls = 0
    model = ring()

    def network(x, t):
        nonlocal calls
        calls += x.shape[0]
        return model.network(x, t)

    counted = tune(adapt(network, shape=(2,)), nfe=3, noise=16, effort="search")
    identity_probe = 16  # one call: the journal recognises a field by its output on the fitting noise
    assert counted.report.facts["network passes"] + identity_probe == calls


def test_tuning_and_measuring_are_counted_apart():
    facts = tune(ring(), nfe=3, noise=16, effort="search").report.facts
    measuring = {"reference (test)", "reference (test, finer)", "final measurement", "rivals"}
    spent = dict.fromkeys((True, False), 0)
    for entry in facts["cost"]:
        spent[entry["stage"] in measuring] += entry["network passes"]
    assert (facts["measuring passes"], facts["tuning passes"]) == (spent[True], spent[False])
    assert facts["network passes"] == spent[True] + spent[False]


def test_learning_goes_on_from_the_fit_at_no_cost_and_is_better_on_fresh_noise(tmp_path):
    model = load("digits")
    first = tune(model, nfe=4, noise=32, resume=tmp_path)
    fitted, asked = first[4], 0

    def count(module, arguments):
        nonlocal asked
        asked += len(arguments[0])

    with model.network.register_forward_pre_hook(count):
        learned = tune(model, nfe=4, noise=32, resume=tmp_path, effort="learn")
    before, costs = ({e["stage"]: e["network passes"] for e in r.report.facts["cost"]} for r in (first, learned))
    kept = [name for name in before if name.startswith(("reference (fit)", "reference (select)", "BOSS", "search", "fit"))]
    assert all(costs[name] == before[name] > 0 for name in kept if name in costs)  # told as what they cost then
    assert asked < learned.report.facts["network passes"] - sum(before[name] for name in kept) + 100
    assert costs["learn, NFE 4"] > 0
    assert learned[4].provenance.method.startswith("learned(fit(")
    field = model.given(torch.arange(200) % 10)
    noise = torch.randn(200, *field.model.shape, generator=torch.Generator().manual_seed(77))
    end = reference(field, noise, tol=1e-3).end
    assert rmse(learned[4](field, noise), end) < 0.9 * rmse(fitted(field, noise), end)


def test_what_is_found_in_several_goes_is_what_is_found_in_one(tmp_path, monkeypatch):
    """Scores by coarser references are not mistaken for those by the finer ones that a later effort or budget asks for."""
    model, kept = load("digits"), Climb._score

    def checked(self, name, n, sampler):
        assert kept(self, name, n, sampler) == self.selection.score(sampler, self.metric)
        return kept(self, name, n, sampler)

    monkeypatch.setattr(Climb, "_score", checked)
    tune(model, nfe=8, noise=32, effort="search", resume=tmp_path)
    tune(model, nfe=(4, 8), noise=32, effort="fit", resume=tmp_path)
    several = tune(model, nfe=(4, 8), noise=32, effort="learn", resume=tmp_path)
    whole = tune(model, nfe=(4, 8), noise=32, effort="learn")
    for n in (4, 8):
        assert torch.equal(several[n].b, whole[n].b)
        assert torch.equal(several[n].times, whole[n].times)
        assert several[n].provenance == whole[n].provenance


def test_more_budgets_in_the_same_folder_still_have_all_grids(tmp_path):
    tune(ring(), nfe=2, noise=16, resume=tmp_path)
    both = tune(ring(), nfe=(2, 6), noise=16, resume=tmp_path)
    alone = tune(ring(), nfe=6, noise=16)
    assert torch.equal(both[6].times, alone[6].times)


def test_search_is_free_of_fits_and_never_better_than_fit_by_much(result):
    search = tune(ring(), nfe=(4, 6), noise=64, seed=3, effort="search")
    for n in (4, 6):
        assert not search[n].provenance.method.startswith("fit")
        assert result[n].provenance.measured["rmse"] <= 1.05 * search[n].provenance.measured["rmse"]


def conditional():
    """Two classes with different means and widths, and a null class between them, in closed form."""
    mean, width = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.5]]), torch.tensor([[0.1], [0.6], [1.0]])

    def network(x, t, label):
        m, c = mean.to(x)[label], width.to(x)[label] ** 2
        t = t.to(x)[:, None]
        return m + (t * c - (1 - t)) / (t**2 * c + (1 - t) ** 2) * (x - t * m)

    return adapt(network, shape=(2,), classes=2, null_label=2, name="conditional")


def test_one_table_serves_several_conditions_and_reports_mean_and_worst():
    conditions = [{"label": 0}, {"label": 1, "guidance": 2.0}]
    tuned = tune(conditional(), nfe=3, noise=24, conditions=conditions, effort="search", metric="worst")
    row = tuned.report.best(3, "tuned")
    assert set(row.by_condition) == {"label=0", "label=1, guidance=2"}
    assert row.worst == max(row.by_condition.values())
    pooled = math.sqrt(sum(v**2 for v in row.by_condition.values()) / 2)
    assert row.metrics["rmse"].value == pytest.approx(pooled, rel=1e-6)
    assert row.passes == 6  # guidance doubles the network passes, not the NFE
    assert tuned[3].provenance.conditions == ("label=0", "label=1, guidance=2")


def test_choosing_by_the_worst_condition_never_has_a_worse_worst_on_the_selection_noise():
    model, conditions = conditional(), [{"label": 0}, {"label": 1, "guidance": 4.0}]
    fields = JointField([model.given(**c) for c in conditions])
    noise = draw((2 * 24, 2), 0, 1)
    end = reference(fields, noise).end
    worst = {}
    for metric in ("rmse", "worst"):
        sampler = tune(model, nfe=3, noise=24, conditions=conditions, effort="search", metric=metric)[3]
        errors = (sampler(fields, noise) - end).double().square().flatten(1).mean(1).chunk(2)
        worst[metric] = max(float(e.mean().sqrt()) for e in errors)
    assert worst["worst"] <= worst["rmse"] * (1 + 1e-6)


def test_a_class_conditional_model_is_tuned_on_all_its_classes_unless_told():
    seen = set()
    model = conditional()

    def network(x, t, label):
        seen.update(label.tolist())
        return model.network(x, t, label)

    tune(adapt(network, shape=(2,), classes=2, null_label=2), nfe=2, noise=8, effort="search")
    assert seen == {0, 1}


def test_a_network_that_predicts_noise_gets_a_table_over_its_own_output_and_clock():
    from fewstep import DiscreteVP

    levels = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    path = DiscreteVP((1 - levels).cumprod(0))
    exact = mixture(torch.tensor([[1.0, -0.5], [-1.0, 0.5]]), torch.tensor(0.05), path)

    def network(x, timestep):
        t = path.time(timestep.double()).to(x.dtype)
        return path.convert(exact.network(x, t), x, t, source="velocity", target="noise")

    model = adapt(network, path, "noise", shape=(2,), name="noisy")
    tuned = tune(model, nfe=6, noise=64)
    sampler = tuned[6]
    assert sampler.predicts == "noise"
    assert torch.allclose(sampler.clock, path.timestep(sampler.times))
    line = tuned.report.facts["summary"][0]
    assert line["ratio"] < 0.8, line
    field, noise = model.given(), draw((enough(TEST, 2), 2), 0, 2)
    error = rmse(sampler(field, noise), reference(field, noise, tol=1e-5).end)
    assert error == pytest.approx(line["tuned_rmse"], rel=0.15)  # two references, each within a tenth


class Interrupted(Exception):
    pass


def test_an_interrupted_tuning_resumes_without_asking_again(tmp_path):
    model, asked = ring(), 0
    limit = math.inf

    def network(x, t):
        nonlocal asked
        asked += 1
        if asked > limit:
            raise Interrupted
        return model.network(x, t)

    wrapped = adapt(network, shape=(2,))
    whole = tune(wrapped, nfe=(2, 3), noise=32)
    total = asked
    asked, limit = 0, int(0.95 * total)
    with pytest.raises(Interrupted):
        tune(wrapped, nfe=(2, 3), noise=32, resume=tmp_path)
    asked, limit = 0, math.inf
    resumed = tune(wrapped, nfe=(2, 3), noise=32, resume=tmp_path)
    assert asked < 0.5 * total
    for n in (2, 3):
        assert torch.equal(resumed[n].b, whole[n].b)
        assert resumed[n].provenance.measured == whole[n].provenance.measured
    for kind in ("tuning passes", "measuring passes"):  # of both processes together
        assert resumed.report.facts[kind] == whole.report.facts[kind]


def test_progress_of_another_model_or_seed_is_not_mistaken_for_this_one(tmp_path):
    first = tune(ring(), nfe=3, noise=16, resume=tmp_path, effort="search")
    shifted = mixture(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor(0.2))
    second = tune(shifted, nfe=3, noise=16, resume=tmp_path, effort="search")
    assert first.report.facts["summary"] != second.report.facts["summary"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_half_written_journal_line_is_forgotten(tmp_path):
    whole = tune(ring(), nfe=3, noise=16, resume=tmp_path, effort="search")
    (journal,) = tmp_path.glob("*/journal.jsonl")
    journal.write_text(journal.read_text()[:-20])
    again = tune(ring(), nfe=3, noise=16, resume=tmp_path, effort="search")
    assert torch.equal(again[3].b, whole[3].b)


def test_a_damaged_kept_reference_is_solved_again(tmp_path):
    whole = tune(ring(), nfe=3, noise=16, resume=tmp_path, effort="search")
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(b"not a tensor")
    again = tune(ring(), nfe=3, noise=16, resume=tmp_path, effort="search")
    assert again.report.facts["reference error"] == whole.report.facts["reference error"]


def test_results_save_into_one_folder_per_budget(result, tmp_path):
    folders = result.save(tmp_path)
    assert [f.name for f in folders] == ["nfe-4", "nfe-6"]
    assert torch.equal(Sampler.load(folders[0]).b, result[4].b)


def test_a_bare_field_needs_only_a_shape():
    tuned = tune(lambda x, t: torch.cos(3 * x) - x * t, nfe=3, noise=(32, 4))
    assert tuned[3].provenance.path == ""
    assert tuned.report.facts["summary"][0]["ratio"] < 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"nfe": 0}, BudgetError, "at least 1 call, got"),
        ({"nfe": ()}, BudgetError, "at least 1 call, got none"),
        ({"effort": "guess"}, ValueError, 'effort is "search", "fit" or "learn", got "guess"'),
        ({"metric": "fid"}, ValueError, 'metric is "rmse" or "worst", got "fid"'),
        ({"conditions": [{"labl": 3}]}, ValueError, r"arguments of Model.given.*got \['labl'\]"),
        ({"noise": torch.zeros(3, 2), "conditions": [{}, {}]}, FieldError, "must divide among them, got a batch of 3"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        tune(ring(), **{"nfe": 4, **arguments})
    assert "\n" not in str(caught.value)


def test_a_field_without_a_known_shape_is_refused():
    with pytest.raises(FieldError, match="shape of a sample is not known"):
        tune(lambda x, t: -x, nfe=4)


def test_conditions_do_not_go_with_a_field():
    with pytest.raises(ValueError, match="conditions belong to a Model"):
        tune(ring().given(), nfe=4, noise=16, conditions=[{}])


def test_a_budget_that_was_not_tuned_is_refused(result):
    with pytest.raises(BudgetError, match=r"tuned for \[4, 6\] calls, asked for 8"):
        result[8]


@pytest.mark.parametrize(
    ("model", "effort", "noise", "message"),
    [
        (
            load("digits"),
            "learn",
            2,
            'effort "learn" at 8 calls needs at least 4 noises of 64 elements .* learns at once, got 2',
        ),
        (ring(), "fit", 16, 'effort "fit" at 8 calls needs at least 18 noises of 2 elements .* fits at once, got 16'),
    ],
)
def test_too_little_noise_for_what_is_fitted_is_refused_with_the_number_needed(model, effort, noise, message):
    with pytest.raises(FieldError, match=message):
        tune(model, nfe=(4, 8), noise=noise, effort=effort)


def test_the_default_noise_is_enough_for_any_budget():
    for effort, nfe in (("fit", 40), ("learn", 40)):
        shape = climb._shape(ring(), None, 1, effort, nfe)
        climb._check_enough(torch.zeros(shape), effort, nfe)


def test_a_field_that_every_table_solves_is_tuned():
    straight = adapt(lambda x, t: torch.ones_like(x), shape=(4,))
    result = tune(straight, nfe=2, effort="fit")
    assert result[2].nfe == 2
    assert LeastSquares()(straight.given(), torch.randn(32, 4), nfe=2).nfe == 2


def test_noise_in_half_precision_is_taken_to_single():
    result = tune(load("digits"), nfe=2, effort="search", noise=torch.randn(16, 1, 8, 8).half())
    assert math.isfinite(result.report.facts["summary"][0]["tuned_rmse"])


def test_nan_from_the_network_names_the_call_and_the_time():
    def network(x, t):
        return torch.where(t[:, None] > 0.3, torch.nan, 1.0) * x

    with pytest.raises(FieldError, match=r"NaN at call \d+ .*time t = 0\.\d+"):
        tune(adapt(network, shape=(2,)), nfe=4, noise=10)
