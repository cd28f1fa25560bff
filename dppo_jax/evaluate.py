"""Evaluation: n samples of every question, drawn and scored batch by batch. `statistics` says what is made of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax import statistics
from dppo_jax.data.prompts import PromptStream, decode_replies
from dppo_jax.devices import hosts
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending, Scorer
from dppo_jax.rewards.votes import vote
from dppo_jax.types import PromptBatch, RolloutBatch

Generate = Callable[[Params, PromptBatch, jax.Array], RolloutBatch]

OUTCOMES = ("scored", "killed", "failed", "refused")  # of `rewards.worker.Outcome`


class Samples(NamedTuple):
    """The n samples of some questions, one question after another: B rows."""

    rewards: np.ndarray  # f32[B]
    lengths: np.ndarray  # i32[B], tokens
    truncated: np.ndarray  # bool[B]
    outcomes: np.ndarray  # i32[B], numbers in OUTCOMES
    votes: np.ndarray  # i32[B, 2], the halves of `rewards.votes.vote`


class Book(Protocol):
    """Where an evaluation keeps its batches. All hosts call the same methods."""

    def known(self) -> Mapping[int, Samples]:
        """The batches that need not be drawn again, by number."""

    def keep(self, number: int, samples: Samples, replies: list[str], answers: list[str]) -> None:
        """Keeps a batch: its samples, their replies, and the answers that these give ("" of those that give none)."""


def all_failed(counts: Mapping[str, float], replies: int) -> str | None:
    """A sentence where the verifier failed on every one of `replies` replies; None where it scored one.

    counts: of `Pending.result`, summed over all hosts. A reply that it refused to read is no failure, and no score.
    """
    failed, killed, refused = (int(counts.get(name, 0)) for name in ("failed", "killed", "refused"))
    if not failed + killed or failed + killed + refused < replies:
        return None
    return (
        f"the verifier scored none of {replies} replies: it failed on {failed} and was killed on {killed}, so every "
        "reward is 0; look at the answers, data.verifier and reward.time_limit_s"
    )


def evaluate(
    params: Params,
    generate: Generate,
    stream: PromptStream,
    scorer: Scorer,
    *,
    mesh: Mesh | None,
    num_prompts: int,
    samples: int,
    key: jax.Array,
    tokenizer,
    eos_ids: tuple[int, ...],
    answer_of: Callable[[str], str],
    seed: int,
    book: Book | None = None,
) -> dict[str, float]:
    """`summary` of every question of a stream.

    `generate` draws `samples` responses to each of `num_prompts` prompts; the draws of a batch are a function of key
    and its number. `answer_of` is `rewards.votes.answer_of`. What a `book` knows is not drawn again. Of several hosts,
    each scores the responses that are its own, and all return the same.
    """
    prompt_share = hosts.share_over(mesh, num_prompts)
    row_share = prompt_share.grouped(samples)
    batches = dict(book.known()) if book else {}
    waiting: list[tuple[int, Pending, list[str], np.ndarray, np.ndarray]] = []

    def finish() -> None:
        number, pending, replies, lengths, truncated = waiting.pop()
        rewards, _ = pending.result()
        answers = [answer_of(reply) for reply in replies]
        outcomes = np.array([OUTCOMES.index(outcome.kind) for outcome in pending.scored], np.int32)
        votes = np.array([vote(answer) for answer in answers], np.int64).view(np.int32).reshape(-1, 2)
        padded = [_padded(x, len(lengths)) for x in (rewards, outcomes, votes)]  # the last batch may have fewer
        own = Samples(padded[0], lengths, truncated, *padded[1:])
        rows = min(num_prompts, len(stream) - number * num_prompts) * samples
        batches[number] = Samples(*(field[:rows] for field in hosts.gather(tuple(own), row_share)))
        if book:
            texts = [hosts.gather_texts(of_host, row_share)[:rows] for of_host in (replies, answers)]
            book.keep(number, batches[number], *texts)

    for number, (prompts, held_examples) in enumerate(stream.eval_batches(num_prompts, prompt_share.held)):
        if number in batches:
            continue
        rollout = generate(params, hosts.to_global(prompts, mesh, prompt_share), jax.random.fold_in(key, number))
        if waiting:  # the last batch was scored while the device drew this one
            finish()
        examples = [example for example in prompt_share.of_owned(held_examples) for _ in range(samples)]
        fields = rollout.tokens, rollout.response_mask, rollout.truncated
        tokens, mask, truncated = hosts.owned(fields, row_share)
        replies = decode_replies(tokenizer, tokens[: len(examples)], mask[: len(examples)], eos_ids)
        lengths = mask.sum(axis=1, dtype=np.int32)
        waiting.append((number, scorer.submit(replies, examples), replies, lengths, truncated))
    if waiting:
        finish()
    whole = Samples(*(np.concatenate(fields) for fields in zip(*(batches[n] for n in sorted(batches)), strict=True)))
    return summary(whole, samples, seed=seed)


def summary(samples: Samples, count: int, *, seed: int) -> dict[str, float]:
    """Of `count` samples of every question: avg (avg@count), maj (maj@count, of several), and pass@k for k = 2, 4, ...
    up to `count`, a score of 1 being right; where scores are not all 0 or 1, also best@k. Of each the ends of its 95%
    interval, NAME_low and NAME_high. Then length_mean, in tokens, and the verifier's counts (killed, failed, refused).
    """
    rewards: np.ndarray = samples.rewards.reshape(-1, count).astype(np.float64)
    correct = rewards >= 1.0
    votes = np.ascontiguousarray(samples.votes).view(np.int64).reshape(-1, count)
    ks = [2**i for i in range(1, 11) if 2**i <= count]
    metrics = {"avg": rewards.mean(axis=1)}
    if count > 1:
        metrics["maj"] = statistics.majority(correct, votes)
    metrics |= {f"pass@{k}": statistics.pass_at_k(correct.sum(axis=1), count, k) for k in ks}
    if not np.isin(rewards, (0.0, 1.0)).all():  # best@k of 0 and 1 is pass@k
        metrics |= {f"best@{k}": statistics.best_at_k(rewards, k) for k in sorted({*ks, count} - {1})}
    values = np.stack(list(metrics.values()), axis=1)
    found: dict[str, float] = {}
    for name, *numbers in zip(metrics, values.mean(axis=0), *statistics.interval(values, seed=seed), strict=True):
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, numbers), strict=True))
    counts = {name: float((samples.outcomes == number).sum()) for number, name in enumerate(OUTCOMES) if number}
    return found | {"length_mean": float(samples.lengths.mean()), **counts}


def _padded(x: np.ndarray, rows: int) -> np.ndarray:
    """With zeros up to so many rows."""
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))
