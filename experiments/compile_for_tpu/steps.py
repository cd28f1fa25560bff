"""The programs that a config runs on a pod, compiled for one that is not there."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.devices.sharding import (
    ROLLOUT,
    batch_sharding,
    laid_out,
    local_bytes,
    make_mesh,
    named_shardings,
    num_shards,
    spec,
)
from dppo_jax.errors import UserError
from dppo_jax.models import ModelConfig
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.train_step import assemble, jit_update
from dppo_jax.types import PromptBatch
from experiments.run.memory import page_bytes
from experiments.run.rollouts import training_rollout
from experiments.run.setup import Setup

NAMES = ("train", "prefill", "decode")


class Step(NamedTuple):
    """One program: how it is compiled, and what is known of it beforehand. Bytes are per chip."""

    name: str
    lower: Callable[[], Any]
    microbatches: int  # turns of the loop over packed microbatches
    tokens: int  # processed, over all chips
    logits_bytes: int  # bytes of all logits of one pass, if they were held
    weight_bytes: int = 0  # read in each decode step
    cache_bytes: int = 0
    read_bytes: int = 0  # of the cache, in a decode step in which every row is as long as it may be


def devices(topology: str) -> list[jax.Device]:
    """Those of a topology such as v5p:4x4x4. UserError where libtpu is missing or does not know it."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        if "libtpu" in str(error) or isinstance(error, ImportError):
            raise UserError("libtpu is not installed, or does not load: pip install 'jax[tpu]'") from error
        reason = str(error).splitlines()[0]
        raise UserError(f"topology {topology!r} is not known to libtpu: {reason}") from error


@contextlib.contextmanager
def in_force(config: ConfigDict, mesh: Mesh) -> Iterator[None]:
    """The mesh and the precision of products, as `load_setup` sets them, without devices."""
    with jax.default_matmul_precision(config.policy.matmul), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def mesh_of(config: ConfigDict, topology: str) -> Mesh:
    """The config's mesh over a topology."""
    return make_mesh(config.mesh, devices(topology))


