"""Set-up for every test: the Triton interpreter where there is no GPU, one seed, and poisoned
memory on request."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, so it must stand before any test module's import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that spin for each other's cores take several times as long as ones that share them.
    torch.set_num_threads(1)
# Nothing here may reach for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, on a busy machine they wait for them, and forks must
    not share a pool of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poison():
    """Uninitialised memory reads as NaN, in PyTorch and in the extension, so an unwritten output
    cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
