"""The training loop: what it writes, that nothing is compiled twice, and that a kill changes nothing."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from dppo_jax.losses import LOSSES, corrects_mismatch, required_fields
from dppo_jax.models import load_policy
from dppo_jax.models.config import RopeConfig
from dppo_jax.models.decoder import abstract_params
from dppo_jax.storage.checkpoint import restore_params
from dppo_jax.storage.run_config import plain, read_config
from dppo_jax.storage.run_log import read_scalars
from experiments import eval
from experiments.run import checks
from experiments.run.setup import Setup
from tests.helpers.fixtures import (
    TINY,
    config_file,
    contents,
    finished_run,
    hurried,
    hurried_environment,
    run,
    run_config,
    same,
    small_config,
    tiny,
)
from tests.helpers.places import ROOT

TAGS = """reward/mean reward/solved_groups loss/surrogate grad_norm policy/entropy response/length_mean
    response/truncated mismatch/abs_prob_diff_mean mismatch/abs_prob_diff_max policy/abs_prob_diff_mean
    trust_region/masked trust_region/masked_positive trust_region/masked_negative trust_region/bad_updates
    ratio/ess train/occupancy time/rollout time/reward time/train time/compile throughput/tokens_per_s""".split()


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory):
    with hurried(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def proximal(folder, tmp_path_factory):
    """Everything that the finished run does not do: a recomputed anchor, top-K, epochs, more pieces, bfloat16."""
    config = small_config(
        folder,
        steps=2,
        loss__name="dppo_topk_kl_proximal",
        loss__delta_low=1e-3,
        loss__delta_high=1e-3,
        rollout__tracked=3,
        rollout__dtype="bfloat16",
        train__epochs=2,
        train__micro_rows=2,
        checkpoint__every=0,
        log__histograms=0,
        log__samples=0,
    )
    return run(config, tmp_path_factory.mktemp("proximal") / "run")


def updates(folder: Path, step: int) -> int:
    """The counter in a checkpoint."""
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        return int(manager.restore(step, args=ocp.args.StandardRestore())["updates"])


def kinds(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tb"), size_guidance={"histograms": 0, "tensors": 0}).Reload()


# --- what a run leaves ---


def test_scalars_have_every_promised_tag_at_every_step(finished):
    scalars = read_scalars(finished.folder)
    for tag in TAGS:
        assert scalars[tag][0].tolist() == [0, 1, 2, 3], tag
        assert np.isfinite(scalars[tag][1]).all(), tag
    assert 0 < scalars["reward/mean"][1].mean() < 1


def test_histograms_and_samples_come_at_their_steps(finished):
    events = kinds(finished.folder)
    for tag in ("ratio", "policy/prob_diff"):
        assert [event.step for event in events.Histograms(tag)] == [0, 2]
    lengths = read_scalars(finished.folder)["response/length_mean"][1]
    for event in events.Histograms("ratio"):
        assert event.histogram_value.num == round(32 * lengths[event.step])  # every response token, once
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 2]


def test_samples_are_read_back(finished):
    files = sorted((finished.folder / "samples").iterdir())
    assert [file.name for file in files] == ["step_000000.jsonl", "step_000002.jsonl"]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == finished.config.log.transcripts
    for row in rows:
        assert row.keys() == {"prompt", "reply", "reward", "answer"}
        assert "<eos>" not in row["reply"]
        assert eval_sum(row["prompt"]) == int(row["answer"])
    assert len({row["prompt"] for row in rows}) == len(rows)  # as many prompts as there are transcripts


def eval_sum(prompt: str) -> int:
    return sum(int(character) for character in prompt if character.isdigit())


def test_config_json_is_the_config(finished):
    assert read_config(finished.folder) == plain(finished.config.to_dict())


def test_it_ends_with_the_table_and_where_the_logs_are(finished):
    assert "reward/mean" in finished.printed
    assert f"logs: {finished.folder}" in finished.printed.splitlines()


def test_evaluation_comes_before_the_first_step_on_schedule_and_at_the_end(finished):
    scalars = read_scalars(finished.folder)
    for metric in ("avg", "pass@2", "length_mean"):
        assert scalars[f"eval/sums/{metric}"][0].tolist() == [0, 2, 4], metric
    avg, best = scalars["eval/sums/avg"][1], scalars["eval/sums/pass@2"][1]
    assert (avg <= best).all() and (best <= 2 * avg).all() and (best > 0).any()


def test_checkpoints_are_kept_and_count_updates(finished):
    steps = sorted(int(path.name) for path in (finished.folder / "checkpoints").iterdir())
    assert steps == [2, 4]
    assert [updates(finished.folder, step) for step in steps] == [4, 8]  # two minibatches a step


def test_the_exported_policy_holds_the_trained_parameters(finished, folder):
    policy = load_policy(finished.folder / "policy")
    trained = restore_params(finished.folder, abstract_params(TINY))
    jax.tree.map(np.testing.assert_array_equal, policy.params, trained)
    start = load_policy(folder / "model").params
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(trained), strict=True))
    assert AutoTokenizer.from_pretrained(finished.folder / "policy").get_vocab()["<eos>"] == 1


def test_the_eval_command_says_the_same_of_run_checkpoint_and_export(finished):
    of_run = eval.evaluate(finished.config, finished.folder)
    metrics = {f"{name}{end}" for name in ("avg", "maj", "pass@2") for end in ("", "_low", "_high")}
    metrics |= {"length_mean", "failed", "killed", "refused"}
    assert of_run.keys() == {f"eval/sums/{name}" for name in metrics}
    for name in ("avg", "maj", "pass@2"):
        low, mean, high = (of_run[f"eval/sums/{name}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low < mean < high <= 1
    assert eval.evaluate(finished.config, finished.folder / "policy") == of_run
    assert eval.evaluate(finished.config, finished.folder / "checkpoints" / "4") == of_run
    assert eval.evaluate(finished.config, finished.folder / "checkpoints" / "2") != of_run


# --- what a run computes ---


def test_nothing_is_compiled_after_the_first_step_and_nothing_twice(finished):
    steps = [step for _, step in finished.compilations]
    assert set(steps) <= {None, 0}
    count = lambda name: sum(function == f"jit({name})" for function, _ in finished.compilations)  # noqa: E731
    assert {name: count(name) for name in ("update", "assemble", "group_mean")} == dict(
        update=1, assemble=1, group_mean=1
    )
    assert count("rollout") == 2  # for training and for evaluation


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_step_with_a_proximal_policy_either(proximal):
    assert {step for _, step in proximal.compilations} <= {None, 0}
    assert sum(function == "jit(recompute)" for function, _ in proximal.compilations) == 1


def test_mismatch_is_nothing_in_one_precision_and_something_in_two(finished, proximal):
    same_precision, mixed = read_scalars(finished.folder), read_scalars(proximal.folder)
    for tag in ("mismatch/abs_prob_diff_mean", "mismatch/abs_prob_diff_max"):
        assert (same_precision[tag][1] < 1e-6).all()
        assert (mixed[tag][1] > 1e-5).all() and (mixed[tag][1] < 1e-2).all()


def test_minibatches_move_the_policy_away_from_the_rollout(finished):
    """Several updates per rollout really happen: the first minibatch has a ratio of 1, later ones have not."""
    scalars = read_scalars(finished.folder)
    assert (scalars["policy/abs_prob_diff_max"][1][1:] > 1e-3).all()
    assert (scalars["trust_region/masked"][1][1:] > 0).all()
    assert (scalars["ratio/ess"][1] <= 1 + 1e-6).all()


def test_epochs_multiply_the_updates(proximal):
    assert updates(proximal.folder, 2) == 2 * 2 * 2  # steps, epochs, minibatches


def test_a_proximal_topk_loss_masks(proximal):
    scalars = read_scalars(proximal.folder)
    for tag in TAGS:
        assert scalars[tag][0].tolist() == [0, 1] and np.isfinite(scalars[tag][1]).all(), tag
    assert (scalars["loss/divergence"][1] > 0).all()
    assert (scalars["trust_region/masked"][1] > 0).any()
    assert not (proximal.folder / "samples").exists()
    assert not kinds(proximal.folder).Tags()["histograms"]


def test_a_run_is_a_function_of_its_config_and_seed(finished, folder, tmp_path):
    run(run_config(folder), tmp_path / "again")
    same(finished.folder, tmp_path / "again")
    for sample in (finished.folder / "samples").iterdir():
        assert sample.read_bytes() == (tmp_path / "again" / "samples" / sample.name).read_bytes()
    run(run_config(folder, steps=1, seed=1), tmp_path / "other")
    first = (finished.folder / "samples" / "step_000000.jsonl").read_text()
    assert first != (tmp_path / "other" / "samples" / "step_000000.jsonl").read_text()


def test_every_step_and_row_draws_numbers_of_its_own(folder, tmp_path):
    """One question over and over: the same numbers would begin most replies with the same character."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "0+1=", "answer": 1}\n')
    changes = dict(steps=2, log__samples=1, log__transcripts=32, data__path=str(tmp_path / "one.jsonl"))
    run(run_config(folder, **changes), tmp_path / "run")
    first, second = (
        [json.loads(line)["reply"] for line in file.read_text().splitlines()]
        for file in sorted((tmp_path / "run" / "samples").iterdir())
    )
    assert len(first) == len(second) == 32
    assert sum(a[:1] == b[:1] for a, b in zip(first, second, strict=True)) < 16
    assert len(set(first)) > 24  # some are short: three in a hundred are empty


