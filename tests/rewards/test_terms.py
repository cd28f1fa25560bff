"""The terms of a reward, by their definitions and in real runs."""

import time

import numpy as np
import pytest

from configs import base
from dppo_jax.errors import UserError
from dppo_jax.rewards import shaping
from dppo_jax.rewards.shaping import TERMS, Responses, Settings
from dppo_jax.storage.run_log import read_scalars
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.run.learner import Learner
from tests.helpers.fixtures import hurried, run, small_config, tiny
from tests.helpers.places import ROOT

FORMS = [
    ("<think>2+3</think><answer>5</answer>", 1),
    ("\n<think>\na\nb</think>\n\n<answer> 5\n</answer>\n", 1),
    ("<think></think><answer></answer>", 1),
    ("<answer>5</answer>", 0),
    ("<think>2+3</think>5", 0),
    ("<answer>5</answer><think>2+3</think>", 0),
    ("<think>a</think><think>b</think><answer>5</answer>", 0),
    ("<think>a<think>b</think><answer>5</answer>", 0),
    ("<think>a</think><answer>5</answer><answer>6</answer>", 0),
    ("<think>a</think><answer>5<answer>6</answer>", 0),
    ("<think>a</think> so <answer>5</answer>", 0),
    ("<think>a</think><answer>5</answer> done", 0),
    ("<think>a</think><answer>5", 0),
    ("", 0),
    ("<think>" + "a" * 100_000 + "</think>" + " " * 100_000 + "<answer>5</answer>", 1),
    ("<think>" * 100_000, 0),
    ("<think>" + " <" * 200_000, 0),
    ("<think></think>" + " " * 200_000, 0),
]


def term(name, replies, **settings):
    responses = Responses(replies, np.zeros(len(replies), np.int32), np.zeros(len(replies), np.float32))
    terms, counts = shaping.values(responses, {name: 1.0}, Settings(limit=9, **settings))
    assert terms[name].dtype == np.float32
    return terms[name].tolist(), counts


def test_the_form_that_is_asked_for():
    got = term("format", [reply for reply, _ in FORMS], format=base.FORMAT)
    assert got == ([score for _, score in FORMS], {"format_stopped": 0})
    assert term("format", ["a\nb", "ab", "xaby"], format="a.?b")[0] == [1, 1, 0]


def test_a_pattern_that_takes_years_is_stopped_and_counted():
    began = time.monotonic()
    replies = ["a" * 200 + "!", "aaa"]
    assert term("format", replies, format="(a|a|aa)+", time_limit_s=0.5) == ([0, 1], {"format_stopped": 1})
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("reply", "ngram", "penalty"),
    [
        ("a b c d", 3, 0),
        ("a b c a b c", 3, 1 / 4 - 0),  # abc bca cab abc: 3 of 4 are different
        ("a a a a", 1, 3 / 4),
        ("A a\na\ta", 1, 3 / 4),
        ("a a a a", 3, 1 / 2),
        ("a b", 3, 0),
        ("", 1, 0),
        ("a " * 1002, 3, 1 - 1 / 1000),
    ],
)
def test_repetition(reply, ngram, penalty):
    assert term("repetition", [reply], ngram=ngram)[0] == [np.float32(-penalty)]


def test_the_sum_has_the_weights_and_the_default_is_the_old_sum_to_the_bit():
    rng = np.random.default_rng(0)
    scores, lengths = rng.random(1000, np.float32), rng.integers(1, 100, 1000)
    responses = Responses(["a a"] * 1000, lengths, scores)
    weights = dict(base.get_config().reward.terms)
    for buffer in (0, 30):
        settings, used = Settings(limit=99, buffer=buffer), shaping.active(weights, buffer=buffer)
        got = shaping.total(shaping.values(responses, used, settings)[0], used, 1000)
        old = scores + shaping.overlong_penalty(lengths, limit=99, buffer=buffer)
        np.testing.assert_array_equal(got, old)
    used = {"correct": 2.0, "repetition": 0.5}
    got = shaping.total(shaping.values(responses, used, Settings(limit=99, ngram=1))[0], used, 1000)
    np.testing.assert_array_equal(got, 2 * scores - np.float32(0.25))


