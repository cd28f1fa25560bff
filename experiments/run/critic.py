"""The critic of a run: compiled, laid out over the mesh, and kept in the run's checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dppo_jax.critic import critic_axes, init_critic, make_critic_update, make_estimate, make_values
from dppo_jax.devices.sharding import batch_sharding, laid_out
from dppo_jax.metrics import Metrics
from dppo_jax.models import DTYPES
from dppo_jax.models.decoder import Params, abstract_params
from dppo_jax.optimizer import make_optimizer, make_schedule
from dppo_jax.packing import Plan
from dppo_jax.train_step import TrainState, init_state, state_shardings
from dppo_jax.types import TrainBatch
from experiments.run.setup import Setup


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
        kernel = setup.attention(dtype=config.policy.dtype, length=setup.pack_shape.length).name
        values = make_values(model, dtype=DTYPES[config.policy.dtype], remat=config.policy.remat, attention=kernel)
        replicated, by_row = NamedSharding(mesh, P()), batch_sharding(mesh)
        self._estimate = jax.jit(
            make_estimate(values, discount=c.discount, lam=c.lam, whiten=c.whiten), out_shardings=by_row
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

    def advantages(self, batch: TrainBatch, plan: Plan, rewards, penalties: jax.Array | None = None) -> jax.Array:
        """Of every token of the batch, of a reward for each response and a penalty for each token; keeps the returns
        for the updates that follow."""
        assert self.state is not None
        rewards = jnp.asarray(rewards, jnp.float32)
        advantages, self._estimates = self._estimate(self.state.params, batch, plan, rewards, penalties)
        return advantages

    def update(self, batch: TrainBatch, plan: Plan) -> Metrics:
        """One optimizer step on a minibatch."""
        self.state, measured = self._update(self.state, batch, self._estimates, plan)
        return measured
