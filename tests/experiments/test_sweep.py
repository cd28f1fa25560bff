"""A sweep against separate runs, resumed, and what it refuses."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dppo_jax.errors import UserError
from dppo_jax.storage.checkpoint import restore_params
from dppo_jax.storage.run_config import read_config
from dppo_jax.storage.run_log import MACHINE, read_scalars
from experiments.sweep import Run, check, config_of, make_runs, train
from tests.helpers.fixtures import hurried, run, run_config, small_config, tiny

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
        if not tag.startswith(MACHINE):
            np.testing.assert_allclose(found[tag][1], separate[tag][1], rtol=1e-5, atol=1e-6, err_msg=tag)


def test_runs_at_once_are_runs_in_turns(tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS)
    runs = [*RUNS[1:3], *make_runs([], ["gspo"], [1.0], [1])]
    for over in ("vmap", "map"):
        train(config, runs, tmp_path / over, over=over)
    for one in runs:
        vmap, turns = (read_scalars(tmp_path / over / one.folder) for over in ("vmap", "map"))
        for tag in vmap:
            if not tag.startswith(MACHINE):
                np.testing.assert_allclose(vmap[tag][1], turns[tag][1], rtol=1e-5, atol=1e-6, err_msg=tag)


def test_a_sweep_has_all_that_a_run_has(tmp_path, tmp_path_factory):
    """Evaluation, shadow losses, counted tokens, a reference, resampling, early draws, transcripts, an export."""
    numbers = NUMBERS | dict(steps=2, rollout__lag=0, reference__coef=0.1, log__regions=("cispo",))
    numbers |= dict(log__tokens=1, log__samples=1, eval__every=1, rollout__resample=2)
    config = run_config(tiny(tmp_path_factory), **numbers)
    runs = [Run("dppo_binary_tv", 0, 1.0), Run("token_tis", 1, 0.5)]
    train(config, runs, tmp_path / "sweep")
    for one in runs[1:]:
        separate = run(config_of(config, one), tmp_path / one.folder).folder
        found, want = read_scalars(tmp_path / "sweep" / one.folder), read_scalars(separate)
        assert found.keys() == want.keys()
        assert {"eval/sums/avg", "region/cispo/masked", "learning_rate", "rollout/resampled"} <= found.keys()
        for tag in found:
            if not tag.startswith(MACHINE):
                np.testing.assert_allclose(found[tag][1], want[tag][1], rtol=1e-4, atol=1e-6, err_msg=tag)
        for file in (separate / "samples").iterdir():
            assert file.read_text() == (tmp_path / "sweep" / one.folder / "samples" / file.name).read_text()
        exports = (at / "policy" / "model.safetensors" for at in (separate, tmp_path / "sweep" / one.folder))
        policies = map(load_file, exports)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), *policies)


def test_rollouts_of_a_sweep_are_drawn_early_too(tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS | dict(rollout__lag=0, train__staleness=1))
    runs = [Run("ppo_clip", 0, 1.0), Run("cispo", 1, 1.0)]
    train(config, runs, tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "checkpoints" / "3")
    train(config, runs, tmp_path / "sweep")  # from step 2, whose rollout is in the checkpoint
    for one in runs[1:]:
        separate = run(config_of(config, one), tmp_path / one.folder).folder
        found, want = read_scalars(tmp_path / "sweep" / one.folder), read_scalars(separate)
        for tag in ("reward/mean", "grad_norm", "policy/abs_prob_diff_mean"):
            np.testing.assert_allclose(found[tag][1], want[tag][1], rtol=1e-4, atol=1e-6, err_msg=tag)


def test_a_run_that_diverges_stops_its_sweep(tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS)
    with pytest.raises(UserError, match="so training stops.*; there is no checkpoint"):
        train(config, [Run("ppo_clip", 0, 1.0), Run("ppo_clip", 0, 1e30)], tmp_path / "sweep")


def test_a_cut_sweep_goes_on(swept, tmp_path, tmp_path_factory):
    for steps in (1, 3):
        config = small_config(tiny(tmp_path_factory), **NUMBERS | {"steps": steps})
        train(config, RUNS, tmp_path / "cut")
    for one in RUNS:
        whole, cut = (read_scalars(folder / one.folder) for folder in (swept, tmp_path / "cut"))
        assert whole.keys() == cut.keys()
        for tag in whole:
            if not tag.startswith(MACHINE):
                np.testing.assert_array_equal(whole[tag][1], cut[tag][1], err_msg=tag)


@pytest.mark.parametrize("runs", [RUNS[::-1], RUNS[:2], [*RUNS, Run("cispo", 0, 1.0)]], ids=["order", "fewer", "more"])
def test_states_go_to_the_runs_that_they_are_of(runs, swept, tmp_path, tmp_path_factory):
    """A folder that holds a config.json says nothing of the checkpoint."""
    own = shutil.copytree(swept, tmp_path / "sweep")
    shutil.copytree(own / RUNS[0].folder, own / "cispo" / "seed_0")
    config = small_config(tiny(tmp_path_factory), **NUMBERS | {"steps": 4})
    with pytest.raises(UserError, match="its checkpoint has the runs ppo_clip/seed_0, .*--seeds as they were"):
        train(config, runs, own)


def test_the_folders_of_a_sweep_and_of_a_run_are_told_apart(swept, tmp_path, tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), **NUMBERS)
    for folder, sentence in ((swept, "holds a sweep"), (swept / RUNS[0].folder, "is a run of the sweep in")):
        with pytest.raises(UserError, match=sentence):
            run(config_of(config, RUNS[0]), folder)
        with pytest.raises(UserError, match="checkpoint.export=True"):
            restore_params(folder, {})
    alone = run(config_of(config, RUNS[0]), tmp_path / "run").folder
    with pytest.raises(UserError, match="holds a run, which experiments.train goes on with"):
        train(config, RUNS, alone)


def test_a_finished_sweep_says_so(swept, tmp_path_factory, capsys):
    train(small_config(tiny(tmp_path_factory), **NUMBERS), RUNS, swept)
    assert capsys.readouterr().out == f"nothing to do: {swept} has 3 of 3 steps\nlogs: {swept}\n"


def test_numbers_of_the_configs_own_loss_are_of_no_other(tmp_path_factory):
    config = small_config(tiny(tmp_path_factory), loss__name="cispo", loss__ratio_cap=2.0)
    runs = [Run("cispo", 0, 1.0), Run("pg_is", 0, 1.0)]
    check(config, runs)
    assert [config_of(config, one).loss.ratio_cap for one in runs] == [2.0, None]


# An advantage, an aggregation, a penalty, shaped rewards, further batches or left-out groups of their own.
METHODS_APART = ("gspo", "dapo", "cispo", "scale_rl", "dr_grpo", "max_rl", "dppo_binary_tv", "grpo")


def test_swept_methods_are_the_separate_ones(tmp_path, tmp_path_factory):
    numbers = dict(steps=2, policy__head_float32=True, optimizer__eps=1e-4, checkpoint__every=0)  # as scale_rl has it
    config = small_config(tiny(tmp_path_factory), **numbers)
    runs = [run._replace(seed=number % 2) for number, run in enumerate(make_runs([], METHODS_APART, [1.0], [0]))]
    train(config, runs, tmp_path / "sweep")
    for one in runs:
        separate = run(config_of(config, one), tmp_path / one.folder).folder
        assert read_config(tmp_path / "sweep" / one.folder) == read_config(separate)
        found, want = read_scalars(tmp_path / "sweep" / one.folder), read_scalars(separate)
        assert found.keys() == want.keys()
        assert (want["rollout/resampled"][1].max() > 0) == (one.method == "dapo")
        for tag in found:
            if not tag.startswith(MACHINE):
                message = f"{one.method}: {tag}"
                np.testing.assert_allclose(found[tag][1], want[tag][1], rtol=1e-5, atol=1e-6, err_msg=message)


REFUSED: dict[str, tuple[list[Run], dict]] = {
    "the nearest is 'ppo_clip'": ([Run("ppo_clp", 0, 1.0)], {}),
    "without advantage.name = gae: critics": (RUNS[:1], dict(advantage__name="gae", loss__name="ppo_clip")),
    "a sweep does without alp.sigma: its noise": (RUNS[:1], dict(alp__sigma=0.1)),
    "a sweep does without lora.rank: adapters": (RUNS[:1], dict(lora__rank=2)),
    "not among the losses of this sweep; leave it out, or unset it: loss.delta_low=None": (
        [Run("gspo", 0, 1.0)], dict(loss__delta_low=0.1)
    ),
    "not among the losses of this sweep; set loss_defaults.dppo_binary_kl.delta_low, and leave it out": (
        [Run("gspo", 0, 1.0), Run("dppo_binary_kl", 0, 1.0)], dict(loss__delta_low=0.1)
    ),
    "loss_defaults.dis.eps_low = 0.1 reaches no run: method 'dis_math' sets loss.eps_low itself; give --losses": (
        [Run("dis", 0, 1.0, "dis_math")], dict(loss_defaults__dis__eps_low=0.1)
    ),
    r"relax_low.alpha\)": ([Run("relax_low", 0, 1.0)], {}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_batched_is_refused(sentence, tmp_path_factory):
    runs, numbers = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        check(small_config(tiny(tmp_path_factory), **numbers), runs)
