import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fewstep import FewstepError, TimeGrid, compare_images, load, methods, tabulate
from fewstep.evaluation import (
    BiasWarning,
    Estimate,
    Extractor,
    Features,
    Generated,
    Report,
    features_of,
    frechet,
    frechet_estimate,
    image_metrics,
    image_row,
    kid,
    over_seeds,
    precision_recall,
    split,
)
from fewstep.evaluation import inception as inception_file
from fewstep.evaluation.distances import Moments, mmd
from fewstep.evaluation.estimate import shuffled
from fewstep.evaluation.inception import Inception, resized
from problems import randn

PIXELS = Extractor.of("pixels")


def images(count=60, seed=0, shape=(1, 2, 2)):
    return randn(count, *shape, seed=seed, dtype=torch.float32).mul(0.3).clamp(-1, 1)


def half(estimate):
    return (estimate.high - estimate.low) / 2


class Network(nn.Module):
    """Features, and a map as spatial ones; batch normalisation that must not be used in training mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y.mean((2, 3)), y


def broken(x):
    return x.flatten(1) * math.nan


THREE = Extractor("three", lambda x: x.flatten(1)[:, :3])
NUMBER = 3

# --- closed forms and independent implementations ----------------------------------------------------------------------


def test_moments_of_parts_add_up_to_those_of_the_whole():
    x = randn(57, 4) + 3
    parts = [Moments.of(x[k::5]) for k in range(5)]
    joined = sum(parts[1:], start=parts[0])
    assert joined.count == 57
    torch.testing.assert_close(joined.mean, x.mean(0))
    torch.testing.assert_close(joined.covariance, torch.cov(x.T))


def test_the_distance_between_gaussians_has_its_closed_form():
    """Diagonal covariances: |m|^2 + sum (s - 1)^2, met by 20,000 samples to within twice their interval."""
    shift, stretch = torch.tensor([0.3, 0.0, -0.2]), torch.tensor([1.0, 2.0, 0.5])
    x, y = randn(20_000, 3, seed=1) * stretch + shift, randn(20_000, 3, seed=2)
    expected = float(shift.square().sum() + (stretch - 1).square().sum())
    found = frechet_estimate(x, y)
    assert abs(found.value - expected) < 2 * half(found) < 0.2
    assert found.value == pytest.approx(frechet(x, y), rel=1e-12)


def test_the_jackknife_equals_leaving_blocks_out():
    x, y = randn(45, 3, seed=3), randn(50, 3, seed=4)
    parts = np.array([frechet(shuffled(x)[torch.arange(45) % 10 != k], y) for k in range(10)])
    error = math.sqrt(0.9 * np.sum((parts - parts.mean()) ** 2))
    assert half(frechet_estimate(x, y)) == pytest.approx(2.2622 * error, rel=1e-4)


def test_what_two_samplers_share_cancels_in_the_difference_of_their_distances():
    """Rounds with fresh noise: the interval covers the mean difference as often as it says, and is far below the distance's."""
    y, covered, widths = randn(4000, 3, seed=1), 0, []
    noises = [randn(300, 3, seed=10 + k) for k in range(40)]
    differences = [frechet_estimate(1.3 * z, y, minus=1.25 * z) for z in noises]
    truth = math.fsum(d.value for d in differences) / len(differences)
    for z, found in zip(noises, differences, strict=True):
        covered += found.low <= truth <= found.high
        widths.append(half(found) / half(frechet_estimate(1.3 * z, y)))
        assert found.value == pytest.approx(frechet(1.3 * z, y) - frechet(1.25 * z, y), rel=1e-9)
    assert covered >= 34
    assert max(widths) < 0.5
    with pytest.raises(ValueError, match=r"as many samples of either sampler, got \(300, 3\), \(299, 3\)"):
        frechet_estimate(noises[0], y, minus=noises[1][:299])


def test_samples_of_ten_classes_in_turn_do_not_make_blocks_of_one_class_each():
    classes = (torch.arange(1000) % 10).double()
    x = torch.stack([3 * classes, randn(1000, seed=5)], dim=1)
    mixed = x[torch.randperm(1000, generator=torch.Generator().manual_seed(6))]
    in_turn, by_lot = (half(frechet_estimate(z, x.flip(0))) for z in (x, mixed))
    assert in_turn < 3 * by_lot


