"""Samples are those of the file, each once an epoch, the same on any number of processes; bad data get one clear line."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from fewstep._errors import FewstepError
from fewstep.keyed import BLOCK, Keyed
from fewstep.training.data import TOYS, EndlessSource, FiniteSource, Source, open_source
from fewstep.training.data.checks import spread
from fewstep.training.data.source import epoch_rows

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 3, 6, 5), dtype=np.uint8)
LABELS = np.arange(10) % 3


def whole(source, step=0, seed=0):
    """One epoch of a finite source, in its own order."""
    return source.draw(Keyed(seed=seed, step=step, start=0, stop=source.size), source.size)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(stream, "png")
    return stream.getvalue()


def image_folder(folder: Path, pixels=PIXELS, labels=LABELS):
    for place, image in enumerate(pixels):
        file = folder / ("cat", "dog", "emu")[labels[place]] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return folder


def parquet(file: Path, columns, metadata=None):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return file


def cells(pixels=PIXELS):
    return [{"bytes": png(image), "path": None} for image in pixels]


def assert_holds(source: Source, pixels=PIXELS, labels=LABELS):
    """Every sample once, scaled, with its label."""
    x, label = whole(source)
    want = torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1
    place = [int((want - sample).flatten(1).abs().amax(1).argmin()) for sample in x]
    assert sorted(place) == list(range(len(pixels)))
    assert torch.equal(want[place], x)
    assert x.dtype == torch.float32
    assert source.shape == pixels.shape[1:]
    assert source.data_range == (-1, 1)
    if labels is None:
        assert label is None
        assert source.classes is None
    else:
        assert label.dtype == torch.int64
        assert label.tolist() == labels[place].tolist()
        assert source.classes == 3


# --- which samples a step sees -----------------------------------------------------------------------------------------------


def test_every_epoch_holds_every_sample_once_in_another_order():
    seen = torch.cat([epoch_rows(10, 1, step * 4, step * 4 + 4) for step in range(10)]).view(4, 10)
    assert [sorted(epoch) for epoch in seen.tolist()] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 4


def test_a_batch_may_span_several_epochs():
    assert sorted(epoch_rows(3, 0, 0, 9).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("make", ["finite", "endless"])
@pytest.mark.parametrize("cut", [1, 64, 70])
def test_two_shares_are_the_whole_batch(make, cut):
    finite = FiniteSource(torch.from_numpy(PIXELS), torch.from_numpy(LABELS), 3, flip=True, dequantize=True, hold_out=3)
    source = finite if make == "finite" else open_source("pinwheel")
    every = Keyed(seed=3, step=5, start=0, stop=130)
    x, label = source.draw(every, 130)
    parts = [source.draw(share, 130) for share in (every.share(0, cut), every.share(cut, 130))]
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    if label is not None:
        assert torch.equal(torch.cat([part[1] for part in parts]), label)
    assert not torch.equal(source.draw(replace(every, step=6), 130)[0], x)
    assert not torch.equal(source.draw(replace(every, seed=4), 130)[0], x)


def test_rows_outside_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"rows 4 to 9 are no part of a batch of 8"):
        FiniteSource(torch.zeros(3, 2)).draw(Keyed(0, 0, 4, 9), 8)


def test_what_is_kept_aside_is_never_drawn():
    source = FiniteSource(torch.arange(11.0).view(11, 1), torch.arange(11), 11, hold_out=3)
    x, label = whole(source)
    kept, kept_label = source.held_out()
    assert [int(place) // 3 for place in kept] == [0, 1, 2]  # one of each three, none of the last two
    assert kept.flatten().tolist() == kept_label.tolist()
    assert x.flatten().tolist() == label.tolist()
    assert sorted([*x.flatten().tolist(), *kept.flatten().tolist()]) == list(range(11))
    assert source.description == "samples in memory: 8 of shape 1 to train on in 11 classes, one in 3 kept aside: 3"
    assert FiniteSource(torch.zeros(3, 2)).held_out() is None


@pytest.mark.parametrize("hold_out", [2, 10, 20])
def test_no_class_is_kept_aside_whole_where_labels_go_round(hold_out):
    labels = torch.arange(400) % 10
    source = FiniteSource(labels[:, None].float(), labels, hold_out=hold_out)
    kept, kept_label = source.held_out()
    assert (len(kept), source.size) == (400 // hold_out, 400 - 400 // hold_out)
    assert len(set(kept_label.tolist())) >= 5
    assert sorted(set(whole(source)[1].tolist())) == list(range(10))
    again = FiniteSource(labels[:, None].float(), labels, hold_out=hold_out)
    assert torch.equal(again.held_out()[0], kept)  # of a resumed run


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_in_memory_must_be_finite(bad):
    data = torch.zeros(8, 2)
    data[3, 1] = bad
    with pytest.raises(FewstepError, match=f"mine: sample 3 holds {bad}; every value must be a finite float32"):
        FiniteSource(data, origin="mine")


def test_half_of_the_images_are_mirrored():
    image = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).expand(200, 1, 2, 3)
    plain = image[0].float() / 127.5 - 1
    x, _ = whole(FiniteSource(image, flip=True))
    same = (x == plain).flatten(1).all(1)
    assert torch.equal(~same, (x == plain.flip(-1)).flatten(1).all(1))
    assert 70 < int(same.sum()) < 130


def test_dequantized_levels_fill_their_bins():
    levels = torch.tensor([[0, 100, 255]], dtype=torch.uint8).expand(4000, 3)
    source = FiniteSource(levels, dequantize=True, hold_out=4000)
    level = (whole(source)[0] + 1) * 128
    assert torch.equal(level.floor().clamp(max=255), torch.tensor([0.0, 100, 255]).expand(3999, 3))
    assert torch.allclose((level % 1).mean(0), torch.tensor(0.5), atol=0.02)
    assert torch.equal((source.held_out()[0] + 1) * 128, torch.tensor([[0.5, 100.5, 255.5]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_out": 1}, r"one of each so many samples aside: expected 0 \(none\) or 2 and more, got 1"),
        ({"hold_out": -2}, "got -2"),
        ({"hold_out": 9}, "hold_out=9 keeps nothing aside of 8 samples; choose a smaller number, or 0"),
        ({"flip": True}, r"flip mirrors images \(channels, height, width\), the samples have shape \(2,\)"),
        ({"dequantize": True}, "dequantize is for uint8 images of 256 levels, these samples are float"),
    ],
)
def test_options_that_do_not_fit_the_data(options, message):
    with pytest.raises(FewstepError, match=message):
        FiniteSource(torch.zeros(8, 2), **options)


# --- generators and densities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "entropy"), [("checkerboard", 3.6765), ("8gaussians", 2.838), ("moons", None)])
def test_samples_follow_the_density(name, entropy):
    source = open_source(name)
    assert isinstance(source, EndlessSource)
    x, label = source.draw(Keyed(0, 0, 0, 20_000), 20_000)
    assert label is None
    assert source.held_out() is None
    grid = (torch.arange(-120, 120, dtype=torch.float64) + 0.5) / 20
    points = torch.cartesian_prod(grid, grid)
    log_p = source.log_density(points)
    p = log_p.exp() / 20**2
    assert abs(float(p.sum()) - 1) < (0.03 if name == "checkerboard" else 1e-6)
    mean = float(source.log_density(x).mean())
    expected = float((p * log_p.clamp(min=-1e4)).sum() / p.sum())
    assert abs(mean - expected) < 0.03
    assert entropy is None or abs(mean + entropy) < 0.03
    assert torch.allclose(x.double().mean(0), (p[:, None] * points).sum(0), atol=0.05)
    assert torch.allclose(x.double().square().mean(0), (p[:, None] * points**2).sum(0), rtol=0.03)


def test_the_checkerboard_reaches_its_ceiling_exactly():
    x, _ = open_source("checkerboard").draw(Keyed(1, 0, 0, 50_000), 50_000)
    log_p = TOYS["checkerboard"].log_density(x)
    assert log_p.unique().tolist() == [math.log(0.45**2 / 8)]
    assert x.abs().max() <= 2 / 0.45
    assert TOYS["checkerboard"].log_density(torch.tensor([[-0.1, 0.1], [4.5, 4.5], [-5.0, 0.1]])).isinf().all()
    assert open_source("checkerboard").description == 'the density "checkerboard": endless samples of shape 2'


def test_the_pinwheel_has_five_equal_arms():
    x, _ = open_source("pinwheel").draw(Keyed(0, 0, 0, 20_000), 20_000)
    turn = torch.tensor(2 * math.pi / 5)
    turned = x @ torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])
    histograms = [torch.histogramdd(points, 8, range=[-4, 4, -4, 4]).hist / len(x) for points in (x, turned)]
    assert float((histograms[0] - histograms[1]).abs().sum()) < 0.1
    assert TOYS["pinwheel"].log_density is None
    radius = x.norm(dim=1).double()  # sqrt((2 + 0.6 n)^2 + (0.2 m)^2)
    assert abs(float(radius.square().mean()) - (4 + 0.36 + 0.04)) < 0.06


GENERATORS = """
import torch
def good(rng, count):
    return torch.randn(count, 2, 3, generator=rng), torch.randint(4, (count,), generator=rng)
