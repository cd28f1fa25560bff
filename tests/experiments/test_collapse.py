"""Runs that are sick on purpose, what is said of them, and the page that leads from a symptom to a check."""

import json
import re

import numpy as np
import pytest

from configs import base
from configs.studies.collapse import ARGUMENTS, HEALTHY, SICK, SYMPTOMS, get_config
from dppo_jax.data.examples import Example
from dppo_jax.errors import UserError
from dppo_jax.storage.run_config import flatten
from dppo_jax.storage.run_log import Scalars, read_scalars
from experiments.questions.collapse.broken_reward import score
from experiments.questions.collapse.report import RESTARTED, RESUMED, after, differing, of_symptom, report
from experiments.run.cli import keys, load_config
from experiments.train import train
from tests.helpers.fixtures import hurried
from tests.helpers.places import ROOT

PAGE = (ROOT / "docs" / "collapse.md").read_text(encoding="utf-8")


def scalars(values: list[float], **tags: list[float]) -> Scalars:
    """The same values under every tag of a symptom, but for those given, with dots for slashes."""
    named = dict.fromkeys({"reward/mean", *(tag for tags in SYMPTOMS.values() for tag in tags)}, values)
    named |= {tag.replace("__", "/"): own for tag, own in tags.items()}
    return {tag: (np.arange(len(own)), np.array(own)) for tag, own in named.items()}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_run_is_the_healthy_one_but_for_what_was_done_to_it(name):
    healthy, config = flatten(get_config().to_dict()), flatten(get_config(name).to_dict())
    changed = {key: config[key] for key in config if config[key] != healthy[key]}
    assert changed == (dict(SICK[name].sets) if name in SICK else {})


def test_every_symptom_has_a_run():
    assert {symptom for sick in SICK.values() for symptom in sick.symptoms} | {"resume"} == set(SYMPTOMS)
    assert of_symptom("entropy")[0] == HEALTHY and of_symptom("resume") == (HEALTHY, RESUMED, RESTARTED)


def test_an_unknown_run_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="'entropy_rise'.*'entropy_rises'"):
        load_config(str(ROOT / "configs/studies/collapse.py:entropy_rise"), [])


def test_the_broken_reward_fails_on_a_right_reply():
    with pytest.raises(ValueError, match="h7"):
        score("c8 a7 h7", Example("f7", "7"))


@pytest.fixture(scope="module")
def one_update(tmp_path_factory) -> Scalars:
    """A step of one update, as the page has it for what is masked before any, of the run whose rollout is noisy."""
    folder = tmp_path_factory.mktemp("collapse")
    overrides = "--config.steps=1 --config.train.epochs=1 --config.train.minibatches=1"
    assert overrides in PAGE
    regions = "--config.log.regions=('dppo_binary_tv','minirl')"
    with pytest.MonkeyPatch.context() as patch, hurried(tmp_path_factory):
        patch.chdir(ROOT)
        path = "configs/studies/collapse.py:masked_noise"
        config = load_config(path, [*overrides.split(), regions, "--config.train.micro_rows=128"])
        config.compile_cache = ""
        train(config, folder / "run")
    return read_scalars(folder / "run")


def test_a_noisy_rollout_is_masked_before_any_update(one_update):
    masked = {name: one_update[f"region/{name}/masked"][1][0] for name in ("dppo_binary_tv", "minirl")}
    assert one_update["trust_region/masked"][1][0] > 0.03 > masked["dppo_binary_tv"] > masked["minirl"] == 0


def test_runs_that_differ_in_a_bit_are_told_apart():
    run = scalars([0.25, 0.5])
    assert differing(run, scalars([0.25, 0.5]) | {"time/train": (np.arange(2), np.ones(2))}) == []
    assert differing(run, scalars([0.25, 0.5], reward__mean=[0.25, np.nextafter(0.5, 1)])) == ["reward/mean"]
    assert differing(run, {tag: run[tag] for tag in run if tag != "reward/mean"}) == ["reward/mean"]
    assert "reward/mean" in differing(run, after(run, 1))


def test_a_report_has_the_figure_and_the_means_of_first_and_last_steps(tmp_path):
    values = np.random.default_rng(0).random((2, 12))
    runs = {name: [scalars(seed.tolist()) for seed in values] for name in of_symptom("resume")}
    runs[RESUMED][1] = scalars(values[1].tolist(), grad_norm=[1.0])
    text = report(runs, tmp_path)
    first, last = f"{values[:, :5].mean():.3g}", f"{values[:, -5:].mean():.3g}"
    assert f"| `policy/abs_prob_diff_mean` {first} → {last} | {first} → {last} |" in text
    assert re.findall(r"^\| resume \| `(\w+)` \|", text, re.MULTILINE) == [*runs]
    found = json.loads((tmp_path / "collapse.json").read_text())
    assert found["resume"][RESUMED]["tags that differ"] == [[], ["grad_norm"]]
    assert [path.name for path in tmp_path.glob("*.png")] == ["resume.png"]


def test_figures_of_the_page_are_of_symptoms_and_every_run_is_named():
    figures = re.findall(r"\]\(\.\./experiments/questions/collapse/result/(\w+)\.png\)", PAGE)
    assert len(figures) > 3 and set(figures) <= set(SYMPTOMS)
    assert set(re.findall(r"`(\w+)`", PAGE)) >= {*SICK, RESUMED, RESTARTED}


def test_config_keys_of_the_page_are_keys():
    known = set(dict(keys(base.get_config())))
    named = set(re.findall(r"`([a-z]+\.[a-z_.]+)(?:=[^`]*)?`", PAGE)) | set(re.findall(r"--config\.([a-z_.]+)", PAGE))
    files = {name for name in named if name.endswith((".md", ".py", ".json"))}
    assert len(named) > 10 and named - files <= known
