"""Which answer a reply votes for, and which answers are one."""

import pytest

from dppo_jax.rewards.votes import answer_of, normal, vote

SAME = [
    ("0.5", ".50", "1/2", "\\frac{1}{2}", "$0.5$", "0.500", "5e-1"),
    ("1,234", "1234", "1234.0", "1.234e3", "$1{,}234$"),
    ("7", "07", "007", "7.", "+7", "$7$"),
    ("-3", "\u22123", "-3.0"),
    ("0", "-0", "0.000", "0e9"),
    ("1" + "0" * 400, "1e400", "10e399"),
    ("x + 1", "x  +\n1"),
]


@pytest.mark.parametrize("answers", SAME, ids=lambda answers: answers[0][:8])
def test_one_number_is_one_vote(answers):
    assert len({normal(answer) for answer in answers}) == len({vote(answer) for answer in answers}) == 1


def test_different_answers_are_different_votes():
    others = ("x+1", "X + 1", "1e401", "1e-400", "0.51", "9" * 5000)
    votes = [vote(answer) for answer in (*(answers[0] for answers in SAME), *others)]
    assert len({*votes, 0}) == len(votes) + 1
    assert vote("") == 0 and all(-(2**63) <= v < 2**63 for v in votes)


@pytest.mark.parametrize(
    ("part", "verifier", "reply", "answer"),
    [
        ("auto", "last_number", "<think>5</think>3 + 4 = 7.", "7"),
        ("auto", "last_number", "no number", ""),
        ("answer_tag", "last_number", "<answer>it is 1,234</answer> 5", "1,234"),
        ("auto", "math_verify", "first \\boxed{1}, then \\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("auto", "math_verify", "so the answer is 12", "12"),
        ("auto", "math_verify", "12", "12"),
        ("boxed", "math_verify", "It is \\boxed{ 7 }.", "7"),
        ("boxed", "math_verify", "It is 7, unboxed.", ""),
        ("boxed", "math_verify", "<think>\\boxed{7}</think>", ""),
        ("hashes", "exact_match", "so\n#### 18\n", "18"),
        ("auto", "exact_match", " yes ", "yes"),
        ("auto", "task", "<answer>a b</answer>", "a b"),
        ("whole", "exact_match", "<think>no</think> ", ""),
    ],
)
def test_the_answer_of_a_reply(part, verifier, reply, answer):
    assert answer_of(reply, part=part, verifier=verifier) == answer
