"""Log-densities of a flow by the instantaneous change of variables, and of the samples that a table makes.

Along a solution of dx/dt = v(x, t), log p_t(x_t) falls at the rate div v (Chen et al., 1806.07366, theorem 1), so that
log p_1(x_1) = log p_0(x_0) - integral of div v dt. Everything is in nats, per sample, over all of its dimensions.
"""

import math
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from .._types import Field, FieldError, PathField, State, Time
from ..composite import CountedField, source_of
from ..field import Model
from ..path import AffinePath
from ..sampler import Sampler
from .divergence import DivergenceRule
from .flow import Flow, LogDensity, Rule, Run, Source, checked, in_pieces
from .solve import Solver, check_solver, integrate, known
from .tables import Accumulating, log_volume, velocity_quadrature

Density = Literal["sampler", "flow"]
"""Whose log-density: that of the samples that a table really makes, or that of the flow which it approximates."""


class Sampled(NamedTuple):
    """Samples (batch, *shape) with their log-densities."""

    sample: Tensor
    log_density: LogDensity


def log_density(
    field: Field | Model,
    x1: State,
    *,
    solver: Solver = "dopri5",
    divergence: DivergenceRule = "exact",
    probes: int = 1,
    tol: float = 1e-6,
    seed: int = 0,
    end: float | None = None,
    path: AffinePath | None = None,
    source: Source | None = None,
    max_batch: int | None = None,
    differentiable: bool = False,
) -> LogDensity:
    """The log-density of data `x1` under the flow of `field`, solved backwards from the data to the noise.

    Where the velocity is infinite at t = 1 (VP, DiscreteVP, EDM; data and noise predictions also elsewhere) the solve starts
    at the last time at which the network's prediction determines a velocity (`AffinePath.span`), and `x1` is taken as a
    state of that time: its density is that of data with noise sigma(end), 1e-3 on VP and `sigma_min` on EDM.
    At t = 0 the field answers as it does when sampling.

    Args:
        field: each sample's velocity may depend on that sample only. A `Model` is asked without a condition.
        x1: (batch, *shape) data. Half precision is taken to float32; float64 data keep all digits.
        solver: "dopri5" (adaptive, to `tol`), a number of Runge-Kutta 4 steps (4 NFE each), or the `TimeGrid` of these
            steps. A `Sampler` runs from noise only: see `sample_with_log_density`.
        divergence: "exact" costs one backward pass per dimension and call, "hutchinson" one per probe and call.
        probes: Rademacher probes of "hutchinson", the same along the whole solution; two or more give a standard error.
        tol: of "dopri5"; the log-densities of low-dimensional mixtures are then right to about 1e-3 nats (1e-5: 3e-3).
        seed: of the probes.
        end: time of which `x1` are states; default as above.
        path: of a bare function, for its start scale and span; a field from `Model.given` knows its own.
        source: log-density of states at t = 0; default N(0, start_scale^2 I), so dim * log(start_scale) is in the result.
        max_batch: solve in pieces of this size. Adaptive steps suit the piece, so results move within `tol`.
        differentiable: keep the graph, for gradients in the network's parameters and in `x1`. They are those of the
            computed number (discretise, then optimise), and all calls stay in memory: about `nfe` forward and backward
            passes. Otherwise nothing is kept from one call to the next, whatever the gradient mode.

    Raises:
        FieldError: NaN from the network or in `x1`, a wrong shape, a field without derivative, or a failed solve.
        ValueError: an unknown solver or divergence, or `end` outside (0, 1].

    Example:
        >>> log_density(lambda x, t: -x, torch.zeros(1, 2)).value  # x1 = x0 / e: log N(0) + 2
        tensor([0.1621])
    """
    if isinstance(solver, Sampler):
        raise ValueError("a table runs from noise to data only: use sample_with_log_density(sampler, field, noise)")
    check_solver(solver)
    flow, x1 = Flow.of(field, path, end, source), checked(x1, "x1")
    rule = Rule.of(divergence, probes, seed, x1, differentiable)

    def solve(part: CountedField, index: Tensor) -> tuple[Tensor, Tensor]:
        x0, total = integrate(
            rule.traced(part, index), x1[index], flow.end, 0.0, rows=rule.rows, solver=solver, tol=tol, path=flow.path
        )
        return x0, flow.at_start(x0)[:, None] - total.T

    x0, logs, nfe = in_pieces(flow.field, len(x1), max_batch, solve, graph=differentiable)
    return rule.result(logs, nfe, x0 / flow.start_scale)


