"""The behavior policy draws responses: `rollout` a batch to its end, `in_flight` in pieces, between updates,
`conversation` in turns with environments, `exact` from the training pass itself."""

from dppo_jax.rollout.caches import Choice as CacheChoice
from dppo_jax.rollout.caches import choose as choose_cache
from dppo_jax.rollout.calls import Abandoned, InChunks, OneCall
from dppo_jax.rollout.conversation import Answers, Conversation, Dialogs, Told
from dppo_jax.rollout.decode_loop import resumed_tokens
from dppo_jax.rollout.exact import ExactRollout
from dppo_jax.rollout.in_flight import Finished, Flight, InFlight
from dppo_jax.rollout.rollout import Rollout
from dppo_jax.rollout.slots import Work
from dppo_jax.rollout.stops import Stops, check_stop, make_stops

__all__ = [
    "Abandoned", "Answers", "CacheChoice", "Conversation", "Dialogs", "ExactRollout", "Finished", "Flight",
    "InChunks", "InFlight", "OneCall", "Rollout", "Stops", "Told", "Work", "check_stop", "choose_cache",
    "make_stops", "resumed_tokens",
]  # fmt: skip
