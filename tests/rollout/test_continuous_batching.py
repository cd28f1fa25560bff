"""Rows that wait for a slot: the same rows as without waiting, whatever the slots, ends, limits and neighbours."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr, Literal

from dppo_jax.rollout import Rollout
from dppo_jax.types import RolloutBatch
from tests.helpers.fixtures import COMPILER_OPTIONS
from tests.helpers.rollouts import (
    NEVER,
    TOLERANCE,
    G,
    N,
    P,
    R,
    at_tokens,
    ends,
    first_end,
    free,
    log_probabilities,
    policy,
    prompts,
    redraw,
    rollout,
    uniforms_of,
)

NEAR = 1e-5  # how far from a boundary float32 and float64 agree on what is drawn
ROWS = N * G
LIMITS = np.random.RandomState(3).randint(2, R + 1, (N, G))
LIMITS[0, 1], LIMITS[2] = 1, R
SLOTS = [None, 1, 3, 5, ROWS]


def limited(limit=LIMITS, **changes):
    return prompts(limit=limit, **changes)


def cut(endless: RolloutBatch, eos_ids, pad_id: int, limit: np.ndarray) -> RolloutBatch:
    """An endless rollout as it is when rows end with a token of `eos_ids` or at their limit."""
    end, limit = first_end(endless.tokens, eos_ids), limit.reshape(-1)
    column = np.arange(endless.tokens.shape[1])
    mask = (column <= end[:, None]) & (column < limit[:, None])
    changes = {name: np.where(mask[..., None], getattr(endless, name), 0) for name in ("topk_ids", "topk_logp")}
    return endless.replace(
        tokens=np.where(mask, endless.tokens, pad_id),
        response_mask=mask,
        behavior_logp=np.where(mask, endless.behavior_logp, 0),
        truncated=end >= limit,
        **changes,
    )


def check_same(out: RolloutBatch, want: RolloutBatch, near: np.ndarray | bool = False, atol=TOLERANCE) -> None:
    """Equal rows; a row may differ from its first draw that was as good as a tie (`near`) on."""
    rows, length = want.tokens.shape
    differs = (out.tokens != want.tokens) | (out.response_mask != want.response_mask)
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), length)
    for row in np.flatnonzero(first < length):
        assert np.broadcast_to(near, differs.shape)[row, first[row]], f"row {row} differs at {first[row]}, not at a tie"
    assert (first < length).mean() < 0.2, "ties are rare"
    same = np.arange(length) < first[:, None]
    np.testing.assert_array_equal(out.truncated[first == length], want.truncated[first == length])
    np.testing.assert_array_equal(out.group, want.group)
    np.testing.assert_allclose(out.behavior_logp[same], want.behavior_logp[same], rtol=0, atol=atol)
    np.testing.assert_allclose(out.topk_logp[same], want.topk_logp[same], rtol=0, atol=atol)
    apart = -np.diff(want.topk_logp, axis=-1) > 2 * atol  # which of two equally likely tokens comes first is nobody's
    clear = np.pad(apart, [(0, 0), (0, 0), (1, 0)], constant_values=True) & np.pad(apart, [(0, 0), (0, 0), (0, 1)])
    clear &= (same & out.response_mask)[..., None]
    np.testing.assert_array_equal(out.topk_ids[clear], want.topk_ids[clear])


def near_ties(out: RolloutBatch, temperature: float, batch, group_size=G, seed=0) -> np.ndarray:
    """Where a draw was so near a boundary that rounding decides; every other draw is what float64 draws."""
    log_p = log_probabilities(out, temperature, temperature, batch)
    tokens, far = redraw(log_p, uniforms_of(out, group_size, seed))
    clear = out.response_mask & (far > NEAR)
    assert clear.sum() > 0.95 * out.response_mask.sum()
    np.testing.assert_array_equal(out.tokens[clear], tokens[clear])
    gap = np.abs(out.behavior_logp - at_tokens(log_p, out.tokens))[out.response_mask]
    assert gap.max() < TOLERANCE
    return far <= NEAR


@pytest.mark.parametrize("name", ["no end", "pad is eos", "pad is drawn", "ends at once"])
@pytest.mark.parametrize("slots", SLOTS)
def test_slots_do_not_change_a_row(slots, name):
    """Against the endless rollout without slots or limits, cut by hand; and every draw against float64."""
    eos_ids, pad_id = ends(1.0, name)
    out = rollout(1.0, eos_ids, pad_id, batch=limited(), slots=slots)
    want = cut(free(1.0), eos_ids, pad_id, LIMITS)
    check_same(out, want, near_ties(out, 1.0, limited()))
    lengths = want.response_mask.sum(axis=1)
    at_limit = lengths == LIMITS.reshape(-1)
    assert out.truncated[at_limit & (first_end(free(1.0).tokens, eos_ids) >= lengths)].all()
    if name in ("no end", "ends at once"):
        assert (want.truncated[lengths == 1] == (name == "no end")).all() and (lengths == 1).any()
    if name != "no end":
        assert 0 < want.truncated.sum() < ROWS and not (want.truncated & at_limit).all()


@pytest.mark.parametrize("slots", [1, 5])
def test_nothing_waits_where_every_row_has_its_only_token(slots):
    """By an end-of-sequence token, or by a limit of 1."""
    first = free(1.0).tokens[:, 0]
    ended = rollout(1.0, tuple(first), 7, batch=limited(), slots=slots)
    short = rollout(1.0, NEVER, 7, batch=limited(np.ones((N, G))), slots=slots)
    for out, truncated in ((ended, False), (short, True)):
        np.testing.assert_array_equal(out.tokens, np.where(np.arange(R) == 0, first[:, None], 7))
        np.testing.assert_array_equal(out.response_mask.sum(axis=1), np.ones(ROWS))
        assert (out.truncated == truncated).all()
        np.testing.assert_allclose(out.behavior_logp[:, 0], free(1.0).behavior_logp[:, 0], atol=TOLERANCE)
        assert not out.behavior_logp[:, 1:].any() and not out.topk_logp[:, 1:].any()


@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        (1.7, dict(slots=5)),  # tied, biased, capped
        (0.5, dict(slots=5)),  # its queries and keys normalised
        (1.0, dict(slots=4, shards=2)),
        (1.0, dict(slots=6, shards=2)),
        (1.0, dict(slots=4, shards=4)),  # one slot a shard
    ],
)
def test_other_models_and_shards(temperature, options):
    eos_ids, pad_id = ends(temperature, "pad is drawn")
    out = rollout(temperature, eos_ids, pad_id, batch=limited(), **options)
    near = near_ties(out, temperature, limited())
    check_same(out, cut(free(temperature), eos_ids, pad_id, LIMITS), near)


def test_groups_of_one():
    out = rollout(1.0, batch=limited(LIMITS[:, :1]), group_size=1, slots=3)
    alone = jax.tree.map(lambda x: x[::G], free(1.0))
    check_same(out, cut(alone, NEVER, 0, LIMITS[:, :1]), near_ties(out, 1.0, limited(LIMITS[:, :1]), 1))


@pytest.mark.parametrize("slots", [3, 5])
def test_a_row_does_not_depend_on_order_or_neighbours(slots):
    """Order decides who waits for whom, and nothing else; so do the limits of others."""
    order = [2, 0, 3, 1]
    whole = cut(free(1.0), NEVER, 0, LIMITS)
    permuted = rollout(1.0, batch=limited(order=order), slots=slots)
    moved = jax.tree.map(lambda x: x.reshape(N, G, *x.shape[1:])[np.array(order)].reshape(x.shape), whole)
    check_same(permuted, moved, near_ties(permuted, 1.0, limited(order=order)))

    batch = limited(np.where(np.arange(N)[:, None] == 0, LIMITS, R + 1 - LIMITS), lengths=np.array([7, 6, 2, 4]))
    changed = rollout(1.0, batch=batch, slots=slots)
    near = near_ties(changed, 1.0, batch)
    check_same(*(jax.tree.map(lambda x: x[:G], x) for x in (changed, whole)), near[:G])
    assert (changed.tokens[G:] != whole.tokens[G:]).any()


def test_greedy():
    endless = rollout(0.0, like=1.0)
    out = rollout(0.0, like=1.0, batch=limited(), slots=3)
    log_p = log_probabilities(out, 1.0)
    top = np.sort(log_p, axis=-1)
    check_same(out, cut(endless, NEVER, 0, LIMITS), top[..., -1] - top[..., -2] < NEAR)
    drawn, mask = at_tokens(log_p, out.tokens), out.response_mask
    np.testing.assert_allclose(drawn[mask], top[..., -1][mask], atol=NEAR)


def test_bfloat16():
    """Rounds more, and by other amounts in other batches: ties are a thousand times wider."""
    endless = rollout(1.0, dtype=jnp.bfloat16)
    out = rollout(1.0, batch=limited(), slots=5, dtype=jnp.bfloat16)
    _, far = redraw(log_probabilities(out, 1.0), uniforms_of(out, G, 0))
    check_same(out, cut(endless, NEVER, 0, LIMITS), far < 0.05, atol=0.05)
    gap = np.abs(np.exp(out.behavior_logp) - np.exp(at_tokens(log_probabilities(out, 1.0), out.tokens)))
    assert 1e-4 < gap[out.response_mask].mean() < 0.03


def test_rows_longer_than_the_first_block_of_the_cache():
    """Blocks of 128 and 74 columns. Some rows stay in the first, others pass its edge while their neighbours do not."""
    batch = prompts(np.array([120, 100, 1, 64]), width=120, limit=np.array([[83, 20], [4, 83], [60, 9], [83, 2]]))
    out = rollout(1.0, batch=batch, group_size=2, length=83, slots=3)
    np.testing.assert_array_equal(out.response_mask.sum(axis=1), batch.limit.reshape(-1))
    near_ties(out, 1.0, batch, 2)


def test_prompts_longer_than_the_first_block_of_the_cache():
    batch = prompts(np.array([190, 129, 2, 128]), width=190, limit=np.array([[6, 1], [3, 9], [9, 2], [5, 5]]))
    out = rollout(1.0, batch=batch, group_size=2, length=9, slots=3)
    np.testing.assert_array_equal(out.response_mask.sum(axis=1), batch.limit.reshape(-1))
    near_ties(out, 1.0, batch, 2)


# What the loop does, read from its jaxpr.


def traced(slots: int, **options):
    """(jaxpr with constants, how results are nested), of a rollout (params, prompts, eos_ids)."""
    config, params = policy("llama")

    def run(params, batch, eos_ids):
        return Rollout(
            config, group_size=G, max_new_tokens=R, temperature=1.0, eos_ids=tuple(eos_ids), pad_id=0, slots=slots,
            **options,
        )(params, batch, jax.random.key(0))  # fmt: skip

    return jax.make_jaxpr(run, return_shape=True)(params, limited(), jnp.full(ROWS, -1, jnp.int32))


def products(jaxpr: Jaxpr, looping: bool = False):
    """(inside a while loop, output shape) of every matrix product."""
    for eqn in jaxpr.eqns:
        inside = looping or eqn.primitive.name == "while"
        if eqn.primitive.name == "dot_general":
            yield looping, eqn.outvars[0].aval.shape
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(sub, inside)


def test_a_group_shares_one_prefill():
    """The prompt pass, which scans its layers, has N rows, not N * G, and a step has a row a slot."""
    found = list(products(traced(slots=5)[0].jaxpr))
    prefill, step = ([shape for looping, shape in found if looping == which] for which in (False, True))
    layers = policy("llama")[0].num_layers
    assert {shape[0] for shape in prefill} == {N} and {shape[0] for shape in step} == {5}
    assert len(prefill) == 9 + 1 and len(step) == layers * 9 + 1
    assert sum(P in shape for shape in prefill) == 9


def evaluate(jaxpr: Jaxpr, consts, args):
    """(results, turns of the innermost while loops): the jaxpr's equations, with a counter beside every loop but one
    whose condition computes nothing, which stands for an if."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    turns = jnp.int32(0)

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        if eqn.primitive.name == "while":
            cut_at = np.cumsum([eqn.params["cond_nconsts"], eqn.params["body_nconsts"]])
            cond_consts, body_consts, init = inputs[: cut_at[0]], inputs[cut_at[0] : cut_at[1]], inputs[cut_at[1] :]
            condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
            innermost = bool(condition.jaxpr.eqns) and all(inner.primitive.name != "while" for inner in body.jaxpr.eqns)

            def proceed(carry, condition=condition, cond_consts=cond_consts):
                return evaluate(condition.jaxpr, condition.consts, [*cond_consts, *carry[1]])[0][0]

            def turn(carry, body=body, body_consts=body_consts, innermost=innermost):
                results, inside = evaluate(body.jaxpr, body.consts, [*body_consts, *carry[1]])
                return carry[0] + (1 if innermost else inside), results

            turns, results = jax.lax.while_loop(proceed, turn, (turns, init))
        elif eqn.primitive.name == "custom_vjp_call":
            forward = eqn.params["call_jaxpr"]
            results = evaluate(forward.jaxpr, forward.consts, inputs)[0]
        else:
            results = eqn.primitive.bind(*inputs, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars], turns


