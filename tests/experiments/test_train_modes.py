"""What changes a run's time alone changes nothing else: packing, slots, kept compilations, rollouts a step early."""

import contextlib
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base
from dppo_jax.devices.compilations import keep_compiled
from dppo_jax.models.decoder import abstract_params
from dppo_jax.storage.checkpoint import restore_params
from dppo_jax.storage.run_log import MACHINE, read_scalars
from experiments.study import by_step
from tests.helpers.fixtures import TINY, Run, contents, hurried, no_cache, run, same, small_config, tiny

ROWS, POSITIONS = 32, 8 + 24  # of a rollout batch; of a row: few responses are as long as they may be
MICRO_ROWS = 2
# What the slots are there to change.
WORK = {f"rollout/{name}" for name in ("decode_steps", "pages_read", "pages_live", "occupancy")}


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache") / "compiled"


@pytest.fixture(scope="module")
def start(tmp_path_factory, cache):
    """start(folder=None, **changes) runs. What it compiles is kept in `cache`; all replies are among its samples."""
    given = tiny(tmp_path_factory)

    def begin(folder=None, **changes) -> Run:
        numbers = dict(
            steps=4,
            rollout__slots=8,
            rollout__max_new_tokens=POSITIONS - 8,
            train__micro_rows=MICRO_ROWS,
            checkpoint__every=1,
            log__histograms=0,
            log__samples=1,
            log__transcripts=ROWS,
            compile_cache=str(cache),
        )
        folder = tmp_path_factory.mktemp("modes") / "run" if folder is None else folder
        config = small_config(given, **(numbers | changes))
        with no_cache() if config.compile_cache else contextlib.nullcontext():
            return run(config, folder)

    return begin


STILL = dict(optimizer__learning_rate=0.0, steps=3, checkpoint__every=0)


@pytest.fixture(scope="module")
def still(start) -> Run:
    """A learning rate of 0: the policy stays as it is."""
    return start(**STILL)


@pytest.fixture(scope="module")
def still_ahead(start, still) -> Run:
    """The same, drawn a step early."""
    return start(**STILL, train__staleness=1)


@pytest.fixture(scope="module")
def separate(start, still) -> Run:
    """The same, one sample a row, no slot ever filled anew."""
    return start(**STILL, train__pack=False, rollout__slots=0, compile_cache="")


@pytest.fixture(scope="module")
def ahead(start, still) -> Run:
    """A policy that moves, each rollout drawn before the last updates."""
    return start(train__staleness=1)


