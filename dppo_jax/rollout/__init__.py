"""The behavior policy draws responses: `rollout` a batch to its end, `in_flight` in pieces, between updates."""

from dppo_jax.rollout.in_flight import Finished, Flight, InFlight
from dppo_jax.rollout.rollout import Rollout
from dppo_jax.rollout.slots import Work

__all__ = ["Finished", "Flight", "InFlight", "Rollout", "Work"]
