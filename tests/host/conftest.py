"""The host executor, for the tests that run CUDA kernels on it."""

import pytest

from . import build


@pytest.fixture(scope="session")
def host():
    """The module latent_shift_host: kernels compiled for the host and the executor's controls."""
    reason = build.why_not()
    if reason:
        pytest.skip(reason)
    return build.load()
