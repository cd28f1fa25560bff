"""Conversations: turns of the policy and texts between them, in one row, whenever the texts come."""

import functools

import jax
import numpy as np
import pytest

from dppo_jax.models.decoder import forward, head_weight
from dppo_jax.rollout import Answers, Conversation, Finished, Rollout
from dppo_jax.train_step import assemble
from dppo_jax.types import PromptBatch
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY, random_params

N, G, P, R, K, TURNS, TURN_TOKENS, END = 4, 2, 6, 40, 3, 4, 9, 5
KEY = jax.random.key(3)
PARAMS = random_params()
SETTINGS = dict(group_size=G, max_new_tokens=R, temperature=1.0, eos_ids=(END,), pad_id=0, topk=K, record_entropy=True)
# (batches ahead, options): caches, scanned layers, shards, slots for all, pages for one row alone.
CASES = {
    "blocks": (0, dict(slots=4)),
    "few pages": (1, dict(slots=6, paged=True, pages=2, shards=2)),
    "scanned": (1, dict(unrolled=False, shards=2)),
}
cases = pytest.mark.parametrize("case", CASES)


def batch(number: int) -> PromptBatch:
    """Prompts of a step; one row in four has a limit of its own that is below R."""
    rng = np.random.default_rng(number)
    mask = np.arange(P) >= P - rng.integers(1, P + 1, N)[:, None]
    tokens = np.where(mask, rng.integers(2, TINY.vocab_size, (N, P)), 0).astype(np.int32)
    limit = np.where(rng.random((N, G)) < 0.25, rng.integers(3, 20, (N, G)), R).astype(np.int32)
    return PromptBatch(tokens=tokens, mask=mask, group=np.arange(N, dtype=np.int32), limit=limit)


def moved(step: int):
    return jax.tree.map(lambda x: x * (1 + 0.02 * step), PARAMS)


@functools.cache
def programs(case: str):
    ahead, options = CASES[case]
    talks = Conversation(Rollout(TINY, **SETTINGS, **options), N, ahead, ahead + 1, turn_tokens=TURN_TOKENS)
    names = ("join", "advance", "extend", "part")
    return talks, {n: jax.jit(getattr(talks, n), compiler_options=COMPILER_OPTIONS) for n in names}


def said(tokens: list[int], turns: int) -> tuple[list[int], bool]:
    """A small environment: what it says to a row of these tokens, and whether that is all."""
    text = [2 + (tokens[-1] + turns + i) % 14 for i in range(turns % 3 + (len(tokens) % 2))]
    return text, turns >= TURNS or sum(tokens) % 11 == 0


def answers(flight, rows: list[tuple[int, int]]) -> Answers:
    """To these rows, by place and member."""
    shape = flight.ended.shape
    text, length = np.zeros((*shape, R), np.int32), np.zeros(shape, np.int32)
    to, over, score = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, np.float32)
    for at in rows:
        words, over[at] = said(flight.out.token[at][: flight.tokens_drawn[at]].tolist(), int(flight.told.turns[at]))
        text[at][: len(words)], length[at], to[at] = words, len(words), True
        score[at] = flight.told.turns[at]
    return Answers(to, text, length, over, np.zeros(shape, bool), score, np.zeros(shape, np.int32))


