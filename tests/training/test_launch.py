"""Several processes: one line for what went wrong, said once; exit statuses as of one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fewstep._errors import FewstepError
from fewstep.training.launch import LAUNCHED, launch, reporting

ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TRAIN = [sys.executable, "-m", "fewstep.cli", "train", "--data", "moons", "--width", "8", "--blocks", "1", "--batch", "8"]


def test_an_error_of_all_processes_is_one_line(tmp_path):
    words = ["--lr", "1e30", "--warmup", "0", "--clip", "0", "--out", str(tmp_path / "run"), "--processes", "2"]
    done = subprocess.run([*TRAIN, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("fewstep: the loss is ")


def test_a_termination_signal_leaves_a_checkpoint_and_one_line(tmp_path):
    words = ["--steps", "1000000", "--every", "5", "--out", str(tmp_path), "--processes", "2"]
    with subprocess.Popen([*TRAIN, *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("step")
        process.send_signal(signal.SIGTERM)
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("step")]
        assert process.wait(100) == 130
    assert len(rest) == 1, rest
    assert "with --resume" in rest[0]
    assert list(tmp_path.glob("checkpoint-*"))


def test_a_wrong_recipe_starts_no_process(capsys, monkeypatch, tmp_path):
    from fewstep.cli import main

    monkeypatch.setattr("fewstep.cli_train.launch", None)
    for words, message in (["--lr", "-1"], "lr must be positive"), (["--every", "0"], "every must be at least 1"):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--data", "moons", *words, "--processes", "2", "--out", str(tmp_path)])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err


def failing(monkeypatch, error: Exception) -> None:
    def run(args):
        assert os.environ[LAUNCHED]
        assert args.training_script_args == ["train", "--out", "x"]
        raise error

    monkeypatch.setattr(torchrun, "run", run)


def failure(tmp_path, rank: int, status: int, said: dict | None = None) -> ProcessFailure:
    file = tmp_path / f"{rank}.json"
    if said is not None:
        file.write_text(json.dumps({"timestamp": int(time.time()), **said}))
    return ProcessFailure(rank, 1234, status, str(file))


LOST = {"message": "RuntimeError: Connection closed by peer", "known": False}


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ([(1, LOST), (1, {"message": "no data", "known": True})], "^no data$"),
        ([(-signal.SIGTERM, None), (1, {"message": "no data", "known": True})], "^no data$"),
        (
            [(1, LOST), (-signal.SIGKILL, None)],
            "process 1 of 2 was killed by SIGKILL; go on with --resume if there is a checkpoint, else",
        ),
        ([(-signal.SIGTERM, None), (3, None)], "process 1 of 2 ended with status 3; go on"),
    ],
)
def test_the_cause_is_told_not_what_followed(tmp_path, monkeypatch, failures, message):
    failing(monkeypatch, ChildFailedError("train", {k: failure(tmp_path, k, *one) for k, one in enumerate(failures)}))
    with pytest.raises(FewstepError, match=message):
        launch(2, ["train", "--out", "x"])
    assert LAUNCHED not in os.environ


def test_an_unknown_error_keeps_its_traceback(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, ChildFailedError("train", {0: failure(tmp_path, 0, 1, LOST)}))
    with pytest.raises(SystemExit) as stop:
        launch(2, ["train", "--out", "x"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == LOST["message"] + "\n"


def test_interrupted_processes_are_an_interruption(tmp_path, monkeypatch):
    for error in SignalException("", signal.SIGTERM), ChildFailedError("train", {0: failure(tmp_path, 0, 130)}):
        failing(monkeypatch, error)
        with pytest.raises(KeyboardInterrupt):
            launch(2, ["train", "--out", "x"])


def test_a_process_reports_to_the_launcher(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mine"), reporting():  # of no launcher
        raise ValueError("mine")
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for error, status in (KeyboardInterrupt(), 130), (SystemExit(7), 7), (FewstepError("mine"), 1), (KeyError("what"), 1):
        with pytest.raises(SystemExit) as stop, reporting():
            raise error
        assert stop.value.code == status
        if isinstance(error, FewstepError):
            assert json.loads((tmp_path / "error.json").read_text()).items() > {"message": "mine", "known": True}.items()
    said = json.loads((tmp_path / "error.json").read_text())
    assert not said["known"]
    assert said["message"].startswith("Traceback")