def slow_precision_recall(x, y, k):
    """By the definition, one pair at a time."""

    def share(points, centres):
        radius = [sorted(float((c - d).norm()) for j, d in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)]
        inside = [any(float((p - c).norm()) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(x, y), share(y, x)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_brute_force(k, monkeypatch):
    monkeypatch.setattr("fewstep.evaluation.neighbours.ENTRIES", 300)  # many pieces
    x, y = randn(37, 2, seed=1) * 0.5 + 0.5, randn(29, 2, seed=2)
    found = precision_recall(x, y, k=k)
    assert tuple(estimate.value for estimate in found) == pytest.approx(slow_precision_recall(x, y, k), abs=1e-12)
    left_out = [slow_precision_recall(shuffled(x)[torch.arange(37) % 10 != b], y, k) for b in range(10)]
    for estimate, parts in zip(found, np.array(left_out).T, strict=True):
        assert half(estimate) == pytest.approx(2.2622 * math.sqrt(0.9 * np.sum((parts - parts.mean()) ** 2)), rel=1e-4)


def test_precision_and_recall_tell_too_narrow_from_too_wide():
    real = randn(400, 2, seed=1)
    narrow, wide = (precision_recall(randn(400, 2, seed=2) * scale, real) for scale in (0.3, 3.0))
    assert narrow[0].value > 0.85 > 0.5 > narrow[1].value
    assert wide[1].value > 0.9 > 0.6 > wide[0].value


def test_torchmetrics_gives_the_same_frechet_distance_and_kid():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    x, y = randn(40, 4, seed=1), randn(50, 4, seed=2) * 1.5
    flat = nn.Flatten()
    flat.num_features = 4  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchmetrics, about its memory
        distance = fid.FrechetInceptionDistance(feature=flat).set_dtype(torch.float64)
        discrepancy = kernel.KernelInceptionDistance(feature=flat, subsets=1, subset_size=40)
    for metric, real in ((distance, y), (discrepancy, y[:40])):
        metric.update(real, real=True)
        metric.update(x, real=False)
    assert frechet(x, y) == pytest.approx(float(distance.compute()), rel=1e-9)
    assert mmd(x, y[:40]) == pytest.approx(float(discrepancy.compute()[0]), rel=1e-6)


def test_kid_has_its_closed_form_and_no_bias():
    """In one dimension E k(x, y) = sum of binomials times products of moments; like sets have KID zero on average."""
    x, y = randn(20_000, 1, seed=1) + 0.5, randn(20_000, 1, seed=2)
    moments = {0: 1.0, 1: 0.5, 2: 1.25, 3: 0.5**3 + 3 * 0.5}, {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}

    def mean(p, q):
        return sum(math.comb(3, i) * p[i] * q[i] for i in range(4))

    expected = mean(moments[0], moments[0]) + mean(moments[1], moments[1]) - 2 * mean(moments[0], moments[1])
    found = kid(x, y)
    assert found.low < expected < found.high
    same = kid(randn(5_000, 3, seed=3), randn(5_000, 3, seed=4))
    assert same.low < 0 < same.high


def test_kid_uses_every_sample_once():
    x, y = randn(95, 3, seed=1), randn(120, 3, seed=2) + 0.1
    whole = kid(x, y, size=9)  # ten subsets of nine
    assert whole == kid(x, y, size=1000)
    assert whole != kid(x, y, seed=1)
    assert kid(x, y, size=4) != whole
    with pytest.raises(ValueError, match="KID needs at least 20 samples on either side, got 19"):
        kid(x[:19], y)


def test_intervals_are_as_wide_as_values_scatter():
    real, found = randn(600, 2, seed=99), []
    for seed in range(30):
        x = 0.7 * randn(300, 2, seed=seed) + 0.4
        found.append([frechet_estimate(x, real), kid(x, real), *precision_recall(x, real)])
    scatter = np.std([[estimate.value for estimate in row] for row in found], axis=0)
    ratio = np.mean([[half(estimate) for estimate in row] for row in found], axis=0) / (2.26 * scatter)
    assert (ratio > 0.7).all()
    # KID's hold the real samples' chance as well, which these values share; neighbours make a jackknife cautious.
    assert (ratio < [1.4, 4.0, 1.4, 2.0]).all()


# --- several seeds -----------------------------------------------------------------------------------------------------


def test_the_mean_over_seeds_has_the_wider_interval():
    alike = over_seeds([Estimate(1.0, 0.7, 1.3)] * 3)
    assert (alike.value, half(alike)) == pytest.approx((1.0, 0.3 / math.sqrt(3)))
    apart = over_seeds([Estimate(v, v - 0.01, v + 0.01) for v in (1.0, 2.0, 3.0)])
    assert (apart.value, half(apart)) == pytest.approx((2.0, 1.96 / math.sqrt(3)))
    assert over_seeds([Estimate(1.0, 0.0, 5.0)]) == Estimate(1.0, 0.0, 5.0)
    with pytest.raises(ValueError, match="at least one"):
        over_seeds([])


def test_a_row_of_several_seeds_is_shown_by_the_report():
    real = features_of(images(50, 9))
    drawn = [Generated(features_of(images(50, s)), torch.empty(0), s, nfe=4, passes=8) for s in range(3)]
    row = image_row("euler", drawn, real)
    assert (row.nfe, row.passes) == (4, 8)
    each = [image_metrics(one.features, real) for one in drawn]
    for name, estimate in row.metrics.items():
        assert estimate.value == pytest.approx(np.mean([found[name].value for found in each]))
    table = Report("images", (row,)).to_markdown()
    assert "FD (pixels, 50) | KID (pixels, 50) | precision (pixels, 50) | recall (pixels, 50)" in table
    assert Report("images", (row,)).best(4, metric="recall (pixels, 50)") is row


# --- extractors --------------------------------------------------------------------------------------------------------


def test_a_network_gives_features_and_spatial_ones_in_evaluation_mode():
    network = Network().double()
    extract = Extractor.of(network)
    assert extract.name == "Network"
    x = images(8)
    found, first = extract(x), extract(x[:1])
    assert (found.values.shape, found.spatial.shape, found.values.dtype) == ((8, 3), (8, 3), torch.float32)
    torch.testing.assert_close(found.values[:1], first.values)
    assert network.training
    assert not extract(images(2)).values.requires_grad
    names = list(image_metrics(features_of(images(40, 1), network), features_of(images(40, 2), network)))
    assert names[:2] == ["FD (Network, 40)", "spatial FD (Network, 40)"]


def test_a_method_is_treated_as_its_network():
    network, other = Network().double(), Network().double()
    x = images(8)
    found = Extractor("method", network.forward)(x)
    torch.testing.assert_close(found.values, Extractor.of(network)(x).values)  # in evaluation mode and in its precision
    assert network.training
    assert Extractor("method", network.forward).identity != Extractor("method", other.forward).identity


def test_batches_of_a_loader_give_what_one_tensor_gives():
    x = images(25)
    whole, parts = features_of(x, batch=7), features_of((part, torch.zeros(len(part))) for part in x.split(4))
    assert torch.equal(whole.values, parts.values)
    assert whole.limits == parts.limits == (float(x.min()), float(x.max()))


def test_functions_of_a_module_are_extractors():
    assert Extractor.of("test_metrics:THREE") is THREE
    found = Extractor.of("test_metrics:broken")
    assert (found.name, found.network) == ("test_metrics:broken", broken)
    assert str(sys.path).count("''") <= 1


def test_features_are_stored_bit_by_bit(tmp_path):
    for name, made in (
        ("a", features_of(images(5), Network())),
        ("b", Extractor("free", lambda x: x, limits=None)(randn(3, 2))),
    ):
        made.save(tmp_path / name)
        back = Features.load(tmp_path / name)
        assert torch.equal(back.values, made.values)
        assert (back.spatial is None) == (made.spatial is None)
        assert (back.extractor, back.shape, back.limits) == (made.extractor, made.shape, made.limits)
    (tmp_path / "c").write_bytes(b"nothing")
    for name in ("c", "missing"):
        with pytest.raises(FewstepError, match="holds no features"):
            Features.load(tmp_path / name)


def test_states_that_are_no_images_have_no_limits():
    free = Extractor("plane", lambda x: x, limits=None)
    assert torch.equal(free.clipped(10 * torch.ones(1, 2)), 10 * torch.ones(1, 2))
    assert len(image_metrics(features_of(5 * randn(50, 2), free), features_of(randn(50, 2) + 9, free))) == 4


# --- Inception ---------------------------------------------------------------------------------------------------------


def test_images_are_resized_as_by_tensorflow():
    """x[i * size / side], linear between pixels, the last one held."""
    x = torch.tensor([[[[0.0, 3.0], [6.0, 9.0]]]])
    expected = np.interp(np.arange(5) * 2 / 5, [0, 1], [0.0, 3.0])
    torch.testing.assert_close(resized(x, 5)[0, 0, 0], torch.tensor(expected, dtype=torch.float32))
    assert float(resized(x, 5)[0, 0, -1, -1]) == 9.0


def test_inception_takes_the_weights_that_are_there(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Inception().eval()
    names = set(network.state_dict())
    assert len(names) == 94 * 6  # 94 convolutions, each with its normalisation's five
    assert {
        "Mixed_5b.branch_pool.conv.weight",
        "Mixed_6d.branch7x7dbl_5.bn.bias",
        "Mixed_7c.branch3x3dbl_3b.conv.weight",
    } < names
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    folder = tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FewstepError, match=r'no weights for the extractor "inception": put weights-.* into .*checkpoints'):
        Extractor.of("inception")
    folder.mkdir(parents=True)
    torch.save(
        {**network.state_dict(), "fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, folder / inception_file.NAMES[0]
    )
    with pytest.raises(FewstepError, match="is damaged: its SHA-256 begins with"):
        Extractor.of("inception")
    digest = inception_file.hashlib.sha256((folder / inception_file.NAMES[0]).read_bytes()).hexdigest()
    monkeypatch.setattr(inception_file, "_digits", lambda: digest[:8])
    extract, grey = Extractor.of("inception"), images(1, shape=(1, 8, 8))
    found = extract(grey)
    assert (found.values.shape, found.spatial.shape) == ((1, 2048), (1, 2023))
    torch.testing.assert_close(extract(grey.expand(-1, 3, -1, -1)).values, found.values)
    with pytest.raises(FewstepError, match=r"Inception takes images \(batch, 1 or 3, height, width\)"):
        extract(images(1, shape=(2, 8, 8)))
    assert "torchvision" not in sys.modules
    torch.save({"other": torch.zeros(1)}, folder / inception_file.NAMES[0])
    digest = inception_file.hashlib.sha256((folder / inception_file.NAMES[0]).read_bytes()).hexdigest()
    with pytest.raises(FewstepError, match=r"holds no Inception-v3 weights"):
        Extractor.of("inception")


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "pixel",
            r'unknown extractor "pixel": did you mean "pixels"\? known are pixels, inception and package.module:function',
        ),
        ("no_such_module:f", r'cannot use the extractor "no_such_module:f": importing it gave ModuleNotFoundError'),
        ("test_metrics:nothing", r'cannot use the extractor "test_metrics:nothing": importing it gave AttributeError'),
        ("test_metrics:NUMBER", r"an extractor is a name or a function from images to features, got int"),
    ],
)
def test_unknown_extractors_are_refused(what, message):
    with pytest.raises(FewstepError, match=message) as caught:
        Extractor.of(what)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"must be floating-point .* scale 256 levels as x.float\(\) / 127.5 - 1"),
        (torch.zeros(3), r"must be floating-point \(batch, \*shape\), got torch.float32 of shape \(3,\)$"),
        (images() * 255 + 128, r"pixels takes images in \[-1, 1\], these have values from .* to .*; scale them"),
        (torch.full((2, 4), math.nan), "images hold NaN or infinity"),
        ([], "no images to take features of"),
        ([images(2), images(2, shape=(1, 3, 3))], r"several shapes: \(1, 2, 2\) and \(1, 3, 3\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(given, message):
    with pytest.raises(FewstepError, match=message):
        features_of(given)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        (broken, "the extractor broken returned NaN or infinity for images that have neither"),
        (Extractor("sum", lambda x: x.sum()), r"the extractor sum must return floating-point features \(60, dim\), got .*\(\)"),
        (Extractor("list", lambda x: [x]), r"must return floating-point features \(60, dim\), got list"),
        ("math:sqrt", r"the extractor math:sqrt failed on images \(60, 1, 2, 2\): .*Error: "),
    ],
)
def test_features_that_cannot_be_are_refused(extractor, message):
    with pytest.raises(FewstepError, match=message):
        features_of(images(), extractor)


