"""What a config builds. The entry points read configs; the library never does."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from dppo_jax import hosts, lora, packing, precision, quantize
from dppo_jax.advantages import ADVANTAGES
from dppo_jax.data.prompts import PromptStream
from dppo_jax.data.tasks import load_task
from dppo_jax.data.tokenizer import eos_ids, load_tokenizer
from dppo_jax.errors import UserError, lookup
from dppo_jax.evaluate import Generate, all_failed, evaluate
from dppo_jax.files import user_path
from dppo_jax.losses import bind, required_fields, with_reference_kl
from dppo_jax.models import DTYPES, ModelConfig
from dppo_jax.models.attention import Choice, choose
from dppo_jax.models.config import Lora, Quantization
from dppo_jax.models.decoder import LOG_SIGMA, Params, abstract_params, init_params, param_axes
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.packing import Layout
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.shaping import overlong_penalty
from dppo_jax.rollout import Rollout
from dppo_jax.sampling import step_key
from dppo_jax.sharding import TRAINING, batch_shards, make_mesh, parts, rows
from dppo_jax.token_head import piece_count
from dppo_jax.train_step import (
    Oracle,
    Score,
    TrainState,
    Update,
    init_state,
    make_oracle,
    make_score,
    make_update,
    state_shardings,
)
from dppo_jax.weights import WEIGHTS
from experiments.chips import memory_of

# Purposes of randomness, folded into the seed's key beside the step.
ROLLOUT, EVALUATION = 0, 1  # 2 is the noise of the update
ADAPTERS = 3

class Text(NamedTuple):
    """A model directory's tokenizer, the tokens that end a response, and the one that pads."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int


