"""The published formulas, typed from the papers' own notation and nothing else: numpy, log-SNR and exponentials.

DDIM: Song et al., 2010.02502, eq. 12. DPM-Solver: Lu et al., 2206.00927, algorithms 1 and 2. DPM-Solver++: Lu et al.,
2211.01095, algorithms 1 and 2, third order as in the authors' release. Time runs from noise (0) to data (1) as everywhere here.
"""

import itertools
import math

import numpy as np

from fewstep import VP, CondOT


class Schedule:
    """alpha, sigma and lambda of a path, from the definitions in the papers."""

    def __init__(self, path) -> None:
        self.path = path

    def pair(self, t: float) -> tuple[float, float]:
        if self.path == CondOT():
            return t, 1.0 - t
        assert self.path == VP(0.1, 20.0)
        s = 1.0 - t  # the papers' clock
        alpha = math.exp(-(s**2) * (20.0 - 0.1) / 4 - s * 0.1 / 2)
        return alpha, math.sqrt(1.0 - alpha**2)

    def slopes(self, t: float) -> tuple[float, float]:
        """Derivatives of both in t."""
        if self.path == CondOT():
            return 1.0, -1.0
        alpha, sigma = self.pair(t)
        beta = 0.1 + (1.0 - t) * (20.0 - 0.1)
        return alpha * beta / 2, -(alpha**2) * beta / (2 * sigma)

    def lamb(self, t: float) -> float:
        alpha, sigma = self.pair(t)
        return math.log(alpha) - math.log(sigma)

    def time(self, lamb: float) -> float:
        """Bisection: no closed form to get wrong."""
        low, high = 0.0, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.lamb(middle) < lamb else (low, middle)
        return (low + high) / 2

    def both(self, v: np.ndarray, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Data and noise from a velocity: x = alpha x1 + sigma x0 and v = alpha' x1 + sigma' x0, solved by numpy."""
        matrix = np.array([self.pair(t), self.slopes(t)])
        data, noise = np.linalg.solve(matrix, np.stack([x.ravel(), v.ravel()]))
        return data.reshape(x.shape), noise.reshape(x.shape)


def ddim_step(schedule, x, data, noise, t):
    alpha, sigma = schedule.pair(t)
    return alpha * data + sigma * noise


def singlestep(schedule, predict, x, s, t, order, plus, buffered=None):
    """One step of DPM-Solver-1/2/3 or its ++ version from s to t; returns the new state and the stage predictions.

    With `buffered` stage predictions nothing is asked: PFDiff's springboard.
    """
    alpha_s, sigma_s = schedule.pair(s)
    l_s, l_t = schedule.lamb(s), schedule.lamb(t)
    h = l_t - l_s

    def ask(stage, y, when):
        return predict(y, when) if buffered is None else buffered[stage]

    def start_of(r):
        """alpha, sigma at lambda_s + r h, and the exponential there."""
        when = t if r == 1.0 else schedule.time(l_s + r * h)
        return (*schedule.pair(when), when)

    m = ask(0, x, s)
    if order == 1:
        alpha, sigma, _ = start_of(1.0)
        if plus:
            return sigma / sigma_s * x - alpha * np.expm1(-h) * m, [m]
        return alpha / alpha_s * x - sigma * np.expm1(h) * m, [m]
    if order == 2:
        r1 = 0.5
        a1, s1, t1 = start_of(r1)
        alpha, sigma, _ = start_of(1.0)
        if plus:
            u = s1 / sigma_s * x - a1 * np.expm1(-r1 * h) * m
            m1 = ask(1, u, t1)
            x = sigma / sigma_s * x - alpha * np.expm1(-h) * m - alpha / (2 * r1) * np.expm1(-h) * (m1 - m)
        else:
            u = a1 / alpha_s * x - s1 * np.expm1(r1 * h) * m
            m1 = ask(1, u, t1)
            x = alpha / alpha_s * x - sigma * np.expm1(h) * m - sigma / (2 * r1) * np.expm1(h) * (m1 - m)
        return x, [m, m1]
    r1, r2 = 1 / 3, 2 / 3
    a1, s1, t1 = start_of(r1)
    a2, s2, t2 = start_of(r2)
    alpha, sigma, _ = start_of(1.0)
    if plus:
        u1 = s1 / sigma_s * x - a1 * np.expm1(-r1 * h) * m
        m1 = ask(1, u1, t1)
        u2 = s2 / sigma_s * x - a2 * np.expm1(-r2 * h) * m + r2 / r1 * a2 * (np.expm1(-r2 * h) / (r2 * h) + 1) * (m1 - m)
        m2 = ask(2, u2, t2)
        x = sigma / sigma_s * x - alpha * np.expm1(-h) * m + alpha / r2 * (np.expm1(-h) / h + 1) * (m2 - m)
    else:
        u1 = a1 / alpha_s * x - s1 * np.expm1(r1 * h) * m
        m1 = ask(1, u1, t1)
        u2 = a2 / alpha_s * x - s2 * np.expm1(r2 * h) * m - s2 * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * (m1 - m)
        m2 = ask(2, u2, t2)
        x = alpha / alpha_s * x - sigma * np.expm1(h) * m - sigma / r2 * (np.expm1(h) / h - 1) * (m2 - m)
    return x, [m, m1, m2]


def multistep_plus(schedule, predict, x, knots, order):
    """DPM-Solver++(2M) and (3M), the first steps with what history there is."""
    history = []
    for s, t in itertools.pairwise(knots):
        history = [(schedule.lamb(s), predict(x, s)), *history][:3]
        (l0, m0), (_, sigma_s), (alpha, sigma) = history[0], schedule.pair(s), schedule.pair(t)
        h = schedule.lamb(t) - l0
        x = sigma / sigma_s * x - alpha * np.expm1(-h) * m0
        if order >= 2 and len(history) >= 2:
            l1, m1 = history[1]
            r0 = (l0 - l1) / h
            d10 = (m0 - m1) / r0
            if order == 3 and len(history) == 3:
                l2, m2 = history[2]
                r1 = (l1 - l2) / h
                d11 = (m1 - m2) / r1
                d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
                d2 = (d10 - d11) / (r0 + r1)
                x = x + alpha * (np.expm1(-h) / h + 1) * d1 - alpha * ((np.exp(-h) - 1 + h) / h**2 - 0.5) * d2
            else:
                x = x - 0.5 * alpha * np.expm1(-h) * d10
    return x