def test_the_longest_row_of_a_run_chooses_the_factors_of_longrope(folder):
    """In training and evaluation together: a token has one log-probability in a run."""
    factors = (1.0,) * (TINY.head_dim // 2)
    rope = RopeConfig(1e4, "longrope", original_max_position=20, short_factor=factors, long_factor=factors, long=True)
    model = dataclasses.replace(TINY, rope=rope)

    def is_long(**changes) -> bool:
        setup = Setup(small_config(folder, data__max_prompt_len=8, **changes), model)
        assert setup.trained_model.rope == setup.behavior_model.rope == setup.model.rope
        return setup.model.rope.long

    assert not is_long(rollout__max_new_tokens=12) and is_long(rollout__max_new_tokens=13)
    for longest in (12, 13):
        sets = {"hard": {**small_config(folder).data, "max_prompt_len": 8}}
        assert is_long(rollout__max_new_tokens=4, eval__sets=sets, eval__max_new_tokens=longest) == (longest == 13)


def test_minibatches_are_whole_groups_and_every_row_once_an_epoch(folder):
    config = small_config(folder, train__epochs=3, train__minibatches=4)
    for step in (0, 5):
        parts = list(Setup(config).minibatches(step))
        assert len(parts) == 12
        for part in parts:
            assert part.dtype == np.int32
            assert (part.reshape(-1, 4) == part.reshape(-1, 4)[:, :1] + np.arange(4)).all()
            assert (part.reshape(-1, 4)[:, 0] % 4 == 0).all()
        epochs = [np.concatenate(parts[i : i + 4]) for i in (0, 4, 8)]
        assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
        assert epochs[0].tolist() == list(range(32))
        assert len({epoch.tobytes() for epoch in epochs}) == 3
        again = np.concatenate(list(Setup(config).minibatches(step)))
        np.testing.assert_array_equal(np.concatenate(parts), again)
    assert any((a != b).any() for a, b in zip(Setup(config).minibatches(0), Setup(config).minibatches(5), strict=True))


# --- stopping and going on ---


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(folder, tmp_path, tmp_path_factory):
    """SIGKILL at any moment after the first checkpoint; the event file and checkpoints are what the kill left."""
    killed, changes = tmp_path / "killed", dict(eval__every=3, eval__prompts=8)
    config = config_file(tmp_path / "config.py", folder, "run_config", steps=100_000, **changes)
    command = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={killed}"]
    with subprocess.Popen(command, cwd=ROOT, env=hurried_environment(tmp_path_factory)) as process:
        while not (killed / "checkpoints" / "2").is_dir() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    latest = max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit())
    steps = latest + 3
    said = run(run_config(folder, steps=steps, **changes), killed).said
    assert f"going on from the checkpoint at step {latest}" in said
    assert f"steps: 100000 -> {steps}" in said
    run(run_config(folder, steps=steps, **changes), tmp_path / "whole")
    same(killed, tmp_path / "whole")
    assert read_scalars(killed)["grad_norm"][0].tolist() == list(range(steps))
    policies = [load_file(path / "policy" / "model.safetensors") for path in (killed, tmp_path / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *policies)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "run"))