def text(directory: Path, model: ModelConfig) -> Text:
    """UserError for a tokenizer that is not there, or knows tokens that the model has no row for."""
    tokenizer = load_tokenizer(str(directory))
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has a token {largest}, beyond the model's vocab_size of {model.vocab_size}"
        )
    ends = eos_ids(tokenizer, str(directory))
    return Text(tokenizer, ends, ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _length_multiple(platform: str, length: int) -> int:
    """Row lengths that the attention kernels of a platform work with, long ones in blocks of a good size."""
    return {"tpu": 128 if length < 4096 else 512, "gpu": 64}.get(platform, 1)


def platform(mesh: Mesh | None) -> str:
    """Of the devices that the mesh is made of: "cpu", "gpu" or "tpu"."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


PLATFORM = {"cudnn": "gpu", "splash": "tpu"}  # where an attention kernel runs


def attention(config: ConfigDict, model: ModelConfig, mesh: Mesh | None, *, dtype: str, length: int) -> Choice:
    """policy.attention, or the best for this platform, row length and dtype."""
    name, devices = config.policy.attention, platform(mesh)
    if mesh is not None and PLATFORM.get(name, devices) != devices:
        raise UserError(f"policy.attention = {name} runs on a {PLATFORM[name]}, not on a {devices}; set it to auto")
    if name != "auto":
        return Choice(name, "policy.attention")
    return choose(devices, dtype=DTYPES[dtype], head_dim=model.head_dim, length=length, softcap=model.attn_softcap)


def layout(config: ConfigDict, mesh: Mesh | None = None, mean_prompt: float | None = None) -> Layout:
    """The shape of one packed piece of a minibatch. `mean_prompt` is the data's, in tokens."""
    c, shards = config, 1 if mesh is None else batch_shards(mesh)
    minibatch = c.rollout.prompts // c.train.minibatches * c.rollout.group_size
    return packing.layout(
        prompt_length=c.data.max_prompt_len,
        max_new_tokens=c.rollout.max_new_tokens,
        rows=min(c.train.micro_rows, math.ceil(minibatch / shards)) * shards,
        mean_prompt=mean_prompt if c.train.pack else None,
        multiple=_length_multiple(platform(mesh), c.data.max_prompt_len + c.rollout.max_new_tokens),
    )


def loss(config: ConfigDict) -> functools.partial:
    """The loss with its hyperparameters: loss.<name> where set, else loss_defaults.<loss.name>; with the reference's
    penalty, where there is one."""
    bound = bind(config.loss.name, loss_numbers(config))
    if not config.reference.coef:
        return bound
    return with_reference_kl(bound, coef=config.reference.coef, estimator=config.reference.estimator)


def loss_numbers(config: ConfigDict) -> dict[str, float]:
    """The hyperparameters of the loss that trains."""
    given = {key: value for key, value in config.loss.items() if key != "name" and value is not None}
    return {**_defaults(config, config.loss.name), **given}


def data_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """By name: the training data and every evaluation set."""
    return {"data": config.data, **{f"eval.sets.{name}": data for name, data in config.eval.sets.items()}}


def _defaults(config: ConfigDict, name: str) -> dict[str, float]:
    return dict(config.loss_defaults[name]) if name in config.loss_defaults else {}


def regions(config: ConfigDict) -> dict[str, functools.partial]:
    """The losses of log.regions, each with its loss_defaults."""
    return {name: bind(name, _defaults(config, name)) for name in config.log.regions}


def needed_fields(config: ConfigDict) -> frozenset[str]:
    """The optional fields of LossInputs that the loss and the measured regions ask for."""
    return required_fields(loss(config)).union(*(required_fields(region) for region in regions(config).values()))



def advantages(config: ConfigDict) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """(rewards [B], group [B]) -> advantages [B]; None where a critic gives them."""
    function = lookup({**ADVANTAGES, "gae": None}, config.advantage.name, "advantage.name")
    return None if function is None else functools.partial(function, num_groups=config.rollout.prompts)


def shaping(config: ConfigDict, lengths: np.ndarray) -> np.ndarray:
    """What is added to the verifier's rewards, f32[B], for responses of these lengths."""
    return overlong_penalty(lengths, limit=config.rollout.max_new_tokens, buffer=config.reward.overlong_buffer)


def schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate by update."""
    o = config.optimizer
    updates = config.steps * config.train.epochs * config.train.minibatches
    return make_schedule(learning_rate=o.learning_rate, warmup=o.warmup, schedule=o.schedule, updates=updates)


def published_axes(model: ModelConfig, published: Params) -> Params:
    """Logical axis names of what the rollout holds."""
    axes = param_axes(model)
    return axes | ({"head_float32": ("vocab", "embed")} if "head_float32" in published else {})


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW around `schedule`."""
    o = config.optimizer
    adamw = make_optimizer(
        schedule(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
    )
    if not config.alp.sigma:
        return adamw

    gain = config.alp.learning_rate / o.learning_rate

    def own_rate(updates: Params, _: Any) -> Params:
        return {key: value * gain if key == LOG_SIGMA else value for key, value in updates.items()}

    return optax.chain(adamw, optax.stateless(own_rate))


def adapted(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with the config's adapters; itself where there are none."""
    c = config.lora
    return dataclasses.replace(model, lora=Lora(c.rank, c.alpha, tuple(c.targets))) if c.rank else model


def trained(config: ConfigDict, params: Params) -> Params:
    """What a run trains of all its parameters, axes or shapes."""
    return lora.split(params)[0] if config.lora.rank else params


def frozen(config: ConfigDict, params: Params) -> Params:
    """What it leaves alone."""
    return lora.split(params)[1] if config.lora.rank else {}


def initial(config: ConfigDict, model: ModelConfig, params: Params) -> Params:
    """What a run begins with: the policy's parameters, its adapters, and log sigma of the perturbation."""
    if config.lora.rank:
        # Of all that is drawn here the adapters alone are kept, so nothing else is computed.
        key, whole = step_key(config.seed, 0, ADAPTERS), adapted(config, model)
        params = lora.joined(params, jax.device_get(jax.jit(lambda k: lora.split(init_params(whole, k))[0])(key)))
    if not config.alp.sigma:
        return params
    layers = len(params["layers"]["attn_norm"])
    return {**params, LOG_SIGMA: np.full(layers, math.log(config.alp.sigma), np.float32)}


def axes(config: ConfigDict, model: ModelConfig) -> Params:
    """Logical axis names of what `initial` gives."""
    return param_axes(adapted(config, model)) | ({LOG_SIGMA: ("layers",)} if config.alp.sigma else {})


def abstract(config: ConfigDict, model: ModelConfig) -> Params:
    """Shapes of what `initial` gives."""
    log_sigma = {LOG_SIGMA: jax.ShapeDtypeStruct((model.num_layers,), jnp.float32)}
    return abstract_params(adapted(config, model)) | (log_sigma if config.alp.sigma else {})


def shardings(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> TrainState:
    """Where a run's state lives."""
    names, shapes = axes(config, model), abstract(config, model)
    return state_shardings(
        trained(config, names), optimizer(config), trained(config, shapes), mesh, frozen(config, names)
    )


def begin(config: ConfigDict, model: ModelConfig, params: Params, places: TrainState | None) -> TrainState:
    """A fresh state around the parameters of a model directory."""
    whole = initial(config, model, params)
    return init_state(trained(config, whole), optimizer(config), places, frozen(config, whole))


def abstract_begin(config: ConfigDict, model: ModelConfig) -> TrainState:
    """Shapes of what `begin` gives."""
    whole = abstract(config, model)
    return jax.eval_shape(
        lambda p, f: init_state(p, optimizer(config), frozen=f), trained(config, whole), frozen(config, whole)
    )


def merged(config: ConfigDict) -> Callable[[Params], Params] | None:
    """Parameters with their adapters merged, in float32; None where there are none."""
    c = config.lora
    return functools.partial(lora.merged, scale=c.alpha / c.rank) if c.rank else None


def behavior_model(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model as the rollout computes it: quantised, if the config says so."""
    name, activations = config.rollout.quantize, config.rollout.quantize_activations
    if activations and model.num_experts:
        raise UserError(
            "rollout.quantize_activations: the products of experts take dequantised weights; set it to False"
        )
    return dataclasses.replace(model, quantization=Quantization(name, activations)) if name else model


def behavior_weights(config: ConfigDict) -> Callable[[Params], Params] | None:
    """What the rollout makes of the parameters: merged, then rounded or quantised."""
    name = config.rollout.quantize
    quantized = functools.partial(quantize.quantized, name=name) if name else None
    steps = [step for step in (merged(config), precision.weights(config.rollout.weights), quantized) if step]
    return (lambda params: functools.reduce(lambda p, step: step(p), steps, params)) if steps else None


def score(config: ConfigDict, model: ModelConfig, shape: Layout, mesh: Mesh | None = None) -> Score:
    """The teacher-forced pass."""
    pieces = config.policy.head_pieces
    if pieces == 0:
        shards = 1 if mesh is None else batch_shards(mesh)
        vocabulary = model.vocab_size // (1 if mesh is None else parts(mesh, *TRAINING["vocab"]))
        pieces = piece_count(shape.rows * shape.responses // shards, vocabulary, memory_bytes(mesh))
    return make_score(
        adapted(config, model),
        temperature=config.policy.temperature or config.rollout.temperature,
        behavior_temperature=config.rollout.temperature,
        head_float32=config.policy.head_float32,
        dtype=DTYPES[config.policy.dtype],
        remat=config.policy.remat,
        pieces=pieces,
        attention=attention(config, model, mesh, dtype=config.policy.dtype, length=shape.length).name,
    )


def memory_bytes(mesh: Mesh | None) -> int | None:
    """Of one device, if it says."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform == "cpu":
        return None
    if device.platform == "tpu":
        return memory_of(device)
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def update(config: ConfigDict, model: ModelConfig, shape: Layout, mesh: Mesh | None = None) -> Update:
    """One optimizer step on a minibatch."""
    return make_update(
        score(config, model, shape, mesh),
        loss(config),
        functools.partial(WEIGHTS[config.aggregation.name], constant=config.aggregation.constant),
        optimizer(config),
        oracle=oracle(config, model, shape, mesh) if "exact" in needed_fields(config) else None,
        regions=regions(config),
        count_tokens=model.vocab_size if config.log.tokens else 0,
        noise_seed=config.seed if config.alp.sigma else None,
    )


def oracle(config: ConfigDict, model: ModelConfig, shape: Layout, mesh: Mesh | None = None) -> Oracle:
    """The rollout's own arithmetic, teacher-forced."""
    c = config.rollout
    return make_oracle(
        behavior_model(config, model),
        dtype=DTYPES[c.dtype],
        attention=attention(config, model, mesh, dtype=c.dtype, length=shape.length).name,
        weights=behavior_weights(config),
        activations=precision.activations(c.activations),
        head_float32=config.policy.head_float32,
    )


def rollout(
    config: ConfigDict, model: ModelConfig, text: Text, mesh: Mesh | None = None, *, tracked: int | None = None
) -> Rollout:
    """The behavior policy, for training. `tracked`: K; None: rollout.tracked where something needs it."""
    c = config
    if tracked is None:
        tracked = c.rollout.tracked if "topk" in needed_fields(c) else 0
    if tracked > model.vocab_size:
        raise UserError(f"rollout.tracked = {tracked} is more than the model's vocabulary of {model.vocab_size}")
    if c.rollout.router_replay and not model.num_experts:
        raise UserError(f"rollout.router_replay: a {model.model_type} has no experts to replay; set it to False")
    return Rollout(
        behavior_model(config, model),
        group_size=c.rollout.group_size,
        temperature=c.rollout.temperature,
        tracked=tracked,
        weights=behavior_weights(config),
        activations=precision.activations(c.rollout.activations),
        record_experts=c.rollout.router_replay,
        **_rollout_settings(config, model, text, mesh, c.rollout.prompts * c.rollout.group_size, [c.data]),
    )


def eval_rollout(config: ConfigDict, model: ModelConfig, text: Text, mesh: Mesh | None = None) -> Generate:
    """The policy as it is evaluated: its own temperature and truncation."""
    c = config
    return Rollout(
        model,
        group_size=c.eval.samples,
        temperature=c.eval.temperature,
        top_p=c.eval.top_p,
        weights=merged(config),
        **_rollout_settings(config, model, text, mesh, c.eval.prompts * c.eval.samples, list(c.eval.sets.values())),
    )


def _rollout_settings(
    config: ConfigDict, model: ModelConfig, text: Text, mesh: Mesh | None, rows_count: int, sections: list[ConfigDict]
) -> dict[str, Any]:
    """What training and evaluation share. The attention is one that takes the prompts of every data section."""
    c = config.rollout
    kernels = {attention(config, model, mesh, dtype=c.dtype, length=data.max_prompt_len).name for data in sections}
    return dict(
        max_new_tokens=c.max_new_tokens,
        eos_ids=text.eos_ids,
        pad_id=text.pad_id,
        dtype=DTYPES[c.dtype],
        slots=min(c.slots, rows_count) if c.slots else None,
        shards=1 if mesh is None else batch_shards(mesh),
        attention=kernels.pop() if len(kernels) == 1 else "xla",
        unrolled=platform(mesh) != "tpu",
        head_float32=config.policy.head_float32,
    )


def on_mesh(function: Generate, mesh: Mesh) -> Generate:
    """jit of a rollout: parameters where they live, prompts and rows over the batch axes. On several hosts the prompts
    are global arrays; see `hosts.place`."""
    return jax.jit(function, in_shardings=(None, rows(mesh), None), out_shardings=rows(mesh))


def stream_and_scorer(
    config: ConfigDict, data: ConfigDict, tokenizer, num_prompts: int, stack: ExitStack
) -> tuple[PromptStream, Scorer]:
    """The prompts of a data section, and the scorer of their answers, which `stack` closes."""
    task = load_task(
        data.kind,
        name=data.name,
        path=data.path and str(user_path(data.path, "data.path")),
        settings=data.settings.to_dict(),
        size=data.size,
        seed=data.seed,
        verifier=data.verifier,
    )
    stream = PromptStream(
        task,
        tokenizer,
        num_prompts=num_prompts,
        max_prompt_len=data.max_prompt_len,
        seed=config.seed,
        chat=data.chat,
        template=data.template,
        date=data.date,
        too_long=data.too_long,
    )
    scorer = Scorer(task, workers=config.reward.workers, time_limit_s=config.reward.time_limit_s)
    return stream, stack.enter_context(scorer)


def on_devices(config: ConfigDict, stack: ExitStack) -> Mesh:
    """The mesh, in force together with the precision of matrix products until `stack` closes."""
    mesh = make_mesh(config.mesh)
    stack.enter_context(jax.default_matmul_precision(config.policy.matmul))
    stack.enter_context(jax.set_mesh(mesh))
    return mesh


def minibatches(config: ConfigDict, step: int) -> Iterator[np.ndarray]:
    """Row numbers of every optimizer minibatch of a step, groups whole. The first epoch keeps the order of the rollout;
    later ones draw theirs from (seed, step, epoch)."""
    prompts, group = config.rollout.prompts, config.rollout.group_size
    for epoch in range(config.train.epochs):
        order = np.arange(prompts)
        if epoch:
            order = np.random.default_rng([config.seed, step, epoch]).permutation(prompts)
        for part in order.reshape(config.train.minibatches, -1):
            yield (part[:, None] * group + np.arange(group)).reshape(-1).astype(np.int32)


def model_directory(config: ConfigDict) -> Path:
    """policy.path, which must be set."""
    if not config.policy.path:
        raise UserError("policy.path is empty: set it to a Hugging Face model directory")
    return user_path(config.policy.path, "policy.path")


class Evaluation:
    """The config's evaluation sets, asked on schedule: before step 0, every eval.every steps, and at the end."""

    def __init__(self, config: ConfigDict, model: ModelConfig, mesh: Mesh, text: Text, stack: ExitStack):
        self._config, self._text, self._mesh = config, text, mesh
        self._sets = {
            name: stream_and_scorer(config, data, text.tokenizer, config.eval.prompts, stack)
            for name, data in config.eval.sets.items()
        }
        self._generate = on_mesh(eval_rollout(config, model, text, mesh), mesh)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the prompts and answers of every set, by config section."""
        return {f"eval.sets.{name}": stream.fingerprint for name, (stream, _) in self._sets.items()}

    @property
    def left_out(self) -> list[str]:
        """A sentence for every set that does not use all of its data."""
        return [f"eval.sets.{name}: {said}" for name, (stream, _) in self._sets.items() if (said := stream.left_out)]

    @property
    def counts(self) -> dict[str, float]:
        """{"eval/<set>/skipped": ...}, as of `PromptStream.counts`."""
        return {
            f"eval/{name}/{kind}": float(count)
            for name, (stream, _) in self._sets.items()
            for kind, count in stream.counts.items()
        }

    def at(self, step: int, params: Params) -> dict[str, float]:
        """{"eval/<set>/avg": ...}, or nothing when the step has no evaluation."""
        every, last = self._config.eval.every, step == self._config.steps
        return self.run(step, params) if every and (step % every == 0 or last) else {}

    def run(self, step: int, params: Params) -> dict[str, float]:
        """Every set, with the samples of this step."""
        results: dict[str, float] = {}
        for name, (stream, scorer) in self._sets.items():
            scores = evaluate(
                params,
                self._generate,
                stream,
                scorer,
                mesh=self._mesh,
                num_prompts=self._config.eval.prompts,
                samples=self._config.eval.samples,
                key=step_key(self._config.seed, step, EVALUATION),
                tokenizer=self._text.tokenizer,
                eos_ids=self._text.eos_ids,
            )
            results |= {f"eval/{name}/{metric}": score for metric, score in scores.items()}
            fault = all_failed(scores, len(stream) * self._config.eval.samples)
            if fault and hosts.is_writer():
                tqdm.write(f"step {step}, eval.sets.{name}: {fault}", file=sys.stderr)
        return results
