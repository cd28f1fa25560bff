"""What a step drew: on the devices, of all runs together, and on the host, run by run."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dppo_jax.data.examples import Example
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending
from dppo_jax.rollout import Finished, Work
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.run.conversing import Scored

WORK = ("decode_steps", "pages_read", "pages_live", "put_back")  # of `rollout.Work`, as the log has it


@dataclasses.dataclass
class Replies:
    """What one run drew in a step, on the host: N prompts, B = N * G responses."""

    prompt_lengths: np.ndarray  # i[N], tokens
    lengths: np.ndarray  # i[B], tokens of the responses
    truncated: np.ndarray  # bool[B]
    pairs: dict[int, tuple[Example, str]]  # example and reply by row, of the rows that this host scores
    verified: np.ndarray  # f32[B], the verifier's scores; empty until they are there
    shaped_rewards: np.ndarray  # f32[B], the scores with what shaping adds; advantages are made of these
    counts: dict[str, int]  # the verifier's: killed, failed, ...
    work: dict[str, float]  # what the rollout cost, and how old its tokens are, by the name of the log's tag
    terms: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # f32[B] of the reward, by the log's tag
    live: float | None = None  # decode steps of all its slots in which they had a row; None: not known
    fault: str = ""  # why reward.function failed on a reply of this host
    redrawn: int = 0  # further batches that were drawn for this step
    unscored: bool = False  # no verifier: what is shown of the rewards is the whole
    own_lengths: np.ndarray | None = None  # i[B], tokens that the policy drew, of conversations; None: all
    own_texts: list[str] | None = None  # of what it drew, of the rows that this host scores
    critic_prompts: list[list[int]] | None = None  # ids of the N prompts that the critic sees; None: the policy's

    @property
    def shown_rewards(self) -> np.ndarray:
        """Of the log and the transcripts, f32[B]."""
        return self.shaped_rewards if self.unscored else self.verified

    def occupancy(self, slots: int) -> dict[str, float]:
        """{"rollout/occupancy": the share of these slots that had a row, over all decode steps}, if it is known."""
        steps = self.work.get("decode_steps", 0.0)
        return {} if self.live is None else {"rollout/occupancy": self.live / max(steps * slots, 1.0)}

    @property
    def critic_prompt_lengths(self) -> np.ndarray:
        """i[N], tokens of the prompts that the critic sees."""
        own = self.critic_prompts
        return self.prompt_lengths if own is None else np.array([len(ids) for ids in own])

    @property
    def drawn(self) -> np.ndarray:
        """i[B], tokens of the responses that the policy drew."""
        return self.lengths if self.own_lengths is None else self.own_lengths


class Drawing(NamedTuple):
    """A rollout that the devices compute, of all runs together."""

    prompts: PromptBatch
    rollout: RolloutBatch
    work: Work | None  # None: drawn before the checkpoint that the run goes on from
    params: Params  # the trained part of the behavior policy's parameters
    age: int  # steps since it was drawn
    equal_params: bool  # whether they are the learner's, before its updates
    finished: Finished | None  # what is known of groups that several steps drew
    clock: dict[str, float]  # when the step began, and what was done when


@dataclasses.dataclass
class Samples:
    """One step's rollouts: on the devices, of all runs together, and on the host, run by run."""

    drawing: Drawing
    replies: list[Replies]
    pending: Sequence[Pending | Scored] | None  # the scores, by run; None once they are filled in

    def mark(self, event: str) -> None:
        """Notes the time."""
        self.drawing.clock[event] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """How long the parts of the step took, once it is over."""
        c = self.drawing.clock
        return {
            "time/rollout": c["drawn"] - c["began"],
            "time/reward": c["scored"] - c["drawn"],
            "time/train": c["trained"] - c["scored"],
        }

    def whole_seconds(self) -> float:
        return self.drawing.clock["trained"] - self.drawing.clock["began"]


def chosen(unequal: np.ndarray, more_unequal: np.ndarray) -> np.ndarray:
    """The source of each group of the merged batch, i[N]: 0 .. N-1 are the N old groups, N .. 2N-1 the N new ones.

    `unequal` and `more_unequal`, bool[N], say which of the old and the new groups have unequal rewards. An old group
    stays unless its rewards are equal and a new group with unequal ones is left.
    """
    sources = np.arange(len(unequal))
    free, replacements = sources[~unequal], sources[more_unequal]
    count = min(len(free), len(replacements))
    sources[free[:count]] = len(unequal) + replacements[:count]
    return sources


def rows_of(groups: np.ndarray, group_size: int) -> np.ndarray:
    """The rows of groups, one group after another."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)


def merged(before: Replies, more: Replies, groups: np.ndarray, group_size: int) -> Replies:
    """What was drawn first with what was drawn later in its place; groups, i[N], as of `chosen`."""
    index = rows_of(groups, group_size)

    def host(a, b):
        return np.concatenate([a, b])[index]

    def of(replies: Replies, name: str) -> np.ndarray:  # of a part that no reply of a batch has: 0
        return replies.terms.get(name, np.zeros_like(replies.verified))

    own = None
    if before.critic_prompts is not None and more.critic_prompts is not None:
        critics = [*before.critic_prompts, *more.critic_prompts]
        own = [critics[group] for group in groups]
    pairs = before.pairs | {row + len(before.verified): pair for row, pair in more.pairs.items()}
    return Replies(
        prompt_lengths=np.concatenate([before.prompt_lengths, more.prompt_lengths])[groups],
        lengths=host(before.lengths, more.lengths),
        truncated=host(before.truncated, more.truncated),
        pairs={row: pairs[i] for row, i in enumerate(index.tolist()) if i in pairs},
        verified=host(before.verified, more.verified),
        shaped_rewards=host(before.shaped_rewards, more.shaped_rewards),
        counts={name: count + more.counts[name] for name, count in before.counts.items()},
        terms={name: host(of(before, name), of(more, name)) for name in (*before.terms, *more.terms)},
        fault=before.fault or more.fault,
        work=before.work | {name: before.work[name] + more.work[name] for name in WORK},
        live=None if before.live is None or more.live is None else before.live + more.live,
        redrawn=before.redrawn + 1,
        unscored=before.unscored,
        critic_prompts=own,
    )
