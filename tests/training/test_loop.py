"""Training: the same weights however often it is stopped and however many processes share it; every mistake in one line."""

import itertools
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep
from fewstep import zoo
from fewstep._types import ArtifactError, FewstepError, FieldError
from fewstep.cli import main
from fewstep.keyed import Keyed
from fewstep.path import CondOT
from fewstep.training import loop
from fewstep.training.assemble import assemble, check_network
from fewstep.training.batch import Ahead, Loss
from fewstep.training.data import FiniteSource, open_source
from fewstep.training.finish import CURVE, command
from fewstep.training.loop import Session, learning_rate, train
from fewstep.training.measure import held_out_loss
from fewstep.training.objective import FlowAndDivergence, Regression
from fewstep.training.recipe import RECIPES, Keeping, Recipe, plain
from fewstep.training.setup import shares_of
from fewstep.training.state import Run, checkpoints, stored_recipe
from fewstep.zoo.checkpoint import CONFIG, WEIGHTS
from fewstep.zoo.network import ResidualMLP

TINY = replace(RECIPES["digits"], steps=7, batch=32, width=16, blocks=1, warmup=2)
OFTEN = Keeping(every=2)


class Killed(BaseException):
    """The process ended between two statements."""


def files(folder: Path) -> dict[str, bytes]:
    curve = [json.loads(line) for line in (folder / CURVE).read_text().splitlines()]
    numbers = [{k: v for k, v in point.items() if k != "samples_per_s"} for point in curve]
    return {WEIGHTS: (folder / WEIGHTS).read_bytes(), CURVE: json.dumps(numbers).encode()}


def when(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `action` happen in the middle of one step."""

    def rate(recipe: Recipe, now: int) -> float:
        if now == step:
            action()
        return learning_rate(recipe, now)

    monkeypatch.setattr(loop, "learning_rate", rate)


def with_values(settings: Any, values: dict[str, Any]) -> Any:
    """With values as a caller could pass them; under test the classes check the types that are theirs themselves."""
    made = replace(settings)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def raise_killed() -> None:
    raise Killed


# --- the same weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, monkeypatch, number):
    """Ctrl-C and termination finish the step; a killed run goes back to its last checkpoint."""
    whole = train(TINY, tmp_path / "whole", keeping=OFTEN)
    with monkeypatch.context() as patch:
        when(4, raise_killed if number is None else lambda: signal.raise_signal(number), patch)
        with pytest.raises(Killed if number is None else KeyboardInterrupt):
            train(TINY, tmp_path / "parts", keeping=OFTEN)
    assert not (tmp_path / "parts" / CONFIG).exists()
    torch.manual_seed(99)  # nothing outside the checkpoint may matter
    resumed = train(TINY, tmp_path / "parts", resume=True, keeping=OFTEN)
    assert load_file(tmp_path / "parts" / WEIGHTS).keys() == load_file(tmp_path / "whole" / WEIGHTS).keys()
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    if number is None:  # a finished step leaves a checkpoint of its own, which the curve's means do not show
        assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert resumed.fingerprint() == whole.fingerprint() == zoo.load(tmp_path / "parts").fingerprint()
    assert not checkpoints(tmp_path / "parts")


def test_pieces_of_a_batch_add_up_to_the_whole(tmp_path):
    """Accumulated gradients are those of the whole batch, whose samples are the same."""
    recipe = replace(TINY, dropout=0.0)
    one, four = (train(replace(recipe, accumulate=k), tmp_path / str(k)) for k in (1, 4))
    for a, b in zip(one.network.parameters(), four.network.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(a, b, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("flags", [["--coupling", "minibatch_ot"], ["--divergence", "0.1", "--divergence-share", "0.5"]])
def test_two_processes_train_what_one_does(tmp_path, flags):
    """torchrun with gloo, against one process with the same batch: losses within rounding, averaged weights close."""
    words = ["--recipe", "digits", "--steps", "12", "--every", "4", "--batch", "64", "--width", "32", "--blocks", "1"]
    words += ["--dropout", "0", "--warmup", "2", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        out = ["--out", str(tmp_path / str(processes)), "--processes", str(processes)]
        done = subprocess.run(
            [sys.executable, "-m", "fewstep.cli", "train", *words, *out],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / k / CURVE).read_text().splitlines()] for k in "12")
    assert [p["step"] for p in one] == [p["step"] for p in two] == [4, 8, 12]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-5)
    weights = [load_file(tmp_path / k / WEIGHTS) for k in "12"]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0.0, atol=2e-5)


def test_processes_agree_when_their_time_is_over(tmp_path):
    words = ["--recipe", "digits", "--batch", "32", "--width", "8", "--blocks", "1", "--seconds", "1", "--processes", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fewstep.cli", "train", *words, "--steps", "1000000", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert zoo.read_config(tmp_path).training.steps % 5 == 0  # type: ignore[union-attr]


def test_processor_time_is_that_of_all_processes(tmp_path, monkeypatch):
    """A clock that ticks once per look gives every step a second; of two equal processes that is two."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=time.perf_counter, process_time=lambda: next(ticks)))
    monkeypatch.setattr(Session, "_reduced", lambda _, values, how: {"sum": 2 * values, "mean": values}[how])
    train(TINY, tmp_path, keeping=OFTEN)
    assert zoo.training_record(tmp_path).cpu_hours == pytest.approx(2 * TINY.steps / 3600)


def test_what_belongs_to_the_machine_does_not_change_the_weights(tmp_path):
    keeping = Keeping(every=3, keep=1, preview=4)
    one, two = train(TINY, tmp_path / "a", keeping=OFTEN), train(TINY, tmp_path / "b", keeping=keeping)
    assert one.fingerprint() == two.fingerprint()
    assert [f.name for f in (tmp_path / "b" / "previews").iterdir()] == ["step-00000004.png"]


def test_signals_and_random_numbers_are_left_as_they_were(tmp_path):
    handlers, state = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    train(TINY, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handlers
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_gives_another_model(tmp_path):
    one, two = (train(replace(TINY, seed=seed), tmp_path / str(seed)) for seed in (0, 2**32))
    assert one.fingerprint() != two.fingerprint()


# --- what is learnt ----------------------------------------------------------------------------------------------------


SHORT = replace(RECIPES["density2d"], data="8gaussians", steps=200, batch=128, width=32, blocks=2, lr=6e-3, warmup=10, ema=0.95)
EDM_DIALS = {"path": "EDM", "predicts": "data", "raw": "edm", "weight": "edm", "time": "normal_log_snr", "time_mean": 1.2}


@pytest.mark.parametrize(
    "settings",
    [{}, {"coupling": "minibatch_ot"}, EDM_DIALS, {"divergence": 0.1, "divergence_form": "exact", "divergence_share": 1.0}],
)
def test_what_is_drawn_resembles_what_was_shown(tmp_path, settings):
    """A ring of Gaussians: radius and spread of what is drawn are those of the data."""
    model = train(replace(SHORT, **settings), tmp_path)
    drawn = fewstep.reference(model.given(), torch.randn(256, 2, generator=torch.Generator().manual_seed(0)), tol=3e-2).end
    truth, _ = open_source("8gaussians").draw(Keyed(0, 0, 0, 4096), 4096)
    assert float(drawn.norm(dim=1).mean()) == pytest.approx(float(truth.norm(dim=1).mean()), rel=0.2)
    assert float(drawn.mean(0).norm()) < 0.5
    assert float(drawn.std(0).mean()) == pytest.approx(float(truth.std(0).mean()), rel=0.2)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "VP", "predicts": "noise"},
        {"path": "VP", "predicts": "velocity", "weight": "min_snr", "target": "data"},
        {"path": "VE(sigma_max=20.0)", "predicts": "noise", "time": "log_snr"},
        {"path": "Cosine", "predicts": "data", "time": "logit_normal", "time_std": 0.8},
        {"huber": 0.1, "stratified": True},
    ],
)
def test_every_dial_lowers_its_loss(tmp_path, settings):
    train(replace(SHORT, **settings), tmp_path, keeping=Keeping(every=20))
    curve = [json.loads(line) for line in (tmp_path / CURVE).read_text().splitlines()]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]


