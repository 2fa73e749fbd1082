"""What generated images are worth beside real ones: every metric with its interval, samplers with their seeds, the floor."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._types import FewstepError
from ..calling import Condition
from ..field import Model
from ..keyed import generator
from ..sampler import Sampler
from .comparison import Group, Report, Row, by_name
from .distances import frechet_estimate, kid
from .estimate import BLOCKS, Estimate, over_seeds
from .features import Extractor, Features
from .generation import Generated, Given, generate
from .neighbours import precision_recall

ImageMetric = Literal["FD", "spatial FD", "KID", "precision", "recall"]

FEWEST = 2 * BLOCKS
"""Samples on either side that a jackknife over `BLOCKS` blocks needs."""

FLOOR = "real data"
"""Name of the row that other real samples have."""


class BiasWarning(UserWarning):
    """A distance of so few samples that its bias may be larger than what it measures."""


def image_metrics(
    generated: Features, real: Features, *, metrics: Sequence[ImageMetric] | None = None, k: int = 3, seed: int = 0
) -> dict[str, Estimate]:
    """Distances, precision and recall of generated features beside real ones, each with its 95 % interval.

    All samples are used. The names say what was measured with and on how many generated samples: "FD (pixels, 2000)".

    Args:
        generated: from `generate` or `features_of`.
        real: of the same extractor.
        metrics: "FD" and "spatial FD" (`frechet_estimate`), "KID" (`kid`), "precision" and "recall" (`precision_recall`).
            Default: all that the features allow.
        k: neighbour of precision and recall.
        seed: of KID's subsets.

    Warns:
        BiasWarning: a Frechet distance with no more samples than features on one of the sides.

    Raises:
        FewstepError: features of different extractors, of images of different sizes or ranges; fewer than 20 samples.
        ValueError: an unknown metric, or `k` too large.

    Example:
        >>> from fewstep.evaluation import features_of
        >>> draw = lambda seed: torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        >>> found = image_metrics(features_of(draw(0)), features_of(draw(1)))
        >>> list(found)
        ['FD (pixels, 50)', 'KID (pixels, 50)', 'precision (pixels, 50)', 'recall (pixels, 50)']
    """
    _check_alike(generated, real)
    spatial = generated.spatial is not None and real.spatial is not None
    chosen = metrics if metrics is not None else [m for m in get_args(ImageMetric) if spatial or m != "spatial FD"]
    unknown = set(chosen) - set(get_args(ImageMetric))
    if unknown:
        raise ValueError(f"metrics are {', '.join(get_args(ImageMetric))}, got {sorted(unknown)}")
    found: dict[str, Estimate] = {}
    for metric in chosen:
        if metric == "FD":
            found[metric] = _frechet(metric, generated.extractor, generated.values, real.values)
        elif metric == "spatial FD":
            if generated.spatial is None or real.spatial is None:
                raise FewstepError(f'"spatial FD" needs spatial features, the extractor {generated.extractor} gives none')
            found[metric] = _frechet(metric, generated.extractor, generated.spatial, real.spatial)
        elif metric == "KID":
            found[metric] = kid(generated.values, real.values, seed=seed)
        elif metric not in found:
            found["precision"], found["recall"] = precision_recall(generated.values, real.values, k=k)
    return {f"{metric} ({generated.extractor}, {len(generated)})": found[metric] for metric in chosen}


def compare_images(
    samplers: Sequence[Sampler] | Mapping[str, Sampler],
    model: Model,
    real: Features,
    count: int,
    *,
    extractor: str | Extractor | Callable[[Tensor], Any] = "pixels",
    seeds: Sequence[int] = (0, 1, 2),
    metrics: Sequence[ImageMetric] | None = None,
    k: int = 3,
    conditions: Sequence[Given] | None = None,
    guidance: float = 1.0,
    null: Condition | None = None,
    batch: int = 128,
    groups: Mapping[str, Group] | None = None,
    against: str | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> Report:
    """Draw samples with every sampler and measure them against real data: means over seeds, and the floor.

    `count` of the real samples, drawn by lot, stand in for generated ones: what they are measured at is the floor, which a
    perfect model would reach at this count. Everything is compared with the others.

    Args:
        samplers: to compare; names default to their provenance. All start from the same noise.
        model: see `generate`.
        real: features of real images by the same extractor, at least twice `count`.
        count: samples for each sampler and seed.
        extractor: see `Extractor.of`.
        seeds: of the noise; values are means over them, intervals those of `over_seeds`.
        metrics: see `image_metrics`.
        k: see `image_metrics`.
        conditions: see `generate`.
        guidance: see `generate`.
        null: see `generate`.
        batch: see `generate`.
        groups: where each name belongs.
        against: name of one of the samplers: the others get their Frechet distances less its own as well ("FD - NAME"). The
            noise that they share cancels, so this tells them apart where their own intervals overlap.
        out: see `generate`; one folder serves all samplers and seeds.
        progress: see `generate`.

    Raises:
        FewstepError: see `generate` and `image_metrics`; too few real samples.
        ValueError: no seed, an unknown name in `against`, or see `generate` and `image_metrics`.
    """
    if not seeds:
        raise ValueError("seeds must hold at least one seed")
    extract, named = Extractor.of(extractor), samplers if isinstance(samplers, Mapping) else by_name(samplers)
    if against is not None and against not in named:
        raise ValueError(f"against must be one of {', '.join(named)}, got {against}")
    stand_in, reference = split(real, count)
    if model.shape is not None:  # before any image is drawn
        probe = extract.clipped(torch.randn(FEWEST, *model.shape, generator=generator(0, "probe")))
        _check_alike(replace(extract(probe), limits=None), reference)
    floor = Row(FLOOR, 0, 0, "other", image_metrics(stand_in, reference, metrics=metrics, k=k))
    rows: dict[str, Row] = {}
    baseline: Sequence[Generated] = ()
    for name in sorted(named, key=lambda name: name != against):  # the baseline first
        drawn: list[Generated] = []
        for seed in seeds:
            one = generate(
                named[name], model, count, extractor=extract, seed=seed, conditions=conditions, guidance=guidance, null=null,
                batch=batch, out=out, progress=progress,
            )  # fmt: skip
            _check_alike(one.features, reference)
            drawn.append(one)
        row = image_row(name, drawn, reference, metrics=metrics, k=k, group=(groups or {}).get(name, "other"))
        if against is not None and name != against:
            row = replace(row, metrics={**row.metrics, **_less(drawn, baseline, reference, row.metrics, against)})
        elif against is not None:
            baseline = drawn
        rows[name] = row
    facts = {
        "extractor": extract.name, "samples": count, "real samples": len(reference), "seeds": list(seeds), "guidance": guidance,
        "k": k,
    }  # fmt: skip
    return Report("images", (floor, *(rows[name] for name in named)), facts)


def _less(
    drawn: Sequence[Generated], baseline: Sequence[Generated], real: Features, metrics: Iterable[str], against: str
) -> dict[str, Estimate]:
    """The Frechet distances among `metrics` less the baseline's, seed by seed."""
    found = {}
    for metric in metrics:
        kind = metric.partition(" (")[0]
        if kind in ("FD", "spatial FD"):
            each = []
            for one, other in zip(drawn, baseline, strict=True):
                x, z, y = (f.values if kind == "FD" else f.spatial for f in (one.features, other.features, real))
                assert x is not None  # else they would have no such metric
                assert y is not None
                each.append(frechet_estimate(x, y, minus=z))
            found[f"{kind} - {against}"] = over_seeds(each)
    return found


