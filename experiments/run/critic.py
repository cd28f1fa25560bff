"""The critic of a run: compiled, laid out over the mesh, and kept in the run's checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dppo_jax import packing
from dppo_jax.critic import critic_axes, init_critic, make_critic_update, make_estimate, make_values
from dppo_jax.data.privileged import Privileged
from dppo_jax.data.prompts import left_padded
from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import batch_sharding, laid_out
from dppo_jax.metrics import Metrics
from dppo_jax.models import DTYPES
from dppo_jax.models.decoder import Params, abstract_params
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.packing import Plan
from dppo_jax.train_step import TrainState, init_state, state_shardings
from dppo_jax.types import TrainBatch
from experiments.run.samples import Replies
from experiments.run.setup import Setup


def privileged(config: ConfigDict) -> Privileged | None:
    """What the critic sees in the place of the policy's prompts; None: the same."""
    c = config.critic
    if config.advantage.name != "gae" or not c.privileged:
        return None
    return Privileged(c.privileged, c.template, c.max_prompt_len)


class OwnPrompts:
    """The critic's own prompts in the place of the policy's: in a batch, and in the plans of its minibatches."""

    def __init__(self, setup: Setup):
        config = setup.config
        self._mesh, self._group, self._packed = setup.mesh, config.rollout.group_size, config.train.pack
        self._length = config.critic.max_prompt_len
        self.shape = setup.pack_shape_of(self._length)
        self._share = hosts.share_over(setup.mesh, config.rollout.prompts).grouped(self._group)
        self._prompts: dict[str, Any] = {}
        self._lengths: tuple[np.ndarray, np.ndarray] = np.zeros(0, int), np.zeros(0, int)

    def of(self, replies: Replies) -> None:
        """Takes those of a step."""
        assert replies.critic_prompts is not None
        held = [replies.critic_prompts[row // self._group] for row in self._share.held]
        tokens, mask = hosts.to_global(left_padded(held, self._length), self._mesh, self._share)
        self._prompts = dict(prompt_tokens=tokens, prompt_mask=mask, prompt_experts=None, experts=None)
        self._lengths = np.repeat(replies.critic_prompt_lengths, self._group), replies.lengths

    def batch(self, batch: TrainBatch) -> TrainBatch:
        """A batch of the step; without the experts of the policy's prompts."""
        return dataclasses.replace(batch, **self._prompts)

    def plan(self, plan: Plan) -> Plan:
        """The same samples as in a plan of the policy's; those that it leaves out have no response here either."""
        prompts, responses = self._lengths
        computed = np.zeros_like(responses)
        rows = plan.batch_rows[plan.rows < plan.tokens_per_row.size]
        computed[rows] = responses[rows]
        return packing.plan(plan.batch_rows, prompts, computed, self.shape, packed=self._packed)


class Critic:
    """Values, advantages and updates of one run's critic. Its own learning rate, the rest as the policy's."""

    def __init__(self, setup: Setup):
        config, model, mesh = setup.config, setup.model, setup.mesh
        c, o = config.critic, config.optimizer
        assert mesh is not None
        schedule = make_schedule(learning_rate=c.learning_rate, warmup=0, schedule="constant", updates=1)
        self._optimizer = make_optimizer(
            schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
        )
        abstract = jax.eval_shape(init_critic, abstract_params(model))
        self.shardings = state_shardings(critic_axes(model), self._optimizer, abstract, mesh)
        self._abstract = jax.eval_shape(lambda p: init_state(p, self._optimizer), abstract)
        self._own = OwnPrompts(setup) if privileged(config) else None
        shape = self._own.shape if self._own else setup.pack_shape
        kernel = setup.attention(dtype=config.policy.dtype, length=shape.length).name
        dtype, remat = DTYPES[config.policy.dtype], config.policy.remat
        values = make_values(model, dtype=dtype, remat=remat, attention=kernel, bounds=tuple(c.bounds))
        replicated, by_row = NamedSharding(mesh, P()), batch_sharding(mesh)
        self._estimate = jax.jit(
            make_estimate(
                values, discount=c.discount, lam=c.lam, whiten=c.whiten, targets=c.targets, lam_alpha=c.lam_alpha
            ),
            out_shardings=by_row,
        )
        self._update = jax.jit(
            make_critic_update(values, setup.weights, self._optimizer, value_clip=c.value_clip),
            in_shardings=(self.shardings, by_row, by_row, replicated),
            out_shardings=(self.shardings, replicated),
            donate_argnums=0,
        )
        self.state: TrainState | None = None
        self._estimates: Any = None

    def begin(self, params: Params) -> None:
        """From copies of the policy's initial parameters."""
        copied = jax.jit(lambda p: jax.tree.map(jnp.copy, init_critic(p)), out_shardings=self.shardings.params)
        self.state = init_state(copied(params), self._optimizer, self.shardings, owned=True)

    @property
    def abstract(self) -> dict[str, Any]:
        """Shapes and shardings of what `saved` gives."""
        return laid_out(self._abstract, self.shardings).saved()

    def saved(self) -> dict[str, Any]:
        """For a checkpoint."""
        assert self.state is not None
        return self.state.saved()

    def resume(self, saved: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.state = TrainState(saved["params"], saved["opt_state"], saved["updates"])

    def advantages(
        self, batch: TrainBatch, plan: Plan, replies: Replies, rewards, penalties: jax.Array | None = None
    ) -> jax.Array:
        """Of every token of the batch, of a reward for each response and a penalty for each token; keeps the returns
        for the updates that follow."""
        assert self.state is not None
        if self._own:
            self._own.of(replies)
            batch, plan = self._own.batch(batch), self._own.plan(plan)
        rewards = jnp.asarray(rewards, jnp.float32)
        advantages, self._estimates = self._estimate(self.state.params, batch, plan, rewards, penalties)
        return advantages

    def update(self, batch: TrainBatch, plan: Plan) -> Metrics:
        """One optimizer step on a minibatch."""
        if self._own:
            batch, plan = self._own.batch(batch), self._own.plan(plan)
        self.state, measured = self._update(self.state, batch, self._estimates, plan)
        return measured
