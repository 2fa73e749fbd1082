"""The words that every other module uses: states, times, predictions, fields and the errors that users see."""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

State = Float[Tensor, "batch *shape"]
"""A batch of states on the network's device; at least float32 between network calls."""

Time = float | Tensor
"""A number, a 0-d tensor, or one time per sample (batch,); 0 is noise, 1 is data."""

Prediction = Literal["velocity", "noise", "data", "score"]
"""What a network, or a sampler's row, speaks of. Velocity is dx/dt on the clock 0 = noise, 1 = data."""

Raw = Literal["plain", "negated", "v_prediction", "edm"]
"""How a network's bare input and output relate to the state and the prediction: see `fewstep.path.raw_mix`."""

Field = Callable[[Tensor, Time], Tensor]
"""``field(x, t) -> velocity``; condition and guidance are already inside."""


@runtime_checkable
class PathField(Protocol):
    """A field that knows the path it was trained on, and can therefore answer in any prediction."""

    path: "object"
    passes: int

    def __call__(self, x: Tensor, t: Time) -> Tensor: ...

    def predict(self, x: Tensor, t: Time, target: Prediction) -> Tensor: ...


class FewstepError(Exception):
    """Anything that the user can mend; the message says what was expected, what came and what to do."""


class FieldError(FewstepError):
    """The network gave something that no sampler can use: a wrong shape, a wrong dtype, NaN."""


class NotLinearError(FewstepError):
    """A method or scheduler whose states are not fixed linear combinations of the noise and the outputs."""


class ArtifactError(FewstepError):
    """A sampler directory that is not what fewstep wrote, or does not belong to this model."""


class GridError(FewstepError, ValueError):
    """Step times that no method can walk."""


class BudgetError(FewstepError, ValueError):
    """A number of network calls that this method or scheduler cannot spend exactly."""
