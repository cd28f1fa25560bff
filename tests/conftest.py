"""Settings that must be in force before jax is imported, and what a test must not leave behind."""

import os
from importlib.metadata import version

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # unless the environment names another
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from the network
# Compiling is most of the tests' time; what is compiled so is slower, and hardly anything here runs long. A test of
# what a compiler makes takes the fixture `optimized`. Those of numbers compile as users do (Makefile).
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version("jax") < "0.11":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and our worker processes do not mix

# No time limit: the first example of a test compiles. The same examples every time where CI=true.
settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("here")


# Files that compile for pods, start processes by the dozen, or train: `make test-all` runs them, `make test` does not.
SLOW = {
    "test_attacks",
    "test_benchmark",
    "test_bucket_runs",
    "test_chat",
    "test_checkpoint_hosts",
    "test_compile_for_tpu",
    "test_faults",
    "test_gemma2",
    "test_generated_checkpoints",
    "test_generated_configs",
    "test_generated_models",
    "test_hosts",
    "test_hub_runs",
    "test_kills",
    "test_laboratory",
    "test_lora",
    "test_notebooks",
    "test_probe",
    "test_quantize",
    "test_restoring",
    "test_sanity_set",
    "test_sharding",
    "test_skipped",
    "test_stopping",
    "test_stuck",
    "test_study",
    "test_sweep",
    "test_told",
    "test_train_modes",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


@pytest.fixture
def optimized():
    """Compiles with all optimisations but that of XLA_FLAGS above: for tests of memory, of copies, of last bits."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def losses():
    """A config may add losses of its own to LOSSES; the next test does without them."""
    from dppo_jax.losses import LOSSES

    before = dict(LOSSES)
    yield
    LOSSES.clear()
    LOSSES.update(before)
