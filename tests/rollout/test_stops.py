"""Stop strings: a response ends where its decoded text first holds one, by whatever cache, slots and steps."""

import dataclasses
import functools
import json
import random
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.rollout import InFlight, Rollout, Stops, make_stops
from dppo_jax.types import PromptBatch, RolloutBatch
from experiments.run import checks, cli
from tests.helpers.fixtures import COMPILER_OPTIONS, TINY, hurried, random_params, run, small_config, tiny
from tests.helpers.places import ROOT


def held(tokens: Sequence[int], later: list[bytes], first: list[bytes], texts: Sequence[str]) -> list[bool]:
    """By its length, whether the text of the first tokens holds a stop string: decoded anew and searched, token by
    token. The first token is the first that adds anything to others."""
    found, text, begun = [], b"", False
    for token in tokens:
        text += later[token] if begun else first[token]
        begun |= bool(later[token])
        found.append(any(stop in text.decode(errors="replace") for stop in texts))
    return found


def read(stops: Stops, tokens: Sequence[int]) -> list[bool]:
    """The same by the automaton."""
    state, found = 0, []
    for token in tokens:
        state = int(stops.next_state[state, stops.token_class[token]])
        found.append(state == len(stops.next_state) - 1)
    return found


@pytest.mark.parametrize("alphabet", ["ab", "a b", "aé€😀", "\u00e9\u00e8\u00e7"])
def test_the_automaton_finds_what_a_search_of_the_decoded_text_finds(alphabet):
    """Tokens cut texts anywhere, characters too; strings overlap themselves and one another."""
    draw, at_boundaries = random.Random(alphabet), 0

    def text(least: int, most: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(least, most)))

    for _ in range(60):
        later = [b"", *(bytes([byte]) for byte in sorted({*alphabet.encode()}))]
        for _ in range(12):
            whole = text(1, 4).encode()
            start = draw.randrange(len(whole))
            later.append(whole[start : draw.randint(start + 1, len(whole))])
        first = [part.removeprefix(b" ") for part in later]
        texts = tuple(sorted({text(1, 5) for _ in range(draw.randint(1, 4))}))
        stops = make_stops(texts, later, first, vocab_size=len(later) + 2)
        for _ in range(20):
            tokens = draw.choices(range(len(later)), k=draw.randint(1, 25))
            want = held(tokens, later, first, texts)
            assert read(stops, tokens) == want, (texts, [later[token] for token in tokens])
            if True in want:
                last = later[tokens[want.index(True)]]
                at_boundaries += not any(stop.encode() in last for stop in texts)
        assert not read(stops, [len(later), len(later) + 1])[-1]  # ids without a token add nothing
        assert len(np.unique(stops.next_state, axis=1).T) == stops.next_state.shape[1]  # equal columns share a class
    assert at_boundaries > 20


def test_strings_that_overlap():
    later = [b"a", b"b", b"aa", b"ab", b"xaab", b"\xe2\x82", b"\xac", b"\xe2"]
    for texts, tokens, at in (
        (("aab",), (0, 0, 0, 1), 3),  # in aaab
        (("aab",), (2, 3), 1),
        (("aab",), (0, 3), 1),
        (("aab",), (0, 1, 3), None),
        (("xaabx", "aa"), (4,), 0),  # inside another one
        (("€",), (5, 5, 6), 2),
        (("€",), (7, 5, 6), 2),
        (("€",), (5, 0, 6), None),
    ):
        found = read(make_stops(texts, later, vocab_size=8), tokens)
        assert found == [at is not None and step >= at for step in range(len(tokens))], (texts, tokens)


