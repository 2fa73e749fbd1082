"""Models whose paths start at other data than noise are tuned, sampled and drawn from there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import FewstepError, TimeGrid, adapt, load, log_density, methods, tabulate, tune
from fewstep._model import SourcePoints
from fewstep.cli import main
from fewstep.evaluation import Extractor, generate, score
from fewstep.field import ModelField
from fewstep.noise import draw_sets
from fewstep.training import Recipe, open_source, train, with_source
from fewstep.training.data import FiniteSource
from fewstep.training.measure import draw
from fewstep.zoo.networks import build
from problems import randn

BRIDGE = Recipe(data="moons", source="8gaussians", network="mlp", width=16, blocks=1, steps=3, batch=64)


def load_plain():
    torch.manual_seed(0)
    return adapt(build("mlp", (2,), 0, {"width": 8, "blocks": 1}), shape=(2,), name="plain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("bridge")
    train(BRIDGE, out)
    return out


def test_its_samples_start_where_training_started(folder):
    model = with_source(load(folder))
    points = model.source(0, 0, 4000)
    assert float(points.square().sum(1).mean().sqrt()) > 1.5  # eight Gaussians on a circle, no standard normal noise
    assert torch.equal(model.source(0, 100, 200), points[100:200])
    assert not torch.equal(model.source(1, 0, 100), points[:100])


def test_tuning_and_drawing_take_their_points_from_there(folder, monkeypatch):
    model, seen, asked = with_source(load(folder)), [], ModelField.__call__

    def recorded(self, x, t):
        if float(torch.as_tensor(t).max()) == 0.0:
            seen.append(x)
        return asked(self, x, t)

    monkeypatch.setattr(ModelField, "__call__", recorded)
    tuned = tune(model, nfe=2, effort="search", noise=512)[2]
    draw(model, 0)
    generate(tuned, model, 64)
    widths = torch.tensor([float(x.square().sum(1).mean().sqrt()) for x in seen])
    assert len(widths) > 20
    normal = 2**0.5
    assert float(widths.min()) > 1.2 * normal, widths


def test_a_loaded_model_knows_the_source_by_name_and_says_how_to_get_it(folder):
    model = load(folder)
    with pytest.raises(FewstepError, match=r"paths start at samples of 8gaussians, not at noise: .*with_source\(model\)"):
        tune(model, nfe=2)
    with pytest.raises(FewstepError, match="samples of 8gaussians, not at noise: give source=, their log-density"):
        log_density(model, randn(4, 2))
    with pytest.raises(FewstepError, match="score where paths start at noise, this model's start at samples of 8gaussians"):
        score(model, randn(4, 2), 0.5)
    assert log_density(model, randn(4, 2), source=lambda x: -x.square().sum(1), tol=1e-2).value.shape == (4,)


def test_the_command_line_opens_the_source_itself(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(folder), "--sampler", "euler", "--nfe", "2", "--num", "8", "--out", str(tmp_path / "drawn")])
    assert ended.value.code == 0
    assert "8 samples" in capsys.readouterr().out


def test_points_of_another_shape_are_refused(folder):
    with pytest.raises(FewstepError, match=r"starts at samples of shape \(2,\), .* has \(3,\)"):
        with_source(load(folder), FiniteSource(randn(8, 3).float()))
    plain = replace(load(folder), source=None)
    assert with_source(plain) is plain


def test_points_are_those_it_was_trained_from_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("src.npy", np.random.default_rng(0).standard_normal((60, 2)))
    train(replace(BRIDGE, source="src.npy"), "model")
    model = with_source(load("model"))
    assert model.source(0, 0, 8).shape == (8, 2)
    np.save("src.npy", 3 + np.random.default_rng(0).standard_normal((60, 2)))
    with pytest.raises(FewstepError, match=r"samples of src.npy, which are not those it was trained from: weighted mean"):
        with_source(load("model"))


def test_a_model_folder_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "points.py").write_text(
        "import torch\ndef make(rng, count):\n    return torch.randn(count, 2, generator=rng)\n"
    )
    train(replace(BRIDGE, source="points:make"), "model")
    with pytest.raises(FewstepError, match=r"that points:make makes: a model's folder must not run code; .*open_source"):
        with_source(load("model"))
    assert with_source(load("model"), open_source("points:make")).source(0, 0, 3).shape == (3, 2)


def test_tuning_measures_on_points_that_no_fit_saw_and_says_where_there_are_not_enough(tmp_path):
    shape, model = (2,), with_source(replace(load_plain(), source=SourcePoints("few")), FiniteSource(randn(40, 2).float()))
    fitting, selection, test = draw_sets((10, 10, 20), shape, 0, model.source)
    assert len(torch.cat([fitting, selection, test]).unique(dim=0)) == 40
    with pytest.warns(UserWarning, match="few has only 40 samples for the 64 points"):
        draw_sets((16, 16, 32), shape, 0, model.source)


def test_progress_and_images_from_one_source_are_not_taken_for_those_from_another(tmp_path):
    one, two = (with_source(load_plain(), FiniteSource(randn(2000, 2, seed=k).float() * (k + 1))) for k in (0, 1))
    noise = torch.randn(32, 2)
    fresh = tune(two, nfe=2, effort="search", noise=noise).report.facts["summary"]
    tune(one, nfe=2, effort="search", noise=noise, resume=tmp_path)
    kept = tune(two, nfe=2, effort="search", noise=noise, resume=tmp_path).report.facts["summary"]
    assert kept == fresh
    table = tabulate(methods.euler, TimeGrid.uniform(2))
    wide = Extractor("states", lambda x: x, limits=None)
    drawn = [generate(table, model, 16, extractor=wide, out=tmp_path / "images").features.values for model in (one, two)]
    assert not torch.equal(*drawn)
