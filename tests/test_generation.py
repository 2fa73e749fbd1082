import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep import FewstepError, TimeGrid, adapt, load, methods, tabulate
from fewstep.evaluation import Extractor, Features, compare_images, features_of, generate, generation
from fewstep.keyed import Keyed
from problems import randn

EULER = tabulate(methods.euler, TimeGrid.uniform(2)).named("euler")


class Network(nn.Module):
    """Velocities that depend on the class, so that a sample's condition shows."""

    shape = (2, 3)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x, t, label=None, shift=None):
        y = self.scale * x
        if label is not None:
            y = y + label.to(x)[:, None, None] / 10
        return y if shift is None else y + shift


def network_model(**settings):
    return adapt(Network(), **settings)


PLAIN = network_model()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 16)


def files(folder):
    return sorted(file.name for file in Path(folder).rglob("*.safetensors"))


def test_what_is_drawn_is_what_the_sampler_gives():
    drawn = generate(EULER, PLAIN, 70, seed=3, keep=5)
    sample = EULER(PLAIN.given(), Keyed(3, 0, 0, 70).normal("noise", 2, 3))
    torch.testing.assert_close(drawn.features.values, sample.clamp(-1, 1).flatten(1))
    torch.testing.assert_close(drawn.images, sample[:5])
    assert float(sample.abs().max()) > 1
    assert (drawn.features.limits, drawn.seed, drawn.nfe, drawn.passes) == ((-1.0, 1.0), 3, 2, 2)
    assert generate(EULER, PLAIN, 1).images.shape == (0, 2, 3)


@pytest.mark.usefixtures("small_chunks")
def test_the_batch_does_not_matter(tmp_path):
    whole = generate(EULER, PLAIN, 50).features
    for batch in (1, 7, 1000):
        torch.testing.assert_close(generate(EULER, PLAIN, 50, batch=batch).features.values, whole.values)
    stored = generate(EULER, PLAIN, 50, out=tmp_path).features
    assert torch.equal(stored.values, whole.values)
    assert stored.limits == whole.limits
    torch.testing.assert_close(generate(EULER, PLAIN, 20).features.values, whole.values[:20])
    assert not torch.equal(generate(EULER, PLAIN, 50, seed=1).features.values, whole.values)


@pytest.mark.parametrize("kind", ["labels", "mappings", "classes", "none"])
def test_conditions_are_taken_in_turn(kind):
    labels = [0, 1, 2]
    given = {
        "labels": labels,
        "mappings": [{"label": i, "shift": torch.full((1, 2, 3), i / 4), "name": "same"} for i in labels],
        "classes": None,
        "none": [],
    }[kind]
    call = lambda net, x, t, c: net(x, t, **{k: v for k, v in c.items() if k != "name"})  # noqa: E731
    model = network_model(classes=3, call=call)
    drawn = generate(EULER, model, 8, conditions=given, batch=5, keep=8)
    noise = Keyed(0, 0, 0, 8).normal("noise", 2, 3)
    for i in range(8):
        label = i % 3
        condition = {"shift": torch.full((1, 2, 3), label / 4)} if kind == "mappings" else {}
        field = model.given(None if kind == "none" else label, condition=condition)
        torch.testing.assert_close(drawn.images[i : i + 1], EULER(field, noise[i : i + 1]))


def test_guidance_costs_two_passes():
    drawn = generate(EULER, network_model(classes=3, null_label=3), 6, guidance=2.0)
    assert (drawn.nfe, drawn.passes) == (2, 4)


# --- folders -----------------------------------------------------------------------------------------------------------


