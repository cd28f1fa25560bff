"""Makes the embedded default: a small Qwen3 that does sums, on average half right, from a fallible teacher's solutions.

    python -m assets.make_tiny [--out assets/tiny] [--updates N]

The task is reasoning-gym's `chain_sum` with the settings in TASK. The teacher writes its steps out or answers at once,
and slips in either; the model imitates both habits and slips as often, so that at temperature 1 it is right about half
the time although it knows better. Everything is drawn from fixed seeds. See assets/README.md for what came out.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reasoning_gym
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dppo_jax.errors import run_main
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import Params, forward, head_weight, init_params
from dppo_jax.models.hf import save_hf
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.rewards.verifiers import last_number
from dppo_jax.rollout import Rollout
from dppo_jax.token_head import token_head
from dppo_jax.types import PromptBatch, TrainBatch
from experiments.run.cli import Parser, whole

TASK = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}
# reasoning-gym draws item i of seed s from s + i: seeds must lie further apart than sizes.
CORPUS_SEED, HELD_OUT_SEED = 10_000_000, 20_000_000
PROMPT_TOKENS, NEW_TOKENS = 9, 24  # the longest of either, and a little room

TEXTBOOK = 0.6  # the part of the corpus before the teacher begins to slip
WRITES_STEPS = 0.6  # how often the teacher writes its steps out
SLIPS_WRITTEN, SLIPS_AT_ONCE = 0.2, 0.35  # per operation

EOS, PAD = "<|endoftext|>", "<|pad|>"
BATCH = 64


def slip(value: int, operand: int, sign: int, rng: random.Random) -> int:
    """A wrong result of value + sign * operand: the opposite operation, or up to 2 off."""
    if operand and rng.random() < 0.3:
        return value - sign * operand
    return value + sign * operand + rng.choice([-2, -1, 1, 2])


def teach(expression: str, rng: random.Random, fallible: bool = True) -> str:
    """The teacher's reply to "98 + 93 - 77": "98+93=191, 191-77=114", or "114"; now and then wrong."""
    terms = expression.split()
    written = rng.random() < WRITES_STEPS
    slips = SLIPS_WRITTEN if written else SLIPS_AT_ONCE
    total, steps = int(terms[0]), []
    for operator, operand in zip(terms[1::2], map(int, terms[2::2]), strict=True):
        sign = 1 if operator == "+" else -1
        result = slip(total, operand, sign, rng) if fallible and rng.random() < slips else total + sign * operand
        steps.append(f"{total}{operator}{operand}={result}")
        total = result
    return ", ".join(steps) if written else str(total)


def problems(seed: int, size: int) -> list[dict[str, Any]]:
    """reasoning-gym's entries: question, answer and metadata."""
    return list(reasoning_gym.create_dataset("chain_sum", seed=seed, size=size, **TASK))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, and the words of the question, which never change, become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def pad(rows: list[list[int]], length: int, pad_id: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, [rows, length]."""
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


def encode(tokenizer: PreTrainedTokenizerFast, questions: list[str], replies: list[str]) -> TrainBatch:
    """Questions and replies as the train step takes them, an end-of-sequence token after each reply."""
    prompts = pad(tokenizer(questions)["input_ids"], PROMPT_TOKENS, tokenizer.pad_token_id, left=True)
    ended = [ids + [tokenizer.eos_token_id] for ids in tokenizer(replies)["input_ids"]]
    responses = pad(ended, NEW_TOKENS, tokenizer.pad_token_id, left=False)
    zeros = np.zeros(responses[0].shape, np.float32)
    return TrainBatch(*prompts, *responses, behavior_logp=zeros, advantages=zeros[:, 0])


def pretrain(config: ModelConfig, corpus: TrainBatch, updates: int, *, learning_rate: float, seed: int) -> Params:
    """Imitation of the replies, one pass over the corpus: mean -logp of its response tokens."""
    schedule = make_schedule(learning_rate=learning_rate, warmup=updates // 20, schedule="cosine", updates=updates)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)

    def loss(params: Params, batch: TrainBatch) -> jax.Array:
        tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
        hidden = forward(config, params, tokens, jnp.concatenate([batch.prompt_mask, batch.mask], axis=1), remat="full")
        before = hidden[:, batch.prompt_tokens.shape[1] - 1 : -1]
        logp = token_head(before, head_weight(params), batch.tokens, vocab_chunks=1).logp
        return -jnp.sum(jnp.where(batch.mask, logp, 0.0)) / jnp.sum(batch.mask)

    @jax.jit
    def update(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        change, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, change), opt_state, value

    params = init_params(config, jax.random.key(seed))
    opt_state = optimizer.init(params)
    start = time.time()
    for i in range(updates):
        batch = jax.tree.map(lambda x, i=i: x[i * BATCH : (i + 1) * BATCH], corpus)
        params, opt_state, value = update(params, opt_state, batch)
        if (i + 1) % 50 == 0:
            print(f"update {i + 1}/{updates}: loss {float(value):.4f}, {time.time() - start:.0f} s", flush=True)
    return params


def answer(
    config: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    entries: list[dict[str, Any]],
    *,
    temperature: float,
    seed: int = 0,
) -> list[str]:
    """One reply to each problem."""
    tokens, mask = pad(
        tokenizer([entry["question"] for entry in entries])["input_ids"],
        PROMPT_TOKENS,
        tokenizer.pad_token_id,
        left=True,
    )
    rollout = Rollout(
        config,
        group_size=1,
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    batch = jax.jit(rollout)(params, PromptBatch(tokens, mask, np.arange(len(entries))), jax.random.key(seed))
    return tokenizer.batch_decode(np.asarray(batch.tokens), skip_special_tokens=True)


def accuracy(replies: list[str], entries: list[dict[str, Any]]) -> float:
    """The share of replies whose last number is the answer."""
    return float(np.mean([last_number(reply, entry["answer"]) for reply, entry in zip(replies, entries, strict=True)]))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/tiny"), help="the model directory to write")
    parser.add_argument("--updates", type=whole(1, 1_000_000), default=2000, help=f"of {BATCH} problems each")
    arguments = parser.parse_args()

    rng = random.Random(0)
    corpus = problems(CORPUS_SEED, arguments.updates * BATCH)
    questions = [entry["question"] for entry in corpus]
    textbook = int(TEXTBOOK * len(corpus))
    replies = [teach(entry["metadata"]["expression"], rng, i >= textbook) for i, entry in enumerate(corpus)]
    print(f"teacher: {accuracy(replies[textbook:], corpus[textbook:]):.3f} right")

    tokenizer = train_tokenizer(questions[:2000] + replies[:2000])
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a few rows more than tokens: meshes divide it
        hidden_size=96,
        intermediate_size=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        max_position=256,
        tie_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=True,
    )
    params = pretrain(config, encode(tokenizer, questions, replies), arguments.updates, learning_rate=3e-3, seed=0)

    save_hf(arguments.out, config, params, tokenizer)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
    (arguments.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    held_out = problems(HELD_OUT_SEED, 1024)
    for temperature in (0.0, 1.0):
        replies = answer(config, params, tokenizer, held_out, temperature=temperature)
        print(f"held out, temperature {temperature}: {accuracy(replies, held_out):.3f} right, such as {replies[:4]}")


if __name__ == "__main__":
    run_main(main)