def test_a_large_vocabulary_makes_a_small_table():
    """Random words, and every part of the stop strings."""
    draw = random.Random(0)
    texts = ("</answer>", "\n\nQuestion:", "<|im_end|>", "Human:", "###", "\n\n\n", "Q:", "</s>", "final answer", "```")
    parts = {text[at:to] for text in texts for at in range(len(text)) for to in range(at + 1, len(text) + 1)}
    letters = "abcdefghijklmnopqrstuvwxyz <>/\n"
    words = [*sorted(parts), *("".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(150_000))]
    number, later = {part: i for i, part in enumerate(sorted(parts))}, [word.encode() for word in words]
    first = [part.removeprefix(b" ") for part in later]
    stops = make_stops(texts, later, first, vocab_size=151_936)
    assert stops.next_state.size < 100_000 and stops.next_state.dtype == stops.token_class.dtype == np.int16
    for _ in range(200):
        text = draw.choice(texts)
        cuts = sorted({0, len(text), *draw.choices(range(len(text)), k=2)})
        pieces = [number[text[at:to]] for at, to in zip(cuts, cuts[1:], strict=False)]
        missing = draw.randrange(len(pieces) + 1)  # one of them, or none
        tokens = [draw.randrange(len(words)) for _ in range(4)]
        tokens += [piece for i, piece in enumerate(pieces) if i != missing] + [draw.randrange(len(words))]
        want = held(tokens, later, first, texts)
        assert read(stops, tokens) == want and (want[-1] or missing < len(pieces))


def test_all_rows_at_once():
    later = [b"a", b"b", b"aa", b"ab"]
    stops = make_stops(("aab", "bb"), later, vocab_size=4)
    tokens = np.random.default_rng(0).integers(0, 4, (50, 9))
    states = jax.jit(stops.after_each)(tokens)
    want = [held(row, later, later, ("aab", "bb")) for row in tokens.tolist()]
    np.testing.assert_array_equal(stops.found(states), want)


# --- rollouts ---

END = 7  # seldom drawn
LATER = [
    b"", b"\xc3", b"a", b"b", b"ab", b"ba", b" ", b"x", b"a ", "é".encode(), b"aab", b"ca", b" c", b"c", b"bb",
    b"\xa9",
]  # fmt: skip
assert len(LATER) == TINY.vocab_size
FIRST = [part.removeprefix(b" ") for part in LATER]
N, P, G, R = 4, 150, 2, 300  # rows of up to four pages: where those are few, some must make room
PARAMS = random_params()


def prompts() -> PromptBatch:
    tokens = np.random.default_rng(0).integers(2, TINY.vocab_size, (N, P)).astype(np.int32)
    mask = np.arange(P) >= P - np.array([125, 120, 150, 127])[:, None]
    limit = np.array([[290, 12], [295, 280], [9, 250], [270, 300]], np.int32)
    return PromptBatch(tokens, mask, np.arange(N, dtype=np.int32), limit)


def drawn(stops: Stops | None, **options) -> tuple[RolloutBatch, float]:
    """The batch, and how many rows made room."""
    settings = dict(group_size=G, max_new_tokens=R, pad_id=0, topk=3, temperature=1.0, eos_ids=(END,), unrolled=False)
    rollout = Rollout(TINY, **settings | options, stops=stops)
    jitted = jax.jit(rollout.measured, compiler_options=COMPILER_OPTIONS)
    batch, work = jax.tree.map(np.asarray, jitted(PARAMS, prompts(), jax.random.key(1)))
    return batch, float(work.put_back)


@functools.cache
def free() -> RolloutBatch:
    """Without stop strings."""
    return drawn(None)[0]


def first_hit(tokens: Sequence[int], texts: Sequence[str]) -> int | None:
    """The number of the token that completes a stop string. END adds nothing."""
    spelled = [[b"" if i == END else part for i, part in enumerate(parts)] for parts in (LATER, FIRST)]
    found = held(tokens, *spelled, texts)
    return found.index(True) if True in found else None


@functools.cache
def texts() -> tuple[str, ...]:
    """Stop strings that the rows hold, early and late."""
    chosen = []
    for row, at, count in ((0, 4, 20), (2, 135, 20), (3, 133, 7), (6, 180, 20)):
        part = b"".join(LATER[i] for i in free().tokens[row, at : at + count]).decode(errors="replace")
        chosen.append(max(part.split("\ufffd"), key=len))
    return tuple(dict.fromkeys(chosen))