class Stops:
    """Pixels, until it has been asked too often."""

    def __init__(self, calls):
        self.left, self.asked = calls, 0

    def __call__(self, x):
        self.left, self.asked = self.left - 1, self.asked + 1
        if self.left < 0:
            raise KeyboardInterrupt
        return x.flatten(1)


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        generate(EULER, PLAIN, 60, extractor=Extractor("p", Stops(2)), out=tmp_path)
    assert files(tmp_path) == ["features-00000000-00000016.safetensors", "features-00000016-00000032.safetensors"]
    rest = Stops(100)
    resumed = generate(EULER, PLAIN, 60, extractor=Extractor("p", rest), out=tmp_path).features
    assert rest.asked == 2
    torch.testing.assert_close(resumed.values, generate(EULER, PLAIN, 60).features.values)
    again = Stops(0)
    generate(EULER, PLAIN, 60, extractor=Extractor("p", again), out=tmp_path)
    more = Stops(100)  # the last chunk of 60 was not whole
    generate(EULER, PLAIN, 80, extractor=Extractor("p", more), out=tmp_path)
    assert (again.asked, more.asked) == (0, 2)


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_file_is_made_again(tmp_path):
    first = generate(EULER, PLAIN, 32, out=tmp_path).features
    damaged = sorted(tmp_path.rglob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert torch.equal(generate(EULER, PLAIN, 32, out=tmp_path).features.values, first.values)


def test_other_recipes_get_folders_of_their_own(tmp_path):
    other = network_model()
    other.network.scale.data += 1e-3
    calls = [
        (EULER, PLAIN, {}),
        (tabulate(methods.euler, TimeGrid([0.0, 0.4, 1.0])).named("euler"), PLAIN, {}),
        (EULER, other, {}),
        (EULER, PLAIN, {"seed": 1}),
        (EULER, PLAIN, {"conditions": [1, 2]}),
        (EULER, PLAIN, {"conditions": [{"shift": torch.ones(1, 2, 3)}]}),
        (EULER, PLAIN, {"conditions": [{"shift": torch.zeros(1, 2, 3)}]}),
        (EULER, PLAIN, {"extractor": Extractor("p", torch.flatten)}),
        (EULER, PLAIN, {"extractor": Extractor("pixels", nn.Linear(3, 1))}),
        (EULER, PLAIN, {"extractor": Extractor("pixels", torch.flatten, limits=(-2, 2))}),
    ]
    for sampler, model, settings in calls:
        extractor = settings.get("extractor")
        if extractor is not None and not isinstance(extractor.network, nn.Module):
            settings["extractor"] = replace(extractor, network=lambda x: x.flatten(1))
        generate(sampler, model, 4, out=tmp_path, **settings)
        generate(sampler, model, 4, out=tmp_path, batch=2, **settings)
    folders = list(tmp_path.iterdir())
    assert len(folders) == len(calls)
    assert {json.loads((folder / "generation.json").read_text())["sampler"] for folder in folders} == {"euler"}


SCRIPT = """
    import sys
    from accelerate import PartialState
    from fewstep import TimeGrid, load, methods, tabulate
    from fewstep.evaluation import generate, generation

    generation.CHUNK = 16
    state = PartialState(cpu=True)
    table = tabulate(methods.euler, TimeGrid.uniform(2))
    drawn = generate(table, load("digits"), 75, out=sys.argv[1], batch=10)
    drawn.features.save(f"{sys.argv[1]}/of-{state.process_index}")
    try:
        generate(table, load("digits"), 75)
    except Exception as error:
        print(error)
    state.destroy_process_group()
"""


def test_two_processes_draw_what_one_does(tmp_path):
    (tmp_path / "draw.py").write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [  # as torchrun starts them
        subprocess.Popen(
            [sys.executable, tmp_path / "draw.py", tmp_path],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    one = generate(tabulate(methods.euler, TimeGrid.uniform(2)), load("digits"), 75).features
    for process in "01":
        two = Features.load(tmp_path / f"of-{process}")
        torch.testing.assert_close(two.values, one.values, rtol=1e-5, atol=1e-5)
        assert "several processes put their features together in a folder: pass out=" in said[int(process)][0]
    assert len(files(tmp_path)) == 5


# --- comparisons -------------------------------------------------------------------------------------------------------


def test_samplers_are_compared_with_the_floor(tmp_path):
    """The flow dx/dt = -x / 2 takes noise to standard deviation exp(-1/2): the finer table comes nearer to such data."""
    plane = Extractor("plane", lambda x: x.flatten(1), limits=None)
    real = features_of(randn(400, 2, 3, seed=5) * 0.6065, plane)
    fine = tabulate(methods.euler, TimeGrid.uniform(8)).named("fine")
    coarse = tabulate(methods.euler, TimeGrid.uniform(1)).named("coarse")
    settings = {"extractor": plane, "out": tmp_path, "groups": {"fine": "method"}}
    report = compare_images([coarse, fine], PLAIN, real, 200, **settings)
    assert [(row.name, row.nfe, row.group) for row in report.rows] == [
        ("real data", 0, "other"),
        ("coarse", 1, "other"),
        ("fine", 8, "method"),
    ]
    floor, worse, better = (row.metrics["FD (plane, 200)"] for row in report.rows)
    assert worse.low > better.high
    assert better.value < 3 * floor.value
    assert len(list(tmp_path.iterdir())) == 6  # two samplers, three seeds
    assert report.facts["seeds"] == [0, 1, 2]
    assert "| real data |" in report.to_markdown()
    assert compare_images({"coarse": coarse, "fine": fine}, PLAIN, real, 200, **settings) == report
    with pytest.raises(ValueError, match="at least one seed"):
        compare_images([fine], PLAIN, real, 200, seeds=[])


def test_samplers_on_the_same_noise_are_told_apart_by_their_difference(tmp_path):
    plane = Extractor("plane", lambda x: (x.flatten(1), x[:, 0]), limits=None)
    real = features_of(randn(400, 2, 3, seed=5) * 0.75, plane)
    tables = {f"euler {n}": tabulate(methods.euler, TimeGrid.uniform(n)) for n in (8, 3, 4)}
    report = compare_images(tables, PLAIN, real, 200, extractor=plane, out=tmp_path, against="euler 4")
    rows = {row.name: row.metrics for row in report.rows}
    assert list(rows) == ["real data", *tables]
    for kind in ("FD", "spatial FD"):
        worse, better = (rows[name][f"{kind} - euler 4"] for name in ("euler 3", "euler 8"))
        values = {name: rows[name][f"{kind} (plane, 200)"] for name in tables}
        assert worse.value == pytest.approx(values["euler 3"].value - values["euler 4"].value, abs=1e-9)
        assert better.high < 0 < worse.low
        assert values["euler 8"].high > values["euler 4"].low  # apart they say nothing
        assert f"{kind} - euler 4" not in rows["euler 4"]
    with pytest.raises(ValueError, match="against must be one of euler 8, euler 3, euler 4, got heun"):
        compare_images(tables, PLAIN, real, 200, extractor=plane, against="heun")


# --- bad input ---------------------------------------------------------------------------------------------------------


def blows_up(x, t):
    return torch.where(torch.arange(len(x)).view(-1, 1, 1) == 2, torch.nan, x)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (PLAIN, {"extractor": "inceptoin"}, 'unknown extractor "inceptoin": did you mean "inception"'),
        (adapt(blows_up, shape=(2, 3)), {"batch": 4}, "euler gave NaN or infinity in sample 2 of seed 0, 1 in all"),
        (adapt(nn.Identity()), {}, r"Identity does not say the shape of a sample: use adapt\(..., shape=...\)"),
        (PLAIN, {"conditions": [1, {"label": 2}]}, "conditions must be labels throughout, or mappings with the same keys"),
        (PLAIN, {"conditions": [{"shift": torch.ones(2, 2, 3)}]}, 'condition "shift" must have a batch of one in each mapping'),
        (PLAIN, {"conditions": [{"a": "x"}, {"a": "y"}]}, 'condition "a" differs and has no batch'),
        (adapt(blows_up, shape=(2, 3)), {"out": "here"}, "blows_up is a function, which a folder cannot tell from another"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FewstepError, match=message):
        generate(EULER, model, 10, **settings)
    assert not files(tmp_path)


@pytest.mark.parametrize("settings", [{"count": 0}, {"batch": 0}, {"keep": -1}])
def test_numbers_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="count and batch must be at least 1 and keep at least 0"):
        generate(EULER, PLAIN, **{"count": 5, **settings})


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(FewstepError, match=r"several processes need accelerate: pip install 'fewstep\[train\]'"):
        generate(EULER, PLAIN, 5)


def test_a_bar_is_shown_on_request(capsys):
    generate(EULER, PLAIN, 5, progress=True)
    assert capsys.readouterr().out == ""