def test_a_finished_run_is_left_alone(finished, folder, copied):
    before = contents(copied)
    again = run(run_config(folder, steps=3), copied)
    assert f"nothing to do: {copied} has 4 of 3 steps" in again.printed
    assert f"logs: {copied}" in again.printed
    after = contents(copied)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"config.json"}  # steps


def test_an_end_cut_short_is_made_up_for(finished, copied):
    """Killed after the last checkpoint, before the last evaluation and the export."""
    shutil.rmtree(copied / "policy")
    run(finished.config, copied)
    same(finished.folder, copied)
    before, after = (load_file(path / "policy" / "model.safetensors") for path in (finished.folder, copied))
    jax.tree.map(np.testing.assert_array_equal, before, after)


# --- losses by name ---


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_passes_the_check_with_its_defaults(folder, name):
    alpha = dict(loss__alpha=0.3) if name.startswith("relax_") else {}
    teacher = dict(teacher__path=str(folder / "model")) if name == "distill" else {}
    config = small_config(folder, loss__name=name, **alpha, **teacher)
    checks.check(config)
    corrected = ("token_tis", "sequence_tis", "token_mis", "sequence_mis", "icepop")
    recomputed = (*corrected, "ppo_clip_recomputed", "minirl", "minirl_tis")
    needed = {"proximal_logp"} if name.endswith("_proximal") or name in recomputed else set()
    needed |= {field for field in ("topk", "exact") if f"_{field}_" in name}
    needed |= {"exact.slope"} if name.startswith("pdm_exact") else set()
    needed |= {"distill": {"teacher_logp"}, "estr": {"behavior_entropy"}}.get(name, set())
    assert required_fields(Setup(config).loss) == needed
    assert corrects_mismatch(LOSSES[name]) == (name in corrected)


