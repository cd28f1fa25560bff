"""The table of methods against the files that it replaced, its page, and FILE:ARGUMENT on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.methods import METHODS, get_config, set_method
from configs.reuse import get_config as reuse
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES
from experiments import methods, sweep
from experiments.questions.survival import __main__ as survival
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.run.setup import Setup
from experiments.study import Arm
from tests.golden.make_methods import beyond_quickstart
from tests.helpers.places import ROOT

GOLDEN = json.loads((ROOT / "tests/golden/methods.json").read_text())


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def refusal(config: str) -> str:
    """The one sentence."""
    with pytest.raises(UserError) as caught:
        load_config(config, [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the table ---


def test_the_table_has_the_methods_that_had_files():
    assert set(GOLDEN) <= set(METHODS) and len(GOLDEN) == 48


@pytest.mark.parametrize("name", GOLDEN)
def test_a_method_sets_what_its_file_set(name):
    """tests/golden/methods.json, which `python -m tests.golden.make_methods` wrote from the files."""
    found = beyond_quickstart(get_config(name))
    assert found == GOLDEN[name]["sets"]
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in GOLDEN[name]["sets"].items()}
    assert methods.anchor(Setup(get_config(name)).loss) == GOLDEN[name]["anchor"]


def test_a_method_is_set_on_another_config():
    c = reuse()
    set_method(c, "dr_grpo")
    assert (c.loss.name, c.aggregation.constant, c.policy.path) == ("ppo_clip", 12.0, "assets/reuse")
    with pytest.raises(UserError, match="unknown method 'dr_grpp'; the nearest is 'dr_grpo'"):
        set_method(c, "dr_grpp")


def test_the_page_is_what_the_command_writes():
    page = subprocess.run([sys.executable, "-m", "experiments.methods"], cwd=ROOT, capture_output=True, text=True)
    assert page.returncode == 0, page.stderr
    assert page.stdout == (ROOT / "docs" / "methods.md").read_text()


NUMBERS = {  # C, other numbers: the sources' and configs/base.py's
    "cispo": ("5", "–"),
    "pg_tis": ("3", "–"),
    "dapo": ("∞", "`eps_high` 0.28, `eps_low` 0.2"),
    "grpo": ("∞", "`eps_high` 0.2, `eps_low` 0.2"),
    "token_tis": ("2 on ρ", "`eps_high` 0.2, `eps_low` 0.2"),
    "dual_clip": ("∞", "`dual_cap` 3, `eps_high` 0.2, `eps_low` 0.2"),
    "relax_low": ("5", "`alpha` 0.1, `eps_high` 0.27, `eps_low` 0.2"),
    "reinforce": ("–", "–"),
    "bpco": ("5", "`delta_high` 0.2, `delta_low` 0.2"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_page_reads_numbers_off_the_loss(name):
    row = dict(zip(methods.COLUMNS, methods.cells(name, METHODS[name]), strict=True))
    assert (row["C"], row["other numbers"]) == NUMBERS[name]


def test_bpco_has_the_critic_of_its_paper_and_one_response_a_prompt():
    """2608.23566 and its authors' code: atan between 0 and 1, alpha 0.4, sums over tokens, values clipped to 0.5."""
    c, default = get_config("bpco"), get_config("dppo_binary_tv")
    found = {key: c.critic[key] for key in ("bounds", "targets", "lam_alpha", "whiten", "value_clip", "discount")}
    assert found == dict(
        bounds=(0.0, 1.0), targets="monte_carlo", lam_alpha=0.4, whiten=False, value_clip=0.5, discount=1.0
    )
    assert (c.loss.name, c.advantage.name, c.aggregation.name) == ("dppo_binary_tv", "gae", "seq_mean_token_sum")
    assert c.rollout.group_size == 1
    assert c.rollout.prompts == default.rollout.prompts * default.rollout.group_size
    twice = get_config("bpco")
    set_method(twice, "bpco")
    assert twice.to_dict() == c.to_dict()


# --- FILE:ARGUMENT ---

REFUSED = {
    "configs/methods.py": "config file configs/methods.py needs an argument: write configs/methods.py:ARGUMENT, one of "
    "reinforce, rloo, pg_is, pg_tis, cispo and 45 more",
    "configs/methods.py:gspoo": "config file configs/methods.py has no 'gspoo'; the nearest is 'gspo'",
    "configs/methods.py:": "--config configs/methods.py: has no argument after its colon; write FILE:ARGUMENT, or FILE "
    "alone",
    "configs/methods.py:gspo:grpo": "config file configs/methods.py has no 'gspo:grpo'; the nearest is 'gspo'",
    "configs/methods/gspo.py": "config file configs/methods/gspo.py does not exist; write configs/methods.py:gspo",
    f"{ROOT}/configs/methods/gspo.py": f"config file {ROOT}/configs/methods/gspo.py does not exist; write "
    f"{ROOT}/configs/methods.py:gspo",
    "configs/methods/gspoo.py": "config file configs/methods/gspoo.py does not exist; config file configs/methods.py "
    "has no 'gspoo'; the nearest is 'gspo'",
    "configs/quickstart.py:gspo": "config file configs/quickstart.py takes no argument, and 'gspo' is given: write "
    "configs/quickstart.py",
    "configs/no.py:gspo": "config file configs/no.py does not exist; the project's are in configs/",
    "no:gspo": "config file no:gspo does not exist; the project's are in configs/",
    ":": "config file : does not exist; the project's are in configs/",
    "": "config file  does not exist; the project's are in configs/",
}


@pytest.mark.parametrize("config", REFUSED)
def test_a_config_argument_that_cannot_be(config):
    assert refusal(config) == REFUSED[config]


