"""Checkpoints of a run: saved in the background with a checksum of every file, the newest whole one restored."""

from dppo_jax.storage.checkpoint.manager import Checkpoints, Newest, Resumed
from dppo_jax.storage.checkpoint.read import Damaged, agree, refuse_part_of_a_sweep, restore_params, step_folder

__all__ = [
    "Checkpoints", "Damaged", "Newest", "Resumed", "agree", "refuse_part_of_a_sweep", "restore_params", "step_folder",
]  # fmt: skip
