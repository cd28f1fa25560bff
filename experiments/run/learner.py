"""Everything after the rewards: the batch, advantages, minibatches, updates."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dppo_jax import metrics as metrics_lib
from dppo_jax import packing
from dppo_jax.devices import hosts
from dppo_jax.devices.sharding import laid_out
from dppo_jax.lora import joined
from dppo_jax.metrics import Metrics
from dppo_jax.models.decoder import Params
from dppo_jax.packing import Plan
from dppo_jax.teacher_forced import make_recompute
from dppo_jax.train_step import TrainState, assemble, init_state, jit_finite, jit_update
from dppo_jax.types import LossInputs, LossOutput, TrainBatch
from experiments.run.critic import Critic
from experiments.run.runs import Runs, with_all_metrics
from experiments.run.samples import Replies, Samples
from experiments.run.setup import Setup
from experiments.run.skipped import Update
from experiments.run.teacher import Teacher


class Learner:
    """Trains every run on its samples. `rates`: factors of the learning rate, one a run, of stacked runs."""

    def __init__(self, runs: Runs, rates: Sequence[float] = (1.0,)):
        base = runs.base
        self._runs, self._setup, self._mesh = runs, base, base.mesh
        by_row = base.by_row
        self._assemble = jax.jit(runs.at_once(assemble), out_shardings=by_row)
        self._recompute = {
            name: jax.jit(runs.each(make_recompute(base.policy_logprobs, name)), out_shardings=by_row)
            for name in ("proximal", "reference")
            if f"{name}_logp" in runs.needed
        }
        kl = base.reward_kl
        self._reward_kl = jax.jit(runs.at_once(kl), out_shardings=by_row) if kl else None
        self._teacher = Teacher(runs) if "teacher_logp" in runs.needed else None
        self._critic = None if base.advantages else Critic(base)
        self._advantages: Callable[[jax.Array, jax.Array], jax.Array] | None = None
        if runs.stacked:
            self._advantages = _stacked_advantages(runs)
            self._update, self._init = _stacked_update(runs, rates)
        else:
            self._advantages = jax.jit(base.advantages, out_shardings=by_row) if base.advantages else None
            self._update = jit_update(base.update, base.shardings, base.mesh, needs_exact=base.needs_exact)
            self._init = functools.partial(base.init_state, owned=True)
        self._finite = jit_finite()
        self._reference: Params = {}
        self._state: TrainState | None = None
        self._last: Update | None = None

    # --- state ---

    @property
    def state(self) -> TrainState:
        assert self._state is not None, "neither begun nor restored"
        return self._state

    @property
    def params(self) -> Params:
        """The trained parameters."""
        return self.state.params

    @property
    def frozen(self) -> Params:
        """The parameters that are not trained."""
        return self.state.frozen

    def policies(self) -> list[Params]:
        """All parameters of every run's policy."""
        return self._runs.apart(self.state.policy)

    def begin(self, params: Params) -> None:
        """A fresh state around the parameters of a model directory, which it takes."""
        if self._critic:
            self._critic.begin(params)
        self._state = self._init(params)

    def keep_reference(self, load: Callable[[], Params]) -> None:
        """Keeps what the run began with, where the loss has a penalty on leaving it, and the teacher, if it has one."""
        if self._teacher:
            self._teacher.load()
        if "reference" in self._recompute:
            base = {"layers": {}} if self._setup.config.lora.rank else load()  # of LoRA, the adapters alone
            initial = self._setup.trainable_part(self._setup.initial_params(base))
            shardings = None if self._mesh is None else self._setup.shardings.params
            self._reference = jax.device_put(self._runs.together([initial] * len(self._runs)), shardings)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs of the learner."""
        return self.state.saved(critic=self._critic.saved() if self._critic else None)

    def shapes(self) -> tuple[dict[str, Any], Any]:
        """Shapes and shardings of what `saved` gives, and of all parameters of the policy."""
        if self._runs.stacked:
            state = jax.eval_shape(self._init, self._setup.param_shapes)
            return state.saved(), state.policy
        state = laid_out(self._setup.state_shapes, self._setup.shardings)
        return state.saved(critic=self._critic.abstract if self._critic else None), state.policy

    def restore(self, saved: dict[str, Any], load: Callable[[], Params]) -> None:
        """From a checkpoint; `load` reads the model directory, where what is not trained comes from."""
        frozen: Params = {}
        if self._setup.config.lora.rank:
            frozen = load()
        self._state = TrainState(saved["params"], saved["opt_state"], saved["updates"], frozen)
        if self._critic:
            self._critic.resume(saved["critic"])

    def is_finite(self) -> bool:
        """Whether the state is worth a checkpoint: no parameter is infinite, NaN, or beyond all measure."""
        critic = self._critic.state if self._critic else ()
        return bool(self._finite((self.state.params, self.state.opt_state, critic)))

    # --- one step ---

    def assemble(self, samples: Samples) -> TrainBatch:
        """Every row with its prompt, and with the log-probabilities of the other policies that the loss asks for."""
        batch = self._assemble(samples.drawing.prompts, samples.drawing.rollout)
        for name, recompute in self._recompute.items():
            params = samples.drawing.params if name == "proximal" else self._reference
            batch = recompute(joined(self.state.frozen, params), batch, self._plan_all(samples.replies))
        return self._teacher.score(batch, self._plan_all(samples.replies)) if self._teacher else batch

    def advantages(self, batch: TrainBatch, replies: list[Replies]) -> TrainBatch:
        """The batch with its advantages, and without the responses that take no part in the update."""
        penalties = self._penalties(batch, replies) if self._reward_kl else None
        rewards = self._to_rows([run.shaped_rewards for run in replies])
        if self._advantages is not None:
            batch = dataclasses.replace(batch, advantages=self._advantages(rewards, batch.group))
        elif self._critic:
            advantages = self._critic.advantages(batch, self._plan_all(replies), replies[0], rewards, penalties)
            batch = dataclasses.replace(batch, advantages=advantages)
        if self._leaves_out:
            kept = self._runs.together(self._kept(replies))
            batch = dataclasses.replace(batch, mask=batch.mask & kept[..., None])
        return batch

    def _penalties(self, batch: TrainBatch, replies: list[Replies]) -> jax.Array:
        """What the KL from the reference takes from the reward of every token, f32[B, R]. The responses' sums are taken
        from their rewards here, unless a critic is to see each token's own."""
        assert self._reward_kl is not None
        coef, share = self._setup.config.reward.kl_coef, self._row_share
        of_tokens, of_responses = self._reward_kl(batch)
        for run, kl in zip(replies, self._runs.apart(hosts.owned(of_responses, share)), strict=True):
            run.terms["term/kl"] = hosts.gather(kl, share)
            if self._critic is None:
                run.shaped_rewards = run.shaped_rewards - np.float32(coef) * run.terms["term/kl"]
        return coef * of_tokens

    def minibatches(self, step: int, replies: list[Replies]) -> Iterator[Plan]:
        """The plan of every optimizer minibatch of a step, made from the lengths of its replies."""
        lengths = [run.lengths for run in replies]
        if self._leaves_out:
            kept = self._kept(replies)
            lengths = [np.where(rows, run.lengths, 0) for rows, run in zip(kept, replies, strict=True)]
        for indices in zip(*(setup.minibatches(step) for setup in self._runs.setups), strict=True):
            yield self._plan(indices, replies, lengths)

    def update(self, batch: TrainBatch, plan: Plan, behavior_params: Params) -> Metrics:
        """One optimizer step: `train_step.make_update`, compiled once. `behavior_params` are those that drew the batch,
        used for exact divergences alone."""
        exact = [behavior_params] if self._runs.needs_exact else []
        self._state, measured = self._update(self.state, batch, plan, *exact)
        measured = measured if self._critic is None else measured | self._critic.update(batch, plan)
        self._last = Update(batch, plan, behavior_params, measured)
        return measured

    def last_update(self) -> Update | None:
        """The newest update, once."""
        last, self._last = self._last, None
        return last

    # --- packing ---

    def _plan(self, indices: Sequence[np.ndarray], replies: list[Replies], lengths: list[np.ndarray]) -> Plan:
        """Where the rows `indices` of every run go; response lengths i[B] of all its rows."""
        c, group = self._setup.config, self._setup.config.rollout.group_size
        return self._runs.together(
            [
                packing.plan(
                    index,
                    prompt_lengths=np.repeat(run.prompt_lengths, group),
                    response_lengths=length,
                    shape=self._setup.pack_shape,
                    packed=c.train.pack,
                )
                for index, run, length in zip(indices, replies, lengths, strict=True)
            ]
        )

    def _plan_all(self, replies: list[Replies]) -> Plan:
        """All rows of the batch."""
        lengths = [run.lengths for run in replies]
        return self._plan([np.arange(len(length)) for length in lengths], replies, lengths)

    @property
    def _leaves_out(self) -> bool:
        """Whether some responses of some run may take no part in the update."""
        return any(s.config.advantage.drop_equal or s.config.reward.overlong_filter for s in self._runs.setups)

    def _kept(self, replies: list[Replies]) -> list[np.ndarray]:
        """By run, which responses take part, bool[B]."""
        return [_taking_part(setup, run) for setup, run in zip(self._runs.setups, replies, strict=True)]

    def _to_rows(self, values: list[np.ndarray]) -> jax.Array:
        """Numbers of all rows, on the devices that hold them."""
        share = self._row_share
        held = self._runs.together([of_run[share.held] for of_run in values])
        return jnp.asarray(hosts.to_global(held, self._mesh, share))

    @property
    def _row_share(self) -> hosts.Share:
        c = self._setup.config.rollout
        return hosts.share_over(self._mesh, c.prompts).grouped(c.group_size)