@functools.cache
def talked(case: str, order: int, moves: bool = False, steps: int = 2) -> list[Finished]:
    """What every step gives; `order` is the seed by which environments take their time, 0: none does."""
    talks, run = programs(case)
    rng = np.random.default_rng(order)
    flight, joined, found = talks.empty(P), 0, []
    for step in range(steps):
        for number in range(joined, min(step + talks.ahead, steps - 1) + 1):
            flight, joined = run["join"](flight, batch(number), number), number + 1
        while True:
            host = jax.tree.map(np.asarray, flight)
            shards = talks.rollout.shards
            there = np.arange(len(host.batch) // shards) < host.count[:, None]
            over = there & host.over.all(axis=1).reshape(shards, -1)
            if (over.sum(axis=1) >= N // shards).all():
                break
            waits = [tuple(at) for at in np.argwhere(host.ended & ~host.over & there.reshape(-1, 1)).tolist()]
            ready = [at for at in waits if not order or rng.random() < 0.4]
            open_rows = (there.reshape(-1, 1) & ~host.ended).any()
            if not ready and not open_rows:
                ready = waits
            rng.shuffle(ready)
            if ready:
                flight = run["extend"](flight, answers(host, ready))
            if ready and order == 0 or not open_rows:
                continue
            flight, _ = run["advance"](moved(step) if moves else PARAMS, flight, KEY, step)
        # What was asked and not yet answered is answered before the step ends.
        host = jax.tree.map(np.asarray, flight)
        waits = np.argwhere(host.ended & ~host.over & there.reshape(-1, 1)).tolist()
        flight = run["extend"](flight, answers(host, [tuple(at) for at in waits]))
        flight, finished = run["part"](flight, step)
        found.append(jax.tree.map(np.asarray, finished))
    return found


def rows(found: list[Finished]):
    """Of every row that was finished: (batch, group, member) to its fields."""
    result = {}
    for finished in found:
        for row in range(N * G):
            out = jax.tree.map(lambda x, row=row: x[row], finished.rollout)
            key = (*finished.origin[row // G].tolist(), row % G)
            result[key] = out, jax.tree.map(lambda x, row=row: x[row], finished.told)
    return result


@cases
def test_every_turn_is_drawn_and_every_text_put_between(case):
    """The tokens of every row, cut anew from its mask: turns that end as they may, and what the environment said."""
    found = rows(talked(case, 0))
    assert len(found) == 2 * N * G
    kinds = set()
    for (number, group, member), (out, told) in found.items():
        limit = int(batch(number).limit[group, member])
        tokens, own = out.tokens[out.response_mask].tolist(), out.own[out.response_mask]
        assert not out.own[~out.response_mask].any() and len(tokens) <= limit
        at, turns = 0, 0
        while at < len(tokens):
            turns, begins = turns + 1, at
            while True:
                assert own[at]  # of the turn, its end too
                at += 1
                if tokens[at - 1] == END or at - begins == TURN_TOKENS or at == limit:
                    break
            kinds.add("end" if tokens[at - 1] == END else "row" if at == limit else "turn")
            text, over = said(tokens[:at], turns)
            if over or at + len(text) >= limit:
                assert at == len(tokens) and bool(out.truncated) == (not over)
                kinds.add("over" if over else "truncated")
            else:
                assert tokens[at : at + len(text)] == text and not own[at : at + len(text)].any()
                at += len(text)
        assert told.turns == turns == told.score
        assert not out.behavior_logp[~out.own].any() and (out.behavior_logp[out.own] < 0).all()
    assert {"end", "turn", "over", "truncated"} <= kinds


@functools.cache
def teacher_forced():
    def logp(params, tokens, mask):
        return jax.nn.log_softmax(forward(TINY, params, tokens, mask)[:, P - 1 : -1] @ head_weight(params).T)

    return jax.jit(logp, compiler_options=COMPILER_OPTIONS)


@pytest.mark.parametrize("moves", [False, True])
@cases
def test_a_token_has_the_teacher_forced_log_probability_of_all_before_it(case, moves):
    most = 0
    for step, finished in enumerate(talked(case, 0, moves)):
        out = finished.rollout
        tokens = np.concatenate([np.repeat(finished.prompts.tokens, G, axis=0), out.tokens], axis=1)
        attended = np.concatenate([np.repeat(finished.prompts.mask, G, axis=0), out.response_mask], axis=1)
        params = [moved(s) if moves else PARAMS for s in range(step + 1)]
        by_step = np.stack([np.asarray(teacher_forced()(p, tokens, attended)) for p in params])
        log_p = np.take_along_axis(by_step, (step - finished.age)[None, :, :, None], axis=0)[0]
        want = np.take_along_axis(log_p, out.tokens[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(out.behavior_logp[out.own], want[out.own], atol=1e-4)
        top = np.take_along_axis(log_p, out.topk_ids, axis=-1)
        np.testing.assert_allclose(out.topk_logp[out.own], top[out.own], atol=1e-4)
        entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
        np.testing.assert_allclose(out.behavior_entropy, np.where(out.own, entropy, 0), atol=1e-4)
        most = max(most, int(finished.told.turns.max()))
    assert most == TURNS


@pytest.mark.parametrize("order", [1, 2])
@cases
def test_what_is_drawn_does_not_depend_on_which_environment_is_first(case, order):
    one, two = rows(talked(case, 0)), rows(talked(case, order))
    assert one.keys() == two.keys()
    for key in one:
        for name in ("tokens", "own", "response_mask", "truncated"):
            mask = one[key][0].response_mask
            a, b = (getattr(found[key][0], name) for found in (one, two))
            np.testing.assert_array_equal(a[mask] if name == "tokens" else a, b[mask] if name == "tokens" else b)
        np.testing.assert_allclose(one[key][0].behavior_logp, two[key][0].behavior_logp, atol=2e-5)
        assert one[key][1] == two[key][1]


@cases
def test_it_is_compiled_once(case):
    talked(case, 0)
    _, run = programs(case)
    assert {name: program._cache_size() for name, program in run.items()} == dict.fromkeys(run, 1)


def test_the_loss_sees_the_policys_own_tokens_alone():
    finished = talked("blocks", 0)[0]
    train = assemble(finished.prompts, finished.rollout)
    np.testing.assert_array_equal(train.mask, finished.rollout.response_mask & finished.rollout.own)
    assert train.mask.sum() < finished.rollout.response_mask.sum()
