"""Settings that must be in force before jax is imported."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # unless the environment names another
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our worker processes do not mix

# No time limit: the first example of a test compiles. The same examples every time where CI=true.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")
