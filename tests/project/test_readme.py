"""The README and docs/ are held to their word: the README's own loss trains, tags are logged, tables are complete."""

import re
from pathlib import Path

import pytest

import dppo_jax.types
from configs.methods import METHODS
from dppo_jax.data.examples import UNSCORED, Example
from dppo_jax.data.tasks import load_task
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES
from dppo_jax.rewards.extract import EXTRACT
from dppo_jax.rewards.own import own_reward
from dppo_jax.rewards.shaping import TERMS
from dppo_jax.rewards.verifiers import VERIFIERS
from dppo_jax.storage.run_config import MAY_CHANGE
from dppo_jax.storage.run_log import MACHINE, read_scalars
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.train import train
from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
# Tags that a plain run does not log: of a mode, of one data set's verifiers, or in parts of their own.
OF_MODES = {"first_minibatch", "pdm", "region", "eval", "data", "distill", "critic"}
OF_CHIPS = {"throughput/mfu", "memory/peak_gib", "memory/limit_gib"}  # which a CPU does not tell


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of the README's Python block, as a config file, with the overrides of the command below it."""
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    overrides = re.findall(r"--config\.loss\.\w+=\S+", README[README.index(code) :].split("```")[2])
    assert len(overrides) == 2
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mine.py").write_text(code)
    small = ("steps=1", "rollout.prompts=4", "rollout.group_size=2", "train.minibatches=2", "eval.every=0")
    small += ("compile_cache=",)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            config = load_config(str(folder / "mine.py"), [*overrides, *(f"--config.{key}" for key in small)])
            train(config, folder / "run")
        finally:
            LOSSES.pop("sign_free_tv", None)
    return folder / "run"


def test_the_readmes_own_loss_trains(run):
    assert (run / "checkpoints" / "1").is_dir()


def test_what_a_run_leaves_is_what_the_page_says(run):
    tree = PAGES["checkpoints"].split("```")[1]
    named = set(re.findall(r"^  (\w[\w.]*)", tree, re.MULTILINE))
    left = {path.name for path in run.iterdir()}
    assert left <= named
    assert named - left == {"run.lock", "damaged_checkpoints", "policy", "wandb"}
    assert (run / "checkpoints" / "1" / "manifest.json").is_file()


@pytest.mark.parametrize("page", ["notation", "collapse", "data", "speed", "logs"])
def test_tags_of_the_pages_are_logged(run, page):
    logged = set(read_scalars(run))
    named = set(re.findall(r"`([a-z_]+/[a-z_]+)`", PAGES[page]))
    for tag in named:
        assert tag in logged | OF_CHIPS or tag.partition("/")[0] in OF_MODES or (ROOT / tag).exists(), tag


def test_every_tag_of_the_machine_is_on_the_page_of_logs(run):
    tags = {tag for tag in read_scalars(run) if tag.startswith(MACHINE)}
    assert tags and tags <= set(re.findall(r"`([a-z_]+/[a-z_]+)`", PAGES["logs"]))


def test_every_loss_is_on_the_page_of_methods():
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGES["methods"]))
    assert set(LOSSES) <= named


def test_a_reader_finds_what_to_bring_on_the_first_screen():
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", "\n".join(README.splitlines()[:50]), re.MULTILINE)
    assert [name for name, _ in rows] == ["own", "model", "data", "reward", "loss", "pod", "question"]
    assert all("`" in how or "](" in how for _, how in rows[1:])
    assert len(README.splitlines()) <= 160


def test_the_house_is_as_drawn():
    tree = README.split("## The house")[1].split("```")[1]
    top = ""
    for line in tree.strip().splitlines():
        names = re.findall(r"(?:^|\s)([a-z_]+(?:/|\.py))(?=\s)", line)
        if not line.startswith(" "):
            top = names[0]
            assert (ROOT / top).is_dir(), top
        for name in names:
            assert (ROOT / top / name).exists() or (ROOT / name).is_dir(), f"{top}{name}"