def test_any_distribution_can_be_the_source(tmp_path):
    """From one Gaussian ring to the moons: samples of the source, not noise, are carried to the target."""
    recipe = replace(SHORT, data="moons", source="8gaussians", coupling="minibatch_ot")
    model = train(recipe, tmp_path)
    start, _ = open_source("8gaussians").draw(Keyed(5, 0, 0, 512), 512)
    target, _ = open_source("moons").draw(Keyed(5, 0, 0, 512), 512)
    end = fewstep.reference(model.given(), start, tol=1e-2).end
    assert float((end.mean(0) - target.mean(0)).norm()) < 0.3
    assert float(end.std(0).sub(target.std(0)).abs().max()) < 0.35
    assert (tmp_path / "samples.png").exists()


def test_a_network_of_the_users_own(tmp_path):
    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))

        def forward(self, x, t):
            return self.inner(torch.cat([x, t[:, None]], dim=1))

    data = FiniteSource(torch.randn(100, 2) * 0.1 + 3.0)
    recipe = Recipe(data="mine", steps=200, batch=64, lr=1e-2, warmup=5, ema=0.9)
    model = train(recipe, tmp_path, data=data, network=Mine())
    drawn = fewstep.reference(model.given(), torch.randn(64, 2), tol=1e-2).end
    assert float(drawn.mean()) == pytest.approx(3.0, abs=0.3)
    assert load_file(tmp_path / WEIGHTS).keys() == model.network.state_dict().keys()  # type: ignore[union-attr]
    card = (tmp_path / "README.md").read_text()
    assert "fewstep train" not in card
    assert "`train(Recipe(data='mine', steps=200, batch=64, lr=0.01, warmup=5, ema=0.9), out, network=Mine( " in card
    assert ", data=FiniteSource)`, with network, data of the caller's own, trained it" in card
    assert "| network | Mine(" in card
    assert "mlp" not in card


