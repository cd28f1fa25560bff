"""A reward of one's own: the function of a file, in real workers and in a run."""

import json

import numpy as np
import pytest

from dppo_jax.data.examples import Example, Task
from dppo_jax.errors import UserError
from dppo_jax.rewards.own import as_score, own_reward
from dppo_jax.rewards.scorer import Scorer
from dppo_jax.storage.run_log import read_scalars
from experiments import sweep
from experiments.train import train
from tests.helpers.fixtures import hurried, run, small_config, tiny

REWARDS = """
import os, sys, time
import beside

hoard = []


def score(reply, example):
    if reply == "raise":
        raise RuntimeError("no idea")
    if reply == "nan":
        return float("nan")
    if reply == "text":
        return "1"
    if reply == "huge":
        return 1e39
    if reply == "parts":
        return {"style": 0.25, "length": -1}
    if reply == "bad part":
        return {"style": None}
    if reply == "bad name":
        return {"a/b": 1}
    if reply == "empty":
        return {}
    if reply == "hang":
        while True:
            pass
    while reply == "eat":
        hoard.append(bytearray(2**24))
    if reply == "write":
        open(os.path.join(os.path.dirname(__file__), "written"), "w").write("x")
    if reply == "jax":
        return "jax" in sys.modules
    if reply == "meta":
        return example.meta["weight"] * (example.prompt == "p") * (example.answer == "7")
    return beside.value


def one(reply):
    return 1.0


class Callable:
    def __call__(self, reply, example, scale=2.0):
        return scale


doubled = Callable()
number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text("value = 0.75\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder / "rewards.py"


def scorer(text, **limits):
    task = Task("own", (), own_reward(text), isolated=True)
    return Scorer(task, **{"workers": 2, "time_limit_s": 20, **limits})


# Reply: the reward and how it is counted.
REPLIES = {
    "fine": (0.75, ""),
    "raise": (0, "failed"),
    "nan": (0, "failed"),
    "text": (0, "failed"),
    "huge": (0, "failed"),
    "parts": (-0.75, ""),
    "bad part": (0, "failed"),
    "bad name": (0, "failed"),
    "empty": (0, ""),
    "hang": (0, "killed"),
    "eat": (0, "killed"),
    "write": (0, "failed"),
    "jax": (0, ""),
    "meta": (5, ""),
}


def test_replies_are_scored_within_limits_and_faults_are_counted(file):
    with scorer(f"{file}:score", time_limit_s=3, memory_limit_mib=256) as own:
        own.ready()
        examples = [Example("p", "7", {"weight": 5})] * len(REPLIES)
        pending = own.submit(list(REPLIES), examples)
        rewards, counts = pending.result()
        again, _ = own.submit(["fine"] * 4, examples[:4]).result()
    assert dict(zip(REPLIES, rewards.tolist(), strict=True)) == {reply: score for reply, (score, _) in REPLIES.items()}
    kinds = [kind for _, kind in REPLIES.values()]
    assert counts == {kind: kinds.count(kind) for kind in ("killed", "failed", "refused")}
    parts = dict(zip(REPLIES, (outcome.parts for outcome in pending.scored), strict=True))
    assert {reply: dict(named) for reply, named in parts.items() if named} == {"parts": {"style": 0.25, "length": -1}}
    assert again.tolist() == [0.75] * 4
    assert sorted(path.name for path in file.parent.iterdir()) == ["beside.py", "rewards.py"]  # no bytecode either


def test_an_object_that_can_be_called_and_numbers_of_numpy(file):
    with scorer(f"{file}:doubled") as own:
        assert own.submit(["x"], [Example("", "")]).result()[0].tolist() == [2]
    assert as_score(np.float32(0.5)) == 0.5 and as_score(True) == 1 and as_score(np.array(2)) == 2
    for bad in (None, "1", [1, 2], float("inf"), {"a": "1"}, {1: 1}, {"": 1}):
        with pytest.raises((ValueError, TypeError)):
            as_score(bad)


REFUSED = {
    "reward.function: {}/rewards.py has no function 'scor'; the nearest is 'score'": "rewards.py:scor",
    "reward.function: {}/rewards.py has no function 'number'; known: one, score": "rewards.py:number",
    "reward.function: one(reply) of {}/rewards.py must take two arguments, (reply, example)": "rewards.py:one",
    "reward.function: {}/bad.py, line 2 does not load: SyntaxError: ": "bad.py:score",
    "reward.function: {}/imports.py does not load: ModuleNotFoundError: No module named 'no_such": "imports.py:score",
    "reward.function: {}/exits.py does not load: SystemExit: 3": "exits.py:score",
    "reward.function: {}/empty.py has no function 'score'; it has none": "empty.py:score",
}


@pytest.mark.parametrize(("sentence", "text"), REFUSED.items(), ids=REFUSED)
def test_a_function_that_cannot_be_called(file, sentence, text):
    folder = file.parent.parent / "bad files"
    folder.mkdir(exist_ok=True)
    files = {"bad.py": "x = 1\nx =\n", "imports.py": "import no_such_module\n", "exits.py": "exit(3)\n", "empty.py": ""}
    for name, code in {**files, "rewards.py": "number = 3\ndef score(a, b): ...\ndef one(reply): ...\n"}.items():
        (folder / name).write_text(code)
    with scorer(f"{folder}/{text}") as own, pytest.raises(UserError) as error:
        own.ready()
    assert str(error.value).startswith(sentence.format(folder)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="^reward.function: there is no file 'none.py'$"):
        own_reward("none.py:score")
    with pytest.raises(UserError, match="reward.function = 's3://b/none.py'"):
        own_reward("s3://b/none.py:score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield tiny(tmp_path_factory)


def test_a_run_trains_on_it_and_logs_its_parts(folder, tmp_path):
    """The parts are recomputed from the transcripts' definition: a digit in the reply, and the row's own column."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"bonus": 0.5}) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def score(reply, example):\n"
        "    if 'f' in reply:\n        raise ValueError('an f')\n"
        "    return {'digit': float(any(map(str.isdigit, reply))), 'bonus': example.meta['bonus']}\n"
    )
    function = f"{tmp_path}/mine.py:score"
    config = small_config(folder, steps=2, data__path=str(tmp_path / "rows.jsonl"), reward__function=function)
    config.data.verifier = "task"
    done = run(config, tmp_path / "run")
    scalars = {tag: values for tag, (_, values) in read_scalars(done.folder).items()}
    failed = scalars["reward/failed"]
    assert failed.all() and (failed < 32).all()
    np.testing.assert_allclose(scalars["reward/part/bonus"], 0.5 * (1 - failed / 32))
    both = scalars["reward/part/bonus"] + scalars["reward/part/digit"]
    np.testing.assert_allclose(scalars["reward/mean"], both, rtol=1e-6)
    np.testing.assert_allclose(scalars["reward/term/correct"], both, rtol=1e-6)
    assert f"step 0: reward.function failed on {failed[0]:.0f} replies, first with ValueError: an f" in done.said


