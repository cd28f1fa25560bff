"""Replies that want to be run: in every data set, through the real scorer, and without its workers' walls."""

import ctypes
import functools
import json
import re
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from dppo_jax.data.examples import Example, Task
from dppo_jax.data.grammar import EVALUATED, FORMS, is_answer
from dppo_jax.data.gym import GymVerifier, full_score
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import AnswerVerifier
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.rewards.verifiers import extract_answer
from dppo_jax.rewards.worker import Outcome
from tests.helpers import hostile
from tests.helpers.places import ROOT

SETS = sorted(set(DATASETS) - {"composite"})  # which takes no settings that a config can hold
REFUSED = {"coin_flip", "complex_arithmetic", "game_of_life_halting", "gsm_symbolic", "puzzle24"}
ANSWERS = {"exact_match": "Paris", "last_number": "123456789", "math_verify": "\\frac{1}{2}"}


@functools.cache
def cases(seed: int) -> dict[str, Example]:
    """One item of every data set, and one answer of every other verifier, with its verifier."""
    found = {}
    settings = json.dumps({"seed": seed, "size": 3})
    for name in SETS:
        entry = reasoning_gym.create_dataset(name, **json.loads(settings))[0]
        example = Example(entry["question"], str(entry["answer"] or ""), {"entry": entry})
        found[name] = Example("", "", {"verify": GymVerifier(name, settings), "example": example})
    for name, answer in ANSWERS.items():
        found[name] = Example("", "", {"verify": AnswerVerifier(name), "example": Example("", answer)})
    return found


def scored(scorer: Scorer, pairs: list[tuple[str, Example]]) -> tuple[np.ndarray, dict[str, int]]:
    return scorer.submit([reply for reply, _ in pairs], [example for _, example in pairs]).result()


def workers(**limits):
    imports = ("reasoning_gym", "math_verify", "tests.helpers.hostile")
    task = Task("attacks", (), hostile.dispatch, isolated=True, worker_imports=imports)
    return Scorer(task, **{"workers": 2, "time_limit_s": 30, **limits})


def right_replies(found: dict[str, Example]) -> list[tuple[str, Example]]:
    return [(case.meta["example"].answer, case) for case in found.values() if case.meta["example"].answer]


def test_no_attack_runs_scores_ends_the_workers_or_changes_another_score(tmp_path):
    found = cases(3)
    attacks = hostile.attacks(tmp_path / "planted")
    assert len(attacks) >= 20 and len(found) > 100
    pairs = [(attack, case) for case in found.values() for attack in attacks]
    with workers() as scorer:
        before, counts = scored(scorer, right_replies(found))
        assert before.all() and counts == {"killed": 0, "failed": 0, "refused": 0}
        rewards, counts = scored(scorer, pairs)
        after, _ = scored(scorer, right_replies(found))
    names = [name for name in found for _ in attacks]
    assert {name for name, reward in zip(names, rewards, strict=True) if reward} <= {"game_of_life_halting"}
    entries = {name: found[name].meta["example"].meta["entry"] for name in SETS}
    refused = sum(not is_answer(name, extract_answer(attack), entries[name]) for name in SETS for attack in attacks)
    assert counts == {"killed": 0, "failed": 0, "refused": refused} and refused > len(EVALUATED) * len(attacks)
    np.testing.assert_array_equal(after, before)
    assert not list(tmp_path.iterdir())


def test_no_burden_ends_the_run():
    found = cases(3)
    right = right_replies(found)
    pairs = [(burden, case) for case in found.values() for burden in hostile.BURDENS]
    with workers(time_limit_s=4) as scorer:
        rewards, counts = scored(scorer, pairs)
        after = set(scorer.submit([reply for reply, _ in right], [case for _, case in right]).outcomes())
    names = [name for name in found for _ in hostile.BURDENS]
    wrong = {name for name, reward in zip(names, rewards, strict=True) if reward}
    assert wrong <= REFUSED
    assert counts["failed"] == 0 and counts["killed"] < len(pairs) / 20
    assert Outcome("scored", 1.0) in after <= {Outcome("scored", 1.0), Outcome("killed")}  # killed: a slow machine


PLANT = """
import sys
from pathlib import Path

from tests.helpers import hostile
from tests.rewards import test_attacks

folder, through = Path(sys.argv[1]), sys.argv[2]
for name, case in test_attacks.cases(3).items():
    verify, example = case.meta["verify"], case.meta["example"]
    for attack in hostile.attacks(folder / name):
        if through == "verifier":
            assert verify(attack, example) == 0 or name == "game_of_life_halting", (name, attack)
        elif "entry" in example.meta and str(folder) in attack:
            try:
                test_attacks.raw_scorer(name)(attack, example.meta["entry"])
            except Exception:
                pass
print("alive")
"""


