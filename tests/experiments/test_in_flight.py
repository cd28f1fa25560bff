"""Runs with rows in flight: what is trained, logged, saved and refused."""

import shutil

import numpy as np
import pytest

from dppo_jax.errors import UserError
from dppo_jax.storage.run_log import read_scalars
from experiments import sweep
from experiments.run.checks import check
from experiments.sweep import Run as SweepRun
from experiments.train import train
from tests.helpers.fixtures import Run, hurried, run, same, small_config, tiny

IN_FLIGHT = dict(rollout__in_flight=2, rollout__max_age=3, rollout__slots=8, rollout__max_new_tokens=16)


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Run:
    changes = dict(steps=6, checkpoint__every=1, rollout__pages=0, **IN_FLIGHT)
    return run(small_config(folder, **changes), tmp_path_factory.mktemp("in_flight") / "run")


def column(scalars, tag: str) -> np.ndarray:
    return np.asarray(scalars[tag][1])


def test_the_log_says_how_old_tokens_are_and_what_is_under_way(finished):
    scalars = read_scalars(finished.folder)
    mean, most = column(scalars, "rollout/age_mean"), column(scalars, "rollout/age_max")
    assert most[0] == 0 < most.max() <= 3 and (mean <= most).all() and mean.max() > 0
    left = column(scalars, "rollout/in_flight")
    assert left[-1] == 0 < left.max() <= 8
    assert (column(scalars, "rollout/pages_read") >= column(scalars, "rollout/pages_live")).all()
    assert (column(scalars, "rollout/put_back") == 0).all()


def test_tokens_of_several_parameters_are_no_mismatch_at_equal_ones(finished):
    scalars = read_scalars(finished.folder)
    steps = np.asarray(scalars["rollout/age_max"][0])
    equal = column(scalars, "rollout/age_max") == 0
    np.testing.assert_array_equal(scalars["mismatch/abs_prob_diff_mean"][0], steps[equal])
    np.testing.assert_array_equal(scalars["first_minibatch/abs_prob_diff_mean"][0], steps[~equal])
    assert column(scalars, "mismatch/abs_prob_diff_mean").max() < 1e-5


def test_nothing_is_compiled_after_the_first_step(finished):
    assert {step for _, step in finished.compilations} <= {None, 0}


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(finished, step, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.folder, again)
    for later in range(step + 1, 7):
        shutil.rmtree(again / "checkpoints" / str(later))
    said = run(finished.config, again).said
    assert f"going on from the checkpoint at step {step}" in said
    same(finished.folder, again)


def test_without_rows_in_flight_nothing_is_old(folder, tmp_path):
    scalars = read_scalars(run(small_config(folder, steps=2), tmp_path / "run").folder)
    for name in ("age_mean", "age_max", "in_flight", "put_back"):
        assert not column(scalars, f"rollout/{name}").any()
    assert (column(scalars, "rollout/pages_live") > 0).all()


def test_a_loss_with_a_proximal_policy_has_the_parameters_of_the_step(folder, tmp_path):
    changes = dict(steps=3, loss__name="dppo_binary_tv_proximal", optimizer__learning_rate=0.0, **IN_FLIGHT)
    scalars = read_scalars(run(small_config(folder, **changes), tmp_path / "run").folder)
    # Nothing moves: behavior, proximal and trained policy agree however old a token is.
    assert column(scalars, "rollout/age_max").max() > 0
    assert column(scalars, "first_minibatch/abs_prob_diff_max").max() < 1e-5


REFUSED = {
    "rollout.max_age = 2 is of rows in flight: set rollout.in_flight to at least 1": dict(rollout__max_age=2),
    "rollout.max_age = 1 is below rollout.in_flight = 2": dict(rollout__in_flight=2, rollout__max_age=1),
    "exact divergences need those of every token": dict(rollout__in_flight=1, loss__name="dppo_exact_tv"),
    "train.staleness and rollout.in_flight both age": dict(rollout__in_flight=1, train__staleness=1),
    "rollout.lag and rollout.in_flight both age": dict(rollout__in_flight=1, rollout__lag=1),
    "rollout.resample draws whole batches": dict(rollout__in_flight=1, rollout__resample=1),
    "rollout.router_replay needs one set of experts a token": dict(rollout__in_flight=1, rollout__router_replay=True),
    "rollout.in_flight must be at least 0, not -1": dict(rollout__in_flight=-1),
    "rollout.pages = 3, but rollout.cache = 'blocks' has none": dict(rollout__pages=3, rollout__cache="blocks"),
    "rollout.pages = 1 is less than one row may need": dict(rollout__pages=1, rollout__max_new_tokens=200),
    "unknown rollout.cache 'page'; the nearest is 'pages'": dict(rollout__cache="page"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_it_is_refused_in_one_sentence(folder, said):
    with pytest.raises(UserError) as caught:
        check(small_config(folder, **REFUSED[said]))
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_run_does_not_go_on_with_other_rows_in_flight(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.folder, again)
    config = finished.config.copy_and_resolve_references()
    config.rollout.in_flight, config.steps = 3, 8
    with pytest.raises(UserError, match=r"rollout\.in_flight"):
        train(config, again)


def test_a_finished_run_may_have_more_steps(finished, tmp_path):
    """Nothing is in flight at its end, so the next prompts begin there."""
    again = tmp_path / "again"
    shutil.copytree(finished.folder, again)
    config = finished.config.copy_and_resolve_references()
    config.steps = 9
    said = run(config, again).said
    assert "steps: 6 -> 9" in said
    ages = column(read_scalars(again), "rollout/age_max")
    assert len(ages) == 9 and ages[6] == 0 and ages[7:].max() > 0


def test_a_run_that_ends_early_says_what_it_leaves_in_flight(finished, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished.folder, again)
    for later in (5, 6):
        shutil.rmtree(again / "checkpoints" / str(later))
    config = finished.config.copy_and_resolve_references()
    config.steps = 5
    groups = config.rollout.prompts  # those of the batch that joined for step 6
    assert f"steps was lowered: {groups} groups that are in flight will not be trained" in run(config, again).said


def test_a_sweep_has_rows_in_flight_as_its_runs_have(folder, tmp_path):
    changes = dict(steps=3, checkpoint__every=0, loss__name="pg_is", optimizer__eps=1e-4, **IN_FLIGHT)
    config = small_config(folder, **changes)
    runs = [SweepRun("pg_is", 0, 1.0), SweepRun("cispo", 1, 1.0)]
    sweep.train(config, runs, tmp_path / "swept")
    for one in runs:
        alone = run(sweep.config_of(config, one), tmp_path / one.loss)
        swept, apart = read_scalars(tmp_path / "swept" / one.folder), read_scalars(alone.folder)
        assert column(apart, "rollout/age_max").max() > 0
        for tag in ("rollout/age_mean", "rollout/decode_steps", "rollout/in_flight", "response/length_mean"):
            np.testing.assert_array_equal(column(swept, tag), column(apart, tag), err_msg=tag)
        for tag in ("reward/mean", "policy/abs_prob_diff_mean"):
            np.testing.assert_allclose(column(swept, tag), column(apart, tag), rtol=1e-4, atol=1e-6, err_msg=tag)