def steps(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> list[Step]:
    """The update, the prefill and one decode step. Every prompt and response is as long as it may be."""
    return [train(config, model, mesh), *rollout(config, model, mesh)]


def train(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Step:
    """One optimizer minibatch."""
    c, replicated, prompts = config, NamedSharding(mesh, P()), _prompts(config)
    setup = Setup(c, model, mesh)
    state = laid_out(setup.state_shapes, setup.shardings)
    shape, key = setup.pack_shape, jax.eval_shape(lambda: jax.random.key(0))
    drawn = jax.eval_shape(training_rollout(setup), state.policy, prompts, key)
    batch = jax.eval_shape(assemble, prompts, drawn)
    index = next(setup.minibatches(0))
    prompt, response = (np.full(len(batch.tokens), n) for n in (c.data.max_prompt_len, c.rollout.max_new_tokens))
    plan = packing.plan(index, prompt, response, shape)
    for policy in ("proximal", "reference", "teacher"):
        if f"{policy}_logp" in setup.needed:
            recompute = make_recompute(setup.policy_logprobs, policy)
            batch = jax.eval_shape(recompute, state.policy, batch, plan)
    update: Any = jit_update(setup.update, setup.shardings, mesh, needs_exact=setup.needs_exact)
    arguments = [
        state,
        laid_out(batch, batch_sharding(mesh)),
        laid_out(jax.tree.map(np.asarray, plan), replicated),
        *([state.params] if setup.needs_exact else []),
    ]
    share = (shape.rows // setup.batch_shards) * shape.responses * model.vocab_size
    return Step(
        "train",
        lambda: update.lower(*arguments),
        microbatches=int(plan.num_microbatches),
        tokens=len(index) * (c.data.max_prompt_len + c.rollout.max_new_tokens),
        logits_bytes=4 * share // _vocabulary_shards(mesh),
    )


def rollout(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> list[Step]:
    """The prefill of all prompts, and one token for every slot with a full cache."""
    c, setup = config, Setup(config, model, mesh)
    policy = training_rollout(setup)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = _prompts(c, c.rollout.in_flight + 1)
    prompts = laid_out(prompts, batch_sharding(mesh))
    published = jax.eval_shape(policy.publish, setup.state_shapes.policy)
    published = laid_out(published, named_shardings(mesh, setup.published_axes(published), ROLLOUT))
    waiting, experts = jax.eval_shape(policy.prefill, published, prompts, key)
    shapes = waiting, experts, jax.eval_shape(policy.idle, waiting, experts)
    out = jax.tree.map_with_path(lambda path, x: _rollout_sharding(mesh, path, x), shapes)
    waiting, _, state = laid_out(shapes, out)
    replicated = NamedSharding(mesh, P())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    prefill = jax.jit(policy.prefill, out_shardings=out[:2])
    # A rollout publishes the weights and decodes in one program, which lays them out as its loop reads them.
    formats = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), published)
    step = jax.jit(policy.step, donate_argnums=2, in_shardings=(formats, None, None), out_shardings=out[2])
    if policy.paged:  # as in the rollout's own loop: the pool has the prompts
        waiting = dataclasses.replace(waiting, prompts=None)
    slots, count = len(state.row), len(prompts.tokens)
    read = {name: p for name, p in published.items() if name != "embed" or model.tie_embeddings}
    shards, cache_bytes = setup.batch_shards, local_bytes(state.cache)
    full_tables = cache_bytes if state.table is None else state.table.pages.size // shards * page_bytes(setup, policy)
    return [
        Step(
            "prefill",
            lambda: prefill.lower(published, prompts, key),
            microbatches=1,
            tokens=count * c.data.max_prompt_len,
            logits_bytes=4 * count * c.data.max_prompt_len * model.vocab_size // shards // _vocabulary_shards(mesh),
        ),
        Step(
            "decode",
            lambda: step.lower(published, waiting, state),
            microbatches=1,
            tokens=slots,
            logits_bytes=4 * slots * model.vocab_size // shards // _vocabulary_shards(mesh),
            weight_bytes=local_bytes(read),
            cache_bytes=cache_bytes,
            read_bytes=min(cache_bytes, full_tables),
        ),
    ]


def compiled(step: Step) -> tuple[Any, float]:
    """(the program, seconds)"""
    began = time.perf_counter()
    return step.lower().compile(), time.perf_counter() - began


def _vocabulary_shards(mesh: Mesh) -> int:
    return num_shards(mesh, *ROLLOUT["vocab"])


def _prompts(config: ConfigDict, batches: int = 1) -> PromptBatch:
    n, length = batches * config.rollout.prompts, config.data.max_prompt_len
    return PromptBatch(
        tokens=jax.ShapeDtypeStruct((n, length), jnp.int32),
        mask=jax.ShapeDtypeStruct((n, length), jnp.bool_),
        group=jax.ShapeDtypeStruct((n,), jnp.int32),
    )


def _rollout_sharding(mesh: Mesh, path, x) -> NamedSharding:
    """The sharding of a part of the rollout's state: keys and values by rows and heads, scalars replicated, the rest by
    rows. Of all layers together, pages are [KV, D L N, 128, D], and [L, KV, N, p, 128, D] while they wait; blocks are
    [L, S, KV, c, D]."""
    names = [getattr(key, "name", None) for key in path]
    axes: tuple = ("batch",) if x.ndim else ()
    if "cache" in names or "prompts" in names:
        before = ("batch", "kv_heads") if x.ndim == 5 else ("kv_heads", "batch")
        axes = (*[None] * (x.ndim > 4), *before, *[None] * (x.ndim - 2 - (x.ndim > 4)))
    cut = [num_shards(mesh, *ROLLOUT[axis]) if axis else 1 for axis in axes]
    fits = [axis if size % n == 0 else None for axis, size, n in zip(axes, x.shape, cut, strict=False)]
    return NamedSharding(mesh, spec(*fits, rules=ROLLOUT))
