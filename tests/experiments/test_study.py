"""The questions of experiments/: their arms, what is trained, and what is said of it."""

import importlib
import json
import shutil

import numpy as np
import pytest

from configs import reuse
from configs.methods import loss_of
from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import write_config
from dppo_jax.storage.run_log import RunLog, read_scalars
from experiments.questions.survival import __main__ as survival_command
from experiments.questions.survival import report as survival
from experiments.questions.survival.pull import measure
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.study import TAGS, Arm, markdown, summary, train
from experiments.sweep import Run, config_of
from tests.helpers.fixtures import hurried, small_config, tiny
from tests.helpers.places import ROOT

QUESTIONS = ("necessity", "anchor", "minimal_mask", "low_probability", "approximations", "sensitivity", "age")


def arms(question: str) -> list[Arm]:
    return importlib.import_module(f"experiments.questions.{question}.__main__").ARMS


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_arm_is_a_run(question):
    found = arms(question)
    assert len({arm.name for arm in found}) == len(found)
    for arm in found:
        checks.check(config_of(arm.config(reuse.get_config()), Run(arm.loss, 0, 1.0)))


def test_an_arm_may_be_a_method():
    arm = Arm.of("grpo", (("rollout.in_flight", 2),))
    assert arm.name == "grpo_in_flight2"
    (run,) = arm.runs([1])
    own = config_of(arm.config(reuse.get_config()), run)
    assert (run.folder, own.rollout.in_flight, own.loss.name) == ("grpo/seed_1", 2, "ppo_clip")
    assert (own.advantage.name, own.reference.coef) == ("group_mean_std", 0.04)
    for key in ("advantage.name", "loss.eps_low", "loss_defaults.gspo.eps_low"):
        with pytest.raises(UserError, match=f"an arm sets {key}, which method 'gspo' has for itself"):
            Arm.of("gspo", ((key, 0.1),))
    with pytest.raises(UserError, match="the nearest is 'gspo'"):
        Arm.of("gsp")


def test_an_arm_scales_thresholds_and_nothing_else():
    config = reuse.get_config()
    before = config.loss_defaults.dppo_binary_tv.to_dict()
    scaled = Arm("dppo_binary_tv", 4.0, (("delta_low", 0.3),))
    assert scaled.name == "dppo_binary_tv_x4_delta_low0.3"
    assert scaled.config(config).loss_defaults.dppo_binary_tv.to_dict() == dict(
        delta_low=0.3, delta_high=0.2, ratio_cap=5.0
    )
    assert config.loss_defaults.dppo_binary_tv.to_dict() == before


def test_arms_swept_are_arms_trained_apart(tmp_path, tmp_path_factory):
    """With the exact divergence, whose oracle runs at the rollout's parameters."""
    changes = dict(steps=2, loss__name="pg_is", rollout__activations="m4", optimizer__eps=1e-4)
    config, arm = small_config(tiny(tmp_path_factory), **changes), Arm("dppo_exact_tv", 1e-4)
    with hurried(tmp_path_factory):
        for separate in (False, True):
            train(config, [arm], tmp_path / str(separate), range(1), separate=separate)
    swept, apart = (read_scalars(tmp_path / s / arm.name / "dppo_exact_tv" / "seed_0") for s in ("False", "True"))
    assert swept["trust_region/masked"][1].max() > 0
    for tag in TAGS:
        np.testing.assert_allclose(swept[tag][1], apart[tag][1], rtol=1e-5, atol=1e-6, err_msg=tag)


def scalars(rewards: list[float]):
    steps = np.arange(len(rewards))
    return {tag: (steps, np.asarray(rewards if tag == TAGS[0] else [0.125] * len(rewards))) for tag in TAGS}


