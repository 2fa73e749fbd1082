import json
import os
import signal
import subprocess
import sys
import time

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file

from fewstep import Sampler, adapt
from fewstep.cli import main


@pytest.fixture(scope="module", autouse=True)
def _unchecked():
    """Shape checks are for the tests of the parts; whole tunings would spend most of their time on them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


RING = "fewstep.zoo.mixtures:ring"


def run(*words, capsys):
    """Run a command that must succeed; what it printed on stdout."""
    try:
        main(list(words))
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise AssertionError(capsys.readouterr()) from stop
    return capsys.readouterr().out


def refuse(*words, capsys):
    """Run a command that must fail; its complaint."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code not in (0, None)
    said = capsys.readouterr()
    return " ".join((said.err + said.out).replace("│", " ").split())  # cyclopts draws boxes


def nan_model():
    return adapt(lambda x, t: x * float("nan"), shape=(2,), name="nan")


def wide_model():
    return adapt(lambda x, t: torch.cat([x, x], 1), shape=(2,), name="wide")


def other_shape():
    from fewstep.zoo.mixtures import mixture

    return mixture(torch.zeros(1, 3), torch.tensor(1.0), name="three")


def cosine_ring():
    from fewstep import Cosine
    from fewstep.zoo.mixtures import mixture

    return mixture(torch.eye(2), torch.tensor(0.1), Cosine(), name="cosine")


def failing_model():
    raise RuntimeError("no weights here")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    main_quietly("tune", RING, "--nfe", "3,4", "--noise", "32", "--effort", "search", "--out", str(folder), "--json")
    return folder


def main_quietly(*words):
    try:
        main(list(words))
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise


def test_tune_leaves_samplers_report_and_pictures(tuned):
    names = {p.name for p in tuned.iterdir()}
    assert {"nfe-3", "nfe-4", "report.json", "report.md", "report.html", "frontier.png"} <= names
    assert "progress" not in names
    assert Sampler.load(tuned / "nfe-4").nfe == 4
    report = json.loads((tuned / "report.json").read_text())
    assert [line["nfe"] for line in report["facts"]["summary"]] == [3, 4]


def test_sample_draws_from_a_tuned_sampler(tuned, tmp_path, capsys):
    said = run(
        "sample", RING, "--sampler", str(tuned / "nfe-4"), "--num", "10", "--out", str(tmp_path), "--json", capsys=capsys
    )
    summary = json.loads(said)
    assert summary["nfe"] == 4
    assert load_file(tmp_path / "samples.safetensors")["samples"].shape == (10, 2)


def test_samples_do_not_depend_on_the_batch_size(tuned, tmp_path, capsys):
    for batch in ("3", "256"):
        run(
            "sample",
            RING,
            "--sampler",
            str(tuned),
            "--nfe",
            "3",
            "--num",
            "10",
            "--batch",
            batch,
            "--out",
            str(tmp_path / batch),
            capsys=capsys,
        )
    a, b = (load_file(tmp_path / batch / "samples.safetensors")["samples"] for batch in ("3", "256"))
    assert torch.allclose(a, b, atol=1e-6)


def test_sample_writes_a_picture_of_images_with_their_labels(tmp_path, capsys):
    run(
        "sample",
        "digits",
        "--sampler",
        "pfdiff1_1",
        "--nfe",
        "8",
        "--num",
        "12",
        "--guidance",
        "2",
        "--out",
        str(tmp_path),
        capsys=capsys,
    )
    kept = load_file(tmp_path / "samples.safetensors")
    assert kept["labels"].tolist() == [*range(10), 0, 1]
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert kept["samples"].abs().max() < 2.0


def test_evaluate_measures_names_grids_stock_and_directories_side_by_side(tuned, tmp_path, capsys):
    names = f"euler,pfdiff1_1@boss,fit,{tuned}"
    said = run(
        "evaluate", RING, "--samplers", names, "--nfe", "4", "--noise", "64", "--out", str(tmp_path), "--json", capsys=capsys
    )
    errors = {row["name"]: row["metrics"]["rmse"]["value"] for row in json.loads(said)["rows"]}
    assert set(errors) == {"euler", "pfdiff1_1@boss", "fit", str(tuned / "nfe-4")}
    assert errors["fit"] < errors["euler"]
    assert (tmp_path / "report.html").exists()
    text = run("evaluate", RING, "--samplers", "euler", "--nfe", "4,6", "--noise", "16", capsys=capsys)
    assert "euler (4)" in text
    assert "euler (6)" in text


def test_methods_lists_the_registry(capsys):
    from fewstep.methods import registry

    listed = json.loads(run("methods", "--json", capsys=capsys))
    assert {row["name"] for row in listed} == set(registry())
    prices = {row["name"]: row["nfe per step"] for row in listed}
    assert prices["heun"] == "2 per step"
    assert prices["pfdiff2_1"] == "1 + 1 (steps - 1) / 3"
    assert "arXiv:2408.08822" in run("methods", capsys=capsys)


def test_doctor_finds_this_installation_sound(capsys):
    findings = json.loads(run("doctor", "--json", capsys=capsys))
    assert {"torch", "torchvision", "threads", "disk"} <= {f["what"] for f in findings}
    assert all(f["state"] != "BAD" for f in findings)


def test_doctor_names_a_torchvision_that_does_not_fit(monkeypatch, capsys):
    import fewstep.doctor as doctor

    versions, importing = doctor.importlib.metadata.version, doctor.importlib.import_module

    def broken(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return importing(name)

    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "0.28.0" if name == "torchvision" else versions(name)
    )
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    said = refuse("doctor", capsys=capsys)
    assert "torchvision" in said
    assert "pip uninstall torchvision" in said


