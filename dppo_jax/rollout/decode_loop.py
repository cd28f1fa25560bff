"""The decode loop of a rollout: which rows are in the slots, when others take their place, and where a call of it ends.

What is drawn, and in which order rows come into slots, is the same in one call as in several.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dppo_jax.devices.sharding import constrain
from dppo_jax.models.attention import length_multiple
from dppo_jax.rollout.blocks import Blocks
from dppo_jax.rollout.paged import Pages
from dppo_jax.rollout.slots import Shards, Slots, Waiting

MOST = jnp.iinfo(jnp.int32).max  # decode steps


def resumed_tokens(prompt_length: int, max_new_tokens: int) -> int:
    """T, how many tokens of rows that go on pass through the model at a time: at least those of the longest row."""
    longest = prompt_length + max_new_tokens - 1
    multiple = length_multiple("tpu", longest)  # which the others take too
    return -(-longest // multiple) * multiple


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeLoop:
    """Slots that draw rows of `waiting`.

    step: one token more in every live slot. forward: keys and values of every layer, stacked, of tokens [D, T] at
    their positions, with segments.
    """

    waiting: Waiting
    _: dataclasses.KW_ONLY
    cache: Blocks | Pages
    shards: Shards
    group_size: int
    max_new_tokens: int
    step: Callable[[Slots], Slots]
    forward: Callable[[Array, Array, Array], tuple[Array, Array]]

    def run(self, state: Slots, most: int) -> Slots:
        """`most` decode steps; fewer where all that is to be drawn is drawn before (0: until then)."""
        end = state.work.decode_steps + most if most else MOST

        def going_on(state: Slots) -> Array:
            return state.work.decode_steps < end

        def turn(state: Slots) -> Slots:
            # Where the call before ended between two decode steps, nobody is admitted: the rows in the slots go on.
            state, _ = jax.lax.while_loop(
                lambda carry: carry[1],
                lambda carry: (self._admit(self.cache.make_room(carry[0])), jnp.bool_(False)),
                (state, ~self._decoding(state)),
            )
            return jax.lax.while_loop(lambda state: going_on(state) & self._decoding(state), self.step, state)

        return jax.lax.while_loop(lambda state: going_on(state) & self.unfinished(state), turn, state)

    def unfinished(self, state: Slots) -> Array:
        """Whether there is more to draw."""
        waiting = self.waiting
        if waiting.left_over is not None:
            return jnp.sum(state.row < len(waiting.limit)) + jnp.sum(state.waits) > waiting.left_over
        if state.missing is None:
            return jnp.any(state.row < len(waiting.limit)) | jnp.any(state.waits)
        complete = state.missing == 0
        return jnp.any(waiting.due & ~complete) | jnp.any(jnp.sum(complete, axis=1) < waiting.wanted)

    def _decoding(self, state: Slots) -> Array:
        """Until a sixteenth of the slots can be filled anew, or all that wait can be; or rows must make room."""
        waiting = self.waiting
        batch, remaining = len(waiting.limit), jnp.sum(self.cache.admissible(waiting, state), axis=1)
        idle = jnp.sum(self.shards.local(state.row == batch), axis=1)
        enough = jnp.clip(jnp.sum(state.waits), 1, max(1, len(state.row) // 16))
        fillable = jnp.sum(jnp.minimum(idle, remaining))
        going_on = jnp.any(state.row < batch) & (fillable < enough) & ~self.cache.short(state)
        if state.missing is None and waiting.left_over is None:
            return going_on
        return going_on & self.unfinished(state)

    def _admit(self, state: Slots) -> Slots:
        """Idle slots take the next rows that wait and find room."""
        waiting = self.waiting
        batch, group, shards = len(waiting.limit), self.group_size, self.shards
        idle, admissible = shards.local(state.row == batch), self.cache.admissible(waiting, state)
        order, per_shard = jnp.cumsum(idle, axis=1) - 1, admissible.shape[1]
        taken = idle & (order < jnp.sum(admissible, axis=1, keepdims=True))
        rows = jnp.argsort(~admissible, axis=1, stable=True)  # within the shard, those to be taken first
        index = jnp.take_along_axis(rows, jnp.clip(order, 0, per_shard - 1), axis=1)
        fresh = taken.reshape(-1)
        first = jnp.arange(shards.count)[:, None] * per_shard
        row = jnp.where(taken, index + first, shards.local(state.row)).reshape(-1)
        index = jnp.minimum(shards.within(row, batch), per_shard - 1)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        leave = jax.vmap(lambda waits, at: waits.at[at].set(False, mode="drop"))
        progress = shards.look_up(state.progress.reshape(-1), index)
        state = dataclasses.replace(
            state,
            row=row,
            waits=leave(state.waits, jnp.where(taken, index, per_shard)),
            drawn=choose(progress, state.drawn),
            token=choose(shards.look_up(state.out.token, index, progress - 1), state.token),
            limit=choose(shards.look_up(waiting.limit, index), state.limit),
            prompt_mask=choose(shards.look_up(waiting.prompt_mask, index // group), state.prompt_mask),
        )
        if state.stop is not None and state.stops is not None:
            stop = choose(shards.look_up(state.stops, index, progress - 1), state.stop)
            state = dataclasses.replace(state, stop=stop)
        state = self.cache.admit(waiting, state, fresh, index // group)
        all_fresh = state.missing is None and waiting.left_over is None
        if all_fresh and not self.cache.may_run_out(len(state.row), waiting):
            return state  # every row that waits has its first token alone
        return jax.lax.while_loop(
            lambda carry: jnp.any(carry[1]),
            lambda carry: self._resume(*carry),
            (state, fresh & (state.drawn > 1)),
        )[0]

    def _resume(self, state: Slots, cold: Bool[Array, "S"]) -> tuple[Slots, Bool[Array, "S"]]:
        """The tokens of some of the `cold` slots, whose cache holds their prompts alone, one row after another through
        the model and into the cache; and the slots that are left."""
        waiting, shards = self.waiting, self.shards
        width = waiting.prompt_mask.shape[1]
        column = jnp.arange(resumed_tokens(width, self.max_new_tokens))
        length = shards.local(jnp.where(cold, state.position, 0))
        ends = jnp.cumsum(length, axis=1)
        fits = ends <= len(column)
        slot = jax.vmap(lambda ends: jnp.searchsorted(ends, column, side="right"))(ends).astype(jnp.int32)
        slot = jnp.minimum(slot, length.shape[1] - 1)
        number = column - jnp.take_along_axis(ends - length, slot, axis=1)
        is_token = column < jnp.max(jnp.where(fits, ends, 0), axis=1, keepdims=True)

        row = jnp.minimum(shards.within(state.row, len(waiting.limit)), len(waiting.limit) // shards.count - 1)
        row = jnp.take_along_axis(row, slot, axis=1)
        prompt = shards.local(jnp.sum(state.prompt_mask, axis=1, dtype=jnp.int32))
        at = number - jnp.take_along_axis(prompt, slot, axis=1)  # of the response
        of_prompt = jnp.clip(width + at, 0, width - 1), jnp.clip(at, 0, self.max_new_tokens - 1)
        before = shards.look_up(waiting.prompt_tokens, row // self.group_size, of_prompt[0].reshape(-1))
        after = shards.look_up(state.out.token, row, of_prompt[1].reshape(-1))
        tokens = jnp.where(at < 0, before.reshape(at.shape), after.reshape(at.shape))
        segments = jnp.where(is_token, slot + 1, 0)
        tokens, segments, number = (constrain(x, "batch", None) for x in (tokens, segments, number))
        filled = self.forward(tokens, number, segments)
        state = self.cache.fill(state, slot, jnp.where(is_token, number, -1), filled)
        return state, cold & ~fits.reshape(-1)
