"""Rows in flight: a rollout that ends when N groups are complete, and leaves the others to the next one.

C = k N + N groups are drawn at a time: the N that a step trains, and those of k further batches of prompts, so that the
slots have rows while the longest of a batch go on. A row that has not ended stays: under the next parameters it is
prefilled with its tokens so far, and goes on. Every token's log-probability is that under the parameters that drew it.
(Partial rollouts: Kimi k1.5, 2501.12599, section 2.6; interruptible generation: AReaL, 2505.24298, section 4.)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float32, Int32, Key

from dppo_jax.devices.sharding import ROLLOUT, using
from dppo_jax.models.decoder import Params
from dppo_jax.rollout.rollout import Begun, Rollout
from dppo_jax.rollout.slots import Drawn, Shards, Slots, Waiting, Work
from dppo_jax.types import PromptBatch, RolloutBatch


@struct.dataclass
class Flight:
    """The groups that are being drawn, in C places, C / D a shard. A shard's groups are its first, in the order of
    their beginning. This is all that a checkpoint needs: keys and values are made again from it.
    """

    count: Int32[Array, "D"]  # groups that a shard has
    prompts: PromptBatch  # [C, P]; `group` is the number in the batch of prompts that it came with
    batch: Int32[Array, "C"]  # that batch's number
    tokens_drawn: Int32[Array, "C G"]  # of every row; 0: not begun
    ended: Bool[Array, "C G"]
    out: Drawn  # [C, G, R]
    step: Int32[Array, "C G R"]  # of training, in which each token was drawn


@struct.dataclass
class Finished:
    """The N groups that a step trains, and what it is told about them."""

    prompts: PromptBatch  # [N, P]; `group` is 0 .. N-1
    rollout: RolloutBatch
    age: Int32[Array, "B R"]  # steps since each token was drawn
    age_mean: Float32[Array, ""]  # over all tokens
    age_max: Int32[Array, ""]
    origin: Int32[Array, "N 2"]  # the batch of prompts that a group came with, and its number there
    rows_left: Int32[Array, ""]  # begun, and not ended
    work: Work
    told: Any = None  # of conversations: what their environments said of every row, [B]


@dataclasses.dataclass(frozen=True, eq=False)
class InFlight:
    """`rollout` drawn in pieces: N = `prompts` groups a step, and those of `ahead` further batches in the meantime.

    The first complete groups are trained, in the order of their beginning, and a step waits for those whose tokens
    would otherwise be older than `max_age` steps when they are; `max_age` is at least `ahead`. Every shard gives N / D.
    """

    rollout: Rollout
    prompts: int
    ahead: int
    max_age: int

    __name__ = "rollout"

    @property
    def _shards(self) -> Shards:
        return Shards(self.rollout.shards)

    @property
    def places(self) -> int:
        """Groups that there is room for, C."""
        return (self.ahead + 1) * self.prompts

    @property
    def _per_step(self) -> int:
        """Groups that leave a shard in a step."""
        return self.prompts // self.rollout.shards

    def empty(self, prompt_length: int) -> Flight:
        """No group is in flight."""
        r, places = self.rollout, self.places
        rows = places, r.group_size
        each = *rows, r.max_new_tokens

        def zeros(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.int32)

        tokens = zeros(places, prompt_length)
        entropy = jnp.zeros(each) if r.record_entropy else None
        drawn = Drawn(zeros(*each), jnp.zeros(each), zeros(*each, r.topk), jnp.zeros((*each, r.topk)), entropy)
        out = drawn if r.topk else without_topk(drawn)
        return Flight(
            count=zeros(r.shards),
            prompts=PromptBatch(tokens, tokens > 0, zeros(places), zeros(*rows)),
            batch=zeros(places),
            tokens_drawn=zeros(*rows),
            ended=jnp.zeros(rows, bool),
            out=out,
            step=zeros(*each),
        )

    def join(self, flight: Flight, prompts: PromptBatch, batch: Int32[Array, ""]) -> Flight:
        """With the groups of one more batch of prompts, N of them, at the end. There must be places for them."""
        r, first = self.rollout, flight.count[0]
        limit = prompts.limit
        if limit is None:
            limit = jnp.full((self.prompts, r.group_size), r.max_new_tokens, jnp.int32)

        def put(places: Array, new: Array) -> Array:
            placed = jax.lax.dynamic_update_slice_in_dim(
                self._shards.local(places), self._shards.local(new), first, axis=1
            )
            return placed.reshape(places.shape)

        new = dataclasses.replace(prompts, limit=limit)
        nobody = jnp.zeros((self.prompts, r.group_size), jnp.int32)
        return dataclasses.replace(
            flight,
            count=flight.count + self._per_step,
            prompts=jax.tree.map(put, flight.prompts, new),
            batch=put(flight.batch, jnp.full(self.prompts, batch, jnp.int32)),
            tokens_drawn=put(flight.tokens_drawn, nobody),
            ended=put(flight.ended, nobody > 0),
        )

    def dealt(self, flight: Flight) -> Flight:
        """A flight that had another number of shards: its groups are dealt to these in turn, in the order of their
        beginning, so that none has more than its share of those that `max_age` makes due."""
        there = jnp.arange(self.places // len(flight.count)) < flight.count[:, None]
        order = jnp.lexsort((flight.prompts.group, flight.batch, ~there.reshape(-1)))  # what is there comes first
        place = self._shards.local(jnp.arange(self.places))
        shard, number = jnp.arange(len(place))[:, None], place - place[:, :1]
        source = order[(number * len(place) + shard).reshape(-1)]
        count = jnp.full(len(place), jnp.sum(flight.count) // len(place), jnp.int32)
        by_place = dataclasses.replace(flight, count=jnp.zeros(self.places))
        return dataclasses.replace(jax.tree.map(lambda x: x[source], by_place), count=count)

    def __call__(
        self, params: Params, flight: Flight, key: Key[Array, ""], step: Int32[Array, ""]
    ) -> tuple[Flight, Finished]:
        """Draws until there is what this step of training needs: what stays in flight, and what is finished.

        A row draws from fold_in(fold_in(fold_in(key, its batch), its group), its number in the group), whatever the
        steps in which it does.
        """
        begun, state = self.begin(params, flight, key, step)
        return self.end(params, flight, key, step, begun, self.rollout.draw(begun, state)[0])

    def begin(
        self, params: Params, flight: Flight, key: Key[Array, ""], step: Int32[Array, ""]
    ) -> tuple[Begun, Slots]:
        """As `Rollout.begin`: what `Rollout.draw` goes on with, in one call or several."""
        r = self.rollout
        with using(ROLLOUT):
            published, waiting = self._prefilled(params, flight, key, flight.prompts)
            return r.begun(published, *self._going_on(flight, waiting, r.idle(waiting, None), step))

    def _prefilled(
        self, params: Params, flight: Flight, key: Key[Array, ""], prompts: PromptBatch
    ) -> tuple[Params, Waiting]:
        published = self.rollout.publish(params)
        keys = jax.vmap(lambda batch, group: jax.random.fold_in(jax.random.fold_in(key, batch), group))
        return published, self.rollout.prefill_with(published, prompts, keys(flight.batch, prompts.group))[0]

    def end(
        self,
        params: Params,
        flight: Flight,
        key: Key[Array, ""],
        step: Int32[Array, ""],
        begun: Begun,
        state: Slots,
    ) -> tuple[Flight, Finished]:
        """What stays in flight, and what is finished, of the arguments of `begin`; it reads what `Rollout.end` does."""
        with using(ROLLOUT):
            return self._parted(flight, begun.waiting, state, step)

    def _is_there(self, flight: Flight) -> Bool[Array, "D c"]:
        """Whether a place has a group."""
        return jnp.arange(self.places // self.rollout.shards) < flight.count[:, None]

    def _going_on(
        self, flight: Flight, waiting: Waiting, state: Slots, step: Int32[Array, ""]
    ) -> tuple[Waiting, Slots]:
        """What is to be drawn, and the state of rows that have tokens already."""
        r = self.rollout
        there, begun = self._is_there(flight), flight.tokens_drawn.reshape(-1) > 0

        def rows_of(x: Array) -> Array:
            return jax.lax.collapse(x, 0, 2)

        def either(old: Array, new: Array) -> Array:
            return jnp.where(begun.reshape(-1, *[1] * (new.ndim - 1)), rows_of(old), new)

        # A row that has no token yet has its first from the prefill, and may have ended with it.
        to_go = ~jnp.where(begun, rows_of(flight.ended), ~waiting.waits.reshape(-1))
        to_go &= jnp.repeat(there.reshape(-1), r.group_size)
        missing = jnp.sum(self._shards.local(to_go.reshape(-1, r.group_size)), axis=2, dtype=jnp.int32)
        oldest = step + self.ahead - self.max_age
        waiting = dataclasses.replace(
            waiting, due=there & (self._shards.local(flight.batch) <= oldest), wanted=self._per_step
        )
        progress = jnp.maximum(rows_of(flight.tokens_drawn), 1)
        fields = vars(flight.out).items()
        out = {name: either(old, getattr(state.out, name)) for name, old in fields if old is not None}
        # What a row has of a stop string follows from its tokens; of those behind its last nothing is read.
        stops = None if r.stops is None else r.stops.after_each(out["token"])
        return waiting, dataclasses.replace(
            state,
            waits=self._shards.local(to_go),
            progress=self._shards.local(progress),
            missing=jnp.where(there, missing, 1),  # a place without a group is not complete
            out=dataclasses.replace(state.out, **out),
            stops=stops,
        )

    def _parted(
        self, flight: Flight, waiting: Waiting, state: Slots, step: Int32[Array, ""]
    ) -> tuple[Flight, Finished]:
        """What stays, and what is finished, of what was drawn."""
        r, places = self.rollout, self.places
        batch = places * r.group_size
        whole = r.result(flight.prompts, waiting, state, None)
        row, live = self._shards.within(state.row, batch), self._shards.local(state.row < batch)
        note = jax.vmap(lambda x, at, value: x.at[at].set(value, mode="drop"))
        in_slot = note(jnp.zeros_like(state.waits), row, live)
        progress = note(state.progress, row, self._shards.local(state.drawn))
        # A first token that nothing followed is drawn again, under the parameters of the step that goes on from it.
        unfinished = jnp.where(in_slot | (progress > 1), progress, 0)
        length = jnp.sum(whole.response_mask, axis=1, dtype=jnp.int32)
        ended = ~(state.waits | in_slot)
        drawn = jnp.where(ended, self._shards.local(length), unfinished).reshape(places, r.group_size)
        column = jnp.arange(r.max_new_tokens)
        is_new = (column >= flight.tokens_drawn[..., None]) & (column < drawn[..., None])
        out = state.out if r.topk else without_topk(state.out)
        now = dataclasses.replace(
            flight,
            tokens_drawn=drawn,
            ended=ended.reshape(places, r.group_size),
            out=jax.tree.map(lambda x: x.reshape(places, r.group_size, *x.shape[1:]), out),
            step=jnp.where(is_new, step, flight.step),
        )
        assert state.missing is not None
        return self._without_finished(now, whole, state.missing == 0, step, state.work.total())

    def _without_finished(
        self, now: Flight, whole: RolloutBatch, complete: Bool[Array, "D c"], step: Int32[Array, ""], work: Work
    ) -> tuple[Flight, Finished]:
        """What stays of a flight, and the first groups that are complete; `whole` are the rows of all places."""
        r, places, per_step = self.rollout, self.places, self._per_step
        batch = places * r.group_size
        leaves = complete & (jnp.cumsum(complete, axis=1) <= per_step)
        order = jnp.argsort(leaves, axis=1, stable=True)  # those that stay, then those that leave

        def taken(at: Int32[Array, "D n"], tree):
            return jax.tree.map(lambda x: self._shards.look_up(x, at), tree)

        groups = jnp.argsort(~leaves, axis=1, stable=True)[:, :per_step]
        rows = (groups[..., None] * r.group_size + jnp.arange(r.group_size)).reshape(r.shards, -1)
        by_place = dataclasses.replace(now, count=jnp.zeros(places))
        staying = dataclasses.replace(taken(order, by_place), count=now.count - per_step)
        prompts, origin = taken(groups, (now.prompts, jnp.stack([now.batch, now.prompts.group], axis=1)))
        own = jnp.arange(self.prompts, dtype=jnp.int32)
        rollout = dataclasses.replace(taken(rows, whole), group=jnp.repeat(own, r.group_size))
        drawn_in = taken(rows, now.step.reshape(batch, -1))
        drawn = rollout.response_mask if rollout.own is None else rollout.response_mask & rollout.own
        age = jnp.where(drawn, step - drawn_in, 0)
        is_left = self._is_there(staying).reshape(-1, 1) & (staying.tokens_drawn > 0) & ~staying.ended
        return staying, Finished(
            prompts=dataclasses.replace(prompts, group=own),
            rollout=rollout,
            age=age,
            age_mean=jnp.sum(age) / jnp.maximum(jnp.sum(drawn), 1),
            age_max=jnp.max(age),
            origin=origin,
            rows_left=jnp.sum(is_left, dtype=jnp.int32),
            work=work,
            told=jax.tree.map(lambda x: self._shards.look_up(x.reshape(batch), rows), self._told(now)),
        )

    def _told(self, flight: Flight) -> Any:
        """What is known of every row of a flight beside its tokens, [C, G]."""
        return None


def without_topk(drawn: Drawn) -> Drawn:
    """Without the arrays of K = 0 columns."""
    return dataclasses.replace(drawn, topk_ids=None, topk_logp=None)
