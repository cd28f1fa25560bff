"""Runs that talk with environments: what is trained, counted, saved and refused."""

import json
import re
import shutil

import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.run_log import read_scalars
from experiments.run.checks import check
from experiments.sweep import Run as SweepRun
from experiments.sweep import train as sweep_train
from tests.helpers.fixtures import Run, hurried, run, same, small_config, tiny
from tests.helpers.places import ROOT

TALK = f"{ROOT / 'tests/helpers/talk.py'}:Talk"
TALKS = dict(
    data__kind="environment", data__name=TALK, data__path="", data__verifier="task", data__size=12,
    rollout__max_new_tokens=24, rollout__turn_tokens=5, rollout__prompts=4, rollout__group_size=2, rollout__slots=4,
    steps=4, checkpoint__every=1, log__samples=1, log__transcripts=8,
)  # fmt: skip
IN_FLIGHT = dict(rollout__in_flight=1, rollout__max_age=3, steps=5)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Run:
    return run(small_config(folder, **TALKS), tmp_path_factory.mktemp("talks") / "run")


@pytest.fixture(scope="module")
def in_flight(folder, tmp_path_factory) -> Run:
    return run(small_config(folder, **(TALKS | IN_FLIGHT)), tmp_path_factory.mktemp("talks") / "in_flight")


def column(scalars, tag: str) -> np.ndarray:
    return np.asarray(scalars[tag][1])


def test_conversations_are_logged_with_what_is_the_policys_own(finished):
    scalars = read_scalars(finished.folder)
    turns, length = column(scalars, "rollout/turns_mean"), column(scalars, "response/length_mean")
    assert ((turns > 1) & (turns <= 4)).all() and (length <= 5 * turns).all()  # own tokens alone
    assert (column(scalars, "rollout/context_mean") > 0).all() and (column(scalars, "rollout/calls") >= 2).all()
    assert (column(scalars, "rollout/refilled") > 0).all() and column(scalars, "reward/mean").max() > 0
    assert not column(scalars, "reward/failed").any() and not column(scalars, "rollout/age_max").any()
    assert column(scalars, "mismatch/abs_prob_diff_max").max() < 1e-4  # rollout and training see the same rows
    lines = (finished.folder / "samples/step_000000.jsonl").read_text().splitlines()
    replies = [json.loads(line)["reply"] for line in lines]
    assert len(replies) == 8 and any(re.search(r"\?[0-2]", reply) for reply in replies)


def test_nothing_is_compiled_after_the_first_step(finished, in_flight):
    for one in (finished, in_flight):
        assert {step for _, step in one.compilations} <= {None, 0}


def test_a_conversation_goes_on_under_the_next_parameters(in_flight):
    scalars = read_scalars(in_flight.folder)
    assert column(scalars, "rollout/age_max").max() > 0 and column(scalars, "rollout/in_flight")[:-1].max() > 0
    assert column(scalars, "rollout/in_flight")[-1] == 0


@pytest.mark.parametrize(("name", "step"), [("finished", 2), ("in_flight", 1), ("in_flight", 3)])
def test_a_run_goes_on_inside_conversations_as_if_it_had_never_stopped(name, step, tmp_path, request):
    whole, again = request.getfixturevalue(name), tmp_path / "again"
    under_way = column(read_scalars(whole.folder), "rollout/in_flight")[step - 1]
    assert (under_way > 0) == (name == "in_flight")
    shutil.copytree(whole.folder, again)
    for later in range(step + 1, whole.config.steps + 1):
        shutil.rmtree(again / "checkpoints" / str(later))
    assert f"going on from the checkpoint at step {step}" in run(whole.config, again).said
    same(whole.folder, again)


