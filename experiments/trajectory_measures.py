"""How models of trajectories are judged: histograms beside their noise floors, dynamics, likelihood, events."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cells import Row, solved, total_variation
from fewstep import CondOT, Model
from fewstep.evaluation import log_density
from fewstep.field import ModelField
from fewstep.keyed import generator
from systems import System, continued

if TYPE_CHECKING:
    from dynamics import Config

GIVEN = 3
"""States after which the true system goes on, for the relative error."""

JUDGED = 512
"""Samples that the relative error is taken of."""


class Truth(NamedTuple):
    """True trajectories (n, STEPS, dim), float64, and how they are standardised for the network."""

    system: System
    reference: Tensor
    fresh: Tensor
    mean: Tensor
    std: Tensor

    def standard(self, x: Tensor) -> Tensor:
        """As the network sees them."""
        return ((x - self.mean) / self.std).float()

    def physical(self, z: Tensor) -> Tensor:
        """Back from there; differentiable."""
        return z.double() * self.std + self.mean


def judged(config: "Config", model: Model, truth: Truth, seed: int) -> Row:
    """Everything that is measured of one model."""
    shape = truth.reference.shape[1:]
    noise = torch.randn(config.samples, *shape, generator=generator(seed, "sampling"))
    drawn = truth.physical(solved(model.given(), noise, config.calls))
    fresh = truth.fresh[: config.samples]
    row: Row = {
        "tv": marginal_variation(drawn, truth.reference, config.bins),
        "tv_floor": marginal_variation(fresh, truth.reference, config.bins),
        "outside": float(outside(drawn, truth.reference)),
        "relative_error": relative_error(truth.system, drawn[:JUDGED]),
        **likelihood(config, model, truth, seed),
    }
    if truth.system.event is not None:
        row |= events(truth, drawn, fresh, config.bins)
        conditioned = given_event(model, truth)
        noise = torch.randn(config.guided, *shape, generator=generator(seed, "guided sampling"))
        row |= conditional(truth, truth.physical(solved(conditioned, noise, 2 * config.calls, config.guided)))
    return row


def marginal_variation(x: Tensor, truth: Tensor, bins: int) -> float:
    """Total variation of each coordinate's histogram over all times, mean over coordinates.

    The bins cover all but a thousandth of the truth at either end; what lies outside has bins of its own.
    """
    columns = []
    for a, b in zip(x.flatten(0, 1).T, truth.flatten(0, 1).T, strict=True):
        columns.append(total_variation(a[:, None], b[:, None], [_edges(b, bins)]))
    return sum(columns) / len(columns)


def _edges(values: Tensor, bins: int) -> NDArray[np.float64]:
    low, high = np.quantile(values.numpy(), [0.001, 0.999])
    return np.linspace(low, high, bins + 1)


def outside(x: Tensor, truth: Tensor) -> Tensor:
    """Share of the numbers that no true trajectory reaches."""
    low, high = truth.amin((0, 1)), truth.amax((0, 1))
    return ((x < low) | (x > high)).double().mean()


def relative_error(system: System, x: Tensor) -> float:
    """How far a trajectory parts from the true one through its own state number `GIVEN`, from 0 to 1.

    |x - y|_1 / (|x|_1 + |y|_1) at each later time, geometric mean over time, mean over trajectories. No trajectory is
    conditioned on true states: what is asked is whether samples obey the equations.
    """
    given = x[:, GIVEN - 1 :].numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # from impossible states the solver may blow up: an error of 1
        y = continued(system, given[:, 0], given.shape[1] - 1)
        error = np.abs(given - y).sum(2) / (np.abs(given) + np.abs(y)).sum(2)
    error = np.clip(np.nan_to_num(error, nan=1.0), 1e-9, 1.0)[:, 1:]
    return float(np.exp(np.log(error).mean(1)).mean())


def likelihood(config: "Config", model: Model, truth: Truth, seed: int) -> Row:
    """Mean log-density per dimension, in physical units, of true trajectories with noise `smear` (of a standard deviation).

    Trajectories of a differential equation fill no volume: without the noise, their density would be infinite.
    """
    z = truth.standard(truth.fresh[-config.likelihoods :])
    noise, size = torch.randn(z.shape, generator=generator(0, "smear")), z[0].numel()
    if isinstance(model.path, CondOT):
        end = 1 - config.smear
        state, shift = end * z + config.smear * noise, math.log(end)  # the density of the state is that of end * (z + ...)
    else:
        end, state, shift = None, z + config.smear * noise, 0.0
    logs = log_density(model, state, end=end, divergence="hutchinson", seed=seed, tol=config.tol)
    each = logs.value.double() / size + shift - truth.std.log().mean()
    return {
        "nats_per_dim": float(each.mean()),
        "nats_per_dim_se": float(each.std() / len(each) ** 0.5),
        "likelihood_nfe": logs.nfe,
    }


def events(truth: Truth, drawn: Tensor, fresh: Tensor, bins: int) -> Row:
    """How often the event C > 0 happens, and the law of C."""
    of = truth.system.event
    assert of is not None
    model, true, floor = of(drawn), of(truth.reference), of(fresh)
    edges: Sequence[Any] = [_edges(true, bins)]
    return {
        "event": float((model > 0).double().mean()),
        "event_data": float((true > 0).double().mean()),
        "event_tv": total_variation(model[:, None], true[:, None], edges),
        "event_tv_floor": total_variation(floor[:, None], true[:, None], edges),
    }


def conditional(truth: Truth, guided: Tensor, bins: int = 24) -> Row:
    """The law of C among samples that were guided to the event, against that of the true events; counts are made equal."""
    of = truth.system.event
    assert of is not None
    model, true, fresh = of(guided), of(truth.reference), of(truth.fresh)
    true, fresh = true[true > 0][:, None], fresh[fresh > 0][:, None]
    count, edges = min(len(model), len(fresh)), [np.linspace(0.0, float(true.quantile(0.999)), bins + 1)]
    return {
        "guided_event": float((model > 0).double().mean()),
        "guided_tv": total_variation(model[:count, None], true, edges),
        "guided_tv_floor": total_variation(fresh[:count], true, edges),
        "guided_count": count,
    }


def given_event(model: Model, truth: Truth) -> ModelField:
    """The model guided to its event: the score gains the gradient of log sigmoid(1.6 C(x_hat) / std) (2306.07526).

    x_hat is the expected data; std, held fixed, is the spread of C to first order, with the data's covariance given x,
    sigma^2 / alpha dx_hat/dx: the root of sigma^2 / alpha (|grad C . dC(x_hat)/dx| + 1e-3). The public code divides by alpha
    outside the root, which is the same on VE and guides too little on CondOT.
    """
    plain, of = model.given(), truth.system.event
    assert of is not None

    def log_probability(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, _, _ = (c.to(x) for c in model.path.coefficients(t))
        data = plain.predict(x, t, "data")
        c = of(truth.physical(data)).float()
        slope, pulled = torch.autograd.grad(c.sum(), [data, x], retain_graph=True)
        steep = (slope * pulled).flatten(1).sum(1).abs()
        std = (((steep + 1e-3) / alpha).sqrt() * sigma).clamp(min=1e-3)
        return torch.nn.functional.logsigmoid(1.6 * c / std)

    return model.given(classifier=log_probability)
