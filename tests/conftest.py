"""Set-up for every test: the Triton interpreter where there is no GPU, one seed, and poisoned
memory on request."""

import os
from pathlib import Path

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


def pytest_addoption(parser):
    parser.addoption(
        "--resume", metavar="FILE", help="leave out tests that passed before, by the names in FILE"
    )


def pytest_configure(config):
    if config.getoption("--resume"):
        config.pluginmanager.register(Resume(Path(config.getoption("--resume"))))


class Resume:
    """Tests that passed, a line each: a run that is cut off goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.passed = set(path.read_text().splitlines()) if path.exists() else set()

    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self.passed]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK


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