def test_an_objective_of_the_users_own(tmp_path):
    class Halved(Regression):
        def __call__(self, model, batch):
            return Loss(0.5 * super().__call__(model, batch).each)

    plain_run, halved = tmp_path / "plain", tmp_path / "halved"
    train(replace(TINY, steps=1), plain_run, keeping=OFTEN)
    train(replace(TINY, steps=1), halved, objective=Halved(), keeping=OFTEN)
    one, half = (json.loads((folder / CURVE).read_text())["loss"] for folder in (plain_run, halved))
    assert half == pytest.approx(one / 2, rel=1e-6)
    card = (halved / "README.md").read_text()
    record = zoo.training_record(halved)
    assert record.command.startswith("train(Recipe(data='digits', ")
    assert record.command.endswith("), out, objective=Halved(target=None, weight='uniform', huber=None))")
    assert record.command in card
    assert "| network | mlp |" in card
    assert "| objective | " in card
    assert "| weight | " not in card
    with pytest.raises(FewstepError, match="divergence would do nothing beside an objective of your own"):
        train(replace(TINY, divergence=0.1), tmp_path / "both", objective=Halved())


@pytest.mark.usefixtures("unchecked")  # the types of what is passed, which a caller need not check
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda each: Loss(each.mean()), r'one number for each sample, "each" of shape \(32,\), got \(\); average over'),
        (lambda each: Loss(each[:1]), r'"each" of shape \(32,\), got \(1,\)'),
        (lambda each: Loss(each[:, None]), r'"each" of shape \(32,\), got \(32, 1\)'),
        (lambda each: Loss(each, {"extra": each.mean()}), r'"extra" of shape \(32,\), got \(\)'),
        (lambda each: Loss(0.0), r'"each" of shape \(32,\), got \(\)'),
        (lambda each: each, "must return a fewstep.training.batch.Loss, got a Tensor$"),
    ],
)
def test_an_objective_gives_one_loss_for_each_sample(tmp_path, returned, message):
    class Mine(Regression):
        def __call__(self, model, batch):
            return returned(super().__call__(model, batch).each)

    with pytest.raises(FewstepError, match=message):
        train(TINY, tmp_path, objective=Mine())


@pytest.mark.usefixtures("unchecked")
def test_the_pieces_of_an_objective_are_the_whole_batch(tmp_path):
    class Half(FlowAndDivergence):
        def pieces(self, model, batch):
            return super().pieces(model, batch)[:1]

    with pytest.raises(FewstepError, match=r'"each" of shape \(32,\), got \(16,\)'):
        train(TINY, tmp_path, objective=Half(share=0.5))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_objective_is_refused(tmp_path):
    with pytest.raises(FewstepError, match="got a function without passes, span; derive it from"):
        train(TINY, tmp_path, objective=lambda model, batch: Loss(batch.t))
    with pytest.raises(FewstepError, match=r"objective must be an object, got the class Regression; pass Regression\(\)"):
        train(TINY, tmp_path, objective=Regression)  # type: ignore[arg-type]


def test_the_curve_has_the_divergence_of_the_steps_that_compute_it(tmp_path):
    recipe = replace(TINY, steps=6, divergence=0.1, divergence_share=1.0, divergence_every=2)
    seen = []

    class Watched(FlowAndDivergence):
        def pieces(self, model, batch):
            def noted(piece):
                loss = piece()
                if batch.keyed.step % 2 == 0:
                    seen.append(float(loss.parts["divergence"].mean()))
                else:
                    assert not loss.parts
                return loss

            return [partial(noted, piece) for piece in super().pieces(model, batch)]

    watched = Watched(weight=0.1, share=1.0, every=2)
    train(replace(recipe, divergence=0.0), tmp_path, objective=watched, keeping=Keeping(every=3))
    points = [json.loads(line) for line in (tmp_path / CURVE).read_text().splitlines()]
    assert len(seen) == 3  # steps 0, 2 and 4; points after step 3 and step 6
    assert [p["divergence"] for p in points] == pytest.approx([(seen[0] + seen[1]) / 2, seen[2]], rel=1e-5)
    plain_run = tmp_path / "recipe"
    train(recipe, plain_run, keeping=Keeping(every=3))
    assert [json.loads(line)["divergence"] for line in (plain_run / CURVE).read_text().splitlines()] == pytest.approx(
        [p["divergence"] for p in points], rel=1e-5
    )