@functools.cache
def raw_scorer(name):
    return reasoning_gym.create_dataset(name, seed=3, size=3).score_answer


@pytest.mark.parametrize("through", ["verifier", "data set"])
def test_which_data_sets_run_replies(tmp_path, through):
    """Without workers: the sets that EVALUATED names, and no others, plant files; with our verifier none does."""
    done = subprocess.run(
        [sys.executable, "-c", PLANT, str(tmp_path), through],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.strip().endswith("alive"), done.stderr
    planted = {path.name for path in tmp_path.iterdir()}
    assert planted == (set() if through == "verifier" else set(EVALUATED))


@pytest.mark.parametrize("name", SETS)
def test_every_label_is_in_its_grammar_and_scores_one(name):
    """Labels that repeat the question as an integral are accepted as labels only."""
    size = 20 if name in EVALUATED else 3
    for seed in (1, 2):
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=size)
        for entry in (dataset[i] for i in range(size)):
            label = entry["answer"]
            if label is not None:
                assert is_answer(name, label, entry) and full_score(dataset, name, label, entry) == 1
                assert name not in EVALUATED or EVALUATED[name](label, entry) or "Integral" in label
                assert name not in FORMS or FORMS[name](label.strip(), entry)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("countdown", ["1+2*(3-4)/5", " -1 + +2 ", "(1)"], ["1**2", "x", "1+", "1,2", "1//2", "f(1)", "1e9", "1j"]),
        ("simple_integration", ["x**2/2 + C", "-x**(-1)", "(x + 1)**(3/2)", "log(x) + C", "exp(2*x)"], []),
        ("simple_integration", [], ["x**1000", "x**x**x", "9**(9*9*9)", "((x**2)**2)**2", "y", "log", "open(x)"]),
        ("simple_integration", [], ["log(x, 2)", "log(*x)", "log(x=1)", "x.y", "x[0]", "'x'", "x;x", "x#", "(x, x)"]),
        ("simple_integration", [], ["lambda: x", "x if x else x", "x:=x", "x and x", "x<x", "[x]", "{x}", "__x"]),
        ("n_queens", ["_ Q\nQ _"], ["__import__", "[['Q']]", "Q()", ""]),
        ("string_insertion", ["ABBA"], ["['A']", "F", "A B"]),
        ("spiral_matrix", ["1 2 3"], ["[1, 2]", "1+2", "-1", "1_0"]),
        ("kakurasu", ["1 0\n0 1"], ["-1 0\n0 -1", "not 1 0\n0 1", "1 0\n0 1 is wrong", "1 0\n0 1.", "2 0\n0 1"]),
        ("knights_knaves", ["Zoey is a hero, and Mia is an angel.", "Zoey is a hero and Mia is an angel"], []),
        ("knights_knaves", [], ["not Zoey is a hero.", "Zoey is a hero. No, that is false.", "Zoey is not a hero."]),
        ("survo", ["1 12\n3 4"], ["not 1 2\n3 4", "-1 2\n3 4", "1 2\n3 4 ago"]),
        ("quantum_lock", ["A \u2192 B", "A->B", "ABC", "A, B"], ["not A \u2192 B", "A \u2192 B is wrong", "1A"]),
        ("tower_of_hanoi", ["Move disk 1 from Peg 1 to Peg 2\nMove disk 2 from Peg 1 to Peg 3"], []),
        ("tower_of_hanoi", [], ["-Move disk 1 from Peg 1 to Peg 2", "Do not Move disk 1 from Peg 1 to Peg 2", "x"]),
        ("time_intervals", ["99 days", "3 days, 04:05:06", "04:05", "04:05:06.789"], ["99 days1", "99 days ago", "-1"]),
        ("fraction_simplification", ["46/81", "$46/81$", "\\frac{46}{81}", "$\\dfrac{46}{81}$"], []),
        ("fraction_simplification", [], ["$\\frac{46}{81}$1", "$46/81", "46/81 is wrong", "not 46/81", "-46/81"]),
        ("advanced_geometry", ["(7.234, -4.131)", "45.10\u00b0", "-3.1"], ["(7.2, -4.1)1", "not (7, 8)", "(1, 2), 3"]),
        ("polynomial_equations", ["-0.04, 0.0", "1.5", ""], ["1.5, banana", "not 1.5", "1.5 ago"]),
        ("sokoban", ["RRDL"], ["not RRDL", "RRDL1", "RRDL is wrong"]),
    ],
)  # fmt: skip
def test_grammars(name, right, wrong):
    entry = {"answer": "?", "metadata": {"variable": "x"}}
    assert [text for text in right if not is_answer(name, text, entry)] == []
    assert [text for text in wrong if is_answer(name, text, entry)] == []


