"""data.extract: the part of a reply that a verifier reads, by name."""

import dataclasses
import json
import pickle

import pytest

from dppo_jax.data.examples import Example
from dppo_jax.errors import UserError
from dppo_jax.rewards.answers import answer_task
from dppo_jax.rewards.extract import EXTRACT, Extracting, part_fault
from dppo_jax.rewards.scorer import Scorer
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.train import train
from tests.helpers.fixtures import small_config, tiny
from tests.helpers.places import ROOT

CASES = {
    "answer_tag": [
        ("<answer> 7 </answer>", "7"),
        ("<answer>5</answer> no, <ANSWER>7</Answer>!", "7"),
        ("It is 7.", ""),
        ("<answer>7", ""),
        ("<think><answer>5</answer></think>7", ""),
        ("<answer>7</answer><think><answer>5</answer></think>", "7"),
        ("<answer>5<think>6</think>7</answer>", "7"),
        ("", ""),
    ],
    "boxed": [
        ("\\boxed{5}, or rather $\\boxed{\\frac{1}{2}}$ {x}", "\\frac{1}{2}"),
        ("\\boxed{ 7 }", "7"),
        ("\\boxed{50}\\%", "50\\%"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("<think>\\boxed{5}</think> It is 7.", ""),
        ("\\boxed{5<think>x</think>7}", ""),
        ("7", ""),
        ("} \\boxed{} {", ""),
    ],
    "hashes": [
        ("6 + 1 = 7\n#### 7", "7"),
        ("#### 5\nNo.\n#### 7 \nDone.", "7"),
        ("####\n\n7\n8", "7"),
        ("##### 7", "7"),
        ("### 7", ""),
        ("<think>#### 5</think>7", ""),
        ("7 ####", ""),
        ("#### <think>5</think>7", "7"),
    ],
    "last_number": [
        ("6 apples and 1 are 7 apples.", "7"),
        ("<answer>5</answer> and -7.50", "-7.50"),
        ("it costs $1,234", "1,234"),
        ("1{,}234 of them", "1,234"),
        ("<think>5</think> seven", ""),
        ("7<think>5", "7"),
    ],
    "whole": [
        (" It is <answer>7</answer>.\n", "It is <answer>7</answer>."),
        ("<think>5</think> 7", "7"),
        ("5<think>6</think>7", "5\n7"),
        ("<think>5", ""),
    ],
}


@pytest.mark.parametrize(
    ("extract", "reply", "part"), [(name, reply, part) for name, cases in CASES.items() for reply, part in cases]
)
def test_the_part_of_a_reply(extract, reply, part):
    assert EXTRACT[extract](reply) == part


def test_long_replies_are_read_in_linear_time():
    """Each would take hours with a search that begins anew at every place."""
    parts = ["<answer>", "</answer>", "<think>", "\\boxed{", "\\boxed ", "{", "}", "####", "1,234", "-", "7.", "1e"]
    parts += ["\\", "<answer>\\boxed{", "1{,}", "<think></think>", "\\boxed{1}", "\n", "$-\\", "\udcff", "\u202f123"]
    for name in CASES:
        for part in parts:
            EXTRACT[name](part * 200_000)
            EXTRACT[name](part * 100_000 + "7")


VERIFIED = [
    ("auto", "exact_match", "<answer>7</answer>", "7", 1),
    ("whole", "exact_match", "<answer>7</answer>", "7", 0),
    ("whole", "last_number", "<answer>5</answer> or 7", "7", 1),
    ("auto", "last_number", "<answer>5</answer> or 7", "7", 0),
    ("answer_tag", "last_number", "the answer is 7", "7", 0),
    ("answer_tag", "math_verify", "<answer>x = \\frac{14}{2}</answer>", "7", 1),
    ("boxed", "exact_match", "\\boxed{Rome} or Paris", "Rome", 1),
    ("boxed", "math_verify", "\\boxed{\\frac{2}{4}} or 7", "\\frac12", 1),
    ("boxed", "math_verify", "\\boxed{3 \\text{ and } 4}", "3, 4", 1),
    ("boxed", "math_verify", "\\boxed{3 \\text{ and } 4}", "4", 0),
    ("boxed", "math_verify", "so 7", "7", 0),
    ("hashes", "exact_match", "so 6\n#### 7\nbye 8", "7", 1),
    ("hashes", "math_verify", "\\boxed{6}\n#### 7", "7", 1),
    ("last_number", "exact_match", "It is 7.", "7", 1),
    ("last_number", "math_verify", "\\boxed{6}, no, 7 apples", "7", 1),
]


@pytest.mark.parametrize("verifier", ["exact_match", "last_number", "math_verify"])
def test_a_verifier_reads_that_part_and_no_other(verifier):
    cases = [case for case in VERIFIED if case[1] == verifier]
    task = answer_task("test", (), verifier)
    for extract in {case[0] for case in cases} - {"auto"}:
        of_extract = [case for case in cases if case[0] == extract]
        verify = Extracting(task.verify, extract)
        assert pickle.loads(pickle.dumps(verify)) == verify
        with Scorer(dataclasses.replace(task, verify=verify), workers=1, time_limit_s=20) as scorer:
            pending = scorer.submit([c[2] for c in of_extract], [Example("", c[3]) for c in of_extract])
            assert pending.result()[0].tolist() == [score for *_, score in of_extract], extract
    for _, _, reply, answer, score in (case for case in cases if case[0] == "auto"):
        assert task.verify(reply, Example("", answer)) == score


def test_a_label_that_no_such_part_can_equal():
    assert part_fault("auto", "exact_match", "Paris") is None
    assert part_fault("last_number", "math_verify", "x+1") is None
    for extract, answer in (("last_number", "Paris"), ("hashes", "a\nb"), ("boxed", "a}b"), ("last_number", "7 m")):
        assert f"data.extract = {extract!r}" in part_fault(extract, "exact_match", answer)
    for extract in CASES:
        assert part_fault(extract, "exact_match", "7") is None


def test_an_unknown_part_and_a_label_that_is_none_are_refused(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="^unknown data.extract 'box'; the nearest is 'boxed'$"):
        checks.check(load_config("configs/quickstart.py", ["--config.data.extract=box"]))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "1", "answer": answer}) + "\n" for answer in ("7", "x")))
    config = small_config(tiny(tmp_path_factory), data__path=str(rows), data__extract="last_number")
    config.data.verifier = "exact_match"
    with pytest.raises(UserError, match="rows.jsonl, row 2: the answer 'x' can be no part of a reply that data.ex"):
        train(config, tmp_path / "run")