def test_a_summary_counts_seeds_and_pairs_them():
    up, down = [0.5] + [0.75] * 12, [0.5] + [0.25] * 12
    found = summary({"a": [scalars(up), scalars(up)], "b": [scalars(up), scalars(down)]})
    assert (found["start"], found["seeds"], found["steps"]) == (0.5, 2, 13)
    a, b = found["arms"]["a"], found["arms"]["b"]
    assert (a["collapsed"], b["collapsed"]) == (0, 1)
    assert b["by seed"] == [0.75, 0.25] and b["outcome"] == [0.5, 0.25, 0.75]
    assert b["minus the first"] == [-0.25, -0.5, 0.0] and a["minus the first"] == [0, 0, 0]
    assert "| `b` | 0.50 [0.25, 0.75] |" in markdown(found) and "| 1 of 2 | 12.50% |" in markdown(found)


@pytest.mark.parametrize("separate", [False, True])
def test_no_arm_is_trained_where_another_is_refused(tmp_path, separate):
    config = reuse.get_config()
    config.rollout.lag = 1
    arms = Arm("cispo"), Arm("cispo", settings=(("rollout.in_flight", 2),))
    with pytest.raises(UserError, match="rollout.lag"):
        train(config, arms, tmp_path / "study", range(1), separate=separate)
    assert not (tmp_path / "study").exists()


def test_arms_with_settings_are_compared_with_their_loss_without():
    up, down = [0.5] + [0.75] * 12, [0.5] + [0.25] * 12

    def run(rewards: list[float], age: float):
        return scalars(rewards) | {"rollout/age_mean": (np.arange(13), np.full(13, age))}

    arms = Arm("cispo"), Arm("cispo", settings=(("rollout.in_flight", 2),))
    assert [arm.name for arm in arms] == ["cispo", "cispo_in_flight2"]
    assert arms[1].config(reuse.get_config()).rollout.in_flight == 2
    found = summary(
        {"pg_is": [run(down, 0)] * 2, "cispo": [run(up, 0)] * 2, "cispo_in_flight2": [run(up, 1.5), run(down, 1.5)]},
        {"cispo_in_flight2": "cispo"},
    )
    by_arm = {name: arm["minus its loss's first"] for name, arm in found["arms"].items()}
    assert by_arm == {"pg_is": [0, 0, 0], "cispo": [0, 0, 0], "cispo_in_flight2": [-0.25, -0.5, 0]}
    assert markdown(found).splitlines()[-1].endswith("| 1.50 |")


def test_a_map_tells_survivors_by_cell(tmp_path):
    def write(cell: str, lag: int, seed: int, ends: float, steps: int = 12, name: str = "pg_is") -> None:
        folder = tmp_path / cell / name / f"seed_{seed}"
        activations, _, weights = cell.removesuffix("/edge").partition("+")
        config = dict(
            steps=12,
            rollout=dict(activations=activations, weights=weights, lag=lag),
            loss=dict(name=loss_of(name)),
            loss_defaults={},
            optimizer=dict(learning_rate=3e-4),
        )
        write_config(folder, config)
        with RunLog(folder, hparams=config, resume_step=0, total_steps=12) as log:
            for step in range(steps):
                log.scalars(step, {"reward/mean": ends if step else 0.5, survival.DRIFT: 0.01})

    write("m1", 0, 0, 0.75)
    write("m1", 0, 1, 0.25)
    write("m1/edge", 0, 2, 0.25)  # seeds that came later, in a sweep of their own
    write("m1+m2", 16, 0, 0.25)
    write("m1+m2", 16, 1, 0.75, steps=11)  # cut short
    text = survival.report(tmp_path, tmp_path / "out")
    found = {(cell["mismatch"], cell["lag"]): cell for cell in json.loads((tmp_path / "out" / "map.json").read_text())}
    assert {key: (cell["survived"], cell["seeds"]) for key, cell in found.items()} == {
        ("m1", 0): (1, 3),
        ("m1+m2", 16): (0, 1),
    }
    assert found["m1", 0]["outcome"][0] == pytest.approx(1.25 / 3, abs=1e-5)
    assert "| `pg_is` | 0.0003 | 1/3 · 0.42 | 0/1 · 0.25 |" in text
    assert "- of 3: 1: 0.01 to 0.91" in text
    assert (tmp_path / "out" / "map.png").stat().st_size > 5_000
    shutil.rmtree(tmp_path / "m1+m2")
    assert survival.report(tmp_path, tmp_path / "out") == text  # what an earlier report has stays
    for method, ends in (("dr_grpo", 0.75), ("max_rl", 0.25)):  # of one loss
        write("m1", 0, 0, ends, name=method)
    text = survival.report(tmp_path, tmp_path / "out")
    assert "| `dr_grpo` | 0.0003 | 1/1 · 0.75 |" in text and "| `max_rl` | 0.0003 | 0/1 · 0.25 |" in text


