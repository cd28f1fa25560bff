"""The table of answers through the real verifiers, in worker processes; what is hostile is over within the limits."""

import random
import time
from fractions import Fraction

import pytest

from dppo_jax.data.examples import Example, Task
from dppo_jax.rewards import numbers
from dppo_jax.rewards.answers import AnswerVerifier, answer_task
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import by_library
from tests.rewards import answer_pairs as table


@pytest.fixture(scope="module")
def maths():
    with Scorer(answer_task("maths", (), "math_verify"), workers=2, time_limit_s=60) as scorer:
        yield scorer


def scores(scorer, pairs):
    rewards, counts = scorer.submit([reply for reply, _ in pairs], [Example("", label) for _, label in pairs]).result()
    return rewards.tolist(), counts


def pairs(of):
    return [(f"\\boxed{{{other}}}", label) for label, others in of.items() for other in others]


def test_there_are_enough_of_them():
    assert len(pairs(table.MATHS_EQUAL)) + len(pairs(table.MATHS_UNEQUAL)) >= 200
    assert len(table.MALFORMED) + len(table.HOSTILE) + len(table.NUMBERS) + len(table.TEXTS) >= 120


@pytest.mark.parametrize(("of", "score"), [(table.MATHS_EQUAL, 1), (table.MATHS_UNEQUAL, 0)], ids=["equal", "unequal"])
def test_mathematics(maths, of, score):
    asked = pairs(of)
    got, counts = scores(maths, asked)
    assert [pair for pair, reward in zip(asked, got, strict=True) if reward != score] == []
    assert counts == {"killed": 0, "failed": 0, "refused": 0}


def test_known_limits_of_the_library(maths):
    got, _ = scores(maths, [(f"\\boxed{{{reply}}}", label) for reply, label, _ in table.LIMITS])
    assert got == [score for *_, score in table.LIMITS]


def test_what_is_no_answer_scores_0_and_ends_nothing(maths):
    got, counts = scores(maths, [(reply, label) for reply in table.MALFORMED for label in ("7", "x+1")])
    assert not any(got) and counts == {"killed": 0, "failed": 0, "refused": 0}


@pytest.mark.parametrize(("verifier", "cases"), [("last_number", table.NUMBERS), ("exact_match", table.TEXTS)])
def test_numbers_and_texts(verifier, cases):
    """In workers, though these verifiers need none."""
    task = Task("test", (), AnswerVerifier(verifier), isolated=True)
    with Scorer(task, workers=2, time_limit_s=20) as scorer:
        got, counts = scores(scorer, [(reply, label) for reply, label, _ in cases])
    assert [case for case, reward in zip(cases, got, strict=True) if reward != case[2]] == []
    assert sum(counts.values()) == 0


@pytest.mark.slow
def test_hostile_replies_end_within_the_limits_and_the_workers_go_on():
    """In 512 MiB and 3 seconds each; right answers between and after them still score."""
    asked = [pair for reply in table.HOSTILE for pair in ((reply, "7"), ("\\boxed{14/2}", "7"))]
    task = answer_task("maths", (), "math_verify")
    with Scorer(task, workers=2, time_limit_s=3, memory_limit_mib=512) as scorer:
        scores(scorer, [("7", "7")] * 8)  # the workers are there
        began = time.monotonic()
        got, counts = scores(scorer, asked)
        seconds = time.monotonic() - began
        after, _ = scores(scorer, [("7", "7")] * 40)
    assert {reply for reply, reward in zip(table.HOSTILE, got[::2], strict=True) if reward} <= set(table.SEVENS)
    assert sum(got[1::2]) + counts["killed"] >= len(table.HOSTILE) and sum(got[1::2]) > 0.8 * len(table.HOSTILE)
    assert counts["failed"] == counts["refused"] == 0 < counts["killed"] < len(table.HOSTILE)
    assert after == [1] * 40
    assert seconds < 2 * 3 * len(asked)


def number(rng):
    """A number as an answer writes it, and its value."""
    a, b = rng.choice([0, 1, 7, 50, rng.randint(0, 9999), rng.randint(0, 10**7)]), rng.choice([1, 2, 4, 8, 100, 999])
    text, value = rng.choice(
        [
            (f"{a}", Fraction(a)),
            (f"{a:,}", Fraction(a)),
            (f"{a}.{b}", Fraction(f"{a}.{b}")),
            (f"\\frac{{{a}}}{{{b}}}", Fraction(a, b)),
            (f"\\dfrac{{{a}}}{{{b}}}", Fraction(a, b)),
            (f"{a}/{b}", Fraction(a, b)),
        ]
    )
    return rng.choice([(text, value), (f"-{text}", -value)])


def test_plain_numbers_are_decided_as_the_library_does():
    """Where `numbers.compare` decides, it says what exact fractions say, and what math-verify says."""
    rng, decided = random.Random(0), {0.0: 0, 1.0: 0}
    forms = ["%s", "$%s$", "So \\boxed{%s}.", "The answer is %s", "We get $%s$.", "the answer is: $%s$", "**%s**"]
    for _ in range(400):
        (label, expected), (said, value) = number(rng), number(rng)
        if rng.random() < 0.5:
            doubled = f"\\frac{{{2 * expected.numerator}}}{{{2 * expected.denominator}}}"
            said, value = rng.choice([label, doubled]), expected
        assert numbers.plain_value(label) == expected and numbers.plain_value(said) == value
        reply = rng.choice(forms) % said
        fast = numbers.compare(reply, label)
        if fast is not None:
            decided[fast] += 1
            assert fast == (value == expected) == by_library(reply, label), (reply, label)
    assert min(decided.values()) > 80


@pytest.mark.parametrize("text", ["7x", "7%", "1,23", "1 2", "7\\pi", "1/0", "1/2/3", "", "-", ".", "\u0667", "1e5"])
def test_what_is_no_plain_number(text):
    assert numbers.plain_value(text) is None and numbers.compare(text, "7") is None
