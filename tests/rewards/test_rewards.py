"""Verifiers on real replies, and the scorer with real processes, one of which really hangs."""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import AnswerVerifier, answer_task
from dppo_jax.rewards.labels import answer_faults
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import as_number, exact_match, last_number
from tests.helpers import bad_verifiers
from tests.helpers.places import ROOT

MINUS, NARROW_SPACE = "\u2212", "\u202f"


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("The answer is 42.", "42", 1),
        ("42", "42", 1),
        ("6 * 7 = 42", "42", 1),
        ("42 is 6 * 7", "42", 0),
        ("It is 42, I think.", "42", 1),
        ("042", "42", 1),
        ("42.0", "42", 1),
        ("42.01", "42", 0),
        ("421", "42", 0),
        ("-42", "42", 0),
        (f"{MINUS}42", "-42", 1),
        ("-42", f"{MINUS}42", 1),
        ("x=-42", "-42", 1),
        ("-$42", "-42", 1),
        ("50-8", "8", 1),
        ("(50)-8", "-8", 0),
        ("+42", "42", 1),
        ("1,234,567", "1234567", 1),
        ("1{,}234", "1234", 1),
        (f"1{NARROW_SPACE}234", "1,234", 1),
        ("$1,234.50", "1234.5", 1),
        ("1,23", "23", 1),
        ("0.1", ".1", 1),
        ("0.3", "0.30000000000000004", 0),
        ("9007199254740993", "9007199254740992", 0),  # equal as float64
        ("6.02e3", "6020", 1),
        ("\\boxed{42}", "42", 1),
        ("3/4", "4", 1),
        ("no number", "0", 0),
        ("", "0", 0),
        ("...", "0", 0),
        ("7" * 6000, "7", 0),  # beyond the digits that int() takes
        ("7" * 6000, "7" * 6000, 1),
    ],
)
def test_last_number(reply, answer, score):
    assert last_number(reply, answer) == score


def test_last_number_needs_a_number_to_compare_with():
    with pytest.raises(ValueError, match="'five' is not a number"):
        last_number("5", "five")
    assert as_number("5 apples") is None
    assert "is not one number" in answer_faults("last_number", ["5 apples"])[0]
    assert "is empty" in answer_faults("exact_match", [" "])[0]
    assert answer_faults("last_number", ["$1,234$"])[0] is None


def test_exact_match():
    assert exact_match(" Paris\n", "Paris") == 1
    assert exact_match("paris", "Paris") == 0
    assert exact_match("It may be Rome. <answer>Rome</answer> No: <answer> Paris </answer>!", "Paris") == 1
    assert exact_match("<answer>Paris", "Paris") == 0
    assert exact_match("<answer>" * 20_000, "Paris") == 0  # quadratic with a regular expression


MATHS = [
    ("The answer is $\\frac{1}{2}$", "0.5", 1),
    ("so \\boxed{\\frac{2}{4}}", "\\frac{1}{2}", 1),
    ("\\boxed{\\{1,2,3\\}}", "\\{3,2,1\\}", 1),
    ("\\boxed{\\{1,2\\}}", "\\{3,2,1\\}", 0),
    ("$x^2+2x+1$", "(x+1)^2", 1),
    ("$x^2+2x+2$", "(x+1)^2", 0),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
    ("\\boxed{[1,2)}", "[1,2)", 1),
    ("\\boxed{(1,2]}", "[1,2)", 0),
    ("$x = 3$", "3", 1),
    ("\\boxed{7}", "$8$", 0),
    ("I do not know", "8", 0),
    ("", "8", 0),
]


@pytest.fixture(scope="module")
def maths():
    with Scorer(answer_task("maths", (), "math_verify"), workers=2, time_limit_s=20) as scorer:
        yield scorer


def test_math_verify_in_workers(maths):
    replies = [reply for reply, _, _ in MATHS]
    examples = [Example("", answer) for _, answer, _ in MATHS]
    rewards, counts = maths.submit(replies, examples).result()
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [score for _, _, score in MATHS]
    assert counts == {"killed": 0, "failed": 0, "refused": 0}


def test_math_verify_counts_an_answer_without_mathematics(maths):
    rewards, counts = maths.submit(["5", "5"], [Example("", "5"), Example("", "\\boxed{}")]).result()
    assert rewards.tolist() == [1, 0]
    assert counts == {"killed": 0, "failed": 1, "refused": 0}


