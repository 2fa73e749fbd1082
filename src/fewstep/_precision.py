"""Float32 that is float32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32, not in TF32, where there is a GPU; also a decorator.

    TF32, PyTorch's default for convolutions on NVIDIA GPUs, keeps 10 bits of what it multiplies (errors of 5e-4): too few for
    solutions to 1e-4, and for the differences of outputs that `fewstep.tuners.jacobian` takes, at steps of 1.4e-3. Who has
    set the precision of operators one by one (``fp32_precision``) is left alone. The setting is the process's: other threads
    see it, too.
    """
    if not torch.cuda.is_available():
        yield
        return
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # set one by one
        yield
        return
    try:
        _set(False, "highest")
        yield
    finally:
        _set(*before)


def _set(convolutions: bool, products: str) -> None:
    with warnings.catch_warnings():
        # PyTorch recommends its newer settings, under which a network that asks for these ones raises.
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)