def check(found: RolloutBatch) -> None:
    """The free rows, cut behind the first stop string."""
    want, kinds = free(), []
    for row in range(N * G):
        length = int(want.response_mask[row].sum())
        hit = first_hit(want.tokens[row, :length].tolist(), texts())
        cut = length if hit is None else hit + 1
        kinds.append("stop" if hit is not None else "limit" if want.truncated[row] else "end")
        np.testing.assert_array_equal(found.response_mask[row], np.arange(R) < cut)
        assert found.truncated[row] == (kinds[-1] == "limit")
        np.testing.assert_array_equal(found.tokens[row, :cut], want.tokens[row, :cut])
        np.testing.assert_array_equal(found.topk_ids[row, :cut], want.topk_ids[row, :cut])
        for field in ("behavior_logp", "topk_logp"):
            one, two = (getattr(batch, field)[row, :cut] for batch in (found, want))
            np.testing.assert_allclose(one, two, rtol=0, atol=5e-5)
    assert kinds.count("stop") >= 3 and len({*kinds}) >= 2, kinds


@pytest.mark.parametrize(
    "options",
    [
        dict(slots=3, unrolled=True),
        dict(slots=4, shards=2, paged=True),
        dict(slots=4, paged=True, pages=4),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(slots=3, paged=True, pages=4, unrolled=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_end_where_their_text_holds_a_stop_string(options):
    stops = make_stops(texts(), LATER, FIRST, vocab_size=TINY.vocab_size, silent=(END,))
    batch, put_back = drawn(stops, **options)
    check(batch)
    assert (put_back > 0) == ("pages" in options)


def test_a_stop_string_that_no_row_holds_changes_nothing():
    batch, _ = drawn(make_stops(("never",), LATER, FIRST, vocab_size=TINY.vocab_size))
    for one, two in zip(jax.tree.leaves(batch), jax.tree.leaves(free()), strict=True):
        np.testing.assert_array_equal(one, two)


# --- in flight ---

STEPS, WIDTH, LONGEST = 5, 6, 40
KEY = jax.random.key(3)
FLIGHT_TEXTS = ("ab ab", "caaab", "bbb", "éab", "xcax", "aba c")


def batch(number: int) -> PromptBatch:
    rng = np.random.default_rng(number)
    mask = np.arange(WIDTH) >= WIDTH - rng.integers(1, WIDTH + 1, N)[:, None]
    tokens = np.where(mask, rng.integers(2, TINY.vocab_size, (N, WIDTH)), 0).astype(np.int32)
    limit = np.clip(rng.lognormal(np.log(16), 1, (N, G)), 1, LONGEST).astype(np.int32)
    return PromptBatch(tokens=tokens, mask=mask, group=np.arange(N, dtype=np.int32), limit=limit)


def test_rows_in_flight_end_where_their_text_holds_a_stop_string():
    """Under parameters that move, by the rows' own tokens; some strings are drawn over two steps. Under parameters that
    stay, as at once."""
    stops = make_stops(FLIGHT_TEXTS, LATER, FIRST, vocab_size=TINY.vocab_size, silent=(END,))
    rollout = Rollout(
        TINY, group_size=G, max_new_tokens=LONGEST, temperature=1.0, eos_ids=(END,), pad_id=0, slots=4, stops=stops
    )
    in_flight = InFlight(rollout, N, 2, 2)
    compiled = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    draw, join, at_once = compiled(in_flight), compiled(in_flight.join), compiled(rollout)
    kinds, over_steps = [], 0
    for moves in (True, False):
        flight, joined = in_flight.empty(WIDTH), 0
        plain = jax.tree.structure(InFlight(dataclasses.replace(rollout, stops=None), N, 2, 2).empty(WIDTH))
        assert jax.tree.structure(flight) == plain  # checkpoints have the form that they have without
        for step in range(STEPS):
            for number in range(joined, min(step + 2, STEPS - 1) + 1):
                flight, joined = join(flight, batch(number), number), number + 1
            params = jax.tree.map(functools.partial(np.multiply, 1 + 0.02 * step * moves), PARAMS)
            flight, finished = draw(params, flight, KEY, step)
            assert jax.tree.structure(flight) == plain
            finished = jax.tree.map(np.asarray, finished)
            out, length = finished.rollout, finished.rollout.response_mask.sum(axis=1)
            for row in range(N * G):
                tokens = out.tokens[row, : length[row]].tolist()
                hit, limit = first_hit(tokens, FLIGHT_TEXTS), finished.prompts.limit.reshape(-1)[row]
                assert hit is None or hit == len(tokens) - 1
                kind = "stop" if hit is not None else "end" if tokens[-1] == END else "limit"
                assert kind != "limit" or len(tokens) == limit
                assert out.truncated[row] == (kind == "limit")
                kinds.append(kind)
                if kind == "stop":
                    age = finished.age[row, max(0, hit - 1) : hit + 1]
                    over_steps += age[0] != age[-1] and first_hit(tokens[hit:], FLIGHT_TEXTS) is None
            if not moves:
                for place, (number, group) in enumerate(finished.origin):
                    want = jax.tree.map(np.asarray, at_once(PARAMS, batch(number), jax.random.fold_in(KEY, number)))
                    rows, others = (slice(at * G, at * G + G) for at in (place, group))
                    mask = want.response_mask[others]
                    np.testing.assert_array_equal(out.response_mask[rows], mask)
                    np.testing.assert_array_equal(out.tokens[rows][mask], want.tokens[others][mask])
    assert {*kinds} == {"stop", "end", "limit"} and kinds.count("stop") > 10 and over_steps > 0, (kinds, over_steps)


# --- runs ---


@pytest.fixture
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


def test_a_run_with_stop_strings(tmp_path, monkeypatch, hurry):
    """Two steps of the quickstart, made small: a reply holds a digit at its end or nowhere."""
    monkeypatch.chdir(ROOT)
    digits = tuple("0123456789")
    changes = {
        "steps": 2, "rollout.prompts": 4, "rollout.group_size": 2, "rollout.max_new_tokens": 6, "train.minibatches": 2,
        "eval.every": 1, "eval.prompts": 8, "eval.sets.held_out.size": 8, "data.size": 16, "log.samples": 1,
        "compile_cache": "", "rollout.stop": digits,
    }  # fmt: skip
    config = cli.load_config("configs/quickstart.py", [f"--config.{key}={value}" for key, value in changes.items()])
    assert config.rollout.stop == digits
    run(config, tmp_path / "run")
    replies = []
    for step in range(2):
        lines = (tmp_path / "run" / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        replies += [json.loads(line)["reply"] for line in lines]
    assert sum(reply[-1:] in digits for reply in replies if reply) > 4
    assert not any(character in digits for reply in replies for character in reply[:-1])


BAD = {
    "rollout.stop holds an empty text": ("a", ""),
    "rollout.stop holds 'a\ufffd', whose U+FFFD": ("a\ufffd",),
    "rollout.stop has 65 texts, more than 64": tuple(map(str, range(65))),
    "rollout.stop: its texts have 1026 bytes of UTF-8 together, more than 1024": ("é" * 513,),
    "rollout.stop names 'a' twice": ("a", "a"),
    "rollout.stop must be a tuple of names, but holds 7": (7,),
    "rollout.stop: a lone surrogate": ("\ud800",),
}


@pytest.mark.parametrize(("sentence", "value"), BAD.items(), ids=BAD)
def test_stop_strings_that_cannot_be(sentence, value, tmp_path_factory):
    with pytest.raises(UserError) as error:
        checks.check(small_config(tiny(tmp_path_factory), rollout__stop=value))
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)
