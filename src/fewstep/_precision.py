"""Float32 that is float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32, not in TF32; also a decorator.

    TF32 is PyTorch's default for convolutions on NVIDIA GPUs. It errs by 4e-4 per call: a solution to 1e-4 does not converge,
    and the differences of outputs that `fewstep.tuners.gauss_newton` takes are a third wrong.
    """
    places: list[Any] = [getattr(torch.backends.cudnn, "conv", None), torch.backends.cuda.matmul]
    name, exact = "fp32_precision", "ieee"
    if not all(hasattr(place, name) for place in places):  # before PyTorch 2.9
        places, name, exact = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)
