"""How many pages of a rollout's cache the memory of a device has room for, by the shapes of what else is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dppo_jax.devices.sharding import ROLLOUT, laid_out, local_bytes, named_shardings, num_shards
from dppo_jax.models import DTYPES
from dppo_jax.models.decoder import abstract_params, param_axes
from dppo_jax.models.pages import PAGE, count_for
from dppo_jax.rollout import Rollout

if TYPE_CHECKING:
    from experiments.run.setup import Setup

SPARE = 0.1  # of the memory: the prefill, and what is not counted here


def page_bytes(setup: Setup, rollout: Rollout) -> int:
    """Of one page on one device: keys and values of all layers, of the heads that it has."""
    model, mesh = rollout.config, setup.mesh
    cut = 1 if mesh is None else num_shards(mesh, *ROLLOUT["kv_heads"])
    heads = model.num_kv_heads // cut if model.num_kv_heads % cut == 0 else model.num_kv_heads
    return 2 * model.num_layers * heads * PAGE * model.head_dim * jnp.dtype(rollout.dtype).itemsize


def _teacher_bytes(setup: Setup) -> int:
    """Of the teacher's parameters on one device; 0 where the loss asks for none."""
    if setup.teacher is None or "teacher_logp" not in setup.needed:
        return 0
    model, mesh = setup.teacher.model, setup.mesh
    dtype = DTYPES[setup.teacher.config.policy.dtype]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(model))
    return local_bytes(laid_out(shapes, None if mesh is None else named_shardings(mesh, param_axes(model))))


def free_pages(setup: Setup, rollout: Rollout, memory: int, prompts: int, prompt_length: int) -> int:
    """Pages that a device of so many bytes has room for, beside the training state, what the rollout keeps, and the
    pages of so many prompts."""
    c, mesh, state = setup.config, setup.mesh, setup.state_shapes
    state = laid_out(state, None if mesh is None else setup.shardings)
    published = jax.eval_shape(rollout.publish, setup.state_shapes.policy)
    axes = setup.published_axes(published)
    published = laid_out(published, None if mesh is None else named_shardings(mesh, axes, ROLLOUT))
    copies = ("reference_logp" in setup.needed) + setup.needs_exact + (c.rollout.lag + 1 if c.rollout.lag else 0)
    kept = setup.beside_bytes + local_bytes(state) + local_bytes(published) + copies * local_bytes(state.params)
    kept += _teacher_bytes(setup)
    rows = prompts * rollout.group_size // setup.batch_shards
    each = 16 + 8 * rollout.topk + (2 if rollout.stops else 0)  # tokens, logp, two uniforms; the top K; a state
    each += 4 if rollout.record_entropy else 0
    kept += rows * rollout.max_new_tokens * each
    free = int((1 - SPARE) * memory) - kept
    return max(0, free // page_bytes(setup, rollout) - prompts // setup.batch_shards * count_for(prompt_length))
