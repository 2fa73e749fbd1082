from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewstep import EDM, VP, ArtifactError, BudgetError, FewstepError, TimeGrid, methods, tabulate
from fewstep.candidates import angle_grid, grids
from fewstep.cli import main
from fewstep.config import TuneConfig, as_flags, parse_conditions, settings_in, to_toml
from fewstep.coordinates import Coordinates
from fewstep.naming import resolve
from fewstep.outputs import contact_sheet, save_samples
from fewstep.stock import stock_samplers
from fewstep.tuners import Bespoke, Boss, LearnedKnots, LeastSquares, NonStationary
from fewstep.zoo.mixtures import mixture, ring
from problems import randn

# Pictures


def plain_images(*values, channels=1, height=2, width=3):
    """One image of a single value for each value."""
    return torch.stack([torch.full((channels, height, width), float(value)) for value in values])


def pixels(sheet):
    """The sheet at one pixel per pixel, whatever it was enlarged to."""
    scale = max(s for s in range(1, 641) if all(size % s == 0 for size in sheet.shape[:2]) and bool(same_blocks(sheet, s)))
    return sheet[::scale, ::scale], scale


def same_blocks(sheet, scale):
    small = sheet[::scale, ::scale]
    return torch.equal(small.repeat_interleave(scale, 0).repeat_interleave(scale, 1), sheet)


def test_images_are_placed_row_by_row_with_a_white_gap():
    sheet = contact_sheet(plain_images(-1, -0.5, 0, 0.5, 0.9))
    assert sheet.dtype == torch.uint8
    small, _ = pixels(sheet)
    assert small.shape == (2 * 2 + 1, 3 * 3 + 2, 3)
    grey = small[..., 0]
    assert torch.equal(grey[..., None].expand_as(small), small)
    expected = [0, 64, 128, 191, 242]
    for k, value in enumerate(expected):
        top, left = 3 * (k // 3), 4 * (k % 3)
        assert abs(grey[top : top + 2, left : left + 3].int() - value).max() <= 1
    assert (grey[2] == 255).all()  # the gap between the rows
    assert (grey[:, 3] == 255).all()
    assert (grey[3:, 8:] == 255).all()  # the place of the sixth image


def test_pixels_keep_their_order_inside_an_image():
    image = torch.linspace(-1, 1, 12).view(1, 1, 3, 4)
    small, _ = pixels(contact_sheet(image))
    assert small.shape == (3, 4, 3)
    assert small[..., 0].flatten().tolist() == sorted(small[..., 0].flatten().tolist())
    assert (int(small[0, 0, 0]), int(small[-1, -1, 0])) == (0, 255)


def test_colours_stay_in_their_channels():
    image = plain_images(0, channels=3)
    image[0, 0], image[0, 1], image[0, 2] = 1.0, -1.0, 0.0
    assert contact_sheet(image)[0, 0].tolist() == [255, 0, 128]


def test_values_beyond_the_range_are_clipped_not_wrapped():
    sheet, _ = pixels(contact_sheet(plain_images(-7.0, 7.0, -1.0, 1.0)))
    assert sheet[0, 0, 0] == sheet[3, 0, 0] == 0
    assert sheet[0, 4, 0] == sheet[3, 4, 0] == 255


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4), (64, 8, 8)]
)
def test_the_sheet_is_nearly_square(count, rows, columns):
    sheet = contact_sheet(torch.zeros(count, 1, 8, 8))
    assert sheet.shape[0] * (9 * columns - 1) == sheet.shape[1] * (9 * rows - 1)


def test_small_pictures_are_enlarged_and_large_ones_left_alone():
    small, large = contact_sheet(torch.zeros(64, 1, 8, 8)), contact_sheet(torch.zeros(4, 3, 400, 300))
    assert 320 < max(small.shape) <= 640
    assert large.shape == (801, 601, 3)


def test_half_precision_images_that_carry_a_graph_are_drawn():
    images = plain_images(0.5).to(torch.bfloat16).requires_grad_()
    assert contact_sheet(images).unique().tolist() == [191]


# Samples on disk


def test_samples_and_labels_are_read_back_as_they_were(tmp_path):
    samples, labels = randn(6, 5), torch.arange(6)
    assert save_samples(samples, tmp_path / "new" / "folder", labels) == [
        tmp_path / "new" / "folder" / name for name in ("samples.safetensors", "samples.png")
    ]
    kept = load_file(tmp_path / "new" / "folder" / "samples.safetensors")
    assert set(kept) == {"samples", "labels"}
    assert torch.equal(kept["samples"], samples)
    assert torch.equal(kept["labels"], labels)


