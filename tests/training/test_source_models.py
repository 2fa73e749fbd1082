"""Models whose paths start at other data than noise are tuned, sampled and drawn from there."""

from dataclasses import replace

import pytest
import torch

from fewstep import FewstepError, load, log_density, tune
from fewstep.cli import main
from fewstep.evaluation import generate, score
from fewstep.field import ModelField
from fewstep.training import Recipe, train, with_source
from fewstep.training.data import FiniteSource
from fewstep.training.measure import draw
from problems import randn

BRIDGE = Recipe(data="moons", source="8gaussians", network="mlp", width=16, blocks=1, steps=3, batch=64)


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
