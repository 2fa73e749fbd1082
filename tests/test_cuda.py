"""The same on an accelerator: what is computed there agrees with what is computed on the CPU. Skipped where there is none."""

import signal
from dataclasses import replace

import pytest
import torch

from fewstep import (
    Bespoke,
    Boss,
    LearnedKnots,
    LeastSquares,
    NonStationary,
    TableScheduler,
    TimeGrid,
    compare,
    compare_images,
    features_of,
    load,
    methods,
    tabulate,
    tune,
)
from fewstep.training.loop import Session, train
from fewstep.training.recipe import RECIPES, Keeping
from fewstep.trajectory import dopri5, reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # PyTorch's, in autograd's thread
]


def digits(device):
    model = load("digits")
    model.network.to(device)
    return model


def noise(count=32, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def near(there, here, tolerance=1e-4):
    assert there.device.type == "cuda"
    assert float((there.cpu() - here).square().mean().sqrt()) < tolerance


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_table_gives_the_same_samples(guidance):
    labels, table = torch.arange(32) % 10, tabulate(methods.pfdiff(1, 1), TimeGrid.uniform(7))
    here = table(digits("cpu").given(labels, guidance=guidance), noise())
    near(table(digits("cuda").given(labels, guidance=guidance), noise().cuda()), here)
    near(table(digits("cuda").given(labels.cuda(), guidance=guidance), noise().cuda()), here)


def test_solves_agree():
    here, there = (digits(device).given(torch.arange(32) % 10) for device in ("cpu", "cuda"))
    near(reference(there, noise().cuda()).end, reference(here, noise()).end)
    near(dopri5(there, noise().cuda(), tol=1e-4).sample, dopri5(here, noise(), tol=1e-4).sample, 1e-3)


TUNERS = {
    "boss": Boss(),
    "fit": LeastSquares(),
    "nonstationary": NonStationary(),
    "knots": LearnedKnots(methods.euler),
    "bespoke": Bespoke("midpoint"),
    "bound": Bespoke("midpoint", training="bound"),
}


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.filterwarnings("ignore:(the bound improved nothing|no step improved)")
def test_tuners_find_as_good_a_table(name):
    errors = []
    for device in ("cpu", "cuda"):
        model = digits(device)
        table = TUNERS[name](model.given(torch.arange(64) % 10), noise(64).to(device), nfe=4)
        test = model.given(torch.arange(200) % 10)
        report = compare({name: table}, test, noise(200, 1).to(device), metrics=("rmse",))
        errors.append(report.rows[0].metrics["rmse"].value)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("effort", ["search", "learn"])
def test_tune_finds_as_good_a_table(effort, tmp_path):
    errors = []
    for device in ("cpu", "cuda"):
        result = tune(
            digits(device),
            nfe=[4],
            effort=effort,
            conditions=[{"guidance": 1.0}, {"guidance": 2.0}],
            resume=tmp_path / "journal",
        )
        errors.append(next(row for row in result.report.rows if row.group == "tuned").metrics["rmse"].value)
        result[4].save(tmp_path / device)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_images_are_measured_there():
    real = features_of(noise(200).clamp(-1, 1))
    tables = [tabulate(methods.euler, TimeGrid.uniform(n)) for n in (2, 4)]
    here, there = (compare_images(tables, digits(device), real, 80, seeds=(0,)) for device in ("cpu", "cuda"))
    for one, other in zip(here.rows, there.rows, strict=True):
        metrics = [k for k in one.metrics if k.startswith("FD")]
        assert [one.metrics[k].value for k in metrics] == pytest.approx([other.metrics[k].value for k in metrics], rel=1e-3)


def test_a_pipelines_scheduler_steps_there():
    table, model = tabulate(methods.heun, TimeGrid.uniform(2)), digits("cuda")
    scheduler, field = TableScheduler.from_sampler(table), model.given(3)
    scheduler.set_timesteps(table.nfe, device="cuda")
    x = noise(4).cuda() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, float(t)), t, x).prev_sample
    near(x, table(digits("cpu").given(3), noise(4)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_is_resumed_there(precision, tmp_path, monkeypatch):
    recipe = replace(RECIPES["digits"], steps=60, batch=64, precision=precision, divergence=0.01)
    whole = train(recipe, tmp_path / "whole", keeping=Keeping(every=20))
    advance = Session.advance

    def interrupted(session):
        advance(session)
        if session.run.step == 30:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", keeping=Keeping(every=20))
    monkeypatch.setattr(Session, "advance", advance)
    parts = train(recipe, tmp_path / "parts", resume=True, keeping=Keeping(every=20))
    near(next(iter(parts.network.parameters())), next(iter(whole.network.parameters())).cpu(), 1e-3)
    assert load(tmp_path / "parts").device_dtype()[0].type == "cpu"