def test_samples_without_labels_have_none_on_disk(tmp_path):
    save_samples(randn(3, 2), tmp_path)
    assert set(load_file(tmp_path / "samples.safetensors")) == {"samples"}


def test_samples_that_are_views_with_a_graph_are_written(tmp_path):
    samples = randn(5, 4).requires_grad_().T
    save_samples(samples, tmp_path)
    assert torch.equal(load_file(tmp_path / "samples.safetensors")["samples"], samples.detach())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_drawn_as_their_contact_sheet(channels, tmp_path):
    images = randn(7, channels, 4, 4).clamp(-1, 1)
    files = save_samples(images, tmp_path)
    assert [file.name for file in files] == ["samples.safetensors", "samples.png"]
    drawn = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    assert torch.equal(torch.from_numpy((drawn * 255).round()).to(torch.uint8), contact_sheet(images))


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 2, 8, 8), (4, 3, 60)])
def test_what_is_no_image_is_drawn_as_points_or_curves(shape, tmp_path):
    save_samples(randn(*shape), tmp_path)
    drawn = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*; a file is where a folder should be; choose another folder"):
        save_samples(randn(2, 2), tmp_path / "file" / "in it")


# Names of samplers


def cloud(path=None):
    return mixture(1.2 * randn(3, 2), torch.full((2,), 0.05, dtype=torch.float64), path)


def named(name, model=None, budgets=(4,), noises=24):
    model = model or ring()
    return resolve(name, model, model.given(), randn(noises, 2), budgets)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("eular", "euler"),
        ("midpiont", "midpoint"),
        ("pfdif1_1", "pfdiff1_1"),
        ("FlowMatchEular", "FlowMatchEuler"),
        ("unipc2", "UniPC2"),
        ("DPMSolverMultistp2", "DPMSolverMultistep2"),
        ("bos", "boss"),
        ("fitt", "fit"),
        ("Euler", "euler"),
    ],
)
def test_an_unknown_name_suggests_what_was_meant(name, suggested):
    with pytest.raises(FewstepError, match=rf'unknown sampler "{name}" at 4 calls: .*; did you mean .*\b{suggested}\b'):
        named(name)


def test_a_name_like_no_other_points_to_the_list():
    with pytest.raises(FewstepError, match=r'unknown sampler "zzzzzz" .*; see `fewstep methods`$'):
        named("zzzzzz")


def test_a_method_that_is_misspelt_before_its_grid_is_still_recognised():
    with pytest.raises(FewstepError, match=r"did you mean .*heun"):
        named("huen@uniform")


def test_an_unknown_grid_lists_those_there_are():
    with pytest.raises(
        FewstepError,
        match=r'unknown grid "bos" in "euler@bos"; grids are uniform, .*, boss, gits, oss, learned$',
    ):
        named("euler@bos")


@pytest.mark.parametrize("nfe", [0, -3])
@pytest.mark.parametrize("name", ["euler", "fit", "UniPC2"])
def test_a_budget_below_one_call_is_refused(name, nfe):
    with pytest.raises(BudgetError, match=f"a budget is at least 1 call, got {nfe}"):
        named(name, budgets=(nfe,))


@pytest.mark.parametrize("budgets", [None, ()])
def test_a_name_without_a_budget_is_refused(budgets):
    with pytest.raises(BudgetError, match='"euler" is not a directory, so the number of calls must be given: --nfe 8'):
        named("euler", budgets=budgets)


def test_a_method_walks_uniform_steps_unless_told_otherwise():
    found = named("euler")["euler"]
    assert torch.equal(found.b, tabulate(methods.euler, TimeGrid.uniform(4)).b)
    assert found.provenance.method == "euler"


@pytest.mark.parametrize("grid", sorted(grids(2, ring().path)))
def test_a_method_walks_the_grid_that_it_is_given(grid):
    found = named(f"heun@{grid}")[f"heun@{grid}"]
    assert torch.equal(found.times[::2], grids(2, ring().path)[grid].knots[:-1])
    assert found.provenance.method == f"heun@{grid}"


@pytest.mark.parametrize("path", [VP(), EDM()], ids=str)
def test_on_diffusion_paths_a_method_walks_equal_angles(path):
    model = cloud(path)
    found = named("ddim", model)["ddim"]
    assert torch.equal(found.times, angle_grid(Coordinates(path), 4).knots[:-1])
    assert float(found.a[0]) == pytest.approx(model.path.start_scale)