def sample_with_log_density(
    sampler: Sampler | Solver,
    field: Field | Model,
    noise: State,
    *,
    density: Density = "sampler",
    divergence: DivergenceRule = "exact",
    probes: int = 1,
    tol: float = 1e-6,
    seed: int = 0,
    path: AffinePath | None = None,
    source: Source | None = None,
    max_batch: int | None = None,
    differentiable: bool = False,
) -> Sampled:
    """Samples from `noise`, and their log-density accumulated on the way.

    With a table there are two log-densities, and the difference is the table's error:

    - ``density="sampler"``: of the samples that the table makes: log p(noise) - log |det d sample / d noise|, exact for
      however few steps, wherever the table's map is one to one. `nfe` calls, then one backward pass through all of them per
      dimension (memory of the unrolled table; dim x dim numbers per sample): for tens to hundreds of dimensions.
    - ``density="flow"``: of the flow that the table approximates: its divergence is added up along the table's states with
      the weights of the last row, to the table's order of accuracy. One backward pass per call and dimension, or probe.
      For tables whose last row is a quadrature of velocities: Runge-Kutta and multistep methods in t, and what is fitted
      with such rows, but not the exponential methods (DDIM, DPM-Solver) on curved paths.

    A solver converges to the flow: there both are the same, and `density` does not matter.

    Args:
        sampler: a table, or a solver as for `log_density`, run from t = 0 to the end of the path's span.
        field: as for `log_density`.
        noise: (batch, *shape) standard normal.
        density: whose log-density, see above.
        divergence: as for `log_density`; ``density="sampler"`` has no estimate.
        probes: as for `log_density`.
        tol: as for `log_density`.
        seed: as for `log_density`.
        path: as for `log_density`.
        source: as for `log_density`: of the states at t = 0, which are start_scale * noise.
        max_batch: as for `log_density`.
        differentiable: as for `log_density`.

    Raises:
        FieldError: as for `log_density`; a singular map; a table that is no quadrature, for ``density="flow"``.
        ValueError: an unknown name, or "hutchinson" with ``density="sampler"`` and a table.

    Example:
        >>> table = Sampler(times=[0.0], a=[1.0, 1.0], b=[[0.0], [1.0]])  # one Euler step
        >>> sample, logs = sample_with_log_density(table, lambda x, t: -0.5 * x, torch.zeros(1, 1))
        >>> logs.value  # the sample is noise / 2: log N(0) + log 2
        tensor([-0.2258])
    """
    known("density", density, get_args(Density))
    flow, noise = Flow.of(field, path, None, source), checked(noise, "noise")
    rule = Rule.of(divergence, probes, seed, noise, differentiable)
    if not isinstance(sampler, Sampler):
        check_solver(sampler)
        run = _run_solver(sampler, flow, rule, noise, tol)
    elif density == "flow":
        run = _run_quadrature(velocity_quadrature(sampler, flow.path, flow.start_scale), flow, rule, noise)
    elif divergence != "exact":
        raise ValueError('the density of the table\'s own samples has no estimate: use divergence="exact" or density="flow"')
    else:
        run = _run_jacobian(sampler, flow, noise, differentiable)
    sample, logs, nfe = in_pieces(flow.field, len(noise), max_batch, run, graph=differentiable)
    return Sampled(sample, rule.result(logs, nfe, noise))


def score(field: Field | Model, x: State, t: Time, *, path: AffinePath | None = None) -> State:
    """The gradient of log p_t at `x`, from the field's prediction: one NFE and no derivative.

    For an affine path it is -E[x0 | x_t] / sigma, hence a linear function of velocity and state.

    Args:
        field: from `Model.given`, or a bare velocity function with `path`.
        x: (batch, *shape) states.
        t: a number, or one per sample.
        path: of a bare function.

    Raises:
        FieldError: a bare function without `path`, a model whose paths do not start at noise, or sigma is zero at `t`, where
            the score is infinite.
    """
    if (points := source_of(field)) is not None:
        raise FieldError(
            f"a velocity tells the score where paths start at noise, this model's start at samples of {points.name}"
        )
    flow = Flow.of(field, path, None, None)
    ask, home = flow.field, flow.path
    if home is None:
        raise FieldError("a velocity has a score on a known path only: pass path=, or a field from adapt(...).given(...)")
    if bool((home.coefficients(t).sigma == 0).any()):
        raise FieldError(f"the score is infinite where sigma is zero, as at t = 1 on {home!r}: ask before")
    if path is None and isinstance(ask, PathField):
        return ask.predict(x, t, "score")
    return home.convert(ask(x, t), x, t, source="velocity", target="score")


def _run_solver(solver: Solver, flow: Flow, rule: Rule, noise: Tensor, tol: float) -> Run:
    def run(part: CountedField, index: Tensor) -> tuple[Tensor, Tensor]:
        x0, traced = flow.start_scale * noise[index], rule.traced(part, index)
        x, total = integrate(traced, x0, 0.0, flow.end, rows=rule.rows, solver=solver, tol=tol, path=flow.path)
        return x, flow.at_start(x0)[:, None] - total.T

    return run


def _run_quadrature(table: Sampler, flow: Flow, rule: Rule, noise: Tensor) -> Run:
    weights = table.b.detach()[-1].tolist()

    def run(part: CountedField, index: Tensor) -> tuple[Tensor, Tensor]:
        z = noise[index]
        summed = Accumulating(rule.traced(part, index), weights, flow.path)
        # A table keeps its graph where its noise asks for one.
        x = table(summed, z.detach().requires_grad_(True) if rule.graph and not z.requires_grad else z)
        assert isinstance(summed.total, Tensor)
        return x, flow.at_start(flow.start_scale * z)[:, None] - summed.total.T

    return run


def _run_jacobian(table: Sampler, flow: Flow, noise: Tensor, graph: bool) -> Run:
    def run(part: CountedField, index: Tensor) -> tuple[Tensor, Tensor]:
        z = noise[index]
        x, volume = log_volume(table, part, z, graph=graph)
        start = flow.at_start(flow.start_scale * z) + z[0].numel() * math.log(flow.start_scale)
        return x, (start - volume)[:, None]

    return run
