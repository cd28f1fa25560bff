"""Every config builds and validates; the paper's trace abstractly and hold the paper's numbers."""

import json

import pytest

from configs import gsm8k, reasoning_gym
from configs.methods import METHODS
from configs.studies import collapse
from dppo_jax.errors import UserError
from dppo_jax.losses import LOSSES
from experiments.run import checks
from experiments.run.cli import load_config
from experiments.trace import trace
from tests.golden.make_specs import specs
from tests.helpers.places import ROOT

FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py"))
CONFIGS = [path for path in FILES if not path.endswith(("__init__.py", "configs/methods.py"))]
CONFIGS += [f"configs/methods.py:{name}" for name in METHODS]
CONFIGS += [f"configs/reasoning_gym.py:{name}" for name in reasoning_gym.ARGUMENTS]
CONFIGS += [f"configs/gsm8k.py:{name}" for name in gsm8k.ARGUMENTS]
CONFIGS += [f"configs/studies/collapse.py:{name}" for name in collapse.ARGUMENTS]

# 2602.04879, section 5 and appendix C; section 7 and appendix E, table 1.
MOE_BASE = {
    "rollout.prompts": 256,
    "rollout.group_size": 16,
    "rollout.max_new_tokens": 16384,
    "data.max_prompt_len": 1024,
    "optimizer.learning_rate": 1e-6,
    "loss_defaults.dppo_binary_tv.delta_high": 0.2,
    "loss_defaults.dppo_binary_tv.ratio_cap": 5.0,
    "loss_defaults.clip_higher.eps_high": 0.27,
    "eval.every": 5,
}
PAPER = {
    "configs/paper/sanity_test.py": {
        "rollout.prompts": 64,
        "rollout.group_size": 8,
        "train.minibatches": 4,
        "policy.dtype": "bfloat16",
        "optimizer.learning_rate": 1e-6,
        "advantage.name": "group_mean",
        "data.size": 1460,
        "loss_defaults.dppo_binary_tv.delta_low": 0.15,
        "loss_defaults.cispo.ratio_cap": 3.0,
        "loss_defaults.clip_higher.eps_high": 0.28,
    },
    "configs/paper/dense_base.py": {
        "rollout.prompts": 128,
        "rollout.group_size": 8,
        "rollout.max_new_tokens": 8000,
        "rollout.temperature": 1.0,
        "data.max_prompt_len": 1024,
        "optimizer.learning_rate": 1e-6,
        "loss_defaults.dppo_binary_tv.delta_high": 0.2,
        "loss_defaults.dppo_binary_kl.delta_high": 0.05,
        "loss_defaults.dppo_binary_tv.ratio_cap": 5.0,
        "loss_defaults.clip_higher.eps_high": 0.27,
        "eval.temperature": 0.7,
        "eval.top_p": 0.95,
        "eval.samples": 32,
        "eval.every": 10,
    },
    "configs/paper/moe_base.py": MOE_BASE,
    "configs/paper/moe_base_r3.py": MOE_BASE | {"rollout.router_replay": True},
    "configs/paper/moe_thinking.py": MOE_BASE | {"data.chat": True},
    "configs/paper/moe_base_lora.py": {
        "rollout.prompts": 128,
        "rollout.group_size": 8,
        "rollout.max_new_tokens": 8000,
        "optimizer.learning_rate": 1e-5,
        "lora.rank": 32,
        "lora.alpha": 64.0,
        "loss_defaults.dppo_binary_tv.delta_low": 0.15,
        "loss_defaults.dppo_binary_tv.delta_high": 0.15,
        "loss_defaults.dppo_binary_kl.delta_high": 0.05,
    },
}
MINIBATCH = {"configs/paper/sanity_test.py": 16, "configs/paper/moe_base_lora.py": 16}  # prompts; else 32
# Published sizes, in millions of parameters.
SIZES = {
    "configs/paper/sanity_test.py": "1,777.1 million",
    "configs/paper/dense_base.py": "8,190.7 million",
    "configs/paper/octothinker_3b.py": "3,212.7 million",
    "configs/paper/qwen3_1_7b.py": "1,720.6 million",
    "configs/paper/moe_base.py": "30,532.1 million",
    "configs/paper/moe_base_r3.py": "30,532.1 million",
    "configs/paper/moe_thinking.py": "30,532.1 million",
}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_validates(path):
    checks.check(load_config(path, []))


@pytest.mark.parametrize("path", PAPER)
def test_a_paper_config_holds_the_papers_numbers(path):
    config = load_config(path, [])
    assert {key: checks.value(config, key) for key in PAPER[path]} == PAPER[path]
    assert config.rollout.prompts // config.train.minibatches == MINIBATCH.get(path, 32)


@pytest.mark.parametrize("path", SIZES)
def test_a_paper_config_traces_to_the_models_published_size(path):
    said = trace(load_config(path, ["--config.loss.name=dppo_topk_kl_proximal"]))
    assert SIZES[path] in said
    assert "dppo_topk_kl_proximal" in said


@pytest.mark.parametrize(("name", "other"), [("reward_model", "a reward model"), ("distillation", "a teacher")])
def test_what_a_run_holds_beside_its_policy_is_named(name, other):
    assert trace(load_config(f"configs/{name}.py", [])).endswith(f"\nnot traced   {other}")


def test_the_embedded_config_traces_from_its_directory():
    assert "qwen3, 0.3 million parameters, 3 layers" in trace(load_config("configs/quickstart.py", []))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_can_be_swapped_in_by_name(name):
    """Defaults are found by the loss's name; only relax_*'s alpha, which is swept, and the teacher have none."""
    swap = [f"--config.loss.name={name}"]
    if name.startswith("relax_"):
        with pytest.raises(UserError, match="needs loss.alpha"):
            checks.check(load_config("configs/quickstart.py", swap))
        swap.append("--config.loss.alpha=0.1")
    if name == "distill":
        with pytest.raises(UserError, match="loss 'distill' needs a teacher: set teacher.path to a Hugging Face"):
            checks.check(load_config("configs/quickstart.py", swap))
        swap.append("--config.teacher.path=assets/tiny")
    checks.check(load_config("configs/quickstart.py", swap))


def test_a_model_that_is_neither_here_nor_described_cannot_be_traced():
    with pytest.raises(UserError, match="there is no directory 'models/x', and policy.shape names no config.json"):
        trace(load_config("configs/quickstart.py", ["--config.policy.path=models/x"]))


@pytest.mark.parametrize("table", ["training", "rollout"])
@pytest.mark.parametrize("path", [path for path in SIZES if "sanity" not in path])
def test_parameters_lie_where_they_always_lay(path, table):
    """Golden PartitionSpecs: tests/golden/specs.json, which `python -m tests.golden.make_specs` writes."""
    golden = json.loads((ROOT / "tests/golden/specs.json").read_text())
    assert specs(path)[table] == golden[path][table]
