"""Settings that must be in force before jax is imported, and what a test must not leave behind."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # unless the environment names another
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our worker processes do not mix

# No time limit: the first example of a test compiles. The same examples every time where CI=true.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")


@pytest.fixture(autouse=True)
def losses():
    """A config may add losses of its own to LOSSES; the next test does without them."""
    from dppo_jax.losses import LOSSES

    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)