def samples(a: Run, step: int) -> list[dict]:
    lines = (a.folder / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def text(a: Run, step: int) -> list[tuple[str, str]]:
    return [(sample["prompt"], sample["reply"]) for sample in samples(a, step)]


def compiled(a: Run) -> tuple[int, int]:
    """(functions compiled, of which loaded from the cache), as the run says."""
    line = next(line for line in a.said.splitlines() if line.startswith("compiled "))
    return int(line.split()[1]), int(line.split(", ")[1].split()[0])


# --- packing and slots ---


def test_one_sample_a_row_gives_the_same_metrics_as_packed_rows(still, separate):
    """And the static batch draws what the slots draw."""
    for step in range(3):
        assert samples(still, step) == samples(separate, step)
    got, want = read_scalars(still.folder), read_scalars(separate.folder)
    assert got.keys() == want.keys()
    for tag in want.keys() - {"train/occupancy"} - WORK:
        if not tag.startswith(MACHINE):
            np.testing.assert_allclose(got[tag][1], want[tag][1], rtol=1e-4, atol=1e-6, err_msg=tag)
    assert (want["grad_norm"][1] > 0).all()


def test_occupancy_is_the_share_of_real_tokens(still, separate):
    packed, plain = (read_scalars(a.folder) for a in (still, separate))
    for step in range(3):
        real = sum(len(sample["prompt"]) for sample in samples(still, step))  # a token a character
        real += ROWS * plain["response/length_mean"][1][step]
        assert plain["train/occupancy"][1][step] == pytest.approx(real / (ROWS * POSITIONS), rel=1e-6)
        pieces = real / packed["train/occupancy"][1][step] / (MICRO_ROWS * POSITIONS)
        assert pieces == pytest.approx(round(pieces), rel=1e-5) and round(pieces) < ROWS / MICRO_ROWS


# --- rollouts a step early ---


def test_rollouts_are_not_drawn_early_unless_asked():
    assert base.get_config().train.staleness == 0


def test_a_policy_that_stays_trains_the_same_on_rollouts_drawn_early(still, still_ahead):
    same(still.folder, still_ahead.folder, but=("mismatch/", "first_minibatch/", "rollout/age_", "throughput/"))
    tag = "mismatch/abs_prob_diff_mean"  # of a rollout drawn early it has another name
    of_steps = [by_step(read_scalars(run.folder), tag) for run in (still, still_ahead)]
    np.testing.assert_array_equal(*of_steps)
    for step in range(3):
        assert samples(still, step) == samples(still_ahead, step)


def test_each_rollout_comes_from_the_policy_before_the_last_updates(still, ahead):
    """The first two from the initial policy; the updates in between show in the mismatch of the second."""
    assert text(ahead, 0) == text(still, 0) and text(ahead, 1) == text(still, 1)
    assert text(ahead, 2) != text(still, 2)
    scalars = read_scalars(ahead.folder)
    assert scalars["mismatch/abs_prob_diff_mean"][0].tolist() == [0]  # the one rollout at equal parameters
    assert scalars["mismatch/abs_prob_diff_mean"][1][0] < 1e-6
    assert (scalars["first_minibatch/abs_prob_diff_mean"][1] > 1e-4).all()
    assert (read_scalars(still.folder)["mismatch/abs_prob_diff_mean"][1] < 1e-6).all()


@pytest.mark.parametrize("name", ["still", "still_ahead", "separate", "ahead"])
def test_nothing_is_compiled_after_the_first_step_and_nothing_twice(name, request):
    """With rows waiting for slots, with lengths that differ from step to step, with rollouts drawn early."""
    a = request.getfixturevalue(name)
    assert {step for _, step in a.compilations} <= {None, 0}
    for function in ("update", "rollout", "assemble"):
        assert sum(found == f"jit({function})" for found, _ in a.compilations) <= 1, function
    seconds = read_scalars(a.folder)["time/compile"][1]
    assert seconds[0] > 0 and not seconds[1:].any()
    assert "after the first step" not in a.said


def killed(a: Run, tmp_path: Path, step: int) -> Path:
    """A copy of the run as a kill leaves it that came after the checkpoint of this step, and before the next one's."""
    copy = Path(shutil.copytree(a.folder, tmp_path / "killed"))
    for later in range(step + 1, 5):
        shutil.rmtree(copy / "checkpoints" / str(later))
    return copy


def test_a_rollout_drawn_early_is_in_the_checkpoint(ahead, start, tmp_path):
    """Killed and resumed as if nothing had happened, to the bit."""
    copy = killed(ahead, tmp_path, 2)
    for step in (2, 3):
        (copy / "samples" / f"step_{step:06d}.jsonl").unlink()
    resumed = start(copy, train__staleness=1)
    assert "going on from the checkpoint at step 2" in resumed.said
    same(ahead.folder, copy)
    for step in range(4):
        assert samples(resumed, step) == samples(ahead, step)
    trained = (restore_params(folder, abstract_params(TINY)) for folder in (ahead.folder, copy))
    jax.tree.map(np.testing.assert_array_equal, *trained)
    assert {step for _, step in resumed.compilations} <= {None, 2}


def test_a_resumed_run_may_draw_its_rollouts_in_time_again(ahead, start, tmp_path):
    """The one drawn early is still used."""
    resumed = start(killed(ahead, tmp_path, 2), train__staleness=0)
    assert "train.staleness: 1 -> 0" in resumed.said
    scalars, want = read_scalars(resumed.folder), read_scalars(ahead.folder)
    assert samples(resumed, 2) == samples(ahead, 2)
    assert scalars["grad_norm"][1][:3].tolist() == want["grad_norm"][1][:3].tolist()
    assert scalars["first_minibatch/abs_prob_diff_mean"][1][-1] > 1e-4  # of step 2
    assert scalars["mismatch/abs_prob_diff_mean"][0].tolist() == [0, 3]
    assert scalars["mismatch/abs_prob_diff_mean"][1][-1] < 1e-6
    assert text(resumed, 3) != text(ahead, 3)


# --- what was compiled ---


def test_a_second_run_loads_what_the_first_one_compiled(still, still_ahead, cache):
    """Rollout and update, which take longest; and the results of loaded functions are the same."""
    functions, loaded = compiled(still)
    assert functions > 2 and loaded == 0
    assert {file.name.split("-")[0] for file in cache.iterdir()} >= {"jit_rollout", "jit_update"}
    functions, loaded = compiled(still_ahead)
    assert functions >= loaded >= 2


def test_nothing_is_kept_where_there_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with no_cache():
        keep_compiled("")
        assert jax.config.jax_compilation_cache_dir is None
    assert not contents(tmp_path)


def test_compilations_are_kept_in_the_home_folder_unless_another_is_named(tmp_path, monkeypatch):
    folder = functools.partial(getattr, jax.config, "jax_compilation_cache_dir")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with no_cache():
        keep_compiled(base.get_config().compile_cache)
        assert folder() == str(tmp_path / ".cache" / "dppo_jax") and Path(folder()).is_dir()
        keep_compiled(str(tmp_path / "other"))
        assert folder() == str(tmp_path / ".cache" / "dppo_jax"), "one for a process"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    with no_cache():
        keep_compiled(base.get_config().compile_cache)
        assert folder() is None, "jax reads the variable by itself"