def test_the_measured_loss_is_the_one_that_is_trained():
    data = open_source("digits")
    zero = ResidualMLP((1, 8, 8), 10, 8, 0)
    torch.nn.init.zeros_(zero.leave[1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(zero.leave[1].bias)  # type: ignore[arg-type]
    held = data.held_out()
    assert held is not None
    expected = 1 + float(held[0].square().mean())  # E (x1 - x0)^2 with x0 standard normal
    assert held_out_loss(assemble(TINY, data), zero)["held_out"] == pytest.approx(expected, rel=0.03)
    assert held_out_loss(assemble(replace(TINY, hold_out=0), open_source("digits", hold_out=0)), zero) == {}


def test_labels_are_dropped_as_often_as_asked():
    parts = assemble(replace(TINY, batch=512, label_dropout=0.25), open_source("digits"))
    label = torch.cat([parts.batch(step, 0, 512, torch.device("cpu")).label for step in range(8)])  # type: ignore[misc]
    assert float((label == 10).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_the_rate_rises_and_falls():
    recipe = replace(TINY, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.98, abs=0.01)
    assert rates[-1] < 1e-3
    assert learning_rate(replace(recipe, decay="constant", warmup=0), 99) == 1.0


def test_the_average_starts_short_and_ends_long():
    network = torch.nn.Linear(1, 1, bias=False)
    run = Run.begin({}, network, torch.optim.AdamW(network.parameters()), ema=0.9)
    expected = None
    for step in range(40):
        torch.nn.init.constant_(network.weight, float(step))
        run.step = step
        run.blend()
        decay = min(0.9, step / (step + 10))
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
        assert float(run.ema.weight) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


# --- the folder --------------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model_with_its_record(tmp_path):
    train(replace(TINY, divergence=0.1), tmp_path, keeping=Keeping(every=3, stored="bfloat16"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["README.md", CONFIG, CURVE, "curve.png", WEIGHTS, "samples.png"]
    record = zoo.read_config(tmp_path).training
    assert record is not None
    assert record.recipe == plain(replace(TINY, divergence=0.1))
    assert record.network_passes == 7 * round(32 * (3 + 3 / 16))
    assert (
        record.command == "fewstep train --recipe digits --divergence 0.1 --width 16 --blocks 1 --steps 7 --batch 32 --warmup 2"
    )
    text = (tmp_path / "README.md").read_text()
    assert record.command in text
    assert f"{record.network_passes:,} network passes" in text
    assert "7 steps, 224 samples" in text
    assert zoo.load(tmp_path).path == CondOT()


def test_a_run_starts_from_the_weights_of_a_model(tmp_path):
    train(TINY, tmp_path / "first")
    still = replace(TINY, start=str(tmp_path / "first"), steps=1, lr=1e-30, weight_decay=0.0, dropout=0.5)
    train(still, tmp_path / "second")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    train(replace(still, start=str(tmp_path / "second")), tmp_path / "third")
    records = [zoo.training_record(tmp_path / name) for name in ("first", "second", "third")]
    assert records[2].runs() == records[::-1]
    assert zoo.training_passes(tmp_path / "third") == sum(r.network_passes for r in records)
    card = (tmp_path / "third" / "README.md").read_text()
    assert all(record.command in card for record in records)


def test_a_run_goes_on_when_the_model_it_started_from_is_gone(tmp_path, monkeypatch):
    train(TINY, tmp_path / "first")
    started = replace(TINY, start=str(tmp_path / "first"))
    whole = train(started, tmp_path / "whole")
    with monkeypatch.context() as patch:
        when(5, raise_killed, patch)
        with pytest.raises(Killed):
            train(started, tmp_path / "parts", keeping=OFTEN)
    shutil.rmtree(tmp_path / "first")
    assert train(started, tmp_path / "parts", resume=True).fingerprint() == whole.fingerprint()
    assert zoo.training_passes(tmp_path / "parts") == zoo.training_passes(tmp_path / "whole")


def test_only_a_model_of_the_same_settings_can_be_started_from(tmp_path):
    train(replace(TINY, steps=1), tmp_path / "first")
    started = replace(TINY, start=str(tmp_path / "first"))
    with pytest.raises(FewstepError, match=r"path is CondOT\(\) there and VP.*; width is 16 there and 24 here"):
        train(replace(started, path="VP()", width=24), tmp_path / "second")
    with pytest.raises(FewstepError, match=r"raw is plain there and edm here.*sigma_data is None there and 0.4 here"):
        train(replace(started, path="EDM()", predicts="data", raw="edm", sigma_data=0.4), tmp_path / "second")
    with pytest.raises(FewstepError, match="unknown model"):
        train(replace(TINY, start="nothing-here"), tmp_path / "second")
    with pytest.raises(FewstepError, match="start would do nothing to a network of your own"):
        train(started, tmp_path / "second", network=ResidualMLP((1, 8, 8), 10, 16, 1))


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        Recipe(data="moons", steps=10, batch=32),
        replace(RECIPES["density2d"], width=None),
        replace(RECIPES["density2d"], network="dit"),
        replace(RECIPES["digits"], network="unet2d", dropout=None, attention=False, channels=(8, 16), hold_out=2),
        replace(RECIPES["cifar10-flow"], channels=None, attention=None, layers=None, stratified=False),
        replace(RECIPES["cifar10-vp"], attention=False, flip=False, data="it's a $HOME; file", size=16),
        replace(RECIPES["cifar10-edm"], data="-x.npz", time_mean=-1.2, huber=1e-05, lr=3e-4, target="data", precision="bf16"),
    ],
)
def test_the_command_of_a_recipe_gives_the_recipe_back(recipe, capsys):
    words = shlex.split(command(recipe))
    assert words[:2] == ["fewstep", "train"]
    with pytest.raises(SystemExit) as stop:
        main([*words[1:], "--print-config"])
    assert not stop.value.code
    assert yaml.safe_load(capsys.readouterr().out) == plain(recipe)


def test_the_command_of_a_recipe_is_short():
    recipe = replace(RECIPES["cifar10-vp"], attention=False, channels=(8, 16), flip=False, data="a b")
    assert command(recipe) == "fewstep train --recipe cifar10-vp --data 'a b' --no-flip --channels 8,16 --no-attention"
    assert command(Recipe(data="moons", steps=10, batch=32)) == "fewstep train --data moons --steps 10 --batch 32"


def test_a_limit_of_time_ends_the_run_where_it_is(tmp_path):
    model = train(replace(TINY, steps=10**6), tmp_path, keeping=Keeping(seconds=0.3))
    record = zoo.read_config(tmp_path).training
    assert record is not None
    assert 0 < record.steps < 10**6
    assert "of the 1,000,000 that the recipe plans" in (tmp_path / "README.md").read_text()
    assert zoo.load(tmp_path).fingerprint() == model.fingerprint()


def test_trackers_get_the_curve(tmp_path, monkeypatch):
    logged: list[tuple[int, dict[str, float]]] = []
    monkeypatch.setattr(loop.Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    train(TINY, tmp_path, keeping=OFTEN)
    assert [step for step, _ in logged] == [2, 4, 6, 7]
    assert logged[0][1].keys() == {"loss", "lr", "held_out", "samples_per_s"}


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda recipe, step: 1e30 if step == 4 else learning_rate(recipe, step))
        message = r"the loss is (nan|inf) at step \d, learning rate .*last good checkpoint \(step 4\) is kept in .*lower --lr"
        with pytest.raises(FewstepError, match=message):
            train(TINY, tmp_path / "parts", keeping=OFTEN)
    train(TINY, tmp_path / "whole", keeping=OFTEN)
    train(TINY, tmp_path / "parts", resume=True, keeping=OFTEN)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_run_that_diverges_at_once_has_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda recipe, step: 1e30)
    with pytest.raises(FewstepError, match="there is no checkpoint yet"):
        train(TINY, tmp_path)


def unfinished(folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe = TINY) -> None:
    with monkeypatch.context() as patch:
        when(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, keeping=OFTEN)


def test_runs_are_not_mixed_up(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match=r"there is no unfinished run in .*start one without --resume"):
        train(TINY, tmp_path, resume=True)
    unfinished(tmp_path, monkeypatch)
    with pytest.raises(FewstepError, match=r"holds an unfinished run; continue it with --resume"):
        train(TINY, tmp_path)
    with pytest.raises(
        ArtifactError, match=r"was made with lr = 0.001 \(now 0.1\), seed = 0 \(now 3\); .*start afresh in another"
    ):
        train(replace(TINY, seed=3, lr=0.1), tmp_path, resume=True)
    assert stored_recipe(tmp_path) == plain(TINY)
    train(TINY, tmp_path, resume=True)
    with pytest.raises(FewstepError, match="holds a finished model; choose another --out"):
        train(TINY, tmp_path)


def test_another_objective_network_or_data_do_not_continue_a_run(tmp_path, monkeypatch):
    class Other(Regression):
        pass

    class Net(ResidualMLP):
        def __init__(self, size):
            super().__init__((2,), 0, 8, 1)
            self.last = torch.nn.Linear(size, 1)

    x, recipe = torch.randn(100, 2), Recipe(data="mine", steps=6, batch=8, width=8, blocks=1)
    labels = torch.arange(100) % 4
    with monkeypatch.context() as patch:
        when(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        for name, given in {"data": {}, "objective": {"objective": Other()}, "network": {"network": Net(1)}}.items():
            with pytest.raises(KeyboardInterrupt):
                train(recipe, tmp_path / name, data=FiniteSource(x), keeping=OFTEN, **given)
    for name, given, message in [
        ("data", {"data": FiniteSource(3 * x)}, r"weighted mean of sample 0 of data = .* \(now"),
        ("data", {"data": FiniteSource(x[:50])}, r"size of data = 100 \(now 50\)"),
        ("data", {"data": FiniteSource(x, labels)}, r"classes of data = None \(now 4\), labels of data = None"),
        ("data", {"objective": Other()}, r"own objective = none \(now .*Other\(target=None, weight='uniform', huber=None\)\)"),
        ("objective", {}, r"own objective = .*Other\(.*\) \(now none\)"),
        ("objective", {"objective": Other(weight="snr")}, r"own objective = .*uniform.* \(now .*snr"),
        ("network", {}, r"own network = .*Net with weights \w{8} \(now none\)"),
        ("network", {"network": Net(2)}, r"own network = .*Net with weights \w{8} \(now .*Net with weights"),
    ]:
        with pytest.raises(ArtifactError, match=rf"was made with {message}.*; a run can only continue as it began"):
            train(recipe, tmp_path / name, **{"data": FiniteSource(x), **given}, resume=True)
    train(recipe, tmp_path / "data", data=FiniteSource(x * (1 + 1e-6)), resume=True)  # rounding is no other data


def test_the_same_network_and_objective_continue_a_run_in_another_process_and_version(tmp_path, monkeypatch):
    """Where they come from another module, and their words have changed."""

    def mine(module: str, words: str) -> dict[str, Any]:
        own = {"__module__": module, "__qualname__": "Own", "__repr__": lambda self: words}
        fresh = dataclass(frozen=True)(
            type(
                "Own", (Regression,), {**own, "__annotations__": {"seen": set}, "seen": field(default_factory=lambda: {words})}
            )
        )
        return {"network": type("Own", (ResidualMLP,), own)((2,), 0, 8, 1), "objective": fresh()}

    data, recipe = FiniteSource(torch.randn(100, 2)), Recipe(data="mine", steps=6, batch=8)
    with monkeypatch.context() as patch:
        when(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path, data=data, keeping=OFTEN, **mine("__main__", "{'a', 'b'}"))
    train(recipe, tmp_path, data=data, resume=True, **mine("mine", "{'b', 'a'}"))


def test_settings_inside_an_objective_count(tmp_path, monkeypatch):
    def mine(**settings: Any) -> dict[str, Any]:
        return {"data": data, "objective": FlowAndDivergence(base=Regression(**settings), weight=0.1)}

    data, recipe = FiniteSource(torch.randn(100, 2)), Recipe(data="mine", steps=6, batch=16, width=8, blocks=1)
    with monkeypatch.context() as patch:
        when(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path, keeping=OFTEN, **mine())
    with pytest.raises(ArtifactError, match=r"FlowAndDivergence\(.*base=Regression\(.*huber=None\).* \(now .*huber=0.1\)"):
        train(recipe, tmp_path, resume=True, **mine(huber=0.1))
    train(recipe, tmp_path, resume=True, **mine())


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The newest checkpoint, saying something else of its run."""
    file = checkpoints(folder)[-1]
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    run = json.loads(header["run"])
    change(run)
    save_file(load_file(file), file, header | {"run": json.dumps(run)})


def test_a_checkpoint_that_does_not_say_what_it_was_made_of_is_continued(tmp_path, monkeypatch):
    whole = replace(TINY, hold_out=0)
    unfinished(tmp_path, monkeypatch, whole)
    rewritten(tmp_path, lambda run: run.pop("made_of"))
    train(whole, tmp_path, resume=True)


def test_a_checkpoint_that_tells_its_network_in_other_words_is_continued(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    rewritten(
        tmp_path, lambda run: run.update(made_of={"network": "Net(...)", "objective": "", "data": run["made_of"]["data"]})
    )
    train(TINY, tmp_path, resume=True)


def test_a_checkpoint_from_before_samples_were_kept_aside_at_random_is_refused(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    rewritten(tmp_path, lambda run: run.pop("made_of"))
    with pytest.raises(ArtifactError, match="may have kept other samples aside: these would be trained on now; start afresh"):
        train(TINY, tmp_path, resume=True)


def test_other_versions_are_told(tmp_path, monkeypatch, capsys):
    unfinished(tmp_path, monkeypatch)
    monkeypatch.setattr("fewstep.training.state.versions", lambda: {"fewstep": "0", "torch": "3.0", "python": "3"})
    monkeypatch.setattr("fewstep.training.finish.versions", lambda: {"fewstep": "0", "torch": "3.0", "python": "3"})
    train(TINY, tmp_path, resume=True, progress=True)
    assert f"torch {torch.__version__} then, 3.0 now" in "".join(capsys.readouterr())


def test_only_the_last_checkpoints_are_kept(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-00000004.safetensors", "checkpoint-00000005.safetensors"]


def test_what_a_killed_life_left_half_written_is_cleared_away(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    half = tmp_path / ".checkpoint-00000006.safetensors.0badf00d.tmp"
    half.write_bytes(b"half")
    train(TINY, tmp_path, resume=True, keeping=OFTEN)
    assert not half.exists()


def test_a_damaged_checkpoint_is_refused(tmp_path, monkeypatch):
    unfinished(tmp_path, monkeypatch)
    file = checkpoints(tmp_path)[-1]
    good = file.read_bytes()
    for bad in (good[:-10], b"", pickle.dumps({"step": 1})):
        file.write_bytes(bad)
        with pytest.raises(ArtifactError, match="is not a checkpoint that fewstep wrote"):
            train(TINY, tmp_path, resume=True)
    save_file({"network.enter.weight": torch.zeros(1)}, file)
    with pytest.raises(ArtifactError, match="is not a checkpoint that fewstep wrote"):
        train(TINY, tmp_path, resume=True)
    file.write_bytes(good)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_tensors", lambda self: {"network.enter.weight": torch.zeros(1)})
        other = tmp_path / "other"
        unfinished(other, monkeypatch)
    with pytest.raises(ArtifactError, match="is not a checkpoint of this run"):
        train(TINY, other, resume=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    import errno

    unfinished(tmp_path, monkeypatch)
    before = {f.name: f.read_bytes() for f in checkpoints(tmp_path)}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="No space left on device; free some space"):
            train(TINY, tmp_path, resume=True, keeping=OFTEN)
    assert {f.name: f.read_bytes() for f in checkpoints(tmp_path)} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**63}, "seed must be below"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"lr": 10**400}, "lr must be a finite number, got 1000"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"clip": -1.0}, "clip must be a number from 0 on"),
        ({"decay": "cos"}, r"decay must be one of \"constant\", \"cosine\", got 'cos'$"),
        ({"time": "lognormal"}, r"time must be one of \"uniform\", .*, got 'lognormal'$"),
        ({"precision": "bfloat16"}, r"precision must be one of \"no\", \"bf16\", \"fp16\", got 'bfloat16'$"),
        ({"predicts": "score"}, "predicts must be one of .*, got 'score'$"),
        ({"steps": float("nan")}, "steps must be an integer, got nan$"),
        ({"steps": "3"}, "steps must be an integer, got '3'$"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5$"),
        ({"accumulate": True}, "accumulate must be an integer, got True$"),
        ({"stratified": "yes"}, "stratified must be True or False, got 'yes'$"),
        ({"time_mean": float("nan")}, "time_mean must be a finite number, got nan$"),
        ({"width": 2.5}, "width must be an integer or None, got 2.5$"),
        ({"channels": [8, 16]}, r"channels must be a tuple of integers or None, got \[8, 16\]$"),
        ({"data": None}, "data must be text, got None$"),
        ({"hold_out": 1}, "would keep every sample aside"),
        ({"divergence_share": 0.0}, r"divergence_share must lie in \(0, 1\]"),
        ({"raw": "edm"}, 'raw = "edm" goes with predicts = "data"'),
        ({"raw": "v_prediction", "predicts": "data"}, 'raw = "v_prediction" goes with predicts = "noise", got "data"'),
        ({"data": ""}, "data must be given: --data"),
        ({"path": "Line()"}, r"path must be CondOT\(\), .* got \"Line\(\)\""),
        ({"dropout": 1.0}, "network mlp: dropout: Input should be less than 1"),
        ({"coupling": "ot"}, 'coupling must be one of independent, minibatch_ot, got "ot"'),
        ({"channels": (8,)}, "network mlp: channels: Extra inputs"),
        ({"divergence": 0.1, "coupling": "minibatch_ot"}, "needs normal noise that is independent"),
        ({"source": "moons"}, r"source and data must have one shape, got \(2,\) and \(1, 8, 8\)"),
        ({"accumulate": 3}, "a batch of 32 does not divide among 1 processes with 3 pieces each; choose a multiple of 3"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, settings, message):
    with pytest.raises(FewstepError, match=message):
        train(with_values(TINY, settings), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 2.5}, "every must be an integer, got 2.5"),
        ({"keep": 0}, "keep must"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"seconds": float("nan")}, "seconds must be a finite number, got nan"),
        ({"stored": "half"}, 'stored must be one of "float32", "bfloat16", got'),
    ],
)
def test_impossible_housekeeping_is_refused(tmp_path, settings, message):
    with pytest.raises(FewstepError, match=message):
        train(TINY, tmp_path, keeping=with_values(Keeping(), settings))


def test_settings_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(FewstepError, match="the recipe says hold_out = 6, of the data that are given it is 0"):
        train(TINY, tmp_path, data=open_source("digits", hold_out=0))
    with pytest.raises(FewstepError, match="the recipe's size would do nothing"):
        train(replace(TINY, size=4), tmp_path, data=open_source("digits"))
    with pytest.raises(FewstepError, match='tracker "comet_ml" is not installed: pip install comet_ml'):
        train(TINY, tmp_path, keeping=Keeping(tracker="comet_ml"))


def test_labels_in_memory_are_counted_and_the_null_class_comes_after_them(tmp_path):
    data = FiniteSource(torch.randn(60, 2), torch.arange(60) % 3)
    parts = assemble(Recipe(data="mine", batch=600, label_dropout=0.5), data)
    label = parts.batch(0, 0, 600, torch.device("cpu")).label
    assert label is not None
    assert torch.bincount(label, minlength=4)[3] == pytest.approx(300, abs=60)
    with pytest.raises(FewstepError, match="is negative"):
        FiniteSource(torch.randn(3, 2), torch.tensor([0, -1, 1]))


def test_a_kill_between_the_model_and_its_page_can_be_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.training.finish.card", lambda *_, **__: raise_killed())
        with pytest.raises(Killed):
            train(TINY, tmp_path)
    assert (tmp_path / CONFIG).exists()
    train(TINY, tmp_path, resume=True)
    assert (tmp_path / "README.md").exists()


def test_the_next_run_may_have_another_precision(tmp_path):
    """And the averaged network computes in its own, as the saved one does."""
    train(TINY, tmp_path / "full")
    model = train(replace(TINY, precision="bf16"), tmp_path / "mixed")
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model.given(3)(x, 0.3), zoo.load(tmp_path / "mixed").given(3)(x, 0.3))


def test_the_loss_kept_aside_sees_every_class_of_sorted_data(monkeypatch):
    seen: list[int] = []
    data = FiniteSource(torch.randn(4000, 2), torch.arange(4000) // 1000, hold_out=2)
    parts = assemble(Recipe(data="mine", batch=100), data)
    inner = parts.regression
    watch = lambda model, batch: (seen.extend(batch.label.tolist()), inner(model, batch))[1]  # noqa: E731
    object.__setattr__(parts, "regression", watch)
    held_out_loss(parts, ResidualMLP((2,), 4, 8, 0))
    assert len(seen) == 1024
    assert set(seen) == {0, 1, 2, 3}


def test_more_processes_than_the_batch_are_refused():
    assert shares_of(replace(TINY, batch=8, accumulate=2), 1, 2) == [(4, 6), (6, 8)]
    with pytest.raises(FewstepError, match="a batch of 4 does not divide among 8 processes"):
        shares_of(replace(TINY, batch=4), 0, 8)


def test_a_network_whose_output_has_another_shape_is_named(tmp_path):
    class Wrong(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, label):
            return self.weight * x[:, :, :4]

    with pytest.raises(FieldError, match=r"digits.*\(32, 1, 4, 8\)|\(32, 1, 4, 8\).*"):
        train(TINY, tmp_path, network=Wrong())


def test_a_network_that_cannot_be_trained_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return self.weight * x

    class Conditional(Plain):
        def forward(self, x, t, label):
            return self.weight * x

    with pytest.raises(FewstepError, match=r"so network\(x, t, label\) is called, got Plain.forward\(x, t\); change"):
        train(TINY, tmp_path, network=Plain())
    moons = Recipe(data="moons", steps=2, batch=8)
    with pytest.raises(FewstepError, match=r"no labels, so network\(x, t\) is called, got Conditional.forward\(x, t, label\)"):
        train(moons, tmp_path, network=Conditional())
    with pytest.raises(FewstepError, match="Plain has no weights to train"):
        train(moons, tmp_path, network=Plain().requires_grad_(False))
    with pytest.raises(FewstepError, match=r"a traced or scripted network cannot be trained .*; pass the module that it was"):
        train(moons, tmp_path, network=torch.jit.ScriptModule())
    assert not list(tmp_path.iterdir())


def test_networks_are_asked_how_they_are_called(tmp_path):
    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def __call__(self, x, t, label=None):
            return super().__call__(x)

        def forward(self, x):
            return self.weight * x

    class Compiled(Called):
        __call__ = torch.add  # Python does not know how functions of C are called

    class Narrow(Called):
        def __call__(self, x):
            return super().__call__(x)

    train(TINY, tmp_path, network=Called())
    data = open_source("moons")
    check_network(Called(), data)
    check_network(Compiled(), data)
    with pytest.raises(FewstepError, match=r"got Narrow.__call__\(x\); change"):
        check_network(Narrow(), data)


def test_a_file_is_no_folder_to_train_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FewstepError, match=r"out must be a folder, .*file is a file; choose another"):
        train(TINY, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_everything_public_can_be_imported_at_once():
    names: dict[str, Any] = {}
    exec("from fewstep.training import *", names)
    assert names["train"] is train


# --- batches ahead -----------------------------------------------------------------------------------------------------


def test_batches_are_made_one_ahead_by_another_thread_and_none_beyond_the_end():
    made, threads, pieces, parts = [], set(), [(0, 16), (16, 32)], assemble(TINY, open_source("digits"))
    ready = threading.Event()

    def make(step, start, stop):
        made.append((step, start, stop))
        threads.add(threading.current_thread())
        if len(made) == 2:
            ready.set()
        return parts.batch(step, start, stop, torch.device("cpu"))

    ahead = Ahead(make, pieces, 3)
    for step, piece in itertools.product(range(3), range(2)):
        keyed = ahead.take(step, piece).keyed
        assert (keyed.step, keyed.start, keyed.stop) == (step, *pieces[piece])
        assert ready.wait(60)  # the second is made though nobody has taken it
        assert len(made) <= 2 * step + piece + 2
    ahead.close()
    assert made == [(step, *piece) for step in range(3) for piece in pieces]
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_what_making_a_batch_raises_is_raised_where_it_is_taken():
    def make(step, start, stop):
        if step == 1:
            raise FewstepError("broken data")
        return parts.batch(step, start, stop, torch.device("cpu"))

    parts = assemble(TINY, open_source("digits"))
    ahead = Ahead(make, [(0, 32)], 3)
    assert ahead.take(0, 0).keyed.step == 0
    with pytest.raises(FewstepError, match="broken data"):
        ahead.take(1, 0)
    ahead.close()


def test_a_run_leaves_no_thread_behind(tmp_path, monkeypatch):
    made = []

    def kept(*settings):
        made.append(Ahead(*settings))  # so that no garbage collection ends its thread
        return made[-1]

    monkeypatch.setattr(loop, "Ahead", kept)
    train(Recipe(data="checkerboard", steps=2, batch=8, width=8, blocks=1), tmp_path / "done")
    with pytest.raises(FewstepError, match="diverged"):
        train(Recipe(data="checkerboard", steps=9, batch=8, width=8, blocks=1, lr=1e30, warmup=0, clip=0.0), tmp_path / "nan")
    assert len(made) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fewstep")]