def test_each_condition_gets_its_own_table_when_asked(tmp_path, capsys):
    words = [
        "--nfe",
        "2",
        "--noise",
        "8",
        "--effort",
        "search",
        "--guidance",
        "1,2",
        "--condition",
        "label=3",
        "--out",
        str(tmp_path),
    ]
    reports = json.loads(run("tune", "digits", *words, "--each", "--json", capsys=capsys))
    assert [r["facts"]["conditions"] for r in reports] == [["label=3"], ["label=3, guidance=2"]]
    assert (tmp_path / "label-3_guidance-2" / "nfe-2" / "sampler.json").exists()


def test_settings_come_from_a_file_and_flags_win(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text('nfe = [3, 5]\neffort = "search"\nnoise = 12\nseed = 7\n')
    said = run("tune", RING, "--config", str(file), "--seed", "9", "--print-config", capsys=capsys)
    assert "nfe = [3, 5]" in said
    assert "seed = 9" in said
    again = tmp_path / "printed.toml"
    again.write_text(said)
    assert run("tune", RING, "--config", str(again), "--print-config", capsys=capsys) == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "digts"], 'did you mean "digits"'),
        (["tune", RING, "--effrt", "fit"], "Did you mean --effort"),
        (["tune", RING, "--effort", "fot"], 'Did you mean "fit"'),
        (["tun"], 'Did you mean "tune"'),
        (["tune", RING, "--nfe", "0"], "at least 1 call, got"),
        (["tune", RING, "--condition", "colour=red"], "a condition is written label=3"),
        (["tune", f"{__name__}:nan_model"], "NaN at call 1 "),
        (["tune", f"{__name__}:wide_model"], r"must return shape (512, 2), got (512, 4)"),
        (["tune", f"{__name__}:failing_model"], "no weights here"),
        (["tune", "digits", "--condition", "label=12"], "label must lie in 0..9"),
        (["tune", RING, "--guidance", "2"], "guidance needs a condition"),
        (["sample", RING, "--sampler", "eular", "--nfe", "4"], "did you mean euler"),
        (["sample", RING, "--sampler", "euler"], "--nfe 8"),
        (["sample", RING, "--sampler", "heun", "--nfe", "5"], "cannot spend exactly 5 calls; the nearest budgets are 4 and 6"),
        (["sample", RING, "--sampler", "euler@unifrm", "--nfe", "5"], 'unknown grid "unifrm"'),
        (["sample", RING, "--sampler", "euler", "--nfe", "0"], "at least 1 call, got 0"),
        (["sample", RING, "--sampler", "euler", "--nfe", "2", "--num", "0"], "--num must be at least 1"),
        (["evaluate", RING, "--samplers", "euler", "--nfe", "three"], "three"),
        (["evaluate", f"{__name__}:nan_model", "--samplers", "euler", "--nfe", "3"], "NaN at call"),
    ],
)
def test_bad_input_gives_a_message_and_a_non_zero_exit(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(*words, capsys=capsys)


def test_an_unknown_key_in_a_settings_file_suggests_the_right_one(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text("nef = [4]\n")
    assert 'did you mean "nfe"' in refuse("tune", RING, "--config", str(file), capsys=capsys)
    file.write_text("nfe = [4\n")
    assert "neither TOML, YAML nor JSON" in refuse("tune", RING, "--config", str(file), capsys=capsys)
    assert "cannot read" in refuse("tune", RING, "--config", str(tmp_path / "none.toml"), capsys=capsys)
    listed = tmp_path / "settings.json"
    listed.write_text("[1]")
    assert "must hold settings by name" in refuse("tune", RING, "--config", str(listed), capsys=capsys)


def test_a_sampler_for_another_shape_or_path_is_refused(tuned, capsys):
    folder = str(tuned / "nfe-4")
    assert "(3,)" in refuse("sample", f"{__name__}:other_shape", "--sampler", folder, capsys=capsys)
    assert "Cosine()" in refuse("sample", f"{__name__}:cosine_ring", "--sampler", folder, capsys=capsys)


def test_a_damaged_sampler_is_refused(tuned, tmp_path, capsys):
    folder = tmp_path / "nfe-4"
    Sampler.load(tuned / "nfe-4").save(folder)
    file = folder / "sampler.json"
    file.write_text(file.read_text()[:-30])
    assert "sampler.json" in refuse("sample", RING, "--sampler", str(folder), capsys=capsys)
    assert "holds no sampler with 9 calls" in refuse("sample", RING, "--sampler", str(tuned), "--nfe", "9", capsys=capsys)
    assert "choose one with --nfe" in refuse("sample", RING, "--sampler", str(tuned), capsys=capsys)


def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert str(blocked) in refuse("tune", RING, "--out", str(blocked / "x"), capsys=capsys)


def test_ctrl_c_leaves_no_half_written_file_and_the_next_run_goes_on(tmp_path):
    # A shell may have started the tests with SIGINT ignored, which children inherit.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "import fewstep.cli; fewstep.cli.main(sys.argv[1:])"
    words = [sys.executable, "-c", start, "tune", "digits", "--nfe", "6", "--noise", "64", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("progress/*/journal.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert not list(tmp_path.glob("nfe-*"))
    assert {p.name for p in tmp_path.iterdir()} == {"progress"}


def test_help_needs_no_torch():
    code = "import sys, fewstep.cli; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
