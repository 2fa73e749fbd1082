"""The bundled model draws digits that a person reads, training resumes bit for bit, and nothing unsound is loaded."""

import dataclasses
import hashlib
import importlib.util
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewstep import zoo
from fewstep._types import ArtifactError, FewstepError
from fewstep.calling import flow_timestep
from fewstep.field import Model, adapt
from fewstep.grid import TimeGrid
from fewstep.path import EDM, VP, CondOT, DiscreteVP
from fewstep.trajectory import record, reference
from fewstep.zoo import checkpoint
from fewstep.zoo.checkpoint import CONFIG, WEIGHTS
from fewstep.zoo.network import ResidualMLP
from fewstep.zoo.networks import build

DIGITS = Path(zoo.__file__).parent / "digits"
CARD = Path(__file__).parents[1] / "benchmarks" / "digits_card.py"


@pytest.fixture(scope="module")
def digits() -> Model:
    return zoo.load("digits")


@pytest.fixture(scope="module")
def card() -> Any:
    """The script that writes the bundled model's page."""
    spec = importlib.util.spec_from_file_location("digits_card", CARD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound directory, to be spoilt."""
    return shutil.copytree(DIGITS, tmp_path / "model")


def small(**options: Any) -> Model:
    torch.manual_seed(0)
    return adapt(ResidualMLP((2,), 3, width=8, blocks=1), shape=(2,), classes=3, null_label=3, **options)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(5))


# --- the bundled model -------------------------------------------------------------------------------------------------


def test_the_bundled_model_is_what_the_issue_promises(digits):
    assert (digits.name, digits.shape, digits.classes, digits.null_label) == ("digits", (1, 8, 8), 10, 10)
    assert (digits.path, digits.predicts, digits.raw) == (CondOT(), "velocity", "plain")
    network = digits.network
    assert isinstance(network, ResidualMLP)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert zoo.bundled() == ["digits"]


def test_the_folder_is_small_and_complete():
    sizes = {file.name: file.stat().st_size for file in DIGITS.iterdir()}
    assert sizes.keys() == {WEIGHTS, CONFIG, "README.md", "curve.jsonl", "curve.png", "samples.png"}
    assert sizes[WEIGHTS] < 3_000_000
    assert sum(sizes.values()) < 3_300_000


def test_the_training_cost_counts_a_step_as_three_passes():
    training = zoo.read_config(DIGITS).training
    assert training is not None
    assert zoo.training_passes("digits") == 3 * training.steps * training.recipe["batch"] == training.network_passes
    assert zoo.training_passes(DIGITS) == training.network_passes
    assert zoo.training_passes("some.module:function") is None


def test_loading_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    zoo.load("digits")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_classifier_reads_the_digits(digits, card, guidance):
    from sklearn.svm import SVC

    real = card.load_digits()
    images, labels = torch.cat([real.images, real.held_images]), torch.cat([real.labels, real.held_labels])
    judge = SVC(C=10).fit(images.flatten(1).numpy(), labels.numpy())
    wanted = torch.arange(500) % 10
    drawn = record(digits.given(wanted, guidance=guidance), TimeGrid.uniform(40), noise(500)).states[-1]
    assert judge.score(drawn.clamp(-1, 1).flatten(1).numpy(), wanted.numpy()) >= 0.97


def test_the_field_is_smooth_enough_to_solve(digits):
    """Runge-Kutta converges within 64 steps, and Euler's error falls like its order."""
    field, x0 = digits.given(torch.arange(60) % 10), noise(60)
    solution = reference(field, x0, tol=1e-3, most_steps=64)
    errors = [float((record(field, TimeGrid.uniform(n), x0).states[-1] - solution.end).norm()) for n in (10, 20, 40)]
    assert errors[0] > 1.6 * errors[1] > 2.6 * errors[2]


def test_the_card_states_what_the_files_say():
    text, training = (DIGITS / "README.md").read_text(), zoo.read_config(DIGITS).training
    assert training is not None
    assert training.command in text
    assert f"{training.network_passes:,} network passes" in text
    assert all(f"{value:.4f}" in text for value in training.losses.values())
    assert "CC BY 4.0" in text
    assert "{" not in text
    curve = [json.loads(line) for line in (DIGITS / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == training.steps
    assert curve[-1]["held_out"] < curve[0]["held_out"]


def test_the_card_is_written_again_from_the_model(model, card, monkeypatch):
    monkeypatch.setattr(card, "SAMPLES", 100)
    (model / "README.md").unlink()
    measured = card.write_card(model)
    assert measured.accuracy[1.0] > 0.9
    assert measured.euler[1.0][4] > measured.euler[1.0][20]
    assert "From 100 noises" in (model / "README.md").read_text()


# --- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_network_answers_in_its_own_precision(digits, dtype):
    import copy

    network, x = copy.deepcopy(digits.network).to(dtype), noise(4)
    label = torch.arange(4)
    expected = digits.network(x, torch.full((4,), 0.3), label)
    value = network(x.to(dtype), torch.full((4,), 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32), label)
    assert value.dtype == dtype
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value.float(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.05)


def test_half_precision_still_tells_times_apart():
    network = ResidualMLP((2,), 0, width=8, blocks=1).to(torch.bfloat16)
    x, times = torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([0.9, 0.9005])  # equal in bfloat16
    assert not torch.equal(*network._waves(times, x))


def test_no_label_is_the_null_label(digits):
    x = noise(3)
    null = digits.network(x, 0.5, torch.full((3,), 10))
    assert torch.equal(digits.network(x, 0.5), null)
    assert torch.equal(digits.network(x, torch.tensor(0.5)), null)
    assert not torch.equal(digits.network(x, 0.5, torch.zeros(3, dtype=torch.long)), null)


# --- directories -------------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(tmp_path, digits):
    zoo.save_model(digits, tmp_path / "a" / "copy", data_range=(-1.0, 1.0), training=zoo.read_config(DIGITS).training)
    again = zoo.load(str(tmp_path / "a" / "copy"))
    assert again.fingerprint() == digits.fingerprint()
    x, label = noise(8), torch.arange(8)
    assert torch.equal(again.given(label)(x, 0.37), digits.given(label)(x, 0.37))
    assert (tmp_path / "a" / "copy" / CONFIG).read_bytes() == (DIGITS / CONFIG).read_bytes()
    assert sorted(f.name for f in (tmp_path / "a" / "copy").iterdir()) == [CONFIG, WEIGHTS]


def test_other_paths_predictions_and_no_classes_are_kept(tmp_path):
    network = ResidualMLP((2, 3), 0, width=8, blocks=0)
    zoo.save_model(adapt(network, path=VP(0.2, 15.0), predicts="noise", name="mine"), tmp_path)
    again = zoo.load(tmp_path)
    assert (again.path, again.predicts, again.name, again.shape) == (VP(0.2, 15.0), "noise", "mine", (2, 3))
    assert (again.classes, again.null_label) == (None, None)
    assert again.given()(torch.zeros(2, 2, 3), 0.5).shape == (2, 2, 3)
    assert zoo.training_passes(tmp_path) is None


def test_saving_over_a_model_replaces_it(model):
    zoo.save_model(small(name="other"), model)
    assert zoo.load(model).name == "other"


def test_a_folder_named_like_a_bundled_model_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.save_model(small(name="mine"), "digits")
    assert zoo.load("digits").name == "digits"
    assert zoo.load("./digits").name == "mine"
    assert zoo.load(Path("digits")).name == "mine"


@pytest.mark.parametrize(
    ("kind", "shape", "classes", "config"),
    [
        ("mlp", (5,), 3, {"width": 8, "blocks": 1}),
        ("unet2d", (3, 16, 16), 4, {"channels": (8, 16), "layers": 1, "patch": 2, "dropout": 0.1}),
        ("unet2d", (1, 8, 12), 0, {"channels": [8], "layers": 1, "attention": False}),
        ("unet1d", (3, 20), 0, {"channels": (8, 16, 16)}),
        ("dit", (3, 8, 8), 4, {"width": 16, "heads": 2, "blocks": 1}),
        ("dit", (1, 8, 8), 0, {"width": 16, "heads": 2, "blocks": 1, "patch": 4}),
    ],
)
def test_every_kind_of_network_is_called_and_kept_alike(tmp_path, kind, shape, classes, config):
    torch.manual_seed(0)
    network = build(kind, shape, classes, config).eval()
    made = adapt(network, shape=shape, classes=classes or None, null_label=classes or None)
    zoo.save_model(made, tmp_path / "full")
    zoo.save_model(made, tmp_path / "half", stored="bfloat16")
    again, rounded = zoo.load(tmp_path / "full"), zoo.load(tmp_path / "half")
    x, label = torch.randn(2, *shape), torch.tensor([0, classes - 1]) if classes else None
    answer = made.given(label)(x, 0.3)
    assert answer.shape == x.shape
    assert torch.equal(again.given(label)(x, 0.3), answer)
    torch.testing.assert_close(rounded.given(label)(x, 0.3), answer, rtol=0.0, atol=0.05)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.7 * (tmp_path / "full" / WEIGHTS).stat().st_size
    network.train()
    if "dropout" not in config:  # nothing in it draws random numbers of its own
        assert torch.equal(network(x, 0.3), network(x, 0.3))
    if classes and kind != "mlp":  # its conditions start from nothing
        assert not torch.equal(made.given(1)(x, 0.3), made.given(2)(x, 0.3))
    if classes and "dropout" not in config:
        assert torch.equal(network(x, 0.3, torch.full((2,), classes)), network(x, 0.3))


@pytest.mark.parametrize(
    ("kind", "shape", "classes", "config", "message"),
    [
        ("cnn", (3,), 0, {}, "network must be one of mlp, unet2d, unet1d, dit, got 'cnn'"),
        ("mlp", (3,), 0, {"channels": (1, 2)}, "network mlp: channels: Extra inputs .*its options are width, blocks, dropout"),
        ("unet2d", (3,), 0, {}, r"takes samples with 3 axes, the data have shape \(3,\)"),
        ("unet2d", (3, 9, 8), 0, {}, "images of 9x8 do not divide by 2"),
        ("unet1d", (3, 8), 2, {}, "takes no classes"),
        ("unet1d", (3, 9), 0, {}, "length of 9 does not divide by 4"),
        ("unet1d", (3, 8), 0, {"channels": (9, 16)}, "must divide by 8"),
        ("dit", (3, 8, 4), 0, {}, "square images"),
        ("dit", (3, 8, 8), 0, {"heads": 5}, "must divide by its heads"),
        ("dit", (3, 2**14, 2**14), 0, {"patch": 1}, "more than it can hold"),
    ],
)
def test_networks_that_cannot_be_are_refused(kind, shape, classes, config, message):
    with pytest.raises(FewstepError, match=message):
        build(kind, shape, classes, config)


@pytest.mark.parametrize(("raw", "predicts", "path"), [("negated", "velocity", CondOT()), ("v_prediction", "noise", VP())])
def test_what_a_network_gives_is_kept(tmp_path, raw, predicts, path):
    made = adapt(ResidualMLP((2,), 0, 8, 1), path=path, predicts=predicts, raw=raw)
    zoo.save_model(made, tmp_path)
    again, x = zoo.load(tmp_path), torch.randn(3, 2)
    assert (again.raw, again.predicts) == (raw, predicts)
    assert torch.equal(again.given()(x, 0.4), made.given()(x, 0.4))
    assert not torch.equal(again.given()(x, 0.4), adapt(made.network, path=path, predicts=predicts).given()(x, 0.4))


def test_the_preconditioning_of_edm_is_kept(tmp_path):
    made = adapt(ResidualMLP((2,), 0, 8, 1), path=EDM(), predicts="data", raw="edm", sigma_data=0.7)
    zoo.save_model(made, tmp_path)
    again = zoo.load(tmp_path)
    assert (again.raw, again.sigma_data, again.path) == ("edm", 0.7, EDM())
    x = torch.randn(3, 2)
    assert torch.equal(again.given()(x, 0.4), made.given()(x, 0.4))


def refused(made: Model) -> str:
    with pytest.raises(ArtifactError) as caught:
        zoo.save_model(made, "never-written")
    assert not Path("never-written").exists()
    return str(caught.value)


def test_what_the_format_cannot_hold_is_not_saved():
    assert "only networks of fewstep.zoo.networks (mlp, unet2d, unet1d, dit) are saved" in refused(adapt(torch.nn.Linear(2, 2)))
    assert "no call or clock of their own" in refused(small(clock=flow_timestep))
    assert "no call or clock of their own" in refused(small(call=lambda network, x, t, condition: network(x, 1 - t)))
    assert "not DiscreteVP" in refused(small(path=DiscreteVP(torch.linspace(0.99, 0.01, 10))))
    assert "the model says (5,), None and None" in refused(adapt(ResidualMLP((2,), 3, 8, 1), shape=(5,)))
    assert ", None and 0" in refused(adapt(ResidualMLP((2,), 3, 8, 1), null_label=0))
    assert "name: String should have at least 1 character" in refused(dataclasses.replace(small(), name=""))
    broken = small()
    with torch.no_grad():
        broken.network.enter.weight[0, 0] = float("nan")  # type: ignore[attr-defined]
    assert "its weight enter.weight holds NaN or infinity" in refused(broken)


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*a file is where a folder should be"):
        zoo.save_model(small(), tmp_path / "file")


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        (folder / CONFIG).write_text(json.dumps(content))

    return edit


def reweighted(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Other weights with a matching checksum: what is left is that they do not fit."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
        edited("weights_sha256", hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())(folder)

    return edit


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))
    edited("weights_sha256", hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())(folder)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), r"config.json, but it is missing; pass a folder that fewstep saved"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model.safetensors, but it is missing"),
    "cut config": (lambda f: (f / CONFIG).write_bytes((f / CONFIG).read_bytes()[:100]), "not the JSON that fewstep wrote"),
    "no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "not the JSON that fewstep wrote"),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), "is not a model: it is no JSON object with a schema_version"),
    "newer": (edited("schema_version", 2), "has schema version 2, fewstep .* reads up to 1: written by a newer fewstep"),
    "version 0": (edited("schema_version", 0), "no JSON object with a schema_version from 1 on"),
    "unknown key": (edited("code", "print(1)"), "does not describe a model: code: Extra inputs are not permitted"),
    "kind": (edited("kind", "unet"), "kind: Input should be 'mlp', 'unet2d', 'unet1d' or 'dit'"),
    "text for a number": (edited("network.width", "192"), "network mlp: width: Input should be a valid integer"),
    "absurd width": (edited("network.width", 10**9), "network mlp: width: Input should be less than or equal to"),
    "absurd shape": (edited("shape", [2**20] * 9), "shape: List should have at most 8 items"),
    "path": (edited("path", "__import__('os')"), r"path must be CondOT\(\), .* got __import__"),
    "null label": (edited("null_label", 3), "null_label must be 10 or null, got 3"),
    "other width": (edited("network.width", 96), r"must be float32 of shape \(.*\), got torch.float32 of shape"),
    "one more block": (edited("network.blocks", 4), r"does not hold this network: missing \['blocks.3"),
    "many more blocks": (edited("network.blocks", 256), r"does not hold this network: missing \['blocks.10.first"),
    "large shape": (edited("shape", [1024, 1024, 1024]), r"(leave|enter).* must be float32 of shape .*1073741824"),
    "many classes": (edited("classes", 2**20), "null_label must be 1048576"),
    "one block less": (edited("network.blocks", 2), r"not asked for \['blocks.2"),
    "checksum": (edited("weights_sha256", "0" * 64), "was edited, cut off or belongs to another config.json"),
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "was edited, cut off"),
    "pickle": (pickled, "is not a safetensors file"),
    "NaN": (reweighted(lambda w: w["enter.bias"].fill_(float("nan"))), "weight enter.bias holds NaN or infinity"),
    "half": (reweighted(lambda w: w.update({"enter.bias": w["enter.bias"].half()})), "enter.bias must be float32"),
    "missing": (reweighted(lambda w: w.pop("enter.bias")), r"missing \['enter.bias'\], not asked for \[\]"),
    "folder": (lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()), "config.json, but it is missing"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_unsound_folder_gets_one_clear_line(model, name):
    spoil, message = SPOILT[name]
    spoil(model)
    with pytest.raises(ArtifactError, match=message) as caught:
        zoo.load(model)
    assert "\n" not in str(caught.value)