def test_the_boss_grid_is_found_for_the_steps_that_the_budget_buys():
    model, noise = ring(), randn(24, 2)
    expected = Boss().grids(model.given(), noise, (2,))[2]
    found = resolve("heun@boss", model, model.given(), noise, (4,))["heun@boss"]
    assert torch.equal(found.times[::2], expected.knots[:-1])


def test_tuners_are_run_on_the_noise_given():
    model, noise = ring(), randn(40, 2)
    tuners = {"boss": Boss(), "oss": Boss(states="student"), "fit": LeastSquares(), "bespoke-euler": Bespoke("euler")}
    tuners |= {"nonstationary": NonStationary(), "euler@learned": LearnedKnots(methods.euler)}
    for name, tuner in tuners.items():
        found = resolve(name, model, model.given(), noise, (3,))[name]
        assert torch.equal(found.b, tuner(model.given(), noise, nfe=3).b)
        assert found.provenance.method == name


def test_any_method_walks_the_published_grids():
    model, noise = ring(), randn(24, 2)
    for name, tuner in (("gits", Boss(cost="deviation", discount=1.15)), ("oss", Boss(states="student"))):
        found = resolve(f"pfdiff1_1@{name}", model, model.given(), noise, (3,))[f"pfdiff1_1@{name}"]
        expected = tabulate(methods.pfdiff(1, 1), tuner.grids(model.given(), noise, (5,))[5])
        assert torch.equal(found.b, expected.b)


def test_a_stock_scheduler_is_one_of_its_own_velocity_tables():
    found = named("UniPC2")["UniPC2"]
    expected = stock_samplers(ring().path, 4)["UniPC2"].sampler.rebase(ring().path, "velocity")
    assert found.predicts == "velocity"
    assert torch.equal(found.b, expected.b)


def test_every_method_and_stock_scheduler_of_a_path_has_a_table_or_a_reason(unchecked):
    model, found = cloud(EDM()), []
    for name in [*methods.registry(model.path), *stock_samplers(model.path, 4)]:
        with suppress(FewstepError):
            found.append(named(name, model)[name])
    assert len(found) >= 10
    assert {sampler.nfe for sampler in found} == {4}


def test_several_budgets_are_told_apart_by_their_calls():
    found = named("euler", budgets=(2, 5))
    assert {name: sampler.nfe for name, sampler in found.items()} == {"euler (2)": 2, "euler (5)": 5}


def test_a_folder_of_samplers_is_read_in_order_of_calls(tmp_path):
    for n in (10, 2, 4):
        tabulate(methods.euler, TimeGrid.uniform(n)).save(tmp_path / f"nfe-{n}")
    found = named(str(tmp_path), budgets=None)
    assert [Path(name).name for name in found] == ["nfe-2", "nfe-4", "nfe-10"]
    assert [sampler.nfe for sampler in found.values()] == [2, 4, 10]
    assert [sampler.nfe for sampler in named(str(tmp_path), budgets=(4, 10)).values()] == [4, 10]
    with pytest.raises(BudgetError, match=r"holds no sampler with 3 or 5 calls"):
        named(str(tmp_path), budgets=(3, 5))


def test_a_single_sampler_directory_goes_by_its_own_name(tmp_path):
    tabulate(methods.euler, TimeGrid.uniform(3)).save(tmp_path)
    assert list(named(str(tmp_path), budgets=None)) == [str(tmp_path)]


def test_an_empty_folder_says_what_is_missing(tmp_path):
    with pytest.raises(ArtifactError, match=r"expected a sampler folder with the file .*sampler\.json, but it is missing"):
        named(str(tmp_path), budgets=None)


def test_a_folder_with_the_name_of_a_method_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tabulate(methods.euler, TimeGrid.uniform(7)).save("midpoint")
    assert named("midpoint", budgets=None)["midpoint"].nfe == 7


# Settings


def printed(words, capsys):
    """The settings that `fewstep tune` understands."""
    with pytest.raises(SystemExit) as stop:
        main(["tune", "digits", *words, "--print-config"])
    said = capsys.readouterr()
    assert stop.value.code in (0, None), said
    return said.out


