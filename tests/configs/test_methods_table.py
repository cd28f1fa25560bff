"""The table of methods against the files that it replaced, its page, and FILE:ARGUMENT on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import quickstart
from configs.methods import INF, METHODS, get_config, set_method
from configs.reuse import get_config as reuse
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES
from experiments import methods, sweep
from experiments.questions.survival import __main__ as survival
from experiments.run import checks
from experiments.run.check_data import value
from experiments.run.cli import keys, load_config
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


STD, SEQUENCE = {"advantage.name": "group_mean_std"}, {"aggregation.name": "seq_mean_token_mean"}
LATER = {  # what methods set that never had a file, from their sources
    "geometric_mask": STD,
    "flash_reinforce": {"advantage.name": "batch_mean", **SEQUENCE, "train.epochs": 1, "train.minibatches": 1},
    "vespo": STD,
    "gmpo": {**STD, **SEQUENCE},
    "minpro": STD,
    "m2po": STD,
    "estr": STD,
}


@pytest.mark.parametrize("name", LATER)
def test_a_later_method_sets_what_its_source_says(name):
    assert beyond_quickstart(get_config(name)) == {"loss.name": name, **LATER[name]}
    assert methods.anchor(Setup(get_config(name)).loss) == "behavior"


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
    "geometric_mask": ("2", "`eps_high` 0.001, `eps_low` 0.001"),
    "flash_reinforce": ("∞", "`delta` 0.003"),
    "vespo": ("–", "`k_high` 2, `k_low` 3, `lambda_high` 3, `lambda_low` 2"),
    "gmpo": ("–", "`eps_high` 0.4, `eps_low` 0.4"),
    "m2po": ("∞", "`delta` 0.04"),
    "estr": ("∞", "`delta` 1, `entropy_floor` 0.01, `eps_high` 0.2, `eps_low` 0.2"),
    "relax_low": ("5", "`alpha` 0.1, `eps_high` 0.27, `eps_low` 0.2"),
    "reinforce": ("–", "–"),
    "pdm_topk_kl": ("5", "`delta_high` 0.05, `delta_low` 0.05, `tail` uniform"),
    "bpco": ("5", "`delta_high` 0.2, `delta_low` 0.2"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_page_reads_numbers_off_the_loss(name):
    row = dict(zip(methods.COLUMNS, methods.cells(name, METHODS[name]), strict=True))
    assert (row["C"], row["other numbers"]) == NUMBERS[name]


DIS = {"loss.name": "dis", "loss.ratio_cap": INF, "advantage.name": "group_mean_std"}
BANDS = {  # method: what its source gives, as the run has it
    "dis_math": DIS | {"loss.eps_low": 0.3, "loss.eps_high": 5.0},  # 2607.07508, section 4.1
    "dis_coding": DIS | {"loss.eps_low": 0.8, "loss.eps_high": 3.0},
    "ripo": {
        "loss.budget": 0.05, "loss.ratio_low": 0.5, "loss.ratio_high": 10.0, "loss.ratio_cap": INF,
        "advantage.name": "group_mean_std",
    },
    "aspo": {"loss.eps_low": 0.2, "loss.eps_high": 0.2, "loss.ratio_cap": 3.0, "advantage.name": "group_mean_std"},
    "up": {"loss.eps_low": 0.2, "loss.ratio_cap": INF, "advantage.name": "group_mean_std"},
    "prime_rl": {
        "loss.delta_low": 0.2, "loss.delta_high": 0.2, "loss.tau": 1e-3, "advantage.name": "group_mean",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BANDS)
def test_a_method_sets_what_its_source_gives(name):
    config = get_config(name)
    bound = {f"loss.{key}": value for key, value in Setup(config).loss.keywords.items()}
    values = dict(keys(config)) | {"loss.name": config.loss.name} | bound
    assert {key: values[key] for key in BANDS[name]} == BANDS[name]
    assert (config.aggregation.name, config.reference.coef) == ("token_mean", 0.0)


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
    "reinforce, rloo, pg_is, pg_tis, cispo and 62 more",
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


# --- methods of a sweep ---


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_run_of_a_sweep_has_the_config_of_that_method(name):
    """Whatever else is in the config, but for sizes, and for numbers of the config's own loss."""
    (run,) = sweep.make_runs([], [name], [1.0], [3])
    config = quickstart.get_config()
    config.loss.ratio_cap, config.steps = 7.0, 5
    own = get_config(name)
    own.seed, own.steps = 3, 5
    assert sweep.config_of(config, run).to_dict() == own.to_dict()
    assert (run.folder, run.loss) == (f"{name}/seed_3", own.loss.name)