def test_a_sweep_that_draws_again_trains_on_it_too(folder, tmp_path):
    """A batch may have a part that another has not: it is 0 there."""
    (tmp_path / "mine.py").write_text(
        "def score(reply, example):\n    return {'length': len(reply) / 8, **({'f': 1.0} if 'f' in reply else {})}\n"
    )
    config = small_config(folder, steps=1, rollout__resample=1, reward__function=f"{tmp_path}/mine.py:score")
    runs = [sweep.Run("ppo_clip", seed, 1.0) for seed in (0, 1)]
    sweep.train(config, runs, tmp_path / "sweep")
    for one in runs:
        scalars = {tag: values for tag, (_, values) in read_scalars(tmp_path / "sweep" / one.folder).items()}
        both = scalars["reward/part/length"] + scalars["reward/part/f"]
        np.testing.assert_allclose(scalars["reward/mean"], both, rtol=1e-6)
        assert both.all()


def test_a_run_refuses_what_cannot_be_before_it_compiles(folder, tmp_path):
    (tmp_path / "mine.py").write_text("def score(reply, example):\n    return 0.5\n")
    config = small_config(folder, reward__function=f"{tmp_path}/mine.py:scores")
    with pytest.raises(UserError, match="has no function 'scores'; the nearest is 'score'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = small_config(folder, reward__function=f"{tmp_path}/mine.py:score", data__extract="boxed")
    with pytest.raises(UserError, match="data.extract = 'boxed' is the verifier's"):
        train(config, tmp_path / "run")
    config = small_config(folder, reward__function=f"{tmp_path}/mine.py:score", advantage__name="max_rl")
    with pytest.raises(UserError, match="max_rl is for rewards of 0 and 1, but one is 0.5"):
        train(config, tmp_path / "run")
