"""The closed-form fit: every row of a table by least squares against the converged solution, no back-propagation.

Walk the calls once. At row i the states and outputs so far are fixed, so the best next state is linear least squares:
minimise the mean over noise of || a_i x_0 + sum_j b_ij u_j - x*(t_i) ||^2. The last row makes the end point optimal.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._precision import exact_products
from .._types import BudgetError, Field, FieldError, State
from ..noise import PER_NUMBER
from ..problem import Problem, judgeable
from ..sampler import Sampler
from ..trajectory import Reference, reference
from .boss import Boss
from .options import positive, share

CHUNK = 1 << 22
"""Elements per feature that are converted to float64 at once."""


@dataclass(frozen=True)
class LeastSquares:
    """Fit the rows of a table to a field, keeping its times.

    Attributes:
        base: the table to start from; default Euler on the BOSS grid.
        ridges: strengths of the pull towards the starting table's row, relative to the Gram matrix; the one that is best on
            the held-out part of the noise is kept.
        holdout: share of the noise that only validates; if no fit beats the start there, the start is returned.
        tol: tolerance of the reference solution.

    Costs per sample: ``nfe`` field calls for each ridge and the reference's own.

    Raises:
        ValueError: no ridge, or a setting out of its range.
    """

    base: Sampler | None = None
    ridges: tuple[float, ...] = (1e-8, 1e-5)
    holdout: float = 0.25
    tol: float = 1e-4

    def __post_init__(self) -> None:
        if not self.ridges or not all(0.0 <= ridge < math.inf for ridge in self.ridges):
            raise ValueError(f"ridges must be numbers from 0 up, such as (1e-8, 1e-5), got {self.ridges}")
        positive(tol=self.tol)
        share("holdout", self.holdout)

    @exact_products()
    def __call__(self, field: Field, noise: State, *, nfe: int) -> Sampler:
        """The fitted table.

        Raises:
            BudgetError: `base` has another NFE.
            FieldError: `base` combines other predictions than velocities, or there is too little noise to fit and validate
                `nfe` + 1 numbers per row, or the reference is not more accurate than `base`.
        """
        start = self.base or Boss()(field, noise, nfe=nfe)
        if start.nfe != nfe:
            raise BudgetError(f"the table to start from makes {start.nfe} calls, the budget is {nfe}")
        if start.predicts != "velocity":
            raise FieldError(
                f'the fit starts from rows over velocities, this table combines "{start.predicts}" predictions; '
                "use sampler.rebase(path, 'velocity')"
            )
        problem = Problem(field, noise, reference(field, noise, tol=self.tol))
        split = problem.each - max(1, round(self.holdout * problem.each))
        if split < 1 or problem.conditions * noise[:split].numel() < PER_NUMBER * (nfe + 1):
            raise FieldError(
                f"fitting {nfe} calls needs at least two noises per condition and {PER_NUMBER * (nfe + 1)} numbers in all, "
                f"got shape {tuple(noise.shape)}"
            )
        fitting, held = problem.part(0, split), problem.part(split, problem.each)
        best, least = start, judgeable(start, held)
        for ridge in self.ridges:
            candidate, _ = fit(fitting.field, fitting.noise, fitting.solution, start, ridge=ridge)
            error = held.score(candidate)
            if error < least:
                best, least = candidate, error
        return best


def fit(field: Field, noise: State, solution: Reference, start: Sampler, *, ridge: float = 1e-8) -> tuple[Sampler, float]:
    """One walk over the knots of `start`: the fitted table and its RMSE on the noise it was fitted on; nfe field calls.

    Args:
        field: the velocity field.
        noise: (batch, *shape) the noise that `solution` starts from.
        solution: the reference.
        start: gives the times, and the rows that the ridge pulls to; must combine velocities.
        ridge: strength of that pull.
    """
    n, batch = start.nfe, noise.shape[0]
    features = torch.empty(n + 1, batch, *noise.shape[1:], dtype=noise.dtype, device=noise.device)
    features[0] = noise
    gram = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    rounding = 100 * torch.finfo(noise.dtype).eps
    table = torch.cat([start.a[:, None], start.b], dim=1).clone()  # row i: weights of the noise and of the outputs
    error = float("nan")
    with torch.no_grad():
        for i in range(n + 1):
            used = slice(0, i + 1)
            target = solution.at(float(start.times[i])) if i < n else solution.end
            newest, moments, square = _inner(features[used], target)
            gram[used, i] = gram[i, used] = newest
            if i > 0 or float(start.times[0]) > 0.0:
                table[i, used] = _solve(gram[used, used], moments, table[i, used], ridge, rounding)
            if i < n:
                weights = table[i, used].to(features)
                state = torch.tensordot(weights, features[used], dims=1)
                features[i + 1] = field(state, float(start.times[i]))
            else:
                w = table[i, used]
                residual = float(w @ gram[used, used] @ w - 2 * w @ moments + square)
                error = (max(residual, 0.0) / target.numel()) ** 0.5
    method = f"fit({start.provenance.method})" if not start.provenance.method.startswith("fit(") else start.provenance.method
    provenance = replace(start.provenance, method=method, measured={})
    return Sampler(start.times, table[:, 0], table[:, 1:], "velocity", start.clock, provenance), error


def _inner(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """<f_k, newest f>, <f_k, target> and <target, target>, summed in float64 over pieces of the batch."""
    count = len(features)
    newest, moments = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    square = torch.zeros((), dtype=torch.float64)
    flat, aim = features.reshape(count, -1), target.reshape(-1)
    for piece, goal in zip(flat.split(CHUNK, dim=1), aim.split(CHUNK), strict=True):
        piece, goal = piece.double(), goal.double()
        newest += (piece @ piece[-1]).cpu()
        moments += (piece @ goal).cpu()
        square += (goal @ goal).cpu()
    return newest, moments, square


def _solve(gram: Tensor, moments: Tensor, start: Tensor, ridge: float, rounding: float) -> Tensor:
    """Minimise |F c - target|^2 + ridge |c - start|^2 in the features' own scale.

    A feature that is zero up to `rounding`, relative to the largest, keeps its weight (the first velocity of symmetric data on
    Cosine): in its own scale it is noise, and noise of a kind that fits.
    """
    scale = gram.diagonal().sqrt()
    real = scale > max(rounding * float(scale.max()), 1e-30)
    scale, right = scale[real], (moments - gram @ start)[real]
    scaled = gram[real][:, real] / scale / scale[:, None]
    step = torch.linalg.solve(scaled + ridge * torch.eye(len(scale), dtype=torch.float64), right / scale)
    return start.masked_scatter(real, start[real] + step / scale)