def own(path: Path, signature: str, before: str = "") -> str:
    """A config file whose get_config has this signature; steps are the length of its argument."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"from configs import base\n\n{before}\n\ndef get_config({signature}):\n"
        "    c = base.get_config()\n    c.steps = len(name)\n    return c\n"
    )
    return str(path)


@pytest.mark.parametrize("place", ["mine.py", "mine", "a:b/mine.py", "mi:ne.py"])
def test_a_file_of_ones_own_with_an_argument(tmp_path, place):
    required, optional = own(tmp_path / place, "name"), own(tmp_path / "other" / "o.py", "name='abc'")
    assert load_config(f"{required}:four", []).steps == 4
    assert load_config(f"{required}:x:y=/z", ["--config.seed=3"]).steps == 6
    assert refusal(required) == f"config file {required} needs an argument: write {required}:ARGUMENT"
    assert (load_config(optional, []).steps, load_config(f"{optional}:four", []).steps) == (3, 4)


def test_a_path_with_a_colon_that_is_a_file_is_that_file(tmp_path):
    """Though what stands before the colon is a file, too, that takes an argument."""
    own(tmp_path / "a.py", "name")
    assert load_config(own(tmp_path / "a.py:b", "name='abc'"), []).steps == 3


def test_get_config_takes_one_argument_at_most(tmp_path):
    two, keyword = own(tmp_path / "two.py", "name, other"), own(tmp_path / "keyword.py", "*, name")
    assert refusal(two) == f"get_config(name, other) of config file {two} must take one argument, or none"
    assert refusal(f"{two}:x") == refusal(two)
    assert refusal(f"{keyword}:x") == f"get_config(*, name) of config file {keyword} must take one argument, or none"
    assert load_config(f"{own(tmp_path / 'more.py', 'name, other=1')}:xy", []).steps == 2


def test_names_that_a_file_says_it_takes(tmp_path):
    short = own(tmp_path / "short.py", "name", 'ARGUMENTS = {"small": 1, "large": 2}')
    assert load_config(f"{short}:small", []).steps == 5
    assert refusal(short).endswith(f"write {short}:ARGUMENT, one of small, large")
    assert refusal(f"{short}:smal") == f"config file {short} has no 'smal'; the nearest is 'small'"
    lookup = own(tmp_path / "lookup.py", "name", 'TABLE = {"small": 1}').removesuffix(":")
    Path(lookup).write_text(Path(lookup).read_text().replace("len(name)", "TABLE[name]"))
    assert refusal(f"{lookup}:smal") == f"config file {lookup} has no 'smal'"
    assert load_config(f"{lookup}:small", []).steps == 1


def test_what_get_config_raises_is_not_taken_for_a_missing_argument(tmp_path):
    path = own(tmp_path / "mine.py", "name='abc'")
    Path(path).write_text(Path(path).read_text().replace("len(name)", "name + 1"))
    assert "does not load: TypeError: " in refusal(path) and "does not load: TypeError: " in refusal(f"{path}:x")


def test_a_command_refuses_a_table_without_a_name():
    command = [sys.executable, "-m", "experiments.train", "--config", "configs/methods.py", "--trace"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (2, f"error: {REFUSED['configs/methods.py']}\n")


# --- losses are called losses ---


@pytest.mark.parametrize("command", [sweep, survival], ids=["sweep", "survival"])
@pytest.mark.parametrize("given", [["--methods", "cispo"], ["--methods=cispo"], ["--methods"]])
def test_the_old_name_of_losses_is_refused_with_the_new_one(monkeypatch, command, given):
    monkeypatch.setattr(sys, "argv", ["command", "--config", "configs/reuse.py", "--workdir", "no", *given])
    with pytest.raises(UserError, match="^--methods is --losses now: "):
        command.main()


# --- what a loss declares ---

MINE = """from configs import base
from dppo_jax.losses import LOSSES, from_keep, require


def mine(inputs, *, {numbers}, ratio_cap):
    require(inputs, "proximal_logp")
    return from_keep(inputs, inputs.mask, ratio_cap=ratio_cap)


LOSSES["{name}"] = mine


def get_config():
    c = base.get_config()
    c.loss.name = "{name}"
    return c
"""


@pytest.fixture
def mine(tmp_path):
    """Writes a config with a loss of one's own."""
    before = set(LOSSES)

    def write(name: str, numbers: str) -> str:
        (tmp_path / "mine.py").write_text(MINE.format(name=name, numbers=numbers))
        return str(tmp_path / "mine.py")

    yield write
    for name in set(LOSSES) - before:
        del LOSSES[name]


@pytest.mark.parametrize("name", ["dppo_mine_tv", "dppo_mine_kl", "dppo_exact_tv_proximal", "relax_mine", "token_vis"])
def test_a_strangers_loss_gets_no_defaults_by_its_name(name, mine):
    config = load_config(mine(name, "delta_low, delta_high"), [])
    assert name not in config.loss_defaults
    with pytest.raises(UserError, match=f"loss '{name}' needs loss.delta_high, loss.delta_low, loss.ratio_cap"):
        checks.check(config)
    arm = Arm(name, scale=2.0, numbers=(("ratio_cap", 3.0),)).config(config)
    assert arm.loss_defaults[name].to_dict() == {"ratio_cap": 3.0}


@pytest.mark.parametrize("numbers", ["correction_cap", "eps_low, correction_low"])
def test_a_strangers_correction_of_the_mismatch_is_not_perturbed_beside(numbers, mine):
    config = load_config(mine("mine", numbers), ["--config.alp.sigma=0.1", "--config.loss.ratio_cap=1"])
    for key in numbers.split(", "):
        config.loss[key] = 0.5
    with pytest.raises(UserError, match="loss 'mine' corrects the mismatch by the proximal policy"):
        checks.check(config)
    config.alp.sigma = 0.0
    checks.check(config)
