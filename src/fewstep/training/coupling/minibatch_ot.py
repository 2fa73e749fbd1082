"""Minibatch optimal transport, solved exactly."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..._types import FewstepError, State


@dataclass(frozen=True)
class MinibatchOT:
    """The pairing of the batch with the least mean squared distance (Tong et al., 2302.00482; Pooladian et al., 2304.14772).

    An assignment, not samples from a plan: every source sample is used exactly once. With labels the source samples are
    first dealt to the classes, as they come, and each class is assigned within itself. The source given a class then stays
    the source that sampling starts from; paired across classes, each class would train on its own corner of it (torchcfm
    issue 117).

    Cost: n^2 d multiplications and O(n^3) for the assignment, on the CPU.

    Attributes:
        across_classes: pair as if there were no labels.

    Raises:
        FewstepError: the batches differ in length, or a distance is not finite.

    Example:
        >>> MinibatchOT()(torch.tensor([[5.0], [0.0]]), torch.tensor([[1.0], [4.0]]), None)
        tensor([1, 0])
    """

    name: ClassVar[str] = "minibatch_ot"
    whole: ClassVar[bool] = True
    across_classes: bool = False

    def __call__(self, x0: State, x1: State, labels: Tensor | None) -> Tensor:
        """The optimal row of `x0` for each row of `x1`, (batch,) int64."""
        if len(x0) != len(x1) or (labels is not None and len(labels) != len(x1)):
            raise FewstepError(
                f"optimal transport pairs equally many source and data samples and labels, got {len(x0)}, {len(x1)}"
                f"{'' if labels is None else f' and {len(labels)}'}; give the whole batch of each"
            )
        source, data = _centred(x0), _centred(x1)
        if labels is None or self.across_classes:
            return _assign(source, data).to(x1.device)
        rows = torch.empty(len(x1), dtype=torch.int64)
        classes = labels.cpu()
        for label in classes.unique():
            (members,) = torch.where(classes == label)
            rows[members] = members[_assign(source[members], data[members])]
        return rows.to(x1.device)


def _centred(x: Tensor) -> Tensor:
    """Rows (batch, size) float64 about their mean, which moves all distances alike in what the assignment can see."""
    flat = x.detach().flatten(1).cpu().double()
    return flat - flat.mean(0)


def _assign(source: Tensor, data: Tensor) -> Tensor:
    """For each row of `data` its row of `source`: least sum of squared distances.

    |x1 - x0|^2 = |x1|^2 + |x0|^2 - 2 x1.x0, and the squares sum to the same for every assignment: only the inner products
    matter, and nothing is left to cancel.
    """
    gain = data @ source.T
    if not bool(gain.isfinite().all()):
        raise FewstepError("optimal transport needs finite source and data samples, got NaN or infinity; look at the data")
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