good.classes = 4
def plain(rng, count): return torch.randn(count, 5, generator=rng, dtype=torch.float64)
def short(rng, count): return torch.randn(count - 1, 5, generator=rng)
def whole(rng, count): return torch.ones(count, 5, dtype=torch.int64)
def text(rng, count): return "no"
def fails(rng, count): raise KeyError("x")
def nan(rng, count): return torch.full((count, 2), float("nan"))
def changes(rng, count):
    changes.calls = getattr(changes, "calls", 0) + 1
    return torch.zeros(count, changes.calls)
number = 3
"""


@pytest.fixture
def generators(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(GENERATORS)
    (tmp_path / "broken_here.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)


def test_a_function_of_the_users_is_asked_for_whole_blocks(generators):
    source = open_source("made_here:good")
    x, label = source.draw(Keyed(0, 0, 3, BLOCK + 5), 200)
    assert (source.shape, source.classes, source.size) == ((2, 3), 4, None)
    assert x.shape == (BLOCK + 2, 2, 3)
    assert label.shape == (BLOCK + 2,)
    assert source.description == "made_here:good: endless samples of shape 2x3 in 4 classes"
    assert open_source("made_here:plain").draw(Keyed(0, 0, 0, 9), 9)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "made_here:short",
            {},
            r"must return a float tensor \(64, ...\), or it and labels; got Tensor \(63, 5\) torch.float32",
        ),
        ("made_here:whole", {}, r"got Tensor \(64, 5\) torch.int64"),
        ("made_here:text", {}, "must return a float tensor .*; got str"),
        ("made_here:fails", {}, r"made_here:fails\(rng, 64\) gave KeyError: 'x'"),
        ("made_here:nan", {}, "made_here:nan: sample 0 holds nan; every value must be a finite float32"),
        ("made_here:plain", {"classes": 3}, "returns no labels, but classes=3; return .samples, labels. or leave classes out"),
        ("made_here:good", {"classes": 2}, "the label of sample .* is out of range: there are 2 classes, 0 to 1"),
        ("made_here:goof", {}, 'has no function "goof"; did you mean "good"\\? it is called as goof\\(rng, count\\)'),
        ("made_here:number", {}, 'has no function "number"'),
        ("made_nowhere:good", {}, "importing made_nowhere gave ModuleNotFoundError"),
        ("broken_here:good", {}, "importing broken_here gave ZeroDivisionError"),
        ("made_here:plain", {"limit": 3}, "makes endless samples, for which limit has no meaning; leave it out"),
        ("moons", {"hold_out": 3}, "moons makes endless samples, for which hold_out has no meaning"),
        ("moons", {"flip": True}, "flip has no meaning"),
        ("moons", {"classes": 3}, "moons makes endless samples, for which classes has no meaning; leave it out"),
    ],
)
def test_generators_that_cannot_be_used(generators, name, options, message):
    with pytest.raises(FewstepError, match=message):
        open_source(name, **options)


def test_a_generator_keeps_to_one_shape_and_says_its_classes(generators):
    source = open_source("made_here:changes")
    with pytest.raises(FewstepError, match=r"returned samples of shape \(2,\) after \(1,\)"):
        source.draw(Keyed(0, 0, 0, 4), 4)
    with pytest.raises(FewstepError, match=r"returns labels, but classes=None; say how many classes there are"):
        EndlessSource(lambda rng, count: (torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64)), "mine")


# --- formats -----------------------------------------------------------------------------------------------------------------


def test_the_digits_are_those_of_the_bundled_model():
    source, (pixels, target) = open_source("digits"), sklearn_digits(return_X_y=True)
    images, aside = torch.tensor(pixels / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8), torch.arange(1797) % 6 == 5
    held, held_labels = source.held_out()
    x, _ = whole(source)
    assert torch.equal(held, images[aside])
    assert torch.equal(held_labels, torch.tensor(target)[aside])
    assert torch.equal(x.flatten(1).sum(1).sort()[0], images[~aside].flatten(1).sum(1).sort()[0])
    assert (source.shape, source.classes, source.size, source.data_range) == ((1, 8, 8), 10, 1498, (-1, 1))
    assert source.description == (
        "scikit-learn's digits: 1,498 of shape 1x8x8 to train on in 10 classes, one in 6 kept aside: 299"
    )
    assert open_source("digits", hold_out=0).held_out() is None
    assert sorted(set(whole(open_source("digits", limit=100, hold_out=0))[1].tolist())) == list(range(10))


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(FewstepError, match=r"scikit-learn, which is missing: pip install 'fewstep\[train\]'"):
        open_source("digits")


def test_an_image_folder(tmp_path, monkeypatch):
    seen = []
    source = open_source(image_folder(tmp_path / "pets"), progress=lambda done, total: seen.append((done, total)))
    assert_holds(source)
    assert seen == [(place + 1, 10) for place in range(10)]
    assert source.description == "images in pets: 10 of shape 3x6x5 to train on in 3 classes, none kept aside"
    (tmp_path / "pets" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / ".hidden").mkdir()
    (tmp_path / "pets" / "cat" / "._0.png").write_text("left by an archive")
    assert open_source(tmp_path / "pets").size == 10
    monkeypatch.chdir(tmp_path / "pets")
    assert open_source(".", flip=True).description.startswith("images in pets: 10")
    assert_holds(open_source(tmp_path / "pets" / "dog"), PIXELS[LABELS == 1], None)


def test_images_of_all_modes_become_grey_or_colour(tmp_path):
    grey = RNG.integers(0, 256, (2, 4, 4), dtype=np.uint8)
    for place, image in enumerate(grey):
        (tmp_path / f"{place}.png").write_bytes(png(image))
    assert_holds(open_source(tmp_path), grey[:, None], None)
    Image.fromarray(PIXELS[0, :, :4, :4].transpose(1, 2, 0)).convert("P").save(tmp_path / "2.png", transparency=b"\x00\x10")
    Image.fromarray(PIXELS[0, :, :4, :4].transpose(1, 2, 0)).convert("RGBA").save(tmp_path / "3.png")
    x = open_source(tmp_path).data
    assert x.shape == (4, 3, 4, 4)
    assert x[:2].tolist() == np.repeat(grey[:, None], 3, 1).tolist()
    assert x[3].tolist() == PIXELS[0, :, :4, :4].tolist()


def test_photographs_are_turned_as_the_camera_was(tmp_path):
    upright, exif = PIXELS[0].transpose(1, 2, 0), Image.Exif()
    exif[0x0112] = 6  # a quarter to the right is upright
    stream = io.BytesIO()
    Image.fromarray(np.rot90(upright).copy()).save(stream, "png", exif=exif)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(stream.getvalue())
    assert open_source(tmp_path / "photos").data.tolist() == PIXELS[:1].tolist()
    file = parquet(tmp_path / "photos.parquet", {"img": [stream.getvalue()]})
    assert open_source(file).data.tolist() == PIXELS[:1].tolist()


def test_an_image_with_damaged_exif_is_read(tmp_path):
    stream = io.BytesIO()
    damaged = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00\x12\x01"  # it ends inside the first of its two entries
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)).save(stream, "png", exif=damaged)
    (tmp_path / "0.png").write_bytes(stream.getvalue())
    assert open_source(tmp_path).data.tolist() == PIXELS[:1].tolist()


def test_parquet(tmp_path):
    file = parquet(tmp_path / "pets.parquet", {"img": cells(), "label": LABELS})
    assert_holds(open_source(file))
    assert_holds(open_source(str(parquet(tmp_path / "b.parquet", {"image": [png(i) for i in PIXELS]}))), labels=None)
    names = {"info": {"features": {"label": {"names": ["a", "b", "c", "d"]}}}}
    meta = {"huggingface": json.dumps(names)}
    assert open_source(parquet(tmp_path / "c.parquet", {"img": cells(), "label": LABELS}, meta)).classes == 4


def test_a_limit_meets_every_class_of_sorted_and_of_periodic_labels():
    rows = spread(1000, 100, "")
    assert ((rows >= np.arange(0, 1000, 10)) & (rows < np.arange(10, 1010, 10))).all()
    assert len(set((rows % 10).tolist())) == 10  # a fixed stride would meet one class of labels that go round
    assert rows.tolist() == spread(1000, 100, "").tolist()


def test_of_several_parquet_files_the_train_split_is_taken(tmp_path):
    for name, part in (("train-0", slice(0, 4)), ("train-1", slice(4, 10)), ("test-0", slice(0, 3))):
        parquet(tmp_path / f"{name}.parquet", {"img": cells(PIXELS[part]), "label": LABELS[part]})
    source = open_source(tmp_path, limit=5)
    assert source.description.startswith(f"images in {tmp_path.name} (its 2 train files of 3): 5 of shape 3x6x5")
    rows = spread(10, 5, "")
    assert source.data.tolist() == PIXELS[rows].tolist()
    assert source.labels.tolist() == LABELS[rows].tolist()
    assert_holds(open_source(tmp_path))
    assert_holds(open_source(str(tmp_path / "train-*.parquet")))
    assert open_source(str(tmp_path / "*.parquet")).size == 13


def test_arrays(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    assert_holds(open_source(tmp_path / "x.npy"), labels=None)
    np.savez(tmp_path / "x.npz", images=PIXELS.transpose(0, 2, 3, 1), labels=LABELS)
    assert_holds(open_source(tmp_path / "x.npz"))
    assert "channels moved to the front" in open_source(tmp_path / "x.npz").description
    np.save(tmp_path / "grey.npy", PIXELS[:, 0])
    assert_holds(open_source(tmp_path / "grey.npy"), PIXELS[:, :1], None)
    paths = RNG.standard_normal((7, 60, 3))
    np.savez(tmp_path / "paths.npz", data=paths, y=np.arange(7.0))
    source = open_source(tmp_path / "paths.npz", limit=3)
    rows = spread(7, 3, "")
    assert source.data.tolist() == paths[rows].astype(np.float32).tolist()
    assert source.labels.tolist() == rows.tolist()
    assert (source.classes, source.data_range) == (7, None)


@pytest.mark.parametrize(
    ("kind", "shape", "order", "note"),
    [
        (np.uint8, (5, 6, 7, 3), (0, 3, 1, 2), "(channels moved to the front)"),
        (np.uint8, (5, 6, 7, 1), (0, 3, 1, 2), "(channels moved to the front)"),
        (np.uint8, (5, 6, 7, 4), (0, 3, 1, 2), "(channels moved to the front, transparency dropped)"),
        (np.uint8, (5, 4, 6, 4), (0, 1, 2, 3), None),
        (np.float32, (5, 6, 7, 3), (0, 3, 1, 2), "(channels moved to the front)"),
        (np.float32, (5, 6, 7, 4), (0, 3, 1, 2), "(channels moved to the front)"),
        (np.float32, (5, 3, 6, 4), (0, 1, 2, 3), None),
        (np.float32, (5, 2, 6, 3), (0, 1, 2, 3), None),
        (np.float32, (5, 6, 7, 2), (0, 1, 2, 3), None),
        (np.float32, (5, 6, 3), (0, 1, 2), None),
        (np.float32, (5, 16, 4, 4), (0, 1, 2, 3), None),  # features whose channels come first
        (np.float32, (5, 64, 3, 3), (0, 1, 2, 3), None),
        (np.float32, (5, 512, 1, 1), (0, 1, 2, 3), None),
        (np.float32, (5, 5, 5, 1), (0, 3, 1, 2), "(channels moved to the front)"),
    ],
)
def test_channels_that_come_last_are_moved(tmp_path, kind, shape, order, note):
    x = RNG.integers(0, 2, shape).astype(kind)
    np.save(tmp_path / "x.npy", x)
    source = open_source(tmp_path / "x.npy")
    want = x.transpose(order)[:, :3] if note and "dropped" in note else x.transpose(order)
    assert source.data.tolist() == want.tolist()
    assert ("moved" in source.description) == (note is not None)
    assert note is None or note in source.description


def test_float_images_of_8_bit_levels_are_refused(tmp_path):
    for x in (PIXELS.astype(np.float32), PIXELS.transpose(0, 2, 3, 1).astype(np.float64)):
        np.save(tmp_path / "x.npy", x)
        with pytest.raises(FewstepError, match=r"values run from 0 to 255; .* in \[-1, 1\]: divide by 127.5 and subtract 1"):
            open_source(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", PIXELS.astype(np.float32) / 16)
    with pytest.warns(UserWarning, match=r"run from 0 to 15.9.*scale them if these are images"):
        assert open_source(tmp_path / "x.npy").size == 10


@pytest.mark.parametrize(
    "x",
    [PIXELS.reshape(10, -1), PIXELS.repeat(2, 1), PIXELS - 1.0, PIXELS * 2.0, PIXELS / 255],
    ids=["flat", "6", "-1", "510", "1"],
)
def test_other_floats_are_used_as_they_are(tmp_path, x):
    np.save(tmp_path / "x.npy", np.float32(x))
    assert torch.equal(open_source(tmp_path / "x.npy").data, torch.from_numpy(np.float32(x)))


def test_scaling_and_cropping_make_images_alike(tmp_path):
    for name, sides in (("a.png", (8, 12)), ("b.png", (4, 4))):
        (tmp_path / name).write_bytes(png(np.full(sides, 100, np.uint8)))
    source = open_source(tmp_path, size=6)
    assert source.shape == (1, 6, 6)
    assert bool((source.data == 100).all())
    assert open_source(tmp_path, size=(4, 6)).shape == (1, 4, 6)
    with pytest.raises(FewstepError, match=r"b.png is 4x4, but .*a.png is 8x12; pass size="):
        open_source(tmp_path)
    with pytest.raises(FewstepError, match=r"size is the side in pixels, or height and width, each at least 1; got 0"):
        open_source(tmp_path, size=0)


def test_unreadable_images_are_named_and_skipped_only_when_asked(tmp_path):
    folder = image_folder(tmp_path / "pets")
    (folder / "cat" / "0.png").write_bytes(png(PIXELS[0])[:60])
    (folder / "dog" / "1.png").write_bytes(b"hello")
    with pytest.raises(
        FewstepError, match=r"cannot read the image .*cat.0.png: .*; mend or remove it, or pass skip_unreadable"
    ):
        open_source(folder)
    source = open_source(folder, skip_unreadable=True, hold_out=4)
    assert source.size == 6
    assert "(2 of 10 unreadable images left out)" in source.description
    assert source.labels.tolist() == sorted(LABELS[2:])
    (folder / "cat" / "0.png").write_bytes(png(PIXELS[0]))
    with pytest.raises(FewstepError, match=r"dog.1.png: it is no image that Pillow knows"):
        open_source(folder)
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(folder / "dog" / "1.png")
    with pytest.raises(FewstepError, match=r'1.png: its mode "I;16" has more than 8 bits per channel'):
        open_source(folder)
    (folder / "dog" / "1.png").unlink()
    (folder / "dog" / "1.png").symlink_to(folder / "nowhere")  # not a file: passed over
    assert open_source(folder).size == 9


def test_a_file_that_goes_away_while_reading_is_unreadable(tmp_path):
    folder = image_folder(tmp_path / "pets")

    def lose(done, _total):
        if done == 1:
            (folder / "cat" / "3.png").unlink()

    with pytest.raises(FewstepError, match=r"3.png: No such file or directory; mend"):
        open_source(folder, progress=lose)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FewstepError, match=r"none of 1 images can be read"):
        open_source(tmp_path, skip_unreadable=True)


# --- bad folders and names ---------------------------------------------------------------------------------------------------


def test_bad_folders(tmp_path):
    with pytest.raises(FewstepError, match=r"holds no images and no parquet files; put images"):
        open_source(tmp_path)
    np.save(tmp_path / "x.npy", PIXELS)
    with pytest.raises(FewstepError, match=r"no parquet files; pass the file itself: .*x.npy"):
        open_source(tmp_path)
    folder = image_folder(tmp_path / "pets")
    (folder / "fox").mkdir()
    with pytest.raises(FewstepError, match=r'the sub-folder "fox" of .* holds no image; fill or remove it'):
        open_source(folder)
    (folder / "fox").rmdir()
    with pytest.raises(FewstepError, match=r"there are 2 classes, 0 to 1; labels are whole numbers from 0"):
        open_source(folder, classes=2)
    (folder / "stray.png").write_bytes(png(PIXELS[0]))
    with pytest.raises(FewstepError, match=r"holds images itself and in sub-folders"):
        open_source(folder)
    (folder / "x.parquet").write_bytes(b"")
    with pytest.raises(FewstepError, match=r"holds both images and parquet files"):
        open_source(folder)
    image_folder(tmp_path / "all" / "train")
    image_folder(tmp_path / "all" / "test")
    with pytest.raises(FewstepError, match=r"holds splits, not classes: test, train; pass one of them, as .*test"):
        open_source(tmp_path / "all")


def test_bad_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", PIXELS)
    Path("notes.txt").write_text("x")
    with pytest.raises(FewstepError, match=r'no data called "image.npy": did you mean "images.npy"\? data are a parquet file'):
        open_source("image.npy")
    with pytest.raises(FewstepError, match=r'did you mean "checkerboard"'):
        open_source("checkerbord")
    with pytest.raises(FewstepError, match=r"there is no folder far; data are"):
        open_source("far/away.npy")
    with pytest.raises(FewstepError, match=r'notes.txt is of no kind that can be read \(".txt"\)'):
        open_source("notes.txt")
    with pytest.raises(FewstepError, match=r'a pattern names parquet files, but of "z\*" it matches nothing'):
        open_source("z*")
    with pytest.raises(FewstepError, match=r"it also matches images.npy"):
        open_source("*")
    with pytest.raises(FewstepError, match=r"has no labels, but classes=3 was asked for"):
        open_source("images.npy", classes=3)
    with pytest.raises(FewstepError, match=r"classes is the number of classes, at least 1; got 0"):
        open_source("images.npy", classes=0)
    with pytest.raises(FewstepError, match=r"size scales image files, images.npy is an array"):
        open_source("images.npy", size=8)
    for limit in (0, 11):
        with pytest.raises(
            FewstepError, match=f"images.npy holds 10 samples, but limit={limit} was asked for; ask for 1 to 10"
        ):
            open_source("images.npy", limit=limit)
    with pytest.raises(FewstepError, match=r"digits: the label of sample .* is out of range: there are 5 classes"):
        open_source("digits", classes=5)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[1.0, 2.0], [3.0, np.nan]]), "sample 1 holds nan"),
        (np.array([[1.0, -np.inf]]), "sample 0 holds -inf"),
        (np.array([[1e300]]), "sample 0 holds inf; every value must be a finite float32"),
        (np.array([[Evil()]]), r"holds Python objects, which are never loaded \(they can run code\)"),
        (np.ones((3, 2), np.int64), r"expected uint8 \(images, scaled to \[-1, 1\]\) or float \(used as it is\), got int64"),
        (np.ones((3, 2), complex), "got complex128"),
        (np.ones(3), r"expected an array \(samples, ...\) with at least one number per sample, got shape \(3,\)"),
        (np.ones((0, 3)), r"got shape \(0, 3\)"),
        (np.ones((2, 0)), r"got shape \(2, 0\)"),
    ],
)
def test_bad_arrays(tmp_path, x, message):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(FewstepError, match=message):
        open_source(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(FewstepError, match=message):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_files_that_are_no_arrays(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FewstepError, match=r"(cannot read .*; save it again with numpy.save|holds Python objects)"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1, -1], "the label of sample 2, -1, is negative; labels are whole numbers from 0"),
        ([0, 1.5, 1], "the label of sample 1, 1.5, is no whole number"),
        ([0, np.nan, 1], "the label of sample 1, nan, is no whole number"),
        ([0, 1, 900], "the highest label is 900, but there are only 3 samples; number the classes from 0 without gaps"),
        (["cat", "dog", "dog"], 'labels must be whole numbers, got <U3 such as "cat"; number the classes from 0'),
        ([0, 1], r"expected 3 labels, shape \(3,\), got shape \(2,\); give one label per sample"),
        (np.eye(3), r"got shape \(3, 3\); give the number of the class, not one column per class"),
    ],
)
def test_bad_labels(tmp_path, y, message):
    np.savez(tmp_path / "x.npz", x=np.ones((3, 2)), y=np.asarray(y))
    with pytest.raises(FewstepError, match=message):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (["imags", "y"], 'has no array "x" or "images" or "data", only "imags", "y"; rename "imags"'),
        (["arr_0"], 'only "arr_0"; rename the array that holds the samples'),
        (["x", "data"], 'has the arrays "x", "data", of which one is expected; remove or rename the others'),
        (["x", "lables"], 'has no array "y" or "labels" or "label", only "lables"; rename "lables"'),
        (["x", "y", "labels"], 'has the arrays "y", "labels", of which one is expected'),
    ],
)
def test_arrays_of_other_names(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **{name: np.zeros((2, 2)) for name in arrays})
    with pytest.raises(FewstepError, match=message):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"imge": "cells", "label": LABELS}, 'has no column "img" or "image", only "imge", "label"; rename "imge"'),
        ({"img": "cells", "fine_label": LABELS}, 'has no column "label", only "fine_label"; rename "fine_label"'),
        ({"img": "cells", "label": [None, *LABELS[1:].tolist()]}, '1 of 10 rows have no "label"; fill or remove them'),
        ({"img": "cells", "label": ["cat"] * 10}, 'labels must be whole numbers, got object such as "cat"'),
        ({"img": "cells", "label": [-1] * 10}, "the label of sample 0, -1, is negative"),
        ({"img": [1] * 10, "label": LABELS}, r'row 0: expected encoded bytes, or a structure with "bytes", got int'),
        ({"img": [b"x"] * 10, "label": LABELS}, r"cannot read the image .*x.parquet, row 0: it is no image"),
        ({"img": [], "label": []}, "holds no rows; expected one per image"),
    ],
)
def test_bad_parquet_columns(tmp_path, columns, message):
    columns = {name: cells() if isinstance(values, str) else values for name, values in columns.items()}
    file = parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(FewstepError, match=message):
        open_source(file)


def test_bad_parquet_files(tmp_path, monkeypatch):
    good = parquet(tmp_path / "a.parquet", {"img": cells(), "label": LABELS})
    parquet(tmp_path / "b.parquet", {"img": cells()})
    with pytest.raises(FewstepError, match=r'b.parquet has no column "label", but other files of .* have; add or remove it'):
        open_source(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(FewstepError, match=r"cannot read .*b.parquet: .*; expected a parquet file"):
        open_source(tmp_path / "b.parquet")
    content = good.read_bytes()
    good.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(FewstepError, match=r"cannot read .*a.parquet: .*; expected sound parquet files"):
        open_source(good)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(FewstepError, match=r"needs pyarrow, which is missing: pip install pyarrow"):
        open_source(good)