def test_a_bad_environment_ends_its_own_rows_alone(folder, finished, tmp_path):
    """The prompts of the first step but three are what they were; every other score is what it was."""
    kinds = ["raise", "hang", "number", ""] * 3
    bad = {str(seed): kind for seed, kind in zip(range(1, 13), kinds, strict=True)}
    changes = TALKS | dict(steps=1, reward__time_limit_s=2.0, data__settings={"bad": bad})
    other = run(small_config(folder, **changes), tmp_path / "bad")
    scalars = read_scalars(other.folder)
    failed, killed = (column(scalars, f"reward/{kind}")[0] for kind in ("failed", "killed"))
    assert failed > 0 and killed > 0
    assert re.search(rf"step 0: data.name failed on {failed:.0f} replies, first with .*(no idea|not text)", other.said)
    one, two = (
        [json.loads(line) for line in (at / "samples/step_000000.jsonl").read_text().splitlines()]
        for at in (finished.folder, other.folder)
    )
    equal = [a == b for a, b in zip(one, two, strict=True)]
    assert any(equal) and not all(equal)
    for a, b in zip(one, two, strict=True):
        assert a["reply"].startswith(b["reply"]) and (a == b or b["reward"] == 0)


@pytest.mark.slow
def test_a_critic_values_every_turn(folder, tmp_path):
    """Its values are 0 at first: with lambda 1 every token of the policy's has the reward as its advantage, before an
    environment's answer as behind it, and the first update is that of `reward`."""
    once = TALKS | dict(steps=1, checkpoint__every=0, train__minibatches=1)
    critic = dict(advantage__name="gae", critic__lam=1.0, critic__whiten=False)
    with_critic = read_scalars(run(small_config(folder, **once, **critic), tmp_path / "critic").folder)
    without = read_scalars(run(small_config(folder, **once, advantage__name="reward"), tmp_path / "reward").folder)
    assert column(without, "grad_norm")[0] > 0 and column(without, "rollout/context_mean")[0] > 0
    for tag in ("grad_norm", "loss/surrogate", "response/length_mean"):
        np.testing.assert_allclose(column(with_critic, tag), column(without, tag), rtol=1e-5, err_msg=tag)
    assert column(with_critic, "critic/return")[0] > 0 and not column(with_critic, "critic/value")[0]


ENVIRONMENT = dict(data__kind="environment", data__name="two_sums", data__path="", data__verifier="task")
REFUSED = {
    "data.kind = 'jsonl' has one turn, but data.max_turns = 3; set data.kind to env": dict(data__max_turns=3),
    "data.kind = 'jsonl' has one turn, but rollout.turn_tokens = 3; set data.kind": dict(rollout__turn_tokens=3),
    "data.kind = 'environment' gives the reward, but data.verifier = 'last_number'": dict(
        ENVIRONMENT, data__verifier="last_number"
    ),
    "data.kind = 'environment' gives the reward, but reward.function": dict(ENVIRONMENT, reward__function="a.py:b"),
    "data.kind = 'environment': train.staleness = 1 is not": dict(ENVIRONMENT, train__staleness=1),
    "data.kind = 'environment': rollout.resample = 1 is not": dict(ENVIRONMENT, rollout__resample=1),
    "rollout.turn_tokens = 9 is more than rollout.max_new_tokens = 6, of all turns": dict(
        ENVIRONMENT, rollout__turn_tokens=9
    ),
    "data.kind = 'environment' generates its examples, but data.path": dict(ENVIRONMENT, data__path="x"),
    "data.kind = 'environment' has no rows for data.answer_from": dict(ENVIRONMENT, data__answer_from="####"),
}


def test_an_advantage_of_zeros_and_ones_refuses_other_rewards(folder, tmp_path):
    with pytest.raises(UserError, match="max_rl is for rewards of 0 and 1, but one is [2-4]"):
        run(small_config(folder, **TALKS, advantage__name="max_rl"), tmp_path / "run")


@pytest.mark.parametrize("said", REFUSED)
def test_it_is_refused_in_one_sentence(folder, said):
    with pytest.raises(UserError) as caught:
        check(small_config(folder, **REFUSED[said]))
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_sweep_of_conversations_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is for one run at a time: start experiments.train"):
        runs = [SweepRun("pg_is", 0, 1.0), SweepRun("cispo", 0, 1.0)]
        sweep_train(small_config(folder, **TALKS), runs, tmp_path / "swept")