def _taking_part(setup: Setup, replies: Replies) -> np.ndarray:
    """Which responses of a run, bool[B]: not of equal groups, nor truncated, where its config leaves these out."""
    c = setup.config
    kept: np.ndarray = np.ones(len(replies.lengths), bool)
    if c.advantage.drop_equal:
        kept &= metrics_lib.unequal_groups(replies.shaped_rewards, c.rollout.group_size)
    return kept & ~replies.truncated if c.reward.overlong_filter else kept


def _stacked_advantages(runs: Runs) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(rewards [S, B], group [S, B]) -> advantages [S, B], of each run by its own function."""
    setups, index = runs.different(lambda setup: setup.config.advantage.name)
    functions = [setup.advantages for setup in setups]

    def advantages(number: jax.Array, rewards: jax.Array, group: jax.Array) -> jax.Array:
        return jax.lax.switch(number, functions, rewards, group)

    return functools.partial(jax.jit(runs.at_once(advantages)), index)


def _loss_key(setup: Setup) -> tuple:
    """Of runs with one loss, its hyperparameters and the reference's penalty included, the same."""
    reference = setup.config.reference
    return setup.config.loss.name, tuple(sorted(setup.hyperparameters.items())), reference.coef, reference.estimator


def _stacked_update(runs: Runs, rates: Sequence[float]) -> tuple[Callable, Callable[[Params], TrainState]]:
    """The update of all runs, each with its own loss, aggregation and rate, and the state that they begin with.

    Under vmap every run computes the losses of all and keeps its own; under map it computes its own alone.
    """
    of_losses, loss_index = runs.different(_loss_key)
    losses, base = with_all_metrics([setup.loss for setup in of_losses]), runs.base
    of_weights, weights_index = runs.different(lambda s: (s.config.aggregation.name, s.config.aggregation.constant))

    def update(state, batch, plan, loss_number, weights_number, rate, *behavior):
        def loss(inputs: LossInputs) -> LossOutput:
            return jax.lax.switch(loss_number, losses, inputs)

        def weights(mask: jax.Array, group: jax.Array) -> jax.Array:
            branches = [lambda mask, group, own=setup.weights: own(mask, group=group) for setup in of_weights]
            return jax.lax.switch(weights_number, branches, mask, group)

        scaled = optax.chain(base.optimizer, optax.stateless(lambda u, _: jax.tree.map(lambda x: rate * x, u)))
        return base.update_with(loss, weights, scaled, runs.needed)(state, batch, plan, *behavior)

    compiled = jax.jit(runs.each(update), donate_argnums=0)
    factor = jnp.asarray(rates, jnp.float32)
    # The structure of `scaled`'s state, whose factor is known inside the update alone.
    unscaled = optax.chain(base.optimizer, optax.stateless(lambda u, _: u))
    fresh = jax.jit(lambda params: jax.vmap(lambda _: init_state(params, unscaled))(jnp.arange(len(runs))))

    def call(state: TrainState, batch: TrainBatch, plan: Plan, *behavior: Params) -> tuple[TrainState, Metrics]:
        return compiled(state, batch, plan, loss_index, weights_index, factor, *behavior)

    return call, lambda params: fresh(params)
