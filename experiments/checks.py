"""What is refused before anything is loaded or compiled: configs, models and meshes that cannot run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dppo_jax import precision, quantize
from dppo_jax.errors import UserError, lookup
from dppo_jax.lora import TARGETS
from dppo_jax.losses import ESTIMATORS, LOSSES, corrects_mismatch
from dppo_jax.models import DTYPES, ModelConfig
from dppo_jax.models.attention import KERNELS
from dppo_jax.models.decoder import REMAT, abstract_params, param_axes
from dppo_jax.sharding import check_divisible
from dppo_jax.weights import WEIGHTS
from experiments import build

# Names of jax.default_matmul_precision.
MATMUL = dict.fromkeys(("default", "high", "highest"))

# The least that a number may be.
LEAST = {
    "seed": 0,
    "steps": 1,
    "policy.head_pieces": 0,
    "rollout.prompts": 1,
    "rollout.group_size": 1,
    "rollout.max_new_tokens": 1,
    "rollout.slots": 0,
    "rollout.lag": 0,
    "rollout.resample": 0,
    "reward.overlong_buffer": 0,
    "reference.coef": 0,
    "lora.rank": 0,
    "alp.sigma": 0,
    "alp.learning_rate": 0,
    "critic.learning_rate": 0,
    "critic.value_clip": 0,
    "train.minibatches": 1,
    "train.epochs": 1,
    "train.micro_rows": 1,
    "train.staleness": 0,
    "optimizer.learning_rate": 0,
    "optimizer.warmup": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "eval.every": 0,
    "eval.samples": 1,
    "eval.prompts": 1,
    "eval.temperature": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "log.histograms": 0,
    "log.samples": 0,
    "log.transcripts": 0,
    "log.tokens": 0,
}


def check(config: ConfigDict) -> None:
    """Refuses, before anything is loaded or compiled, what cannot run. UserError, one sentence."""
    c = config
    if c.rollout.top_p != 1.0:
        raise UserError(
            f"rollout.top_p = {c.rollout.top_p}: nucleus sampling changes the behavior policy, so training "
            "refuses it; set rollout.top_p=1.0 (evaluation has eval.top_p)"
        )
    for key in ("rollout.temperature", "policy.temperature"):
        temperature = value(config, key)
        if temperature is not None and not 0 < temperature < float("inf"):
            raise UserError(f"{key} = {temperature}: training samples, so it must be above 0")
    for key, least in LEAST.items():
        if not value(config, key) >= least:
            raise UserError(f"{key} must be at least {least}, not {value(config, key)}")
    if not 0 < c.eval.top_p <= 1:
        raise UserError(f"eval.top_p must be above 0 and at most 1, not {c.eval.top_p}")
    if not c.aggregation.constant > 0:
        raise UserError(f"aggregation.constant must be above 0, not {c.aggregation.constant}")
    if c.eval.every and not c.eval.sets:
        raise UserError(f"eval.every = {c.eval.every}, but eval.sets is empty: there is nothing to evaluate on")
    for key in ("policy.dtype", "rollout.dtype"):
        lookup(DTYPES, value(config, key), key)
    if c.policy.dtype == "float16":
        raise UserError("policy.dtype float16 would lose small gradients without loss scaling; use bfloat16 or float32")
    lookup(REMAT, c.policy.remat, "policy.remat")
    lookup(MATMUL, c.policy.matmul, "policy.matmul")
    lookup({"auto": None, **KERNELS}, c.policy.attention, "policy.attention")
    lookup(WEIGHTS, c.aggregation.name, "aggregation.name")
    if c.rollout.prompts % c.train.minibatches:
        raise UserError(
            f"rollout.prompts = {c.rollout.prompts} is not divisible by train.minibatches = {c.train.minibatches}"
        )
    if c.train.staleness > 1:
        raise UserError(f"train.staleness = {c.train.staleness}: a rollout may be 1 step old, or 0")
    for name in c.lora.targets:
        lookup(dict.fromkeys(TARGETS), name, "lora.targets")
    if c.lora.rank and not (c.lora.targets and len(set(c.lora.targets)) == len(c.lora.targets)):
        raise UserError(f"lora.targets = {tuple(c.lora.targets)} must name at least one matrix, and none of them twice")
    if c.lora.rank and not 0 < c.lora.alpha < float("inf"):
        raise UserError(f"lora.alpha must be above 0, not {c.lora.alpha}")
    build.schedule(config)
    lookup(ESTIMATORS, c.reference.estimator, "reference.estimator")
    precision.weights(c.rollout.weights)
    precision.activations(c.rollout.activations)
    lookup({"": None, **quantize.FORMATS}, c.rollout.quantize, "rollout.quantize")
    for key in ("rollout.weights", "rollout.activations"):
        if c.rollout.quantize and value(config, key):
            raise UserError(f"rollout.quantize = {c.rollout.quantize} and {key} both narrow the rollout: unset one")
    if c.rollout.quantize_activations and not c.rollout.quantize:
        raise UserError("rollout.quantize_activations needs a format: set rollout.quantize to int8 or float8")
    needed = build.needed_fields(config)
    if c.train.staleness and "proximal_logp" in needed:
        raise UserError(
            f"loss {c.loss.name!r} needs the policy at the rollout's parameters, which train.staleness = 1 no longer "
            "has; set train.staleness=0"
        )
    if c.train.staleness and "exact" in needed:
        raise UserError(
            "exact divergences need the rollout's parameters, which train.staleness = 1 no longer has; set "
            "train.staleness=0"
        )
    if c.train.staleness and c.rollout.resample:
        raise UserError(
            "rollout.resample draws from the parameters of its step, which train.staleness = 1 no longer has; set "
            "train.staleness=0"
        )
    if c.train.staleness and c.rollout.lag:
        raise UserError("train.staleness and rollout.lag both age the behavior parameters: set one of them to 0")
    if "topk" in needed and c.rollout.tracked < 1:
        raise UserError(f"loss {c.loss.name!r} needs tracked tokens: set rollout.tracked to at least 1")
    group = build.advantages(config)
    if group is not None:
        batch = jax.ShapeDtypeStruct((c.rollout.prompts * c.rollout.group_size,), jnp.float32)
        jax.eval_shape(group, batch, jax.ShapeDtypeStruct(batch.shape, jnp.int32))
    if c.alp.sigma and not c.optimizer.learning_rate:
        raise UserError("alp.sigma needs an optimizer.learning_rate above 0: alp.learning_rate follows its schedule")
    if c.alp.sigma and corrects_mismatch(LOSSES[c.loss.name]):
        raise UserError(
            f"loss {c.loss.name!r} corrects the mismatch by the proximal policy, and alp.sigma = {c.alp.sigma} by its "
            "perturbation: set alp.sigma=0, or loss.name=ppo_clip"
        )


def value(config: ConfigDict, key: str) -> Any:
    """config.a.b for "a.b"."""
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def check_length(config: ConfigDict, model: ModelConfig) -> None:
    """Refuses prompts and responses that together are longer than the model's positions."""
    sections = {"data": config.data, **{f"eval.sets.{name}": data for name, data in config.eval.sets.items()}}
    for name, data in sections.items():
        if data.max_prompt_len + config.rollout.max_new_tokens > model.max_position:
            raise UserError(
                f"{name}.max_prompt_len + rollout.max_new_tokens = {data.max_prompt_len} + "
                f"{config.rollout.max_new_tokens} exceeds the model's {model.max_position} positions"
            )


def check_mesh(config: ConfigDict, mesh: Mesh, model: ModelConfig) -> None:
    """Refuses rows and parameters that do not divide over the mesh."""
    c = config
    counts = {"rollout.prompts": c.rollout.prompts, "rollout.slots": c.rollout.slots}
    if c.eval.every:
        counts["eval.prompts"] = c.eval.prompts
    check_divisible(mesh, counts, abstract_params(model), param_axes(model))


