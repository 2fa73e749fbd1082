"""TF32 is off while tables are tuned, and afterwards as it was."""

import pytest
import torch
from torch import nn

from fewstep import adapt, tune
from fewstep._precision import exact_products


def settings():
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def a_gpu(monkeypatch):
    """As far as these settings are concerned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = settings()
    assert before == (True, "highest")  # PyTorch's own
    torch.set_float32_matmul_precision("high")
    yield
    assert settings() == (True, "high")
    torch.set_float32_matmul_precision("highest")


def test_only_inside(a_gpu):
    with exact_products():
        assert settings() == (False, "highest")
        with exact_products():
            assert settings() == (False, "highest")
        assert settings() == (False, "highest")
    with pytest.raises(KeyError), exact_products():
        raise KeyError


def test_a_network_sees_it_while_tuned_and_may_ask(a_gpu):
    seen = []

    class Network(nn.Linear):
        def forward(self, x, t):
            with torch.backends.cudnn.flags(benchmark=True):  # reads all of them
                seen.append(settings()[1])
            return super().forward(x)

    tune(adapt(Network(2, 2), shape=(2,)), nfe=2, effort="search", noise=4)
    assert set(seen) == {"highest"}


def test_nothing_is_touched_without_a_gpu():
    torch.set_float32_matmul_precision("high")
    with exact_products():
        assert settings() == (True, "high")
    torch.set_float32_matmul_precision("highest")


def test_what_is_set_operator_by_operator_stays(a_gpu):
    places = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(places, "fp32_precision"):
        pytest.skip("before PyTorch 2.9")
    places.fp32_precision = "ieee"
    try:
        with exact_products():
            assert places.fp32_precision == "ieee"
        assert places.fp32_precision == "ieee"
    finally:
        places.fp32_precision = "tf32"