def test_the_refusal_on_the_page_is_what_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    name = re.search(r"^error: unknown loss '(\w+)'.*$", PAGES["configs"], re.MULTILINE)
    with pytest.raises(UserError) as refused:
        checks.check(load_config("configs/quickstart.py", [f"--config.loss.name={name[1]}"]))
    assert f"error: {refused.value}" == name[0]


def test_a_config_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(.*?)```", PAGES["configs"], re.S).group(1))
    overrides = re.findall(r"`(--config\.[^`]+=[^`]+)`", PAGES["configs"])
    values = [override.replace('"', "") for override in overrides if "VALUE" not in override]
    configs = [load_config(str(tmp_path / "mine.py"), [value]) for value in values]
    for config in configs:
        checks.check(config)
    infinite, unset, regions, one, whole, stop, terms, size = configs
    assert unset.critic.lam_alpha is None
    assert (infinite.optimizer.clip_norm, regions.log.regions) == (float("inf"), ("ppo_clip", "dppo_topk_tv"))
    assert stop.rollout.stop == ("</answer>", "\n\n")
    assert one.data.settings.max_terms == 3 and one.data.settings.min_terms == 2
    assert terms.reward.terms.format == 0.2
    assert (whole.data.settings.to_dict(), size.eval.sets.held_out.size) == ({"max_terms": 3}, 64)


def test_rows_of_the_page_are_read(tmp_path):
    rows = re.search(r"```json\n(.*?)```", PAGES["data"], re.S).group(1)
    (tmp_path / "rows.jsonl").write_text(rows)
    task = load_task("jsonl", path=str(tmp_path / "rows.jsonl"), verifier="last_number")
    assert [example.answer for example in task.examples] == ["7", "7"]
    assert [task.score("It is 7.", example) for example in task.examples] == [1.0, 1.0]


def test_methods_are_counted_right():
    for text in (README, PAGES["configs"]):
        assert set(re.findall(r"\[(\d+)(?: methods)?\]\((?:docs/)?methods\.md\)", text)) == {str(len(METHODS))}


@pytest.mark.parametrize(
    ("section", "table"),
    [("Verifiers", {*VERIFIERS, "task", UNSCORED, *EXTRACT}), ("Rewards", set(TERMS))],
    ids=["Verifiers", "Rewards"],
)
def test_every_verifier_and_every_term_is_on_the_page_of_data(section, table):
    text = PAGES["data"].split(f"## {section}\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)) == table


def test_the_reward_of_the_page_is_one(tmp_path):
    (tmp_path / "my_rewards.py").write_text(re.search(r"```python\n(.*?)```", PAGES["data"], re.S).group(1))
    score = own_reward(f"{tmp_path}/my_rewards.py:score")
    assert score("It is 7.", Example("?", "7", {"level": 5})) == 2 and score("It is 7.", Example("?", "7")) == 1


def test_keys_that_may_change_are_those_of_the_page():
    keys = PAGES["configs"][PAGES["configs"].index("\n`steps`") :].split("\n\n")[0]
    assert tuple(re.findall(r"`([^`]+)`", keys)) == MAY_CHANGE


def test_every_dimension_letter_is_on_the_page_of_notation():
    source = Path(dppo_jax.types.__file__).read_text(encoding="utf-8")
    letters = {letter for shape in re.findall(r'\[Array, "([^"]*)"\]', source) for letter in shape.split()}
    table = PAGES["notation"].split("## Dimensions")[1].split("##")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    named = {letter for row in rows for cell in (row[1], row[3]) for letter in re.findall(r"\w+", cell)} | {"Lk"}
    assert letters <= named and "Lk: of all layers" in table


def test_each_page_says_first_for_whom_it_is():
    for name, text in PAGES.items():
        assert re.match(r"# [^\n]+\n\nFor those who", text), name


def test_the_makefile_names_tests_that_are_there():
    """A missing one would stop pytest in CI alone."""
    named = re.findall(r"tests/[\w/.]+", (ROOT / "Makefile").read_text())
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []
