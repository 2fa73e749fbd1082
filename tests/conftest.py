"""Set-up of every test session: one thread, no network, shapes in fewstep's signatures checked."""

import os

# Read when torch and huggingface_hub are imported, hence before any other import.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from jaxtyping import install_import_hook

install_import_hook("fewstep", "typechecker.check")

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("fewstep", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("fewstep")


@pytest.fixture
def unchecked():
    """Without the shape checks: for long loops, and for messages to users who misspell what the checks would catch first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
