"""The rollouts that a config describes: of training, over several steps, and of evaluation."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dppo_jax import precision
from dppo_jax.devices import peers
from dppo_jax.errors import UserError
from dppo_jax.models import DTYPES
from dppo_jax.rollout import (
    CacheChoice,
    Conversation,
    ExactRollout,
    InChunks,
    InFlight,
    OneCall,
    Rollout,
    choose_cache,
    resumed_tokens,
)
from dppo_jax.types import RolloutBatch
from experiments.run import memory
from experiments.run.runs import Runs
from experiments.run.setup import Setup

Calls = OneCall | InChunks


def training_rollout(setup: Setup, *, topk: int | None = None, entropy: bool | None = None) -> Rollout:
    """The behavior policy, for training. `topk` and `entropy`: what is recorded, where not as the run needs."""
    c, model = setup.config.rollout, setup.model
    topk, prompts = setup.topk if topk is None else topk, (c.in_flight + 1) * c.prompts
    if topk > model.vocab_size:
        raise UserError(f"rollout.tracked = {topk} is more than the model's vocabulary of {model.vocab_size}")
    if c.router_replay and not model.num_experts:
        raise UserError(f"rollout.router_replay: a {model.model_type} has no experts to replay; set it to False")
    rollout = Rollout(
        setup.behavior_model,
        group_size=c.group_size,
        temperature=c.temperature,
        topk=topk,
        record_entropy=setup.needs_entropy if entropy is None else entropy,
        weights=setup.behavior_weights,
        round_inputs=precision.activations(c.activations),
        record_experts=c.router_replay,
        **_shared_settings(setup, prompts * c.group_size, [setup.config.data], c.max_new_tokens),
    )
    return _with_pages(setup, rollout, prompts, setup.config.data.max_prompt_len)


def whole_batch_rollout(
    setup: Setup, *, topk: int | None = None, entropy: bool | None = None
) -> Rollout | ExactRollout:
    """`training_rollout`, or the exact one of which it is the draft: the policy that draws a batch to its end."""
    rollout = training_rollout(setup, topk=topk, entropy=entropy)
    if not setup.config.rollout.exact:
        return rollout
    return ExactRollout(rollout, setup.isolated_pass, setup.pack_shape, setup.config.train.minibatches)


def batch_calls(runs: Runs, rollout: Rollout | ExactRollout) -> Calls:
    """`Rollout.measured` of all runs, as a step calls it."""
    base, draft = runs.base, rollout.draft if isinstance(rollout, ExactRollout) else rollout
    rows = base.config.rollout.prompts * draft.group_size
    # What is drawn early is all dispatched before the updates, which take its parameters away.
    most = 0 if base.config.train.staleness else steps_of_call(runs, draft, rows)
    if not most:
        return OneCall(base.on_mesh_measured(runs.each(rollout.measured)))
    shardings = dict(arguments=(None, base.by_row, None), results=(base.by_row, base.everywhere))
    return in_chunks(base, draft.begin, draft.draw, rollout.end, most, **shardings)


def evaluation_calls(runs: Runs) -> Calls:
    """`Rollout` of one run's evaluation, as a run calls it."""
    base, rollout = runs.base, eval_rollout(runs.base)
    most = steps_of_call(runs, rollout, base.config.eval.prompts * rollout.group_size)
    if not most:
        return OneCall(base.on_mesh(rollout), asked=peers.asked_to_stop)

    def end(*arguments: Any) -> RolloutBatch:
        return rollout.end(*arguments)[0]

    shardings = dict(arguments=(None, base.by_row, None), results=base.by_row)
    return in_chunks(base, rollout.begin, rollout.draw, end, most, **shardings)


