"""What a config builds, each thing once. Only this folder reads configs; the library never does."""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dppo_jax import lora, packing, precision, quantize
from dppo_jax.data.tokenizer import token_bytes
from dppo_jax.devices.chips import memory_of
from dppo_jax.devices.sharding import TRAINING, batch_sharding, batch_shards, named_shardings, num_shards
from dppo_jax.errors import UserError
from dppo_jax.evaluate import Generate
from dppo_jax.files import Path
from dppo_jax.isolated import IsolatedPass, make_isolated_pass, with_values_of
from dppo_jax.losses.core import BoundLoss
from dppo_jax.models import DTYPES, ModelConfig
from dppo_jax.models.attention import Choice, choose, length_multiple
from dppo_jax.models.config import Lora, Quantization
from dppo_jax.models.decoder import LOG_SIGMA, Params, abstract_params, init_params, param_axes
from dppo_jax.packing import PackShape
from dppo_jax.rollout import Stops, Work, make_stops
from dppo_jax.sampling import step_key
from dppo_jax.teacher_forced import BehaviorForward, PolicyLogprobs, make_behavior_forward, make_policy_logprobs
from dppo_jax.token_head import vocab_chunk_count
from dppo_jax.train_step import Gradient, TrainState, Update, init_state, make_gradient, make_update, state_shardings
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.run.check_data import longest_row
from experiments.run.model_files import model_directory
from experiments.run.objective import Objective

# Purposes of randomness, folded into the seed's key beside the step.
ROLLOUT, EVALUATION = 0, 1  # 2 is the noise of the update
ADAPTERS = 3

KERNEL_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}  # where an attention kernel runs


