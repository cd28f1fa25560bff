"""A config's rollout at given lengths on the accelerator at hand, with random weights: how fast does it read?

    python -m experiments.benchmark.long_rollout --config configs/paper/sanity_test.py --lengths lognormal:3000:1 \
        --config.rollout.slots=128 --config.rollout.cache=blocks

One rollout, compiled before it is timed. Prints a line of JSON: the bytes that its decode steps read (weights once a
step, and what was read of the cache) and those of live tokens' pages, a second, as shares of the rate at which this
device copies memory; decode steps, tokens a second and the peak of memory; the time of the same in calls of
rollout.chunk decode steps, over that of one call. Every prompt is as long as it may be.
"""

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.errors import UserError, run_main
from dppo_jax.models.decoder import Params, init_params
from dppo_jax.rollout import Rollout
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.benchmark import ours
from experiments.benchmark.processor import processor
from experiments.compile_for_tpu import lengths
from experiments.run import checks, cli
from experiments.run.load import enter_mesh
from experiments.run.memory import page_bytes
from experiments.run.rollouts import in_chunks, training_rollout
from experiments.run.setup import Setup, Text
from experiments.trace import model_config


def copy_rate() -> float:
    """Bytes that this device reads and writes in a second of copying a large array; the best of five."""
    x = jnp.ones((2**28 if jax.default_backend() == "cpu" else 2**32) // 4, jnp.float32)
    return 2 * x.nbytes / ours.seconds(jax.jit(lambda x: x + 1), x)


def of_calls(setup: Setup, rollout: Rollout, arguments: tuple[Any, ...], one: RolloutBatch) -> tuple[float, float]:
    """Seconds of the same rollout in calls of rollout.chunk decode steps, and the share of its tokens that are those of
    one call. On a GPU not all are: what is compiled anew may multiply in another order."""
    shardings = dict(arguments=(None, setup.by_row, None), results=(setup.by_row, setup.everywhere))
    calls = in_chunks(setup, rollout.begin, rollout.draw, rollout.end, setup.config.rollout.chunk, **shardings)
    batch, _ = calls(*arguments)  # compiles
    start = time.perf_counter()
    jax.block_until_ready(calls(*arguments))
    return time.perf_counter() - start, float(np.mean(np.asarray(batch.tokens == one.tokens)[one.response_mask]))


def measure(setup: Setup, params: Params, text: str) -> dict[str, object]:
    """One rollout of responses as long as `text` says."""
    c, rollout = setup.config, training_rollout(setup)
    rows, prompt = c.rollout.prompts * c.rollout.group_size, c.data.max_prompt_len
    limit = lengths.drawn_from(text, rows, c.rollout.max_new_tokens, seed=c.seed)
    if limit.max() == 1:
        raise UserError(f"--lengths {text}: no response has a second token, so nothing is decoded")
    draw = np.random.default_rng(c.seed)
    prompts = PromptBatch(
        tokens=draw.integers(1, setup.model.vocab_size, (c.rollout.prompts, prompt), dtype=np.int32),
        mask=np.ones((c.rollout.prompts, prompt), bool),
        group=np.arange(c.rollout.prompts, dtype=np.int32),
        limit=limit.astype(np.int32).reshape(c.rollout.prompts, -1),
    )
    arguments = params, prompts, jax.random.key(c.seed)
    start = time.perf_counter()
    jitted: Any = setup.on_mesh_measured(rollout.measured)
    compiled = jitted.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    batch, work = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - start
    assert int(batch.response_mask.sum()) == limit.sum() and bool(jnp.isfinite(batch.behavior_logp).all())

    device = jax.devices()[0]
    stats = device.memory_stats() or {}  # of one call
    in_calls = of_calls(setup, rollout, arguments, batch) if c.rollout.chunk else None

    published = jax.eval_shape(rollout.publish, params)
    lookups = published["embed"].size * published["embed"].dtype.itemsize if "head" in published else 0
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(published)) - lookups
    page, steps, rate = page_bytes(setup, rollout), int(work.decode_steps), copy_rate()
    read, live = (steps * weights + page * float(pages) for pages in (work.pages_read, work.pages_live))
    return {
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "jax": jax.__version__,
        "cache": f"pages, {rollout.paged_attention}" if rollout.paged else "blocks",
        "slots": rollout.slots or rows,
        "pages": rollout.pages,
        "tokens": int(limit.sum()),
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "chunk": c.rollout.chunk,
        "chunk_seconds_ratio": in_calls and in_calls[0] / seconds,
        "chunk_equal_tokens": in_calls and in_calls[1],
        "tokens_per_second": int(limit.sum()) / seconds,
        "decode_steps": steps,
        "decode_steps_without_tail": float(work.live) / (rollout.slots or rows),
        "milliseconds_per_step": 1000 * seconds / steps,
        "read_over_live": float(work.pages_read / work.pages_live),
        "put_back": int(work.put_back),
        "copy_bytes_per_second": rate,
        "read_share": read / seconds / rate,
        "live_share": live / seconds / rate,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def main() -> None:
    """The command line."""
    config, arguments = cli.parse(
        __doc__.split("\n")[0],
        {
            "--lengths": dict(required=True, metavar="L", help="lognormal:MEAN:SIGMA, uniform:A:B or a run's folder"),
            "--layers": dict(type=cli.whole(1, 1000), metavar="N", help="of a model otherwise the same: quicker"),
        },
    )
    checks.check(config)
    if config.rollout.in_flight:
        raise UserError(
            f"rollout.in_flight = {config.rollout.in_flight}, but one rollout is measured here; set it to 0"
        )
    lengths.drawn_from(arguments.lengths, 1, 1)  # refused before anything is compiled
    with contextlib.ExitStack() as stack:
        mesh, model = enter_mesh(config, stack), model_config(config)
        model = dataclasses.replace(model, num_layers=arguments.layers) if arguments.layers else model
        checks.check_mesh(config, mesh, model)
        setup = Setup(config, model, mesh, Text(None, (-1,), 0))
        params = jax.jit(functools.partial(init_params, model))(jax.random.key(config.seed))
        print(json.dumps(measure(setup, params, arguments.lengths)))


if __name__ == "__main__":
    run_main(main)
