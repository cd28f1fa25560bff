"""A whole rollout at given response lengths, from the compiled prefill, the compiled decode step and the scheduler.

    predicted = prefill + resumes + decode steps x (decode step - attention) + pages of the slowest shard / bandwidth
    ideal = the prompts' operations at full rate + (weights x decode steps without tail + live tokens) / bandwidth

"decode step - attention" is what the compiled step is predicted to take, without the bytes of the cache that it reads
when every row is as long as it may be. "resumes" are passes of rows that go on under other parameters or after they
made room, one row after another in a long one for each shard; they take as long as their operations do in the compiled
prefill. All shards take each step together: in the predicted time the one that reads most of its pages counts, in the
ideal one their mean. The ideal counts bytes of tokens, not of pages, and no slot that is idle. Every prompt is as long
as it may be.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.devices.chips import Chip
from dppo_jax.models import ModelConfig
from dppo_jax.models.flops import forward_flops
from dppo_jax.models.pages import PAGE, count_for, per_block
from dppo_jax.rollout import Rollout, resumed_tokens
from experiments.compile_for_tpu import lengths
from experiments.compile_for_tpu.lengths import Decoding, Flight, Settings
from experiments.run.memory import page_bytes
from experiments.run.rollouts import training_rollout
from experiments.run.setup import Setup

MEASURED = 8  # training steps, of rows in flight, after as many as it takes for all ages to be there


def settings_of(setup: Setup, policy: Rollout) -> Settings:
    """What the scheduler needs to know of a rollout."""
    prompt, longest = setup.config.data.max_prompt_len, policy.max_new_tokens
    columns = prompt + longest - 1
    width, batch = count_for(columns), (setup.config.rollout.in_flight + 1) * setup.config.rollout.prompts
    return Settings(
        slots=policy.slots or batch * policy.group_size,
        group_size=policy.group_size,
        shards=policy.shards,
        limit=longest,
        pages=policy.pages if policy.paged else None,
        width=width,
        page_block=per_block(width) if policy.paged and policy.paged_attention == "pallas_tpu" else 0,
        columns=None if policy.paged else columns if policy.unrolled else count_for(columns) * PAGE,
        prompt_columns=prompt,
    )


def simulated(config: ConfigDict, settings: Settings, text: str) -> list[Decoding]:
    """The scheduler at these lengths: one rollout, or several of rows in flight when all is as it will stay."""
    c = config.rollout
    rows, prompt = c.prompts * c.group_size, config.data.max_prompt_len

    def batch(number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(rows, prompt), lengths.drawn_from(text, rows, c.max_new_tokens, seed=number)

    if not c.in_flight:
        return [lengths.decoding(*batch(0), settings)]
    max_age = c.in_flight if c.max_age is None else c.max_age
    steps = 2 * (max_age + 1) + MEASURED
    return lengths.in_flight(batch, settings, Flight(c.prompts, c.in_flight, max_age), steps)[-MEASURED:]


def _resume_seconds(config: ConfigDict, model: ModelConfig, settings: Settings, prefill: dict[str, Any]) -> float:
    """Of one pass over rows that go on: the compiled prefill's time, by the operations of both."""
    c, length = config.rollout, config.data.max_prompt_len
    prompts = (c.in_flight + 1) * c.prompts

    def operations(rows: int, length: int) -> float:
        return rows * forward_flops(model, 0, length, 0)

    resumed = operations(settings.shards, resumed_tokens(length, c.max_new_tokens))
    return prefill["predicted_seconds"] * resumed / operations(prompts, length)


def facts(
    config: ConfigDict, model: ModelConfig, mesh: Mesh, step_facts: list[dict[str, Any]], chip: Chip, text: str
) -> dict[str, Any]:
    """The object of the whole rollout that --json writes; of rows in flight, the mean of several training steps."""
    prefill, decode = ({f["step"]: f for f in step_facts}[name] for name in ("prefill", "decode"))
    setup = Setup(config, model, mesh)
    policy = training_rollout(setup)
    settings = settings_of(setup, policy)
    found = simulated(config, settings, text)

    def mean(value: Callable[[Decoding], float]) -> float:
        return sum(map(value, found)) / len(found)

    page = page_bytes(setup, policy) / chip.bandwidth
    without_attention = decode["predicted_seconds"] - decode["read_bytes"] / chip.bandwidth
    resuming = mean(lambda d: d.resumes) * _resume_seconds(config, model, settings, prefill)
    decoding = mean(lambda d: d.decode_steps) * without_attention + mean(lambda d: d.slowest_pages) * page
    weights = mean(lambda d: d.decode_steps_without_tail) * decode["weight_bytes"] / chip.bandwidth
    return {
        "step": "rollout",
        "lengths": text,
        "cache": "pages" if policy.paged else "blocks",
        "slots": found[0].slots,
        "decode_steps": mean(lambda d: d.decode_steps),
        "decode_steps_without_tail": mean(lambda d: d.decode_steps_without_tail),
        "live_share": mean(lambda d: d.decode_steps_without_tail) / max(mean(lambda d: d.decode_steps), 1),
        "pages_read": mean(lambda d: d.pages_read),
        "pages_live": mean(lambda d: d.pages_live),
        "put_back": mean(lambda d: d.put_back),
        "resumes": mean(lambda d: d.resumes),
        "prefill_seconds": prefill["predicted_seconds"],
        "resume_seconds": resuming,
        "decode_seconds": decoding,
        "predicted_seconds": prefill["predicted_seconds"] + resuming + decoding,
        "ideal_seconds": prefill["ideal_seconds"]
        + weights
        + mean(lambda d: d.tokens_live) / PAGE / settings.shards * page,
    }


def microbatches(config: ConfigDict, model: ModelConfig, mesh: Mesh, text: str) -> tuple[int, int]:
    """Turns of the loop over packed microbatches, in all updates of a training step: at these lengths, and where every
    response is as long as it may be."""
    setup, c = Setup(config, model, mesh), config
    rows = c.rollout.prompts * c.rollout.group_size
    prompts, responses = np.full(rows, c.data.max_prompt_len), lengths.drawn_from(text, rows, c.rollout.max_new_tokens)
    longest, minibatches = np.full(rows, c.rollout.max_new_tokens), list(setup.minibatches(0))

    def turns(responses: np.ndarray) -> int:
        plans = (packing.plan(index, prompts, responses, setup.pack_shape) for index in minibatches)
        return sum(int(plan.num_microbatches) for plan in plans)

    return turns(responses), turns(longest)
