"""Rollout: the behavior policy draws G responses to every prompt, by continuous batching."""

from dppo_jax.rollout.rollout import Rollout as Rollout