@pytest.mark.parametrize(
    ("generated", "message"),
    [
        (features_of(images(30, shape=(1, 3, 3))), r"do not match: images of shape \(1, 3, 3\) against \(1, 2, 2\)"),
        (features_of(images(30), THREE), "do not match: features by the extractor three against pixels"),
        (features_of(images(19)), "metrics need at least 20 samples on either side, got 19 and 60"),
        (
            features_of(images(30).abs()),
            r"values span \[.*\] against \[.*\]; scale the generated ones from \[0, 1\] to \[-1, 1\]",
        ),
    ],
)
def test_sides_that_do_not_match_are_refused(generated, message):
    real = features_of(images(60, 1))
    with pytest.raises(FewstepError, match=message):
        image_metrics(generated, real)


def test_sides_that_do_not_match_in_themselves_are_refused():
    real = features_of(images(60, 1))
    wider = Extractor("pixels", lambda x: torch.cat([x, x]).view(len(x), -1))
    with pytest.raises(FewstepError, match="features of dimension 8 against 4"):
        image_metrics(features_of(images(30), wider), real)
    bad = features_of(images(30))
    bad.values[3] = math.nan
    with pytest.raises(FewstepError, match="features by the extractor pixels hold NaN or infinity"):
        image_metrics(bad, real)
    halves = Extractor("halves", lambda x: (x.flatten(1), x.flatten(2)))
    narrow, wide = (features_of(images(n), halves) for n in (30, 60))
    with pytest.raises(FewstepError, match="spatial features of dimension 2 against 4"):
        image_metrics(replace(narrow, spatial=narrow.spatial[:, :2]), wide)
    narrow.spatial[3] = math.nan
    with pytest.raises(FewstepError, match="spatial features by the extractor halves hold NaN or infinity"):
        image_metrics(narrow, wide)
    with pytest.raises(FewstepError, match='"spatial FD" needs spatial features, the extractor pixels gives none'):
        image_metrics(real, real, metrics=["spatial FD"])
    with pytest.raises(ValueError, match=r"k must be at least 1 and less than .* either side \(27 without a block\), got 27"):
        image_metrics(real[:30], real, k=27)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_metric_is_refused():
    real = features_of(images(60, 1))
    with pytest.raises(ValueError, match=r"metrics are FD, spatial FD, KID, precision, recall, got \['fid'\]"):
        image_metrics(real, real, metrics=["fid"])  # type: ignore[list-item]


