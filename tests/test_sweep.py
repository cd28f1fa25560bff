"""A sweep against separate runs, resumed, and what it refuses."""

import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.run_log import read_config, read_scalars
from experiments.sweep import Run, check, config_of, train
from tests.fixtures import hurried, run, small_config, tiny

RATES = {"ppo_clip": 1.0, "minirl": 0.5, "dppo_topk_tv": 1.0}  # of losses
RUNS = [Run(loss, seed, rate) for loss, rate in RATES.items() for seed in (0, 1)]
NUMBERS = dict(steps=3, rollout__tracked=3, rollout__lag=1, checkpoint__every=1, optimizer__eps=1e-4)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    train(small_config(tiny(tmp_path_factory), **NUMBERS), RUNS, folder)
    return folder


@pytest.mark.parametrize("one", [RUNS[0], RUNS[3], RUNS[4]], ids=lambda one: one.folder)
def test_a_swept_run_is_the_separate_one(one, swept, tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS)
    separate = read_scalars(run(config_of(config, one), tmp_path / "run").folder)
    found = read_scalars(swept / one.folder)
    assert read_config(swept / one.folder)["loss"]["name"] == one.loss
    shared = set(found) & set(separate)
    assert {"reward/mean", "grad_norm", "trust_region/masked", "mismatch/abs_prob_diff_mean"} <= shared
    for tag in shared:
        if not tag.startswith("time/"):
            np.testing.assert_allclose(found[tag][1], separate[tag][1], rtol=1e-5, atol=1e-6, err_msg=tag)


def test_runs_at_once_are_runs_in_turns(tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS)
    for over in ("vmap", "map"):
        train(config, RUNS[1:4], tmp_path / over, over=over)
    for one in RUNS[1:4]:
        vmap, turns = (read_scalars(tmp_path / over / one.folder) for over in ("vmap", "map"))
        for tag in vmap:
            if not tag.startswith("time/"):
                np.testing.assert_allclose(vmap[tag][1], turns[tag][1], rtol=1e-5, atol=1e-6, err_msg=tag)


def test_a_cut_sweep_goes_on(swept, tmp_path, tmp_path_factory):
    for steps in (1, 3):
        config = small_config(tiny(tmp_path_factory), **NUMBERS | {"steps": steps})
        train(config, RUNS, tmp_path / "cut")
    for one in RUNS:
        whole, cut = (read_scalars(folder / one.folder) for folder in (swept, tmp_path / "cut"))
        assert whole.keys() == cut.keys()
        for tag in whole:
            if not tag.startswith("time/"):
                np.testing.assert_array_equal(whole[tag][1], cut[tag][1], err_msg=tag)


REFUSED = {
    "the nearest is 'ppo_clip'": ([Run("ppo_clp", 0, 1.0)], {}),
    "a sweep does without train.staleness": (RUNS[:1], dict(train__staleness=1)),
    "set loss_defaults.LOSS.ratio_cap": (RUNS[:1], dict(loss__ratio_cap=2.0)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_batched_is_refused(sentence, tmp_path_factory):
    runs, numbers = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        check(small_config(tiny(tmp_path_factory), **numbers), runs)