def test_most_methods_share_a_sweep():
    """All but those whose loop or shapes are others: what they set anew is no key of `OF_METHODS`, nor the loss's."""
    config, alone = reuse(), set()
    for name, method in METHODS.items():
        own = reuse()
        set_method(own, name)
        keys = {key for key in method.sets if not key.startswith("loss.") and value(own, key) != value(config, key)}
        keys -= {*sweep.OF_METHODS}
        critic = own.advantage.name == "gae"
        try:
            sweep.check(config, sweep.make_runs([], [name], [1.0], [0]))
        except UserError:
            alone.add(name)
        assert (name in alone) == (critic or bool(keys)), name
    assert {"ppo", "reinforce", "distill"} <= alone


APART = "run it alone: python -m experiments.train --config configs/methods.py"
NOT_SWEPT = {
    "--methods=gspo,gsp": "unknown method 'gsp'; the nearest is 'gspo'",
    "--methods=ppo,gspo": "method 'ppo' sets advantage.name = gae, and critics are not trained side by side: "
    f"{APART}:ppo; of those given, a sweep can have gspo",
    "--methods=alp": "method 'alp' sets alp.sigma, and its noise is drawn from one seed, a constant of the compiled "
    f"update: {APART}:alp",
    "--methods=scale_rl,vaco": "method 'scale_rl' sets policy.head_float32 = True, and the runs of a sweep share "
    f"theirs, False: set policy.head_float32=True for all, or {APART}:scale_rl; of those given, a sweep can have vaco",
    "--methods=gspo --config.advantage.name=reward": "advantage.name = 'reward' is the config's, and methods have "
    "their own: set advantage.name=group_mean, or give --losses",
    "--methods=gspo --config.loss.ratio_cap=2": "loss.ratio_cap is set, of dppo_binary_tv, which is not among the "
    "losses of this sweep; set loss_defaults.gspo.ratio_cap, and leave it out, or unset it: loss.ratio_cap=None",
    "--methods=gspo,dapo --config.train.staleness=1": "method 'dapo': rollout.resample draws from the parameters of "
    "its step, which train.staleness = 1 no longer has; set train.staleness=0",
    "--methods=dapo --losses=cispo": "'cispo' is a loss and a method, and a sweep of both would not say which: give "
    "--losses and --methods a --workdir each",
}


@pytest.mark.parametrize("command", [sweep, survival], ids=["sweep", "survival"])
@pytest.mark.parametrize("given", NOT_SWEPT)
def test_methods_that_a_sweep_refuses(monkeypatch, tmp_path, command, given):
    words = ["--config", "configs/reuse.py", "--workdir", str(tmp_path / "no"), *given.split()]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(UserError) as caught:
        command.main()
    assert str(caught.value) == NOT_SWEPT[given]
    assert not (tmp_path / "no").exists()


def test_a_sweep_of_nothing_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["command", "--config", "configs/reuse.py", "--workdir", str(tmp_path / "no")])
    with pytest.raises(UserError, match="^--losses or --methods is required"):
        sweep.main()


def test_thresholds_of_methods_are_not_scaled(monkeypatch, tmp_path):
    words = ["--config", "configs/reuse.py", "--workdir", str(tmp_path / "no"), "--methods=gspo", "--scale=2"]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(UserError, match="^--scale is of losses"):
        survival.main()


def test_losses_and_methods_of_different_names_share_a_sweep():
    runs = sweep.make_runs(["ppo_clip"], ["dapo"], [1.0, 0.5], [0])
    folders = ["ppo_clip/seed_0", "ppo_clip_x0.5/seed_0", "dapo/seed_0", "dapo_x0.5/seed_0"]
    assert [run.folder for run in runs] == folders
    sweep.check(reuse(), runs)


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