def test_too_few_samples_for_a_covariance_are_warned_of():
    few, real = features_of(images(30, shape=(1, 6, 6))), features_of(images(60, 1, shape=(1, 6, 6)))
    with pytest.warns(BiasWarning, match=r"FD \(pixels\): 30 samples for 36 features, .* biased upwards") as caught:
        image_metrics(few, real)
    assert len(caught) == 1
    image_metrics(few, real, metrics=["KID", "recall"])


def test_the_floor_is_of_disjoint_parts():
    real = features_of(torch.arange(50.0).view(50, 1) / 100)
    one, other = split(real, 20)
    assert (len(one), len(other)) == (20, 30)
    assert sorted([*one.values.flatten().tolist(), *other.values.flatten().tolist()]) == real.values.flatten().tolist()
    assert torch.equal(split(real, 20)[0].values, one.values)
    with pytest.raises(FewstepError, match=r"a floor at 26 samples needs 52 real ones .* got 50; choose at most 25"):
        split(real, 26)


@pytest.mark.parametrize(
    ("real", "message"),
    [
        (features_of(torch.rand(60, 1, 4, 4)), r"images of shape \(1, 8, 8\) against \(1, 4, 4\)"),
        (
            features_of(torch.rand(60, 1, 8, 8), Extractor("halves", lambda x: x.flatten(1))),
            "the extractor pixels against halves",
        ),
    ],
)
def test_real_features_that_do_not_fit_are_refused_before_any_image_is_drawn(real, message):
    model, asked = load("digits"), []
    with model.network.register_forward_pre_hook(lambda *_: asked.append(1)), pytest.raises(FewstepError, match=message):
        compare_images([tabulate(methods.euler, TimeGrid.uniform(4))], model, real, 20)
    assert not asked