def test_a_hyperparameter_that_is_set_goes_before_the_default_even_if_it_is_zero(folder):
    bound = Setup(small_config(folder, loss__ratio_cap=0.0, loss__delta_low=0.5)).loss
    assert bound.keywords == dict(delta_low=0.5, delta_high=0.01, ratio_cap=0.0)
    assert Setup(small_config(folder, loss__name="pg_is")).loss.keywords == dict(ratio_cap=float("inf"))


@pytest.mark.slow
def test_a_loss_of_ones_own_is_one_function_in_the_config_file(folder, tmp_path, tmp_path_factory):
    """Selected by name, with a hyperparameter of its own and a metric of its own, on the command line."""
    (tmp_path / "mine.py").write_text(
        f"""
from pathlib import Path

import jax.numpy as jnp

from dppo_jax.losses import LOSSES, from_keep
from tests.helpers.fixtures import small_config


def entropic(inputs, *, floor, ratio_cap):
    rare = inputs.behavior_logp < jnp.log(floor)
    return from_keep(inputs, ~rare, ratio_cap=ratio_cap, metrics={{"rare": (rare.astype(float), inputs.mask)}})


LOSSES["entropic"] = entropic


def get_config():
    return small_config(Path({str(folder)!r}), steps=1)
"""
    )
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        f"--config={tmp_path / 'mine.py'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    overrides = ["--config.loss.name=entropic", "--config.loss.floor=0.06", "--config.loss.ratio_cap=2"]
    environment = hurried_environment(tmp_path_factory)
    done = subprocess.run([*command, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scalars = read_scalars(tmp_path / "run")
    assert 0 < scalars["loss/rare"][1][0] < 1
    assert scalars["trust_region/masked"][1][0] > 0
    assert read_config(tmp_path / "run")["loss"]["floor"] == 0.06
    refused = subprocess.run([*command, overrides[0]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "loss 'entropic' needs loss.floor, loss.ratio_cap, which nothing sets" in refused.stderr
