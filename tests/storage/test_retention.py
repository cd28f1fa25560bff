"""Which older checkpoints stay."""

import itertools

import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import Checkpoints, Retention
from dppo_jax.storage.run_log import read_scalars
from experiments.chaos.inputs.states import state
from tests.helpers.fixtures import hurried, run, small_config, tiny


def steps(folder) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def go_on(folder, todo, values, **how) -> None:
    """A run that saves these steps, and after each measures its value, where it has one."""
    retention = Retention(**how)
    with Checkpoints(folder, keep=1, retention=retention) as checkpoints:
        if (newest := checkpoints.latest()) is not None:
            retention.resume(newest, checkpoints.about(newest))
            retention.measured(newest, [{"score": values[newest]} if newest in values else {"other": 0.0}])
        for step in todo:
            checkpoints.save(step, state(step), retention.saving(step))
            retention.measured(step, [{"score": values[step], "other": 0.0}] if step in values else [])


VALUES = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 6: 0.1}


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (dict(), [7]),
        (dict(every=3), [3, 6, 7]),
        (dict(best="score"), [2, 7]),
        (dict(best="score", best_of="min"), [6, 7]),
        (dict(every=7, best="score"), [2, 7]),
    ],
)
def test_what_stays_is_the_same_however_often_the_run_was_started_anew(tmp_path, how, kept):
    for name, parts in {"once": [range(1, 8)], "thrice": [range(1, 4), range(4, 6), range(6, 8)]}.items():
        for part in parts:
            go_on(tmp_path / name, part, VALUES, **how)
        assert steps(tmp_path / name) == kept


def test_the_best_of_several_runs_is_that_of_their_mean():
    retention = Retention(best="score")
    for step, (one, two) in {1: (0.0, 0.5), 2: (0.9, -0.9), 3: (0.2, 0.2)}.items():
        retention.saving(step)
        retention.measured(step, [{"score": one}, {"score": two}])
    retention.measured(4, [{"score": 9.0}, {"score": 9.0}])  # of a step that was not saved
    for whole in itertools.combinations((1, 2, 3, 4), 3):
        assert retention.stays(whole) == {1 if 1 in whole else 3}


def test_a_tag_that_is_not_logged_is_refused_and_one_that_comes_later_is_waited_for():
    with pytest.raises(UserError, match="'reward/men' is not in the log of this run; the nearest is 'reward/mean'"):
        Retention(best="reward/men").measured(0, [{"reward/mean": 1.0}])
    later = Retention(best="eval/held_out/avg")
    later.measured(1, [{"reward/mean": 1.0}])
    with pytest.raises(UserError, match="the nearest is 'eval/held/avg'"):
        later.measured(2, [{"reward/mean": 1.0, "eval/held/avg": 1.0}])


def test_a_run_keeps_the_step_whose_own_policy_had_the_best_reward(tmp_path, tmp_path_factory):
    with hurried(tmp_path_factory):
        kept = dict(checkpoint__every=1, checkpoint__keep=1, checkpoint__best="reward/mean", checkpoint__keep_every=4)
        run(small_config(tiny(tmp_path_factory), steps=6, **kept), tmp_path)
    at, rewards = read_scalars(tmp_path)["reward/mean"]
    of_step = dict(zip(at, rewards, strict=True))
    best = max(range(1, 6), key=lambda step: of_step[step])
    assert steps(tmp_path) == sorted({best, 4, 6}) and best != 4
