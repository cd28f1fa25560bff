"""Exact rollouts: every token is drawn from the training pass itself, so that rollout and training agree to the bit.

A cached rollout computes the logits of a token by other products than the training pass, and agrees with it but for
rounding. Here it is a draft. With u_t the random numbers of token t, the response is what satisfies

    a_t = draw(z_t(a_1 .. a_{t-1}), u_t)   for all t, z the logits of the training pass,

and it is found by repetition: a pass over the whole row, all its tokens drawn anew, until none changes. In a causal
model token t is right after t passes at the latest, whatever the draft; a draft that differs by rounding alone is
nearly always right at once, and costs the one pass that says so. (Jacobi's iteration, as in 2305.10427; and as in
speculative decoding, 2211.17192, another computation's tokens stand where the model would have drawn the same.)

Nothing is rescored: a token whose draw the training pass does not repeat is replaced by the one that it draws.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from dppo_jax import packing, sampling
from dppo_jax.devices.sharding import ROLLOUT, constrain, using
from dppo_jax.isolated import IsolatedPass
from dppo_jax.models.decoder import Params
from dppo_jax.packing import PackShape, Places, Plan
from dppo_jax.rollout.rollout import Begun, Rollout
from dppo_jax.rollout.slots import Slots, Work
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch, RolloutBatch, TrainBatch


@dataclasses.dataclass(frozen=True, eq=False)
class ExactRollout:
    """A pure function (params, prompts, key) -> RolloutBatch, as `Rollout` is.

    draft: the cached rollout, at a temperature above 0 and without truncation.
    training_pass: that of the update, which has one sample a row, in microbatches of this `shape`.
    minibatches: so many the batch is cut into, rows in order, as in the first epoch.
    """

    draft: Rollout
    training_pass: IsolatedPass
    shape: PackShape
    minibatches: int

    __name__ = "exact_rollout"

    def __call__(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> RolloutBatch:
        return self.measured(params, prompts, key)[0]

    def measured(self, params: Params, prompts: PromptBatch, key: Key[Array, ""]) -> tuple[RolloutBatch, Work]:
        """The batch, and what decoding its draft cost."""
        return self._settled(params, prompts, key, *self.draft.measured(params, prompts, key))

    def end(
        self, params: Params, prompts: PromptBatch, key: Key[Array, ""], begun: Begun, state: Slots
    ) -> tuple[RolloutBatch, Work]:
        """The same, where the draft was drawn in several calls."""
        return self._settled(params, prompts, key, *self.draft.end(params, prompts, key, begun, state))

    def _settled(
        self, params: Params, prompts: PromptBatch, key: Key[Array, ""], draft: RolloutBatch, work: Work
    ) -> tuple[RolloutBatch, Work]:
        """What the training pass draws, from a draft."""
        with using(ROLLOUT):
            uniforms = self.draft.uniforms(sampling.row_keys(key, prompts.group))
        plan = self._plan(jnp.repeat(jnp.sum(prompts.mask, axis=1, dtype=jnp.int32), self.draft.group_size))
        limit = self.draft.limits(prompts)

        def settle(number: Array, batch: TrainBatch) -> TrainBatch:
            """The batch with the rows of one microbatch as the training pass draws them."""
            places = packing.microbatch(plan, number)

            def again(state: tuple[TrainBatch, Array, Array]) -> tuple[TrainBatch, Array, Array]:
                batch, _, passes = state
                drawn = self._drawn(params, batch, places, uniforms, limit)
                return drawn, _differ(drawn, batch), passes + 1

            def unsettled(state: tuple[TrainBatch, Array, Array]) -> Array:
                return state[1] & (state[2] <= self.draft.max_new_tokens)

            return jax.lax.while_loop(unsettled, again, (batch, jnp.bool_(True), jnp.int32(0)))[0]

        batch = dataclasses.replace(assemble(prompts, draft), mask=jnp.ones_like(draft.response_mask))
        batch = jax.lax.fori_loop(0, len(plan.tokens_per_row), settle, batch)
        mask, truncated = self._extent(batch.tokens, limit)
        rollout = dataclasses.replace(
            draft,
            tokens=batch.tokens,
            response_mask=mask,
            truncated=truncated,
            behavior_logp=jnp.where(mask, batch.behavior_logp, 0.0),
            behavior_entropy=None if batch.behavior_entropy is None else jnp.where(mask, batch.behavior_entropy, 0.0),
            topk_ids=batch.topk_ids,
            topk_logp=batch.topk_behavior_logp,
        )
        return rollout, work

    def _plan(self, prompt_lengths: Int32[Array, "B"]) -> Plan:
        """All rows of the batch, where the plans of its minibatches have them, every response of full length."""
        rows, length = len(prompt_lengths), self.draft.max_new_tokens
        of_minibatch = rows // self.minibatches
        capacity = -(-of_minibatch // self.shape.rows)  # microbatches of a minibatch
        number = jnp.arange(rows, dtype=jnp.int32)
        packed_row = number // of_minibatch * capacity * self.shape.rows + number % of_minibatch
        microbatches = self.minibatches * capacity
        nothing = jnp.zeros(microbatches * self.shape.rows, jnp.int32)
        return Plan(
            batch_rows=number,
            rows=packed_row,
            columns=jnp.zeros_like(number),
            response_columns=prompt_lengths,
            responses_before=jnp.zeros_like(number),
            tokens_per_row=nothing.at[packed_row].set(prompt_lengths + length).reshape(microbatches, -1),
            responses_per_row=nothing.at[packed_row].set(length).reshape(microbatches, -1),
            num_microbatches=jnp.int32(microbatches),
            shape=self.shape,
        )

    def _drawn(
        self,
        params: Params,
        batch: TrainBatch,
        places: Places,
        uniforms: Float32[Array, "B R 2"],
        limit: Int32[Array, "B"],
    ) -> TrainBatch:
        """The batch with the tokens that one pass draws of a microbatch, and with what it says of those that it saw."""
        packed = packing.pack(batch, jnp.ones(batch.tokens.shape, jnp.float32), places)
        packed = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), packed)
        head, z = self.training_pass(params, packed)
        u = jnp.stack([packing.take(batch, places, uniforms[..., i]) for i in range(2)], axis=-1)
        token = sampling.draw(z.reshape(-1, z.shape[-1]), u.reshape(-1, 2))[0].reshape(z.shape[:-1])
        tokens = packing.unpack(batch, places, token, batch.tokens)
        mask, _ = self._extent(tokens, limit)
        drawn = dataclasses.replace(
            batch,
            tokens=jnp.where(mask, tokens, self.draft.pad_id),
            behavior_logp=packing.unpack(batch, places, head.logp, batch.behavior_logp),
        )
        if batch.behavior_entropy is not None:
            entropy = packing.unpack(batch, places, head.entropy, batch.behavior_entropy)
            drawn = dataclasses.replace(drawn, behavior_entropy=entropy)
        if batch.topk_ids is None:
            return drawn
        ids = jax.lax.top_k(z, batch.topk_ids.shape[-1])[1].astype(jnp.int32)
        return dataclasses.replace(
            drawn,
            topk_ids=jnp.where(mask[..., None], packing.unpack(batch, places, ids, batch.topk_ids), 0),
            topk_behavior_logp=packing.unpack(batch, places, head.ids_logp, batch.topk_behavior_logp),
        )

    def _extent(self, tokens: Int32[Array, "B R"], limit: Int32[Array, "B"]) -> tuple[Array, Array]:
        stops = self.draft.stops
        return self.draft.extent(tokens, None if stops is None else stops.after_each(tokens), limit)


def _differ(a: TrainBatch, b: TrainBatch) -> Array:
    """Whether two batches have other tokens, or other top-K tokens."""
    tokens = jnp.any(a.tokens != b.tokens)
    return tokens if a.topk_ids is None else tokens | jnp.any(a.topk_ids != b.topk_ids)
