r"""Makes the model of the reuse regime: 2 layers, 32 wide, which does the chains of `task` and slips in half of them.

    python -m experiments.questions.reuse.make_model [--out assets/reuse] [--spellings 8] [--tail 0] [--steps 10] \
        [--pauses 0]

Imitation of a teacher who slips in 7% of the steps, on fresh chains. The model learns the sums and the slips: at
temperature 1 about 53% of its replies are right. Everything is drawn from fixed seeds. Writes the model directory and
the prompts in it.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dppo_jax.data.prompts import decode_replies
from dppo_jax.errors import run_main
from dppo_jax.models.config import ModelConfig, RopeConfig
from dppo_jax.models.decoder import Params, forward, head_weight, init_params
from dppo_jax.models.hf import load_params, save_hf
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.rewards.verifiers import last_number
from dppo_jax.rollout import Rollout
from dppo_jax.token_head import token_head
from dppo_jax.types import PromptBatch
from experiments.questions.reuse.task import (
    MODULUS,
    STEPS,
    TASK,
    VOCABULARY,
    Task,
    draw,
    make_tokenizer,
    write_prompts,
)
from experiments.run.cli import Parser, not_negative, whole

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    max_position=64,
    tie_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    qk_norm=True,
)
SLIP = 0.07  # per step, of STEPS
UPDATES, BATCH, CHUNK = 4000, 128, 500  # CHUNK: updates in one compiled call
MORE_UPDATES = 2000  # for other spellings and for pauses, from the default task's model on
ASSET = Path(__file__).resolve().parents[3] / "assets" / "reuse"  # that model
LEARNING_RATE, WARMUP = 3e-3, 100
CORPUS_SEED, FRESH_SEED = 10, 12


def config_of(task: Task) -> ModelConfig:
    """The model for a task."""
    longest = max(CONFIG.max_position, task.prompt_tokens + task.reply_tokens + 1)
    return dataclasses.replace(CONFIG, vocab_size=len(task.vocabulary), max_position=longest)


def slip(task: Task) -> float:
    """Of the teacher, per step: as many chains are right, however long they are."""
    return SLIP if task.steps == STEPS else 1 - (1 - SLIP) ** (STEPS / task.steps)


def loss(config: ModelConfig, prompt_tokens: int, params: Params, tokens: jax.Array) -> jax.Array:
    """Mean -logp of the reply tokens; tokens i32[B, T], a prompt of so many tokens and its reply in each row."""
    hidden = forward(config, params, tokens, jnp.ones(tokens.shape, bool))
    before = hidden[:, prompt_tokens - 1 : -1]
    return -token_head(before, head_weight(params), tokens[:, prompt_tokens:], temperature=1.0).logp.mean()


def make_answer(temperature: float, task: Task = TASK):
    """(params, prompts i32[N, P], seed) -> one reply to each, as text."""
    tokenizer = make_tokenizer(task)
    rollout = Rollout(
        config_of(task),
        group_size=1,
        max_new_tokens=task.reply_tokens + 1,
        temperature=temperature,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )
    jitted = jax.jit(rollout)

    def answer(params: Params, prompts: np.ndarray, seed: int) -> list[str]:
        batch = PromptBatch(prompts, np.ones(prompts.shape, bool), np.arange(len(prompts), dtype=np.int32))
        drawn = jitted(params, batch, jax.random.key(seed))
        return decode_replies(tokenizer, drawn.tokens, drawn.response_mask, (tokenizer.eos_token_id,))

    return answer


def accuracy(answer, params: Params, *, seed: int, count: int, task: Task = TASK) -> float:
    """The share of right replies to `count` chains of this seed."""
    chains = draw(np.random.default_rng(seed), count, task=task)
    replies = answer(params, chains.prompts, seed)
    return float(np.mean([last_number(reply, str(final)) for reply, final in zip(replies, chains.final, strict=True)]))


def widened(params: Params, task: Task) -> Params:
    """The default task's model, every spelling of a state at the mean of its eight, and a token to pause with."""
    embed = params["embed"]
    end = TASK.first_operation
    means = embed[1:end].reshape(MODULUS, TASK.spellings, -1).mean(axis=1)
    noise = 0.02 * jax.random.normal(jax.random.key(1), (MODULUS * task.spellings, embed.shape[1]))
    states = jnp.repeat(means, task.spellings, axis=0) + noise
    pause = 0.02 * jax.random.normal(jax.random.key(2), (1 if task.pauses else 0, embed.shape[1]))
    return {**params, "embed": jnp.concatenate([embed[:1], states, embed[end:], pause])}


def pretrain(updates: int, task: Task, *, seed: int, start: Params | None = None) -> Params:
    """Parameters after so many updates, a multiple of CHUNK."""
    objective = functools.partial(loss, config_of(task), task.prompt_tokens)
    schedule = make_schedule(learning_rate=LEARNING_RATE, warmup=WARMUP, schedule="cosine", updates=updates)
    optimizer = make_optimizer(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)

    @jax.jit
    def run(params, opt_state, batches):
        def update(carry, tokens):
            params, opt_state = carry
            value, grads = jax.value_and_grad(objective)(params, tokens)
            change, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, change), opt_state), value

        (params, opt_state), values = jax.lax.scan(update, (params, opt_state), batches)
        return params, opt_state, values.mean()

    rows = -(-BATCH * (STEPS + 1) // (task.steps + 1))  # of an update: as many states, however many a chain has
    rng, began = np.random.default_rng(CORPUS_SEED), time.time()
    params = init_params(config_of(task), jax.random.key(seed)) if start is None else start
    opt_state = optimizer.init(params)
    for done in range(CHUNK, updates + 1, CHUNK):
        chains = draw(rng, CHUNK * rows, slip(task), task)
        batches = np.concatenate([chains.prompts, chains.replies], axis=1).reshape(CHUNK, rows, -1)
        params, opt_state, value = run(params, opt_state, batches)
        print(f"update {done}/{updates}: loss {float(value):.4f}, {time.time() - began:.0f} s", flush=True)
    return params


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/reuse"), help="the model directory to write")
    parser.add_argument("--spellings", type=whole(1, 1000), default=TASK.spellings, help="of every state")
    parser.add_argument("--tail", type=not_negative, default=TASK.tail, help="the k-th has a frequency of k^-TAIL")
    parser.add_argument("--steps", type=whole(1, 1000), default=TASK.steps, help="of a chain")
    parser.add_argument("--pauses", type=whole(0, 100), default=TASK.pauses, help="tokens after every state of a reply")
    arguments = parser.parse_args()
    task = Task(arguments.spellings, arguments.tail, arguments.steps, arguments.pauses)

    eight_spellings = TASK._replace(steps=task.steps)
    if task == TASK or task.steps != STEPS:
        params = pretrain(UPDATES, eight_spellings, seed=0)
    else:
        params = load_params(ASSET)[1]
    if task != eight_spellings:
        params = pretrain(MORE_UPDATES, task, seed=0, start=widened(params, task))
    for name, temperature in (("temperature 1", 1.0), ("greedy", 0.0)):
        score = accuracy(make_answer(temperature, task), params, seed=FRESH_SEED, count=4096, task=task)
        print(f"fresh chains, {name}: {score:.3f} right")

    tokenizer = make_tokenizer(task)
    save_hf(arguments.out, config_of(task), params, tokenizer)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": True}
    (arguments.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    write_prompts(arguments.out, task)


if __name__ == "__main__":
    run_main(main)
