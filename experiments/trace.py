"""Traces a config's rollout and update to shapes: no weights, no data, no compilation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.errors import UserError
from dppo_jax.files import read_json_object, user_path
from dppo_jax.models import ModelConfig
from dppo_jax.models.config import config_from_hf
from dppo_jax.models.hf import load_config
from dppo_jax.storage import hub
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch
from experiments.run import checks
from experiments.run.model_files import hub_name
from experiments.run.rollouts import training_rollout
from experiments.run.setup import Setup


def model_config(config: ConfigDict) -> ModelConfig:
    """The model of policy.path or, where that directory is not here, of policy.shape (a config.json), or of the
    config.json on the hub."""
    directory = user_path(config.policy.path, "policy.path")
    if config.policy.path and directory.is_dir():
        return load_config(directory)
    if not config.policy.shape:
        fault = f"there is no directory {config.policy.path!r}, and policy.shape names no config.json instead"
        if not hub_name(config):
            raise UserError(fault)
        try:
            revision = config.policy.commit or config.policy.revision
            return load_config(hub.model_config(config.policy.path, revision).parent)
        except UserError as error:
            raise UserError(f"{fault}; {error}") from None
    shape = user_path(config.policy.shape, "policy.shape")
    if not shape.is_file():
        raise UserError(f"policy.shape names {str(shape)!r}, which does not exist")
    return config_from_hf(read_json_object(shape), str(shape))


def beside(setup: Setup) -> str:
    """The models that a run holds on the devices beside its own, in words: neither traced nor compiled for a pod."""
    others = {"a reward model": setup.terms.get("model"), "a teacher": "teacher_logp" in setup.needed}
    return " and ".join(name for name, there in others.items() if there)


def trace(config: ConfigDict) -> str:
    """Checks the config and traces one step abstractly, as on one device. Returns what it found, in words."""
    checks.check(config)
    model = model_config(config)
    checks.check_length(config, model)
    setup = Setup(config, model)
    state = setup.state_shapes
    params = state.policy
    n, length = config.rollout.prompts, config.data.max_prompt_len
    prompts = PromptBatch(
        tokens=jax.ShapeDtypeStruct((n, length), jnp.int32),
        mask=jax.ShapeDtypeStruct((n, length), jnp.bool_),
        group=jax.ShapeDtypeStruct((n,), jnp.int32),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    # the same shapes, traced once for all layers
    scanned = dataclasses.replace(training_rollout(setup), unrolled=False)
    rollout = jax.eval_shape(scanned, params, prompts, key)
    batch = jax.eval_shape(assemble, prompts, rollout)
    # A plan's shapes are those of any lengths: here every prompt and response is as long as it can be.
    shape = setup.pack_shape
    prompt, response = (np.full(len(rollout.truncated), size) for size in (length, config.rollout.max_new_tokens))
    index = next(setup.minibatches(0))
    plan = packing.plan(index, prompt, response, shape)
    for policy in ("proximal", "reference", "teacher"):
        if f"{policy}_logp" in setup.needed:
            batch = jax.eval_shape(make_recompute(setup.policy_logprobs, policy), params, batch, plan)
    behavior = [state.params] if setup.needs_exact else []
    after, metrics = jax.eval_shape(setup.update, state, batch, plan, *behavior)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    lines = [
        f"model        {model.model_type}, {count / 1e6:,.1f} million parameters, {model.num_layers} layers",
        f"rollout      {n} prompts x {config.rollout.group_size} = {rollout.tokens.shape[0]} rows of "
        f"{length} + {rollout.tokens.shape[1]} tokens, in {config.rollout.dtype}",
        f"update       {config.train.epochs * config.train.minibatches} minibatches of {len(index)} rows a step, "
        f"in {config.policy.dtype}, in pieces of {shape.rows} rows of {shape.length} tokens",
        f"loss         {config.loss.name} with {dict(setup.loss.keywords)}",
        f"metrics      {len(metrics.sums) + len(metrics.maxima) + len(metrics.minima)} a minibatch",
    ]
    if others := beside(setup):
        lines.append(f"not traced   {others}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit("error: experiments.trace is no command; write python -m experiments.train --config FILE --trace")
