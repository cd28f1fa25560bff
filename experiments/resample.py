"""Dynamic sampling (DAPO, 2503.14476, section 3.2): groups of equal rewards make room for those of further draws."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dppo_jax.data.examples import Example
from dppo_jax.metrics import unequal_groups
from dppo_jax.sharding import rows
from dppo_jax.types import PromptBatch, RolloutBatch

# Further draws of a step take the prompts of a step so far away that no run comes there by itself.
AWAY = 1_000_003


class Drawn(NamedTuple):
    """A rollout batch and its rewards. Host arrays have B rows, prompts and their lengths N."""

    prompts: PromptBatch
    prompt_lengths: np.ndarray
    rollout: RolloutBatch
    answers: dict[int, tuple[Example, str]]  # example and reply of the rows that this host scored
    lengths: np.ndarray  # of the responses
    truncated: np.ndarray
    rewards: np.ndarray  # the verifier's
    shaped: np.ndarray  # what advantages are made of
    verifier: dict[str, int]  # its counts, over every draw


def chosen(kept: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Of which group each place is filled: i[N] into the N kept ones and, from N on, the N new ones.

    `kept` and `more` say which groups have unequal rewards. Places keep their group while nothing better is there.
    """
    places = np.arange(len(kept))
    free, new = places[~kept], places[more]
    count = min(len(free), len(new))
    places[free[:count]] = len(kept) + new[:count]
    return places


def resample(
    first: Drawn, again: Callable[[int], Drawn], mesh: Mesh, *, most: int, group_size: int
) -> tuple[Drawn, int]:
    """The batch with as many groups of unequal rewards as `most` further draws give, and how many were needed.

    `again(attempt)` draws once more, attempts counted from 1.
    """
    kept = first
    for attempt in range(1, most + 1):
        unequal = unequal_groups(kept.shaped, group_size)[::group_size]
        if unequal.all():
            return kept, attempt - 1
        more = again(attempt)
        groups = chosen(unequal, unequal_groups(more.shaped, group_size)[::group_size])
        kept = _merged(kept, more, groups, group_size, mesh)
    return kept, most


def _merged(kept: Drawn, more: Drawn, groups: np.ndarray, group_size: int, mesh: Mesh) -> Drawn:
    index = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)

    def host(a, b):
        return np.concatenate([a, b])[index]

    both = kept.answers | {row + len(kept.rewards): answer for row, answer in more.answers.items()}
    prompts = _take(mesh)(kept.prompts, more.prompts, groups)
    rollout = _take(mesh)(kept.rollout, more.rollout, index)
    return Drawn(
        prompts=prompts.replace(group=kept.prompts.group),
        prompt_lengths=np.concatenate([kept.prompt_lengths, more.prompt_lengths])[groups],
        rollout=rollout.replace(group=kept.rollout.group),
        answers={row: both[i] for row, i in enumerate(index.tolist()) if i in both},
        lengths=host(kept.lengths, more.lengths),
        truncated=host(kept.truncated, more.truncated),
        rewards=host(kept.rewards, more.rewards),
        shaped=host(kept.shaped, more.shaped),
        verifier={name: count + more.verifier[name] for name, count in kept.verifier.items()},
    )


@functools.cache
def _take(mesh: Mesh):
    return jax.jit(
        lambda a, b, index: jax.tree.map(lambda x, y: jnp.concatenate([x, y])[index], a, b), out_shardings=rows(mesh)
    )
