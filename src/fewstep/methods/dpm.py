"""The exponential integrators of diffusion models: DDIM, DPM-Solver(++) singlestep, DPM-Solver++ multistep."""

import torch

from ..path import AffinePath
from ._frozen import Frozen, FrozenStep
from ._method import Method, method


def ddim(path: AffinePath) -> Method:
    """Deterministic DDIM (Song et al., 2010.02502, eq. 12): x' = alpha' x1_hat + sigma' x0_hat. 1 NFE per step.

    Equal to Euler in t on CondOT, in sigma on VE and EDM, and in sigma / alpha (for x / alpha) everywhere.
    """
    return _singlestep(FrozenStep(path, "data"), name="ddim", paper="arXiv:2010.02502")


def dpm_single(path: AffinePath, order: int, predicts: Frozen = "data") -> Method:
    """Singlestep DPM-Solver++ (predicts="data") or DPM-Solver (predicts="noise") of order 2 or 3; `order` NFE per step.

    A step into or out of an infinite log-SNR (pure noise on CondOT, clean data everywhere) has its nodes as if it started or
    ended just inside and loses the order there.

    Raises:
        ValueError: order other than 2 or 3, or predicts="velocity".
    """
    if order not in (2, 3):
        raise ValueError(f"dpm_single takes order 2 or 3 (order 1 is ddim), got {order}")
    plus, paper = ("pp", "arXiv:2211.01095") if predicts == "data" else ("", "arXiv:2206.00927")
    return _singlestep(FrozenStep(path, predicts, order), name=f"dpm{plus}{order}s", paper=paper)


def _singlestep(rule: FrozenStep, *, name: str, paper: str) -> Method:
    @method(order=rule.stages, paper=paper, calls=lambda n: rule.stages * n, name=name, path=rule.path, stages=rule.stages)
    def run(u, grid, x):
        for s, t in grid.pairs():
            _, x = rule.step(u, x, s, t)
        return x

    return run


def dpmpp(path: AffinePath, order: int) -> Method:
    """Multistep DPM-Solver++ of order 1, 2 ("2M") or 3 ("3M") (Lu et al., 2211.01095, algorithm 2). 1 NFE per step.

    The global order is 2 at most: the first steps use the history there is, and the published 3M, kept as it is, gives its
    third-order term half the weight (its D2 is h^2 m''/2 where the coefficient expects h^2 m''). A step into or out of an
    infinite log-SNR (pure noise on CondOT, clean data everywhere) is first order, as in diffusers' `lower_order_final`.

    Raises:
        ValueError: order other than 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"dpmpp takes order 1, 2 or 3, got {order}")

    @method(order=min(order, 2), paper="arXiv:2211.01095", name=f"dpmpp{order}m", path=path)
    def run(u, grid, x):
        m, h = [], []  # data predictions and the lambda-steps between them, newest first
        for s, t in grid.pairs():
            m = [path.convert(u(x, s), x, s, source="velocity", target="data"), *m][:order]
            (alpha_s, sigma_s, _, _), (alpha, sigma, _, _) = path.coefficients(s), path.coefficients(t)
            h = [alpha.log() - sigma.log() - alpha_s.log() + sigma_s.log(), *h][:order]
            decay = -alpha * torch.expm1(-h[0])
            x = sigma / sigma_s * x + decay * m[0]
            usable = next((k for k, step in enumerate(h) if not torch.isfinite(step)), len(h))
            if usable >= 2 and len(m) >= 2:
                d1 = (m[0] - m[1]) * (h[0] / h[1])
                if usable >= 3 and len(m) >= 3:
                    older = (m[1] - m[2]) * (h[0] / h[2])
                    bend = (d1 - older) * (h[0] / (h[1] + h[2]))
                    d1 = d1 + (d1 - older) * (h[1] / (h[1] + h[2]))
                    x = x + (alpha - decay / h[0]) * d1 - alpha * ((torch.expm1(-h[0]) + h[0]) / h[0] ** 2 - 0.5) * bend
                else:
                    x = x + 0.5 * decay * d1
        return x

    return run


def variants(path: AffinePath) -> list[Method]:
    """Registry hook."""
    singles = [dpm_single(path, 2), dpm_single(path, 3)]
    if path.coefficients(0.0).alpha > 0:  # holding the noise needs some signal in the first state
        singles += [dpm_single(path, 2, "noise"), dpm_single(path, 3, "noise")]
    return [ddim(path), dpmpp(path, 2), dpmpp(path, 3), *singles]