def test_math_verify_that_hangs_is_killed():
    """sympy evaluates this tower of powers for years, inside one C call."""
    with Scorer(answer_task("maths", (), "math_verify"), workers=1, time_limit_s=2) as scorer:
        replies = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{7}"]
        rewards, counts = scorer.submit(replies, [Example("", "7")] * 2).result()
    assert rewards.tolist() == [0, 1]
    assert counts == {"killed": 1, "failed": 0, "refused": 0}


def isolated(verify, **limits):
    task = Task("test", (), verify, isolated=True, worker_imports=("tests.helpers.bad_verifiers",))
    return Scorer(task, **{"workers": 2, "time_limit_s": 20, **limits})


@pytest.mark.parametrize(
    ("verify", "bad", "limits"),
    [
        (bad_verifiers.hangs_on_demand, "hang", {"time_limit_s": 1}),
        (bad_verifiers.hangs_in_c, "hang", {"time_limit_s": 1}),
        (bad_verifiers.eats_memory, "eat", {"memory_limit_mib": 256}),
        (bad_verifiers.dies, "die", {}),
    ],
)
def test_a_verifier_over_its_limits_is_killed_counted_and_scores_zero(verify, bad, limits):
    replies = ["7", bad, "7", "8", bad, "7"]
    with isolated(verify, **limits) as scorer:
        rewards, counts = scorer.submit(replies, [Example("", "7")] * 6).result()
    assert rewards.tolist() == [1, 0, 1, 0, 0, 1]
    assert counts == {"killed": 2, "failed": 0, "refused": 0}


@pytest.mark.parametrize("where", ["workers", "thread"])
def test_a_verifier_that_raises_is_counted_and_scores_zero(where):
    task = Task("test", (), bad_verifiers.raises, isolated=where == "workers")
    with Scorer(task, workers=1, time_limit_s=20) as scorer:
        rewards, counts = scorer.submit(["fine", "raise", "nan"], [Example("", "")] * 3).result()
    assert rewards.tolist() == [1, 0, 0]
    assert counts == {"killed": 0, "failed": 2, "refused": 0}


def test_a_cheap_verifier_runs_in_this_process_and_submit_returns_at_once():
    scoring = threading.Event()

    def waits(reply, example):
        scoring.wait(20)
        return bad_verifiers.process_id(reply, example)

    with Scorer(Task("test", (), waits, isolated=False), workers=1, time_limit_s=20) as scorer:
        pending = scorer.submit(["7"], [Example("", "7")])  # would wait 20 seconds if it scored here
        scoring.set()
        rewards, _ = pending.result()
    assert rewards.tolist() == [np.float32(os.getpid())]


def test_scores_keep_their_order_across_batches():
    with Scorer(answer_task("test", (), "last_number"), workers=1, time_limit_s=1) as scorer:
        first = scorer.submit(["1", "2", "x"], [Example("", "1"), Example("", "1"), Example("", "1")])
        second = scorer.submit(["2"], [Example("", "2")])
        assert second.result()[0].tolist() == [1]
        assert first.result()[0].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="1 replies for 0 examples"):
        Scorer(answer_task("test", (), "last_number"), workers=1, time_limit_s=1).submit(["2"], [])


PROGRAM = """
import jax
from tests.helpers import bad_verifiers
from dppo_jax.data.examples import Example, Task
from dppo_jax.rewards.scorer import Scorer

if __name__ == "__main__":
    task = Task("test", (), bad_verifiers.sees_jax, isolated=True, worker_imports=("tests.helpers.bad_verifiers",))
    with Scorer(task, workers=2, time_limit_s=20) as scorer:
        print(scorer.submit(["a", "b"], [Example("", "")] * 2).result()[0].tolist())
"""


def test_workers_do_not_import_the_main_module_nor_jax(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = [str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[0.0, 0.0]", done.stderr


def test_a_verifier_that_cannot_travel_to_a_worker():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        isolated(lambda reply, example: 1.0)


def test_settings_out_of_range():
    task = Task("test", (), AnswerVerifier("exact_match"), isolated=False)
    for bad in ({"workers": 0}, {"time_limit_s": 0}, {"memory_limit_mib": 0}):
        with pytest.raises(UserError, match="must be"):
            Scorer(task, **{"workers": 1, "time_limit_s": 1, **bad})