def test_a_file_of_absurd_size_is_not_read(model, monkeypatch):
    monkeypatch.setitem(checkpoint.SIZE_LIMIT, CONFIG, 10)
    with pytest.raises(ArtifactError, match="has more than 10 bytes"):
        zoo.load(model)


def test_a_file_that_cannot_be_read_says_so(model, monkeypatch):
    def fail(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ArtifactError, match=r"cannot read .*Permission denied; check its name and permissions"):
        zoo.load(model)


@given(position=st.integers(0, 10**9), byte=st.integers(0, 255))
def test_no_changed_byte_of_a_folder_raises_anything_else(position, byte, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    zoo.save_model(small(), folder)
    file = folder / (CONFIG, WEIGHTS)[position % 2]
    data = bytearray(file.read_bytes())
    data[position % len(data)] = byte
    file.write_bytes(data)
    try:
        zoo.load(folder)
    except ArtifactError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


# --- names and functions -----------------------------------------------------------------------------------------------

MODULE = """
import torch
from fewstep import adapt

def good():
    return adapt(lambda x, t: -x, shape=(2,), name="mine")

ready = good()
number = 3

def network():
    return torch.nn.Linear(2, 2)

def fails():
    raise RuntimeError("no weights\\nhere")
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("zoo_test_models.py").write_text(MODULE)
    Path("zoo_test_broken.py").write_text("import a_package_that_is_not_there")
    monkeypatch.delitem(sys.modules, "zoo_test_models", raising=False)
    return "zoo_test_models"


def test_a_function_of_the_working_directory_gives_a_model(module):
    before = list(sys.path)
    assert zoo.load(f"{module}:good").name == "mine"
    assert zoo.load(f"{module}:ready").name == "mine"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo_test_models:goodd", 'zoo_test_models has no "goodd", did you mean "good"'),
        ("zoo_test_models:zzzz", 'zoo_test_models has no "zzzz"'),
        ("zoo_test_models:", 'zoo_test_models has no ""'),
        ("zoo_test_models:number", "must return a fewstep Model, got int; return adapt"),
        ("zoo_test_models:network", "must return a fewstep Model, got Linear; return adapt"),
        ("zoo_test_models:fails", "calling it gave RuntimeError: no weights here"),
        ("zoo_test_nowhere:good", "importing zoo_test_nowhere gave ModuleNotFoundError: No module named"),
        ("zoo_test_broken:good", "importing zoo_test_broken gave ModuleNotFoundError: No module named 'a_package"),
        (":good", "importing  gave ValueError"),
        ("digit", 'unknown model "digit": did you mean "digits"\\? a model is a bundled name \\(digits\\), a directory'),
        ("some/where/else", r'unknown model "some/where/else": a model is a bundled name \(digits\)'),
        ("", 'unknown model "": a model is'),
        ("line\nbreak", 'unknown model "line break"'),
    ],
)
def test_names_that_give_no_model(module, name, message):
    with pytest.raises(FewstepError, match=message) as caught:
        zoo.load(name)
    assert "\n" not in str(caught.value)
