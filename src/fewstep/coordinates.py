"""The variables in which a solution is smooth: t itself, or the angle between noise and data.

On VP, VE and EDM paths dx/dt is infinite or huge somewhere. With s = sqrt(alpha^2 + sigma^2), z = x / s and
phi = atan(sigma / alpha), every affine path becomes the same arc z = cos(phi) x1 + sin(phi) x0 with
dz/dphi = -sin(phi) x1 + cos(phi) x0: finite everywhere. References and truncation errors are computed there.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._types import Field, PathField, State
from .path import AffinePath, CondOT, Cosine


@dataclass(frozen=True)
class Coordinates:
    """A clock tau in [0, 1] and a scaled state z = x / scale; `path` is None where they are t and x themselves."""

    path: AffinePath | None

    @staticmethod
    def of(field: Field) -> "Coordinates":
        """Angle for fields on paths with unbounded velocity, t for all others."""
        path = getattr(field, "path", None)
        plain = not isinstance(field, PathField) or not isinstance(path, AffinePath) or isinstance(path, CondOT | Cosine)
        return Coordinates(None if plain else path)

    def tau(self, t: Tensor | float) -> Tensor:
        """The clock at time t."""
        t = torch.as_tensor(t, dtype=torch.float64)
        if self.path is None:
            return t
        start, end = self._ends()
        return (self._angle(t) - start) / (end - start)

    def time(self, tau: Tensor | float) -> Tensor:
        """The time t at clock tau."""
        tau = torch.as_tensor(tau, dtype=torch.float64)
        if self.path is None:
            return tau
        start, end = self._ends()
        angle = start + (end - start) * tau
        return self.path.time_of_log_snr(angle.cos().log() - angle.sin().clamp(min=0.0).log())

    def scale(self, t: Tensor | float) -> float:
        """The factor in x = scale z at time t."""
        if self.path is None:
            return 1.0
        alpha, sigma, _, _ = self.path.coefficients(t)
        return float(torch.hypot(alpha, sigma))

    def field(self, field: Field) -> Field:
        """``(z, tau) -> dz/dtau`` for a velocity field; one NFE."""
        if self.path is None:
            return field
        assert isinstance(field, PathField)
        start, end = self._ends()

        def rate(z: State, tau: float | Tensor) -> State:
            t = float(self.time(tau))
            phi = start + (end - start) * float(tau)
            x = z * self.scale(t)
            if phi > math.pi / 4:  # noisy half: the data prediction is the well-conditioned one
                turn = (math.cos(phi) * z - field.predict(x, t, "data")) / math.sin(phi)
            else:
                turn = (field.predict(x, t, "noise") - math.sin(phi) * z) / math.cos(phi)
            return (end - start) * turn

        return rate

    def _angle(self, t: Tensor) -> Tensor:
        assert self.path is not None
        alpha, sigma, _, _ = self.path.coefficients(t)
        return torch.atan2(sigma, alpha)

    def _ends(self) -> tuple[float, float]:
        return tuple(self._angle(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist())
