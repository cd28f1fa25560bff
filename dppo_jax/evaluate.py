"""Evaluation: n samples per question; avg@n and pass@k."""

from collections import Counter
from collections.abc import Callable, Mapping
from math import comb

import jax
import numpy as np
from jax.sharding import Mesh

from dppo_jax.data.prompts import PromptStream, decode_replies
from dppo_jax.devices import hosts
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending, Scorer
from dppo_jax.types import PromptBatch, RolloutBatch

Generate = Callable[[Params, PromptBatch, jax.Array], RolloutBatch]


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> float:
    """The chance that one of k samples is right, averaged over questions: 1 - C(n-c, k) / C(n, k) (2107.03374).

    correct: i[questions], right answers among `samples` of each.
    """
    return float(np.mean([1.0 - comb(samples - int(c), k) / comb(samples, k) for c in correct]))


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
) -> dict[str, float]:
    """avg (avg@samples), pass@k for k = 2, 4, ... up to `samples`, length, and the verifier's counts (failed, killed:
    see `Pending.result`), over every question of a stream.

    `generate` draws `samples` responses to each of `num_prompts` prompts. Scores of 1 count as right. Of several hosts,
    each scores the responses that are its own, and all return the same.
    """
    prompt_share = hosts.share_over(mesh, num_prompts)
    row_share = prompt_share.grouped(samples)
    scores: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    waiting: list[Pending] = []
    counts: Counter[str] = Counter()

    def finish() -> None:
        padded: np.ndarray = np.zeros(len(row_share.owned), np.float32)
        rewards, verifier = waiting.pop().result()
        counts.update(verifier)
        padded[: len(rewards)] = rewards  # the last batch may have fewer
        scores.append(padded)

    for number, (prompts, held_examples) in enumerate(stream.eval_batches(num_prompts, prompt_share.held)):
        rollout = generate(params, hosts.to_global(prompts, mesh, prompt_share), jax.random.fold_in(key, number))
        if waiting:  # the last batch was scored while the device drew this one
            finish()
        examples = [example for example in prompt_share.of_owned(held_examples) for _ in range(samples)]
        tokens, mask = hosts.owned((rollout.tokens, rollout.response_mask), row_share)
        replies = decode_replies(tokenizer, tokens[: len(examples)], mask[: len(examples)], eos_ids)
        waiting.append(scorer.submit(replies, examples))
        lengths.append(mask.sum(axis=1, dtype=np.int32))
    finish()
    # [rows, batches] to one row after another, without the rows that only fill up the last batch.
    num_replies = len(stream) * samples
    by_batch = hosts.gather((np.stack(scores, axis=1), np.stack(lengths, axis=1)), row_share)
    by_row, length = (x.T.reshape(-1)[:num_replies] for x in by_batch)
    by_question = by_row.reshape(-1, samples)
    correct = (by_question >= 1.0).sum(axis=1)
    ks = [2**i for i in range(1, 11) if 2**i <= samples]
    return {
        "avg": float(by_question.mean()),
        **{f"pass@{k}": pass_at_k(correct, samples, k) for k in ks},
        "length_mean": float(length.mean()),
        **{name: float(count) for name, count in hosts.total(dict(counts)).items()},
    }
