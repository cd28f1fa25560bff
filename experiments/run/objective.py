"""What a run learns from, as its config says: loss, advantages, reward terms, weights, minibatches, optimizer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.advantages import ADVANTAGES
from dppo_jax.errors import lookup
from dppo_jax.losses import bind_loss, required_fields, token_kl, with_reference_kl
from dppo_jax.models.decoder import LOG_SIGMA, Params
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.rewards import shaping
from dppo_jax.types import TrainBatch
from dppo_jax.weights import WEIGHTS


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """Of a config, what asks for no model and no devices."""

    config: ConfigDict

    # --- the loss and what it needs ---

    @cached_property
    def loss(self) -> functools.partial:
        """The loss with its hyperparameters: loss.<name> where set, else loss_defaults.<loss.name>; with the
        reference's penalty, where there is one."""
        c = self.config
        bound = bind_loss(c.loss.name, self.hyperparameters)
        if not c.reference.coef:
            return bound
        return with_reference_kl(bound, coef=c.reference.coef, estimator=c.reference.estimator)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Of the loss, by name."""
        set_here = {key: value for key, value in self.config.loss.items() if key != "name" and value is not None}
        return {**self._defaults(self.config.loss.name), **set_here}

    def _defaults(self, name: str) -> dict[str, Any]:
        defaults = self.config.loss_defaults
        return dict(defaults[name]) if name in defaults else {}

    @cached_property
    def shadow_losses(self) -> dict[str, functools.partial]:
        """The losses of log.regions, measured beside the one that trains, each with its loss_defaults."""
        return {name: bind_loss(name, self._defaults(name)) for name in self.config.log.regions}

    @cached_property
    def needed(self) -> frozenset[str]:
        """The optional fields of LossInputs that the loss, the shadow losses and the reward ask for."""
        of_reward = {"reference_logp"} if self.config.reward.kl_coef else set()
        return required_fields(self.loss).union(
            of_reward, *(required_fields(loss) for loss in self.shadow_losses.values())
        )

    @property
    def needs_exact(self) -> bool:
        """Whether updates take the behavior policy's parameters, for exact divergences."""
        return "exact" in self.needed

    @cached_property
    def advantages(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """(rewards [B], group [B]) -> advantages [B]; None where a critic gives them."""
        function = lookup({**ADVANTAGES, "gae": None}, self.config.advantage.name, "advantage.name")
        if function is None:
            return None
        ddof = {"ddof": self.config.advantage.ddof} if "ddof" in inspect.signature(function).parameters else {}
        return functools.partial(function, num_groups=self.config.rollout.prompts, **ddof)

    @property
    def reward_kl(self) -> Callable[[TrainBatch], tuple[jax.Array, jax.Array]] | None:
        """Of a batch, the KL from the reference that the reward falls by, of every token [B, R] and response [B]."""
        c = self.config.reward
        if not c.kl_coef:
            return None

        def kl(batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
            assert batch.reference_logp is not None
            tokens = token_kl(batch.behavior_logp, batch.reference_logp, batch.mask, estimator=c.kl_estimator)
            return tokens, tokens.sum(axis=1)

        return kl

    @cached_property
    def terms(self) -> dict[str, float]:
        """The terms of the reward, by weight."""
        return shaping.active(dict(self.config.reward.terms), buffer=self.config.reward.overlong_buffer)

    @cached_property
    def term_settings(self) -> shaping.Settings:
        """What the terms ask for."""
        r, limit = self.config.reward, self.config.rollout.max_new_tokens
        return shaping.Settings(limit, r.overlong_buffer, r.format, r.ngram, r.time_limit_s)

    @cached_property
    def weights(self) -> Callable[..., jax.Array]:
        """How the tokens of a minibatch share its gradient."""
        aggregation = self.config.aggregation
        return functools.partial(WEIGHTS[aggregation.name], constant=aggregation.constant)

    # --- minibatches ---

    def minibatches(self, step: int) -> Iterator[np.ndarray]:
        """Row numbers of every optimizer minibatch of a step, groups whole."""
        c = self.config
        for epoch in range(c.train.epochs):
            yield from packing.minibatch_rows(
                c.rollout.prompts, c.rollout.group_size, c.train.minibatches, key=(c.seed, step, epoch)
            )

    @property
    def updates_per_step(self) -> int:
        return self.config.train.epochs * self.config.train.minibatches

    # --- the optimizer ---

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """By update."""
        o = self.config.optimizer
        updates = self.config.steps * self.updates_per_step
        return make_schedule(learning_rate=o.learning_rate, warmup=o.warmup, schedule=o.schedule, updates=updates)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW around `learning_rate`."""
        o, alp = self.config.optimizer, self.config.alp
        adamw = make_optimizer(
            self.learning_rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
        )
        if not alp.sigma:
            return adamw
        gain = alp.learning_rate / o.learning_rate

        def own_rate(updates: Params, _: Any) -> Params:
            return {key: value * gain if key == LOG_SIGMA else value for key, value in updates.items()}

        return optax.chain(adamw, optax.stateless(own_rate))