# Plain arguments: the shape checks of TuneConfig itself draw random numbers, which hypothesis forbids in a strategy.
SETTINGS = st.builds(
    dict,
    nfe=st.lists(st.integers(1, 50), min_size=1, max_size=4).map(tuple),
    effort=st.sampled_from(["search", "fit"]),
    guidance=st.lists(st.floats(-20, 20), max_size=3).map(tuple),
    condition=st.lists(st.integers(0, 99).map(lambda k: f"label={k}"), max_size=3).map(tuple),
    each=st.booleans(),
    metric=st.sampled_from(["rmse", "worst"]),
    noise=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    out=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(Path),
)


@given(SETTINGS)
def test_settings_survive_their_toml_file(tmp_path_factory, settings):
    config = TuneConfig(**settings)
    file = tmp_path_factory.mktemp("settings") / "settings.toml"
    file.write_bytes(to_toml(config).encode())
    data = settings_in(file, TuneConfig)
    assert data.keys() == {f.name for f in fields(TuneConfig)}
    again = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    assert TuneConfig(**{**again, "out": Path(again["out"])}) == config


@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(),
        TuneConfig(nfe=(3, 5), effort="search", each=True, metric="worst", noise=7, seed=9),
        TuneConfig(guidance=(1.0, 2.5), condition=("label=3", "label=4")),
        TuneConfig(guidance=(-1.0, 1e-7, 1e22)),
        TuneConfig(out=Path("with space, and comma")),
        TuneConfig(out=Path("-starts-with-a-dash")),
        TuneConfig(out=Path("with=equals\x7f")),
        TuneConfig(out=Path('quote " and \\ back')),
        TuneConfig(out=Path("äöü 🙂")),
    ],
)
def test_settings_survive_file_and_flags_and_the_parser(config, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(config))
    assert printed(["--config", str(file)], capsys) == to_toml(config)


@pytest.mark.parametrize(
    "words", [["--config", "FILE", "--seed", "9"], ["--config=FILE", "--seed=9"], ["--seed=9", "--config=FILE"]]
)
def test_flags_win_over_the_file_however_they_are_written(words, tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text("noise = 12\nseed = 7\n")
    said = printed([word.replace("FILE", str(file)) for word in words], capsys).splitlines()
    assert "seed = 9" in said
    assert "noise = 12" in said


def test_flags_hold_one_word_for_each_setting():
    flags = as_flags({"nfe": [4, 6], "guidance": [1.0, 2.5], "noise": 12, "each": True, "condition": ["label=3", "label=4"]})
    assert as_flags({"each": False}) == []
    assert "4,6" in " ".join(flags)
    assert "1.0,2.5" in " ".join(flags)
    assert sum("--condition" in word for word in flags) == 2
    assert as_flags({"condition": "label=3"}) == as_flags({"condition": ["label=3"]})


def test_settings_may_be_json(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"nfe": [3], "effort": "search"}')
    assert settings_in(file, TuneConfig) == {"nfe": [3], "effort": "search"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "nef = [4]", 'unknown key "nef" in .*; did you mean "nfe"'),
        ("a.toml", "zzz = 1", 'unknown key "zzz" in .*; known keys: nfe, effort'),
        ("a.toml", "nfe = [4", "is neither TOML, YAML nor JSON"),
        ("a.json", "{", "is neither TOML, YAML nor JSON"),
        ("a.json", "[1]", "must hold settings by name, such as nfe"),
    ],
)
def test_a_file_that_is_not_settings_is_refused(name, text, message, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        settings_in(file, TuneConfig)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path):
    file = tmp_path / "a.toml"
    with pytest.raises(ValueError, match=r"cannot read .*a\.toml: No such file"):
        settings_in(file, TuneConfig)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is neither TOML, YAML nor JSON"):
        settings_in(file, TuneConfig)


def test_conditions_are_every_label_with_every_guidance():
    assert parse_conditions((), ()) is None
    assert parse_conditions(("label=3",), ()) == [{"label": 3, "guidance": 1.0}]
    assert parse_conditions((), (1.0, 2.0)) == [{"guidance": 1.0}, {"guidance": 2.0}]
    both = [{"label": k, "guidance": w} for k in (3, 4) for w in (1.0, 2.0)]
    assert parse_conditions(("label=3", " label = 4 "), (1.0, 2.0)) == both


@pytest.mark.parametrize("text", ["label=x", "label=-1", "label", "colour=3", "", "label=1.5", "label=²"])
def test_a_condition_that_is_not_a_label_is_refused(text):
    with pytest.raises(ValueError, match=r"a condition is written label=3, got "):
        parse_conditions((text,), ())
