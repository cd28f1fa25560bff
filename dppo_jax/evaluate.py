"""Evaluation: n samples per question; avg@n and pass@k."""

from collections.abc import Callable
from math import comb

import jax
import numpy as np

from dppo_jax.data.prompts import PromptStream, decode_replies
from dppo_jax.models.decoder import Params
from dppo_jax.rewards.scorer import Pending, Scorer
from dppo_jax.sharding import to_host
from dppo_jax.types import PromptBatch, RolloutBatch

Generate = Callable[[Params, PromptBatch, jax.Array], RolloutBatch]


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> float:
    """The chance that one of k samples is right, averaged over questions: 1 - C(n-c, k) / C(n, k) (2107.03374).

    correct: i[questions], right answers among `samples` of each.
    """
    return float(np.mean([1.0 - comb(samples - int(c), k) / comb(samples, k) for c in correct]))


def evaluate(
    params: Params,
    generate: Generate,
    stream: PromptStream,
    scorer: Scorer,
    *,
    num_prompts: int,
    samples: int,
    key: jax.Array,
    tokenizer,
    eos_ids: tuple[int, ...],
) -> dict[str, float]:
    """avg (avg@samples), pass@k for k = 2, 4, ... up to `samples`, and length, over every question of a stream.

    `generate` draws `samples` responses to each of `num_prompts` prompts. Scores of 1 count as right.
    """
    scores, lengths = [], []
    waiting: list[Pending] = []
    for number, (prompts, examples) in enumerate(stream.eval_batches(num_prompts)):
        rollout = generate(params, prompts, jax.random.fold_in(key, number))
        if waiting:  # the last batch was scored while the device drew this one
            scores.append(waiting.pop().result()[0])
        rows = len(examples) * samples
        tokens, mask = (x[:rows] for x in to_host((rollout.tokens, rollout.response_mask)))
        replies = decode_replies(tokenizer, tokens, mask, eos_ids)
        waiting.append(scorer.submit(replies, [example for example in examples for _ in range(samples)]))
        lengths.append(mask.sum(axis=1))
    scores.append(waiting.pop().result()[0])
    by_question = np.concatenate(scores).reshape(-1, samples)
    correct = (by_question >= 1.0).sum(axis=1)
    ks = [2**i for i in range(1, 11) if 2**i <= samples]
    return {
        "avg": float(by_question.mean()),
        **{f"pass@{k}": pass_at_k(correct, samples, k) for k in ks},
        "length_mean": float(np.concatenate(lengths).mean()),
    }