REFUSED = {
    "unknown term in reward.terms 'formt'; the nearest is 'format'": {"terms.formt": 1.0},
    "reward.terms.format must be at least 0, not -1.0": {"terms.format": -1.0},
    "reward.terms.format must be a number, not 'x'": {"terms.format": "x"},
    "reward.terms: every weight is 0, so every reward would be; set reward.terms.correct=1.0": {"terms.correct": 0.0},
    "reward.overlong_buffer = 3 is of reward.terms.length, whose weight is 0": {
        "overlong_buffer": 3,
        "terms.length": 0.0,
    },
    "reward.terms.length = 2 weighs nothing: set reward.overlong_buffer": {"terms.length": 2.0},
    "reward.format is no regular expression: ": {"format": "(a", "terms.format": 1.0},
    "reward.format = 'a+' is of reward.terms.format, whose weight is 0": {"format": "a+"},
    "reward.ngram = 4 is of reward.terms.repetition, whose weight is 0": {"ngram": 4},
    "reward.function must be FILE.py:FUNCTION, such as my_rewards.py:score, not 'score'": {"function": "score"},
    "reward.function must be FILE.py:FUNCTION, such as my_rewards.py:score, not 'a.py:f()'": {"function": "a.py:f()"},
    "advantage.name = max_rl is for rewards of 0 and 1, to which reward.terms.format = 0.5 adds": {
        "terms.format": 0.5,
        "advantage": "max_rl",
    },
    "advantage.name = max_rl is for rewards of 0 and 1, to which reward.terms.repetition = 1 adds": {
        "terms.repetition": 1.0,
        "advantage": "max_rl",
    },
}


@pytest.mark.parametrize(("sentence", "changes"), REFUSED.items(), ids=REFUSED)
def test_terms_that_cannot_be(sentence, changes):
    config = base.get_config()
    config.policy.path, config.data.name = "x", "products"
    with config.ignore_type():
        for key, value in changes.items():
            section = config.reward.terms if key.startswith("terms.") else config.reward
            if key == "advantage":
                config.advantage.name = value
            else:
                section[key.removeprefix("terms.")] = value
    with pytest.raises(UserError) as error:
        checks.check(config)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_max_rl_takes_any_weight_of_the_score_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    correct = "reward.terms.correct"
    checks.check(load_config("configs/quickstart.py", ["--config.advantage.name=max_rl", f"--config.{correct}=2"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield tiny(tmp_path_factory)


def test_a_run_logs_every_term_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "evens", lambda responses, settings: (responses.lengths % 2 == 0).astype(np.float32))
    config = small_config(folder, reward__format="[0-9]*", reward__overlong_buffer=2)
    config.reward.terms.update(correct=0.5, format=0.25, repetition=1.0, length=2.0, evens=3.0)
    scalars = read_scalars(run(config, tmp_path / "run").folder)
    tags = [tag for tag in scalars if tag.startswith("reward/term/")]
    assert tags == [f"reward/term/{name}" for name in ("correct", "evens", "format", "length", "repetition")]
    np.testing.assert_array_equal(scalars["reward/term/correct"][1], scalars["reward/mean"][1])
    assert (scalars["reward/term/length"][1] <= 0).all() and scalars["reward/term/length"][1].any()
    assert ((scalars["reward/term/evens"][1] > 0) & (scalars["reward/term/evens"][1] < 1)).all()
    assert scalars["reward/format_stopped"][1].tolist() == [0] * config.steps


def test_truncated_responses_take_no_part(folder, tmp_path, monkeypatch):
    """What the learner is given, seen on its way: the tokens of truncated responses are masked, and no others."""
    seen = []

    def update(self, batch, plan, behavior):
        seen.append((np.asarray(batch.mask).any(axis=1), np.asarray(batch.advantages)))
        return learner_update(self, batch, plan, behavior)

    learner_update = Learner.update
    monkeypatch.setattr(Learner, "update", update)
    scalars = {}
    for on in (False, True):
        done = run(small_config(folder, steps=1, reward__overlong_filter=on), tmp_path / str(on))
        scalars[on] = {tag: values[0] for tag, (_, values) in read_scalars(done.folder).items()}
    rows = 32
    truncated = scalars[True]["response/truncated"] * rows
    assert 0 < truncated < rows and scalars[False]["reward/overlong_filtered"] == 0
    assert scalars[True]["reward/overlong_filtered"] == truncated
    (before, advantages), (after, filtered_advantages) = seen[0], seen[2]
    assert before.sum() == rows and after.sum() == rows - truncated
    np.testing.assert_array_equal(advantages, filtered_advantages)  # they stay in their group's baseline
    assert scalars[True]["grad_norm"] != scalars[False]["grad_norm"]


def test_base_has_every_term():
    assert set(base.get_config().reward.terms) == set(TERMS)
