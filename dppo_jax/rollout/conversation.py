"""Conversations: a row holds all that follows its prompt, the policy's turns and an environment's texts between them.

The devices draw until rows have ended a turn (`advance`); the host takes those to their environments, and has the
devices draw the others meanwhile; what the environments said is put behind the rows' tokens (`extend`), and they go on.
When enough groups are over, they are parted from the others (`part`). No token is ever written anew: the tokens of a
row are those that were drawn and those that were put there, in their order.

Every call of `advance` prefills its rows with the tokens that they have. What it draws is a function of the row's key
and of the token's position in the row, as everywhere; which rows have ended a turn when it returns is a function of
what is drawn, and not of a clock.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Key

from dppo_jax.devices.sharding import ROLLOUT, using
from dppo_jax.models.decoder import Params
from dppo_jax.rollout.in_flight import Finished, Flight, InFlight, without_topk
from dppo_jax.rollout.rollout import Begun
from dppo_jax.rollout.slots import Slots, Work
from dppo_jax.types import PromptBatch, RolloutBatch

PAUSE = 2  # `advance` returns when one in so many of the rows that it draws has ended its turn


@struct.dataclass
class Told:
    """What environments said of rows beside their texts."""

    score: Float32[Array, "*n"]  # the sum of the environment's rewards
    fault: Int32[Array, "*n"]  # why the row is over, where that is no end of its own: a number of the host's; 0: none
    turns: Int32[Array, "*n"]  # of the policy


@struct.dataclass
class Dialogs(Flight):
    """The groups that are talked with, in C places. A row that has `ended` waits for its environment, or is over.

    `tokens_drawn` counts what environments said, too. All that a checkpoint needs.
    """

    turn: Int32[Array, "C G R"]  # in which turn of the row the policy drew a token, from 1; 0: it did not
    begins: Int32[Array, "C G"]  # the column in which the turn at hand begins
    over: Bool[Array, "C G"]  # nothing follows
    truncated: Bool[Array, "C G"]  # it is over since a limit cut it
    told: Told  # [C, G]


@struct.dataclass
class Answers:
    """What environments said to rows that had ended a turn: text in T columns, and whether that is all."""

    to: Bool[Array, "C G"]  # the rows that are answered
    text: Int32[Array, "C G T"]
    length: Int32[Array, "C G"]
    over: Bool[Array, "C G"]
    truncated: Bool[Array, "C G"]
    score: Float32[Array, "C G"]
    fault: Int32[Array, "C G"]


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation(InFlight):
    """Rows of `rollout` in turns: N = `prompts` groups a step, of those and `ahead` further batches.

    A turn ends with an end-of-sequence token, with its own limit of `turn_tokens` (None: none) or with the row's.
    """

    turn_tokens: int | None = None

    def empty(self, prompt_length: int) -> Dialogs:
        """No group is talked with."""
        flight, rows = super().empty(prompt_length), (self.places, self.rollout.group_size)
        nothing, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
        fields: dict[str, Any] = {field.name: getattr(flight, field.name) for field in dataclasses.fields(flight)}
        told = Told(jnp.zeros(rows), nothing, nothing)
        turn = jnp.zeros_like(flight.step)
        return Dialogs(**fields, turn=turn, begins=nothing, over=no, truncated=no, told=told)

    def join(self, flight: Flight, prompts: PromptBatch, batch: Int32[Array, ""]) -> Dialogs:
        """With the groups of one more batch of prompts, as of `InFlight`."""
        joined = super().join(flight, prompts, batch)
        assert isinstance(joined, Dialogs)
        place = jnp.arange(self.places // self.rollout.shards)
        new = ((place >= flight.count[:, None]) & self._is_there(joined)).reshape(-1)

        def fresh(x: Array, first: Any = 0) -> Array:
            return jnp.where(new.reshape(-1, *[1] * (x.ndim - 1)), jnp.asarray(first, x.dtype), x)

        return dataclasses.replace(
            joined,
            turn=fresh(joined.turn),
            begins=fresh(joined.begins),
            over=fresh(joined.over),
            truncated=fresh(joined.truncated),
            told=jax.tree.map(fresh, joined.told).replace(turns=fresh(joined.told.turns, 1)),
        )

    # --- one round ---

    def advance(
        self, params: Params, flight: Dialogs, key: Key[Array, ""], step: Int32[Array, ""]
    ) -> tuple[Dialogs, Work]:
        """Draws until one in PAUSE of the rows that can be drawn has ended its turn. There must be such rows."""
        begun, state = self.begin(params, flight, key, step)
        return self.noted(params, flight, key, step, begun, self.rollout.draw(begun, state)[0])

    def begin(
        self, params: Params, flight: Flight, key: Key[Array, ""], step: Int32[Array, ""]
    ) -> tuple[Begun, Slots]:
        """As `Rollout.begin`: what `Rollout.draw` goes on with, in one call or several, up to `noted`."""
        assert isinstance(flight, Dialogs)
        r = self.rollout
        with using(ROLLOUT):
            prompts = dataclasses.replace(flight.prompts, limit=self._stop(flight))
            published, waiting = self._prefilled(params, flight, key, prompts)
            waiting, state = self._going_on(flight, waiting, r.idle(waiting, None), step)
            waiting = dataclasses.replace(waiting, due=None, wanted=0, left_over=self._left_over(flight))
            return r.begun(published, waiting, dataclasses.replace(state, missing=None))

    def _stop(self, flight: Dialogs) -> Int32[Array, "C G"]:
        """Most tokens that a row may have when its turn ends."""
        limit = flight.prompts.limit
        return limit if self.turn_tokens is None else jnp.minimum(limit, flight.begins + self.turn_tokens)

    def _left_over(self, flight: Dialogs) -> Int32[Array, ""]:
        """How many rows may still be in their turns when `advance` returns."""
        open_rows = jnp.sum(self._is_there(flight).reshape(-1, 1) & ~flight.ended, dtype=jnp.int32)
        of_step = self.prompts * self.rollout.group_size
        at_once = jnp.minimum(open_rows, min(of_step, self.rollout.slots or of_step))
        return jnp.maximum(open_rows - jnp.maximum(-(-at_once // PAUSE), 1), 0)

    def noted(
        self,
        params: Params,
        flight: Dialogs,
        key: Key[Array, ""],
        step: Int32[Array, ""],
        begun: Begun,
        state: Slots,
    ) -> tuple[Dialogs, Work]:
        """What `advance` gives, of the arguments of `begin`; it reads what `Rollout.end` does."""
        with using(ROLLOUT):
            return self._noted(flight, state, step), state.work.total()

    def _noted(self, flight: Dialogs, state: Slots, step: Int32[Array, ""]) -> Dialogs:
        """The flight with what was drawn."""
        r, places = self.rollout, self.places
        batch, rows = places * r.group_size, (places, r.group_size)
        row, live = self._shards.within(state.row, batch), self._shards.local(state.row < batch)
        note = jax.vmap(lambda x, at, value: x.at[at].set(value, mode="drop"))
        in_slot = note(jnp.zeros_like(state.waits), row, live)
        progress = note(state.progress, row, self._shards.local(state.drawn))
        # A first token that nothing followed is drawn again.
        under_way = jnp.where(in_slot | (progress > 1), progress, 0).reshape(rows)
        token, column = state.out.token.reshape(*rows, -1), jnp.arange(r.max_new_tokens)
        is_end = r.sampler.is_end_token(token) & (column >= flight.tokens_drawn[..., None])
        end = jnp.min(jnp.where(is_end, column, r.max_new_tokens), axis=-1) + 1
        there = self._is_there(flight).reshape(-1, 1)
        ends_now = there & ~(state.waits | in_slot).reshape(rows) & ~flight.ended
        drawn = jnp.where(ends_now, jnp.minimum(end, self._stop(flight)), under_way)
        drawn = jnp.where(there & ~flight.ended, drawn, flight.tokens_drawn)
        is_new = (column >= flight.tokens_drawn[..., None]) & (column < drawn[..., None])
        out = state.out if r.topk else without_topk(state.out)
        return dataclasses.replace(
            flight,
            tokens_drawn=drawn,
            ended=flight.ended | ends_now,
            out=jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), out),
            step=jnp.where(is_new, step, flight.step),
            turn=jnp.where(is_new, flight.told.turns[..., None], flight.turn),
        )

    def extend(self, flight: Dialogs, answers: Answers) -> Dialogs:
        """With what environments said. A row without room for it, and for a token after it, is over and truncated."""
        column, drawn = jnp.arange(self.rollout.max_new_tokens), flight.tokens_drawn
        fits = drawn + answers.length < flight.prompts.limit
        goes_on = answers.to & ~answers.over & fits
        after = drawn + jnp.where(goes_on, answers.length, 0)
        at = jnp.clip(column - drawn[..., None], 0, answers.text.shape[-1] - 1)
        is_new = (column >= drawn[..., None]) & (column < after[..., None])
        token = jnp.where(is_new, jnp.take_along_axis(answers.text, at, axis=-1), flight.out.token)
        told = dataclasses.replace(
            flight.told,
            score=jnp.where(answers.to, answers.score, flight.told.score),
            fault=jnp.where(answers.to, answers.fault, flight.told.fault),
            turns=flight.told.turns + goes_on,
        )
        return dataclasses.replace(
            flight,
            tokens_drawn=after,
            ended=flight.ended & ~goes_on,
            out=dataclasses.replace(flight.out, token=token),
            turn=jnp.where(is_new, 0, flight.turn),
            begins=jnp.where(goes_on, after, flight.begins),
            over=flight.over | (answers.to & ~goes_on),
            truncated=jnp.where(answers.to, answers.truncated | ~(answers.over | fits), flight.truncated),
            told=told,
        )

    # --- the end of a step ---

    def part(self, flight: Dialogs, step: Int32[Array, ""]) -> tuple[Dialogs, Finished]:
        """What stays in flight, and the first N / D groups of every shard that are over; there must be as many."""
        rows = self.places * self.rollout.group_size
        out = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), flight.out)
        mask = jnp.arange(self.rollout.max_new_tokens) < flight.tokens_drawn.reshape(-1, 1)
        own = flight.turn.reshape(rows, -1) > 0
        whole = RolloutBatch(
            tokens=out.token,
            response_mask=mask,
            behavior_logp=jnp.where(mask & own, out.logp, 0.0),
            truncated=flight.truncated.reshape(rows),
            group=jnp.zeros(rows, jnp.int32),
            topk_ids=out.topk_ids,
            topk_logp=out.topk_logp,
            own=mask & own,
            behavior_entropy=None if out.entropy is None else jnp.where(mask & own, out.entropy, 0.0),
        )
        complete = self._is_there(flight) & self._shards.local(jnp.all(flight.over, axis=1))
        staying, finished = self._without_finished(flight, whole, complete, step, _NO_WORK)
        assert isinstance(staying, Dialogs)
        return staying, finished

    def _told(self, flight: Flight) -> Told:
        assert isinstance(flight, Dialogs)
        return flight.told


_NO_WORK: Any = None  # `advance` has told it
