"""The words that every other module uses: states, times, predictions, fields and the errors that users see."""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ._errors import ArtifactError as ArtifactError
from ._errors import BudgetError as BudgetError
from ._errors import FewstepError as FewstepError
from ._errors import FieldError as FieldError
from ._errors import GridError as GridError
from ._errors import NotLinearError as NotLinearError

State = Float[Tensor, "batch *shape"]
"""A batch of states on the network's device; at least float32 between network calls."""

Time = float | Tensor
"""A number, a 0-d tensor, or one time per sample (batch,); 0 is noise, 1 is data."""

Prediction = Literal["velocity", "noise", "data", "score"]
"""What a network, or a sampler's row, speaks of. Velocity is dx/dt on the clock 0 = noise, 1 = data."""

Raw = Literal["plain", "negated", "v_prediction", "edm"]
"""How a network's bare input and output relate to the state and the prediction: see `fewstep.path.raw_mix`."""

Bare = Literal[Raw, Prediction]
"""What a pipeline's network returns, seen from a sampler's rows: what they combine, by way of `Raw`, or a prediction."""

RAW_PREDICTS: dict[Raw, Prediction] = {"negated": "velocity", "v_prediction": "noise", "edm": "data"}
"""The prediction that a bare output becomes; "plain" says nothing of it."""

Field = Callable[[Tensor, Time], Tensor]
"""``field(x, t) -> velocity``; condition and guidance are already inside."""


@runtime_checkable
class PathField(Protocol):
    """A field that knows the path it was trained on, and can therefore answer in any prediction."""

    path: "object"
    passes: int

    def __call__(self, x: Tensor, t: Time) -> Tensor: ...

    def predict(self, x: Tensor, t: Time, target: Prediction) -> Tensor: ...