class Text(NamedTuple):
    """A model directory's tokenizer, the tokens that end a response, and the one that pads."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int


NO_TEXT = Text(None, (0,), 0)  # where shapes alone matter


@dataclasses.dataclass(frozen=True, eq=False)
class Setup(Objective):
    """A config, the model of its directory, the mesh it runs on (None: one device), and all that follows from them.

    What does not ask for the model works without one. `mean_prompt` is the data's, in tokens; None: every prompt is as
    long as it may be. `beside_bytes` is what each device holds beside the run's own: its reward model. `teacher` is the
    model of teacher.path on the same devices; see `teacher.load_teacher`.
    """

    given_model: ModelConfig | None = None
    mesh: Mesh | None = None
    text: Text = NO_TEXT
    mean_prompt: float | None = None
    beside_bytes: int = 0
    teacher: "Setup | None" = None

    @property
    def directory(self) -> Path:
        """policy.path, which must be set."""
        return model_directory(self.config)

    # --- microbatches ---

    @cached_property
    def pack_shape(self) -> PackShape:
        """The shape of one packed microbatch."""
        return self.pack_shape_of(self.config.data.max_prompt_len)

    def pack_shape_of(self, prompt_length: int) -> PackShape:
        """The same for prompts of up to `prompt_length` tokens, which are not shorter than the data's in the mean."""
        c, shards = self.config, self.batch_shards
        minibatch = c.rollout.prompts // c.train.minibatches * c.rollout.group_size
        return packing.pack_shape(
            prompt_length=prompt_length,
            max_new_tokens=c.rollout.max_new_tokens,
            rows=min(c.train.micro_rows, math.ceil(minibatch / shards)) * shards,
            mean_prompt=self.mean_prompt if c.train.pack else None,
            multiple=length_multiple(self.platform, prompt_length + c.rollout.max_new_tokens),
        )

    # --- devices ---

    @property
    def platform(self) -> str:
        """Of the devices that the mesh is made of: "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        return 1 if self.mesh is None else batch_shards(self.mesh)

    @property
    def by_row(self) -> NamedSharding | None:
        """Where an array lives whose first axis is the batch's; None: on one device."""
        return None if self.mesh is None else batch_sharding(self.mesh)

    def attention(self, *, dtype: str, length: int) -> Choice:
        """policy.attention, or the best for this platform, row length and dtype."""
        name, platform = self.config.policy.attention, self.platform
        if self.mesh is not None and KERNEL_PLATFORM.get(name, platform) != platform:
            raise UserError(
                f"policy.attention = {name} runs on a {KERNEL_PLATFORM[name]}, not on a {platform}; set it to auto"
            )
        if name != "auto":
            return Choice(name, "policy.attention")
        model = self.model
        return choose(platform, dtype=DTYPES[dtype], head_dim=model.head_dim, length=length, softcap=model.attn_softcap)

    @property
    def memory_bytes(self) -> int | None:
        """Of one device, if it says."""
        return memory_of(jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0])

    @property
    def num_slots(self) -> int:
        """Rows that the training rollout decodes at a time, at most."""
        c = self.config.rollout
        rows = (c.in_flight + 1) * c.prompts * c.group_size
        return min(c.slots or rows, rows)

    # --- parameters ---

    @cached_property
    def model(self) -> ModelConfig:
        """As it is for the longest row of the run."""
        assert self.given_model is not None, "this part of a setup needs a model"
        return self.given_model.for_rows(longest_row(self.config))

    @cached_property
    def trained_model(self) -> ModelConfig:
        """The model with the config's adapters; itself where there are none."""
        c = self.config.lora
        return dataclasses.replace(self.model, lora=Lora(c.rank, c.alpha, tuple(c.targets))) if c.rank else self.model

    def trainable_part(self, params: Params) -> Params:
        """What a run trains of all its parameters, axes or shapes."""
        return lora.split(params)[0] if self.config.lora.rank else params

    def frozen_part(self, params: Params) -> Params:
        """What it leaves alone."""
        return lora.split(params)[1] if self.config.lora.rank else {}

    def initial_params(self, params: Params) -> Params:
        """What a run begins with: the policy's parameters, its adapters, and log sigma of the perturbation."""
        c = self.config
        if c.lora.rank:
            # Of all that is drawn here the adapters alone are kept, so nothing else is computed.
            key, model = step_key(c.seed, 0, ADAPTERS), self.trained_model
            params = lora.joined(params, jax.device_get(jax.jit(lambda k: lora.split(init_params(model, k))[0])(key)))
        if not c.alp.sigma:
            return params
        return {**params, LOG_SIGMA: np.full(self.model.num_layers, math.log(c.alp.sigma), np.float32)}

    @cached_property
    def model_shardings(self) -> Params | None:
        """Where the parameters of a model directory live; None: on one device."""
        return None if self.mesh is None else named_shardings(self.mesh, param_axes(self.model))

    @cached_property
    def param_axes(self) -> Params:
        """Logical axis names of what `initial_params` gives."""
        return param_axes(self.trained_model) | ({LOG_SIGMA: ("layers",)} if self.config.alp.sigma else {})

    @cached_property
    def param_shapes(self) -> Params:
        """Shapes of what `initial_params` gives."""
        log_sigma = {LOG_SIGMA: jax.ShapeDtypeStruct((self.model.num_layers,), jnp.float32)}
        return abstract_params(self.trained_model) | (log_sigma if self.config.alp.sigma else {})

    @cached_property
    def shardings(self) -> TrainState:
        """Where a run's state lives."""
        assert self.mesh is not None
        names, shapes = self.param_axes, self.param_shapes
        return state_shardings(
            self.trainable_part(names), self.optimizer, self.trainable_part(shapes), self.mesh, self.frozen_part(names)
        )

    def init_state(self, params: Params, *, owned: bool = False) -> TrainState:
        """A fresh state around the parameters of a model directory, over the mesh where there is one. `owned`: it takes
        the arrays themselves, which nobody else may use any more."""
        whole, places = self.initial_params(params), None if self.mesh is None else self.shardings
        return init_state(self.trainable_part(whole), self.optimizer, places, self.frozen_part(whole), owned=owned)

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes of what `init_state` gives."""
        whole = self.param_shapes
        return jax.eval_shape(
            lambda p, f: init_state(p, self.optimizer, frozen=f), self.trainable_part(whole), self.frozen_part(whole)
        )

    @cached_property
    def merge(self) -> Callable[[Params], Params] | None:
        """Parameters with their adapters merged, in float32; None where there are none."""
        c = self.config.lora
        return functools.partial(lora.merged, scale=c.alpha / c.rank) if c.rank else None

    # --- passes ---

    @cached_property
    def behavior_model(self) -> ModelConfig:
        """The model as the rollout computes it: quantised, if the config says so."""
        name, activations = self.config.rollout.quantize, self.config.rollout.quantize_activations
        if activations and self.model.num_experts:
            raise UserError(
                "rollout.quantize_activations: the products of experts take dequantised weights; set it to False"
            )
        return dataclasses.replace(self.model, quantization=Quantization(name, activations)) if name else self.model

    @cached_property
    def behavior_weights(self) -> Callable[[Params], Params] | None:
        """What the rollout makes of the parameters: merged, then rounded or quantised."""
        name = self.config.rollout.quantize
        quantized = functools.partial(quantize.quantized, name=name) if name else None
        steps = [step for step in (self.merge, precision.weights(self.config.rollout.weights), quantized) if step]
        return (lambda params: functools.reduce(lambda p, step: step(p), steps, params)) if steps else None

    @cached_property
    def policy_logprobs(self) -> PolicyLogprobs:
        """The teacher-forced pass, on packed microbatches of `pack_shape`."""
        return self.policy_logprobs_of(self.pack_shape)

    def policy_logprobs_of(self, shape: PackShape) -> PolicyLogprobs:
        """The same, on microbatches of another shape."""
        policy, vocab_chunks = self.config.policy, self.config.policy.head_pieces
        if vocab_chunks == 0:
            shards = 1 if self.mesh is None else num_shards(self.mesh, *TRAINING["vocab"])
            vocabulary = self.model.vocab_size // shards
            tokens = shape.rows * shape.responses // self.batch_shards
            vocab_chunks = vocab_chunk_count(tokens, vocabulary, self.memory_bytes)
        attention = self.attention(dtype=policy.dtype, length=shape.length).name
        logprobs = make_policy_logprobs(
            self.trained_model,
            temperature=policy.temperature or self.config.rollout.temperature,
            behavior_temperature=self.config.rollout.temperature,
            head_float32=policy.head_float32,
            dtype=DTYPES[policy.dtype],
            remat=policy.remat,
            vocab_chunks=vocab_chunks,
            attention=attention,
        )
        if not self.config.rollout.exact:
            return logprobs
        if vocab_chunks > 1:
            gigabytes = 4 * shape.rows * shape.responses * self.model.vocab_size / 1e9
            raise UserError(
                f"rollout.exact draws from all logits of a microbatch at once, {gigabytes:.1f} GB, where the head "
                f"would take the vocabulary in {vocab_chunks} pieces; lower train.micro_rows, or set "
                "policy.head_pieces=1"
            )
        return with_values_of(self.isolated_pass, logprobs)

    @cached_property
    def isolated_pass(self) -> IsolatedPass:
        """The training pass, apart from what else a program computes: of rollout.exact."""
        policy = self.config.policy
        if self.platform != "cpu":
            raise UserError(
                f"rollout.exact is shown to hold to the bit on a CPU, not on a {self.platform}; set rollout.exact=False"
            )
        if self.model.num_experts:
            raise UserError(
                f"rollout.exact: an expert of a {self.model.model_type} takes tokens of all rows in one product, whose "
                "last bits depend on them; set rollout.exact=False"
            )
        return make_isolated_pass(
            self.trained_model,
            temperature=self.config.rollout.temperature,
            dtype=DTYPES[policy.dtype],
            attention=self.attention(dtype=policy.dtype, length=self.pack_shape.length).name,
            head_float32=policy.head_float32,
        )

    @cached_property
    def behavior_forward(self) -> BehaviorForward:
        """The rollout's own arithmetic, teacher-forced."""
        return self.behavior_forward_of(self.pack_shape)

    def behavior_forward_of(self, shape: PackShape) -> BehaviorForward:
        """The same, on microbatches of another shape."""
        c = self.config.rollout
        return make_behavior_forward(
            self.behavior_model,
            dtype=DTYPES[c.dtype],
            attention=self.attention(dtype=c.dtype, length=shape.length).name,
            weights=self.behavior_weights,
            round_inputs=precision.activations(c.activations),
            head_float32=self.config.policy.head_float32,
        )

    def update_with(
        self,
        loss: BoundLoss,
        weights: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        needed: frozenset[str],
    ) -> Update:
        """One optimizer step on a minibatch, with this loss, aggregation and optimizer; `needed` are the optional
        fields."""
        c = self.config
        return make_update(
            self.policy_logprobs,
            loss,
            weights,
            optimizer,
            behavior_forward=self.behavior_forward if "exact" in needed else None,
            slope_sums="exact.slope" in needed,
            shadow_losses=self.shadow_losses,
            count_tokens=self.model.vocab_size if c.log.tokens else 0,
            noise_seed=c.seed if c.alp.sigma else None,
        )

    def gradient_of(self, shape: PackShape) -> Gradient:
        """The gradient of one microbatch of this shape, as in `update`."""
        return make_gradient(
            self.policy_logprobs_of(shape),
            self.loss,
            behavior_forward=self.behavior_forward_of(shape) if self.needs_exact else None,
            slope_sums="exact.slope" in self.needed,
            noise_seed=self.config.seed if self.config.alp.sigma else None,
        )

    @cached_property
    def update(self) -> Update:
        """One optimizer step on a minibatch, with the config's own."""
        return self.update_with(self.loss, self.weights, self.optimizer, self.needed)

    # --- rollouts ---

    @cached_property
    def topk(self) -> int:
        """K, how many tokens' log-probabilities the rollout records: rollout.tracked where something needs them."""
        return self.config.rollout.tracked if "topk" in self.needed else 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the rollout records the behavior policy's entropy."""
        return "behavior_entropy" in self.needed

    @cached_property
    def stops(self) -> Stops | None:
        """The stop strings of training and evaluation; None without any, and where shapes alone matter."""
        texts, tokenizer = self.config.rollout.stop, self.text.tokenizer
        if not texts or tokenizer is None:
            return None
        try:
            spelled = token_bytes(tokenizer), token_bytes(tokenizer, first=True)
        except UserError as error:
            raise UserError(f"rollout.stop = {texts!s:.80}: {error}") from None
        return make_stops(texts, *spelled, vocab_size=self.model.vocab_size, silent=self.text.eos_ids)

    @property
    def eval_max_new_tokens(self) -> int:
        """Of an evaluation's responses."""
        return self.config.eval.max_new_tokens or self.config.rollout.max_new_tokens

    @property
    def everywhere(self) -> NamedSharding | None:
        """Where an array lives that every device has; None: on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def on_mesh(self, generate: Generate) -> Generate:
        """jit of a rollout: parameters where they live, prompts and rows over the batch axes. On several hosts the
        prompts are global arrays; see `hosts.to_global`."""
        return jax.jit(generate, in_shardings=(None, self.by_row, None), out_shardings=self.by_row)

    def on_mesh_measured(self, generate: Callable[..., tuple[RolloutBatch, Work]]) -> Callable:
        """The same of `Rollout.measured`."""

        def rollout(params: Params, prompts: PromptBatch, key: jax.Array) -> tuple[RolloutBatch, Work]:
            return generate(params, prompts, key)

        return jax.jit(rollout, in_shardings=(None, self.by_row, None), out_shardings=(self.by_row, self.everywhere))

    def published_axes(self, published: Params) -> Params:
        """Logical axis names of what the rollout holds."""
        axes = param_axes(self.behavior_model)
        return axes | ({"head_float32": ("vocab", "embed")} if "head_float32" in published else {})
