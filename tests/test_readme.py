"""The README is held to its word: its own loss trains, its links lead somewhere, its tables are complete."""

import re
from pathlib import Path

from dppo_jax.losses import LOSSES
from experiments.run.cli import load_config
from experiments.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_own_loss_trains(tmp_path, monkeypatch):
    """The Python block, as a config file, with the overrides of the command below it."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    overrides = re.findall(r"--config\.loss\.\w+=\S+", README[README.index(code) :].split("```")[2])
    assert len(overrides) == 2
    file = tmp_path / "mine.py"
    file.write_text(code)
    small = ("steps=1", "rollout.prompts=4", "rollout.group_size=2", "train.minibatches=2", "eval.every=0")
    small += ("compile_cache=",)
    try:
        config = load_config(str(file), [*overrides, *(f"--config.{key}" for key in small)])
        train(config, tmp_path / "run")
    finally:
        LOSSES.pop("sign_free_tv", None)
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_loss_is_in_the_table():
    table = README[README.index("| name | masked when") :].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_*0-9]+)`", table + (ROOT / "docs" / "methods.md").read_text()))
    for name in LOSSES:
        assert name in named or (name.endswith("_proximal") and "dppo_*_proximal" in named), name
