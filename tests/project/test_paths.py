"""Paths of users are made by dppo_jax.files alone: pathlib makes the folder gs: of gs://bucket."""

import ast

from tests.helpers.places import ROOT

# What may make a path by itself: it is of this machine, or of the project's own files.
OF_THE_MACHINE = {
    "dppo_jax/files.py": "the one place",
    "dppo_jax/rewards/own.py": "a file of code",
    "dppo_jax/rewards/sandbox.py": "/proc",
    "dppo_jax/rewards/label_cache.py": "on a disk alone",
    "dppo_jax/devices/usage.py": "/proc",
    "dppo_jax/models/companions.py": "files that are not in their place yet",
    "dppo_jax/data/chat.py": "/proc, and the project",
    "dppo_jax/storage/hub.py": "the hub's cache",
    "experiments/run/cli.py": "the type of a flag",
    "experiments/benchmark/worker.py": "/proc",
    "experiments/benchmark/peer_torch.py": "a peer's own model",
    "experiments/benchmark/processor.py": "/proc",
    "experiments/benchmark/__main__.py": "programs",
    **{
        f"experiments/chaos/inputs/{name}.py": "what is damaged on purpose"
        for name in (
            "adapter_files", "checkpoint_files", "checkpoints", "configs", "damage", "environments", "judge",
            "model_files", "models", "rows", "runs", "tokenizer_files", "trials",
        )
    },
    "experiments/compile_for_tpu/__main__.py": "the TPU compiler",
    "experiments/compile_for_tpu/report.py": "the project",
    "experiments/questions/reuse/make_model.py": "the project",
}


def imported(text: str) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_paths_of_users_are_made_in_one_place():
    files = [file for folder in ("dppo_jax", "experiments") for file in (ROOT / folder).rglob("*.py")]
    found = {file.relative_to(ROOT).as_posix() for file in files if "pathlib" in imported(file.read_text())}
    assert found == set(OF_THE_MACHINE)
