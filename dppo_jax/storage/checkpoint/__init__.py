"""Checkpoints of a run: saved in the background with a checksum of every file, the newest whole one restored."""

from dppo_jax.storage.checkpoint.made_by import differences, made_by
from dppo_jax.storage.checkpoint.manager import Checkpoints, Newest, Resumed
from dppo_jax.storage.checkpoint.read import Damaged, agree, refuse_part_of_a_sweep, restore_params, step_folder
from dppo_jax.storage.checkpoint.retention import BEST_OF, Retention
from dppo_jax.storage.checkpoint.sums import compile_sums

__all__ = [
    "BEST_OF", "Checkpoints", "Damaged", "Newest", "Resumed", "Retention", "agree", "compile_sums",
    "differences", "made_by", "refuse_part_of_a_sweep", "restore_params", "step_folder",
]  # fmt: skip