def image_row(
    name: str,
    drawn: Sequence[Generated],
    real: Features,
    *,
    metrics: Sequence[ImageMetric] | None = None,
    k: int = 3,
    group: Group = "other",
) -> Row:
    """One sampler's row: means over what it drew with several seeds.

    Raises:
        FewstepError: as for `image_metrics`.
        ValueError: as for `image_metrics`.
    """
    each = [image_metrics(one.features, real, metrics=metrics, k=k) for one in drawn]
    found = {metric: over_seeds([estimates[metric] for estimates in each]) for metric in each[0]}
    return Row(name, drawn[0].nfe, drawn[0].passes, group, found)


def split(real: Features, count: int) -> tuple[Features, Features]:
    """`count` real samples by lot, always the same ones, and all others, which must not be fewer.

    Raises:
        FewstepError: they would be.
    """
    if not 0 < count <= len(real) // 2:
        raise FewstepError(
            f"a floor at {count} samples needs {2 * count} real ones in two disjoint parts, got {len(real)}; "
            f"choose at most {len(real) // 2} samples, or give more real ones"
        )
    order = torch.randperm(len(real), generator=generator(0, "floor"))
    return real[order[:count]], real[order[count:]]


def _frechet(metric: str, extractor: str, x: Tensor, y: Tensor) -> Estimate:
    fewest, size = min(len(x), len(y)), x.shape[1]
    if fewest <= size:
        warnings.warn(
            f"{metric} ({extractor}): {fewest} samples for {size} features, the covariance is singular and the distance biased "
            f"upwards; compare with the floor at this count only, or use more than {size} samples",
            BiasWarning,
            stacklevel=3,
        )
    return frechet_estimate(x, y)


def _check_alike(generated: Features, real: Features) -> None:
    spatial = [f.spatial.shape[1] for f in (generated, real) if f.spatial is not None]
    for what, one, other in (
        ("features by the extractor", generated.extractor, real.extractor),
        ("images of shape", generated.shape, real.shape),
        ("features of dimension", generated.values.shape[1], real.values.shape[1]),
        ("spatial features of dimension", spatial[0], spatial[1]) if len(spatial) == 2 else ("", 0, 0),
    ):
        if one != other:
            raise FewstepError(f"generated and real samples do not match: {what} {one} against {other}")
    if min(len(generated), len(real)) < FEWEST:
        raise FewstepError(f"metrics need at least {FEWEST} samples on either side, got {len(generated)} and {len(real)}")
    for features in (generated, real):
        for kind, values in (("features", features.values), ("spatial features", features.spatial)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise FewstepError(f"{kind} by the extractor {features.extractor} hold NaN or infinity")
    if generated.limits is None or real.limits is None:
        return
    lows = sorted([generated.limits, real.limits])
    if lows[0][0] < -0.5 and lows[1][0] >= 0:
        which = "real" if lows[1] == real.limits else "generated"
        raise FewstepError(
            f"generated and real images do not match: values span {_span(generated)} against {_span(real)}; "
            f"scale the {which} ones from [0, 1] to [-1, 1]"
        )


def _span(features: Features) -> str:
    assert features.limits is not None
    return f"[{features.limits[0]:.3g}, {features.limits[1]:.3g}]"