def steps_of_call(runs: Runs, rollout: Rollout, rows: int) -> int:
    """rollout.chunk; 0, all in one call, where a rollout of so many rows ends with it, and of several runs together."""
    most, turns = runs.base.config.rollout.chunk, -(-rows // (rollout.slots or rows))
    return most if not runs.stacked and turns * rollout.max_new_tokens > most else 0


def in_chunks(setup: Setup, begin: Any, draw: Any, end: Any, most: int, *, arguments: Any, results: Any) -> InChunks:
    """Calls between which the run hears that it is asked to stop."""
    return InChunks(
        begin, draw, end, most=most, asked=peers.asked_to_stop, arguments=arguments, results=results,
        everywhere=setup.everywhere,
    )  # fmt: skip


def rollout_in_flight(setup: Setup, rollout: Rollout) -> InFlight:
    """The rollout, drawn over several steps."""
    c = setup.config.rollout
    max_age = c.in_flight if c.max_age is None else c.max_age
    return InFlight(rollout, prompts=c.prompts, ahead=c.in_flight, max_age=max_age)


def conversation(setup: Setup, rollout: Rollout) -> Conversation:
    """The rollout in turns with environments, over as many steps as it may take."""
    c = setup.config.rollout
    flight = rollout_in_flight(setup, rollout)
    return Conversation(rollout, flight.prompts, flight.ahead, flight.max_age, turn_tokens=c.turn_tokens)


def eval_rollout(setup: Setup) -> Rollout:
    """The policy as it is evaluated: its own temperature, truncation and length."""
    c = setup.config.eval
    sections = list(c.sets.values()) or [setup.config.data]
    rollout = Rollout(
        setup.model,
        group_size=c.samples,
        temperature=c.temperature,
        top_p=c.top_p,
        weights=setup.merge,
        **_shared_settings(setup, c.prompts * c.samples, sections, setup.eval_max_new_tokens),
    )
    return _with_pages(setup, rollout, c.prompts, max(data.max_prompt_len for data in sections))


def _shared_settings(setup: Setup, rows_count: int, sections: list[ConfigDict], max_new_tokens: int) -> dict[str, Any]:
    """What training and evaluation share. The attention is one that takes the prompts of every data section."""
    c, longest = setup.config.rollout, max(data.max_prompt_len for data in sections)
    kernels = {setup.attention(dtype=c.dtype, length=data.max_prompt_len).name for data in sections}
    cache = _cache_of(setup, longest + max_new_tokens - 1)
    return dict(
        max_new_tokens=max_new_tokens,
        eos_ids=setup.text.eos_ids,
        pad_id=setup.text.pad_id,
        stops=setup.stops,
        dtype=DTYPES[c.dtype],
        slots=min(c.slots, rows_count) if c.slots else None,
        shards=setup.batch_shards,
        attention=kernels.pop() if len(kernels) == 1 else "xla",
        unrolled=setup.platform != "tpu",
        resume_attention=_resume_attention(setup, resumed_tokens(longest, max_new_tokens)),
        head_float32=setup.config.policy.head_float32,
        paged=cache.paged,
        paged_attention=cache.attention,
    )


def _resume_attention(setup: Setup, tokens: int) -> str:
    """The attention of rows that go on, of which so many tokens pass the model at a time."""
    return setup.attention(dtype=setup.config.rollout.dtype, length=tokens).name


def _cache_of(setup: Setup, length: int) -> CacheChoice:
    """How a rollout keeps keys and values of rows up to so many tokens."""
    c = setup.config.rollout
    return choose_cache(
        setup.platform,
        setup.model,
        dtype=DTYPES[c.dtype],
        length=length,
        cache="pages" if c.pages else c.cache,
    )


def _with_pages(setup: Setup, rollout: Rollout, prompts: int, prompt_length: int) -> Rollout:
    """With as many pages as rollout.pages says, or as the devices have memory for; None: enough for all slots."""
    pages = setup.config.rollout.pages or None
    if rollout.paged and pages is None and setup.memory_bytes is not None:
        pages = memory.free_pages(setup, rollout, setup.memory_bytes, prompts, prompt_length)
    return dataclasses.replace(rollout, pages=pages)
