"""`fewstep train`: recipes by name or file, flags that win, and one line for every mistake."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from fewstep import load
from fewstep.cli import main
from fewstep.training import loop
from fewstep.training.loop import learning_rate
from fewstep.training.recipe import RECIPES, Recipe, plain
from fewstep.zoo.checkpoint import read_config

SMALL = ["--batch", "32", "--width", "16", "--blocks", "1", "--warmup", "2"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*words: str) -> None:
    """A command that must succeed."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code in (0, None)


def refuse(*words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code in (1, 2)  # 2: words that are no command line
    return " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_a_recipe_by_name_with_flags_trains_a_model_that_other_commands_take(tmp_path, capsys):
    out = tmp_path / "run"
    run("train", "--recipe", "digits", "--steps=4", *SMALL, "--every", "2", "--out", str(out))
    printed = capsys.readouterr()
    assert f"tune it: fewstep tune {out}" in printed.out
    lines = [line for line in printed.err.splitlines() if line.startswith("step")]
    assert lines[-1].startswith("step      4/4  loss ")
    assert "samples/s" in lines[-1]
    assert lines[-1].endswith("0:00 left")
    record = read_config(out).training
    assert record is not None
    assert record.recipe == plain(replace(RECIPES["digits"], steps=4, batch=32, width=16, blocks=1, warmup=2))
    run("sample", str(out), "--sampler", "euler", "--nfe", "3", "--num", "4", "--out", str(tmp_path / "samples"), "--json")
    assert json.loads(capsys.readouterr().out)["nfe"] == 3


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_recipe_from_a_file(tmp_path, capsys, suffix):
    file = tmp_path / f"mine{suffix}"
    settings = {"data": "moons", "steps": 3, "batch": 8, "width": 8, "blocks": 1, "lr": 0.5}
    file.write_text(yaml.safe_dump(settings) if suffix == ".yaml" else json.dumps(settings))
    run("train", "--recipe", str(file), "--lr", "0.01", "--out", str(tmp_path / "run"), "--json")
    assert json.loads(capsys.readouterr().out)["parameters"] == load(tmp_path / "run").parameters()
    record = read_config(tmp_path / "run").training
    assert record is not None
    assert record.recipe == plain(Recipe(**{**settings, "lr": 0.01}))


def test_the_printed_recipe_is_a_recipe(tmp_path, capsys):
    run("train", "--recipe", "cifar10-vp", "--data", "x.parquet", "--no-attention", "--print-config")
    file = tmp_path / "again.yaml"
    file.write_text(capsys.readouterr().out)
    run("train", "--recipe", str(file), "--print-config")
    again = yaml.safe_load(capsys.readouterr().out)
    assert again == plain(replace(RECIPES["cifar10-vp"], data="x.parquet", attention=False))


def test_resuming_takes_the_recipe_of_the_run(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path)]

    def rate(recipe, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", rate)
        with pytest.raises(SystemExit) as stop:
            main(["train", "--recipe", "digits", "--seed", "5", "--steps", "4", *SMALL, *out])
    assert stop.value.code == 130
    assert "--resume" in capsys.readouterr().err
    assert "was made with steps = 4 (now 9)" in refuse("train", "--resume", "--steps", "9", *out, capsys=capsys)
    resume = ["train", "--resume=true", "--network", "mlp", *out]  # the run's own network keeps its own options
    assert "was made with seed = 5 (now 6)" in refuse(*resume, "--seed", "6", capsys=capsys)
    run(*resume)
    record = read_config(tmp_path).training
    assert record is not None
    assert (record.seed, record.steps) == (5, 4)


def test_a_recipe_is_checked_before_it_is_printed(capsys):
    assert "lr must be positive, got -1.0" in refuse(
        "train", "--recipe", "digits", "--lr", "-1", "--print-config", capsys=capsys
    )
    assert "time_mean must be a finite number, got inf" in refuse(
        "train", "--recipe", "digits", "--time-mean", "inf", "--print-config", capsys=capsys
    )
    run("train", "--recipe", "cifar10-flow", "--print-config")  # without data it is a file to fill in


def test_images_that_cannot_be_read_are_left_out_when_asked(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(8):
        Image.fromarray(np.full((4, 4), 30 * k, dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "8.png").write_bytes(b"no image")
    words = ["train", "--data", str(folder), "--steps", "2", *SMALL, "--out", str(tmp_path / "run")]
    assert "8.png" in refuse(*words, capsys=capsys)
    run(*words, "--skip-unreadable")
    assert "1 of 9" in read_config(tmp_path / "run").training.data  # type: ignore[union-attr]


def test_images_of_different_sizes_are_scaled_when_asked(tmp_path, capsys):
    from PIL import Image

    for k in range(8):
        Image.fromarray(np.full((4 + k, 6, 3), 30 * k, dtype=np.uint8)).save(tmp_path / f"{k}.png")
    words = ["train", "--data", str(tmp_path), "--steps", "2", *SMALL, "--out", str(tmp_path / "run")]
    assert "size" in refuse(*words, capsys=capsys)
    run(*words, "--size", "4")
    assert load(tmp_path / "run").shape == (3, 4, 4)


def test_a_recipe_with_another_network_lets_go_of_the_options_of_its_own(tmp_path):
    words = ["--recipe", "digits", "--network", "unet2d", "--channels", "8,16", "--layers", "1", "--steps", "2", "--batch", "8"]
    run("train", *words, "--out", str(tmp_path))
    assert read_config(tmp_path).network["channels"] == [8, 16]


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run("train", "--recipe", "digits", "--steps", "2", *SMALL, "--out", str(tmp_path))
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "digit"], 'unknown recipe "digit"; did you mean "digits"?'),
        (["--recipe", "zzz"], "known recipes: digits, density2d"),
        (["--recipe", "digits", "--stepz", "3"], "Did you mean --steps"),
        (["--recipe", "digits", "--coupling", "ot"], "coupling"),
        (["--steps", "3"], "data must be given: --data"),
        (["--recipe", "cifar10-flow", "--data", "no-such.parquet"], "no-such.parquet"),
        (["--recipe", "digits", "--processes", "0"], "processes must be at least 1"),
        (["--recipe", "digits", "--batch", "2", "--processes", "3"], "a batch of 2 does not divide among 3 processes"),
    ],
)
def test_mistakes_get_one_line(words, message, capsys, tmp_path):
    assert message in refuse("train", *words, "--out", str(tmp_path / "x"), capsys=capsys)


def test_an_unknown_key_in_a_recipe_suggests_the_right_one(tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_text("data: digits\nbatchsize: 3\n")
    assert 'unknown key "batchsize"' in refuse("train", "--recipe", str(file), capsys=capsys)
    file.write_text("data: digits\nwidth: null\nbatch: null\n")
    assert "batch has no value in" in refuse("train", "--recipe", str(file), capsys=capsys)
    file.write_text("data: [unclosed\n")
    assert "neither TOML, YAML nor JSON" in refuse("train", "--recipe", str(file), capsys=capsys)


def test_help_and_recipes_need_no_torch():
    code = "import sys, fewstep.cli_train, fewstep.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert torch.__version__