def test_a_map_tells_apart_runs_with_other_thresholds(tmp_path):
    numbers = {"a": {"eps_high": 0.2}, "b": {"eps_high": 0.08}, "c": {"eps_high": 0.2}}
    configs = {
        tmp_path / cell / "clip_higher" / "seed_0": dict(
            loss=dict(name="clip_higher"), loss_defaults=dict(clip_higher=found | {"ratio_cap": 5.0})
        )
        for cell, found in numbers.items()
    }
    names = list(survival.names_of(configs).values())
    assert names == ["clip_higher, eps_high 0.2", "clip_higher, eps_high 0.08", "clip_higher, eps_high 0.2"]


def test_a_map_of_runs_that_are_all_unfinished_is_refused(tmp_path):
    config = load_config(str(ROOT / "configs/studies/survival.py"), ["--config.steps=12"]).to_dict()
    for seed in range(2):
        folder = tmp_path / "m1_lag0" / "pg_is" / f"seed_{seed}"
        write_config(folder, config)
        with RunLog(folder, hparams=config, resume_step=0, total_steps=12) as log:
            log.scalars(0, {"reward/mean": 0.5})
    with pytest.raises(UserError, match="none of the 2 runs in .* is finished; train them to their end first"):
        survival.report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_region_around_a_rounded_rollout_masks_before_any_update(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/studies/pull.py", ["--config.rollout.activations=m1", "--config.compile_cache="])
    found = measure(config, ["pg_is", "clip_higher", "clip_unsigned", "minirl"], batches=1)["losses"]
    assert found["pg_is"]["masked"] == found["minirl"]["masked"] == 0
    assert 0.03 < found["clip_higher"]["masked"] < found["clip_unsigned"]["masked"]
    assert found["clip_higher"]["pull"] > found["clip_unsigned"]["pull"]


def test_the_edge_of_a_map_is_where_seeds_differ(tmp_path):
    ends = {("cispo", 0): 0.75, ("cispo", 1): 0.25, ("pg_is", 0): 0.25, ("pg_is", 1): 0.25}
    for (loss, seed), end in ends.items():
        folder = tmp_path / Run(loss, seed, 1.0).folder
        with RunLog(folder, hparams={}, resume_step=0, total_steps=12) as log:
            for step in range(12):
                log.scalars(step, {"reward/mean": end if step else 0.5})
    found = survival.edges(tmp_path, [Run(loss, seed, 1.0) for loss, seed in ends], range(2, 4))
    assert found == [Run("cispo", 2, 1.0), Run("cispo", 3, 1.0)]


def test_an_edge_is_not_less_than_the_seeds_nor_another_one(tmp_path, monkeypatch):
    command = ["survival", "--config", str(ROOT / "configs/studies/survival.py"), "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--seeds", "3", "--edge", "2"])
    with pytest.raises(UserError, match="--edge must be at least --seeds = 3"):
        survival_command.main()
    for seed in (3, 4):
        write_config(tmp_path / "edge" / "cispo" / f"seed_{seed}", {})
    with pytest.raises(UserError, match="has 2 runs of another edge than the 1 of --edge and --seeds"):
        survival_command.train_edge(reuse.get_config(), [Run("cispo", 3, 1.0)], tmp_path / "edge")