def test_scorers_that_accept_wrong_answers_are_refused_at_load():
    refused = {}
    with warnings.catch_warnings(action="error", category=UserWarning):
        for name in SETS:
            try:
                load_task("reasoning_gym", name=name, size=2 if name == "knight_swap" else 6, seed=3)
            except UserError as error:
                refused[name] = str(error)
    assert set(refused) == REFUSED
    for name, wrong in {"coin_flip": "'0'", "complex_arithmetic": "'nan'", "gsm_symbolic": "'not "}.items():
        assert f"gives the wrong answer {wrong}" in refused[name] and f"'{name}', item " in refused[name]
        assert "set data.verifier='exact_match'" in refused[name]
        assert load_task("reasoning_gym", name=name, size=6, seed=3, verifier="exact_match")


DENIALS = ["not {}", "-{}", "1{}", "{} is wrong", "{} ago", "{} No, that is false.", "{} banana", "{}, banana", "{}\nx"]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_an_answer_denied_is_no_answer(name):
    """The scorers of these sets alone take at least one denial of the label for the label."""
    task = load_task("reasoning_gym", name=name, size=6, seed=3)
    dataset, taken = reasoning_gym.create_dataset(name, seed=3, size=6), 0
    for example in task.examples:
        assert task.score(example.answer, example) == 1
        wrong = [denial.format(example.answer) for denial in DENIALS]
        if re.search(r"[1-9]", example.answer) and "\n" in example.answer:
            wrong.append(re.sub(r"\b(?=[1-9])", "-", example.answer))
        if example.answer == "0.0":
            wrong.remove("-0.0")
        assert [text for text in wrong if task.score(text, example)] == []
        taken += sum(dataset.score_answer(text, example.meta["entry"]) == 1 for text in wrong)
    assert taken > 0


def test_the_load_check_finds_what_the_forms_are_for(monkeypatch):
    monkeypatch.setattr("dppo_jax.data.grammar.FORMS", {})
    for name in sorted(FORMS):
        with pytest.raises(UserError, match=f"'{name}', item .* gives the wrong answer"):
            load_task("reasoning_gym", name=name, size=6, seed=3)


@pytest.mark.parametrize("where", ["workers", "thread"])
def test_whatever_escapes_a_verifier_is_a_failure_of_that_reply_alone(where):
    """The worker goes with it: what the reply changed there reaches no other reply."""
    bad = ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException", "RecursionError"]
    replies = [reply for name in bad for reply in (name, "fine")]
    task = Task("test", (), hostile.escapes, isolated=where == "workers", worker_imports=("tests.helpers.hostile",))
    with Scorer(task, workers=1, time_limit_s=20) as scorer:
        rewards, counts = scorer.submit(replies, [Example("", "")] * len(replies)).result()
    assert counts == {"killed": 0, "failed": len(bad), "refused": 0}
    if where == "workers":
        assert rewards.tolist() == [0, 0.5] * len(bad)


def test_workers_are_replaced_after_so_many_replies():
    task = Task("test", (), hostile.process_id, isolated=True, worker_imports=("tests.helpers.hostile",))
    with Scorer(task, workers=1, time_limit_s=20, replies_per_worker=4) as scorer:
        rewards, _ = scorer.submit([""] * 10, [Example("", "")] * 10).result()
    _, found = np.unique(rewards, return_counts=True)
    assert found.max() <= 4 and found.sum() == 10


def landlock() -> int:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else 0


def test_workers_cannot_write_connect_or_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        tries = {
            "write": str(tmp_path / "written"),
            "environment": "SECRET_TOKEN",
            "home": "",
            "raise the limit": "",
            "core": "",
        }
        if landlock() >= 4:
            tries |= {"connect": str(server.getsockname()[1]), "start a program": ""}
        if landlock() >= 6:
            tries |= {"signal": ""}
        task = Task("test", (), hostile.succeeds, isolated=True, worker_imports=("tests.helpers.hostile",))
        with Scorer(task, workers=1, time_limit_s=20) as scorer:
            examples = [Example("", answer) for answer in tries.values()]
            rewards, counts = scorer.submit(list(tries), examples).result()
            printed, _ = scorer.submit(["print"], examples[:1]).result()
    assert counts == {"killed": 0, "failed": 0, "refused": 0}
    assert dict(zip(tries, rewards.tolist(), strict=True)) == dict.fromkeys(tries, 0.0)
    assert printed.tolist() == [1]