def makespan(work: list[int], slots: int) -> int:
    """Steps until all is done, each row starting in the slot that is free first."""
    free_at = [0] * slots
    for steps in work:
        heapq.heapreplace(free_at, free_at[0] + steps)
    return max(free_at)


@pytest.mark.parametrize(("slots", "shards"), [(1, 1), (3, 1), (4, 2)])
def test_a_freed_slot_is_used_at_once(slots, shards):
    """Decoding steps are those of list scheduling, shard by shard; rows of one token take none."""
    closed, shape = traced(slots, shards=shards)

    @lambda f: jax.jit(f, compiler_options=COMPILER_OPTIONS)
    def run(*args):
        return evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))

    for name in ("no end", "ends at once"):
        eos_ids, _ = ends(1.0, name)
        padded = np.full(ROWS, -1, np.int32)
        padded[:2] = eos_ids
        leaves, steps = run(policy("llama")[1], limited(), padded)
        out = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        work = np.asarray(out.response_mask).sum(axis=1) - 1
        assert (work == 0).any() and len(set(work.tolist())) > 3
        parts = [[int(steps) for steps in part if steps] for part in work.reshape(shards, -1)]
        assert steps == max(makespan(part, slots // shards) for part in parts)
        by_batches = sum(part.max() for part in np.array_split(work, ROWS // slots))
        assert slots == 1 or steps < by_batches


def test_slots_beyond_the_rows_are_left_out():
    out = rollout(1.0, batch=limited(), slots=ROWS + 3)
    check_same(out, cut(free(1.0), NEVER, 0, LIMITS), near_ties(out, 1.0, limited()))
