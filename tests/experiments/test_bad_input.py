"""Bad input to `python -m experiments.train`: one sentence on stderr, a status of 2, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from dppo_jax.devices.sharding import MESH_AXES
from dppo_jax.errors import UserError, run_main
from experiments import train
from experiments.run import checks
from experiments.run.cli import load_config
from tests.helpers.fixtures import (
    TINY,
    config_file,
    contents,
    finished_run,
    hurried,
    hurried_environment,
    jax_settings,
    small_config,
    tiny,
)
from tests.helpers.places import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with hurried(tmp_path_factory):
        return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def workdir(finished, tmp_path_factory) -> Path:
    """A finished run, which no refusal may touch."""
    return Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("kept") / "run"))


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory) -> Path:
    """A good config file: that of the finished run."""
    return config_file(tmp_path_factory.mktemp("config") / "good.py", folder, "run_config")


@pytest.fixture
def refusal(workdir, config, monkeypatch, capsys):
    """refusal(*arguments) runs the program in this process and gives the sentence that it ends with."""

    def ask(*arguments, config=config, workdir=workdir) -> str:
        before = contents(workdir)
        given = [f"--config={config}", f"--workdir={workdir}", *arguments]
        monkeypatch.setattr(sys, "argv", ["train", *(a for a in given if not a.endswith("=None"))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(train.main)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert contents(workdir) == before
        assert said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        assert len(said.err) < 500
        return said.err.removeprefix("error: ").strip()

    return ask


OVERRIDES = {
    # names
    "--config.stepz=3": "unknown config key 'stepz'; the nearest is 'steps'",
    "--config.los.name=cispo": "unknown config key 'los.name'; the nearest is 'loss.name'",
    "--config.data.settings.digits=3": "unknown config key 'data.settings.digits'; the nearest is 'data.settings'",
    "--stepz=3": "unknown argument '--stepz=3'; overrides are --config.KEY=VALUE",
    "--config.loss.name=cispoo": "unknown loss 'cispoo'; the nearest is 'cispo'",
    "--config.advantage.name=gea": "unknown advantage.name 'gea'; the nearest is 'gae'",
    "--config.aggregation.name=tokens_mean": "unknown aggregation.name 'tokens_mean'; the nearest is 'token_mean'",
    "--config.optimizer.schedule=cosin": "optimizer.schedule 'cosin' is not one of constant, linear, cosine",
    "--config.policy.dtype=fp32": "unknown policy.dtype 'fp32'; the nearest is 'float32'",
    "--config.policy.remat=ful": "unknown policy.remat 'ful'; the nearest is 'full'",
    "--config.policy.attention=flash": "unknown policy.attention 'flash'; the nearest is 'splash'",
    "--config.train.micro_batches=2": "unknown config key 'train.micro_batches'; the nearest is 'train.minibatches'",
    "--config.data.kind=csv": "unknown data.kind 'csv'; known: environment, hub, jsonl, parquet, reasoning_gym",
    "--config.data.verifier=exact": "unknown data.verifier 'exact'; the nearest is 'exact_match'",
    # hyperparameters
    "--config.loss.name=relax_low": "loss 'relax_low' needs loss.alpha, which nothing sets",
    "--config.loss.alpha=0.3": "loss 'dppo_binary_tv' has no hyperparameter 'alpha'",
    # values
    "--config.steps=many": "--config.steps=many: must be a whole number, not 'many'",
    "--config.steps=1.5": "--config.steps=1.5: must be a whole number, not '1.5'",
    "--config.rollout.in_flight=True": "must be a whole number, not 'True'",
    "--config.loss.delta_low=small": "must be a number, not 'small'",
    "--config.data.columns.question=q": "unknown config key 'data.columns.question'",
    "--config.data.answer_from=boxd": "data.answer_from = 'boxd' must be '####', 'boxed' or a regular expression",
    "--config.eval.sets.sums.answer_from=(": "eval.sets.sums.answer_from = '(' is no regular expression: missing )",
    "--config.data.bad_label=dropp": "unknown data.bad_label 'dropp'; the nearest is 'drop'",
    "--config.data.chat=maybe": "--config.data.chat=maybe",
    "--config.steps": "override '--config.steps' has no value; write --config.steps=VALUE",
    "--config.loss=cispo": "config key 'loss' is a section; override one of its keys: alpha, ",
    "--config.seed=-1": "seed must be at least 0, not -1",
    "--config.rollout.prompts=0": "rollout.prompts must be at least 1, not 0",
    "--config.checkpoint.every=-1": "checkpoint.every must be at least 0, not -1",
    "--config.checkpoint.keep_every=-1": "checkpoint.keep_every must be at least 0, not -1",
    "--config.checkpoint.best_of=maxx": "unknown checkpoint.best_of 'maxx'; the nearest is 'max'",
    "--config.checkpoint.best_of=MAX": "unknown checkpoint.best_of 'MAX'; the nearest is 'max'",
    "--config.log.events_mb=1e-12": "log.events_mb must be 0, or at least 1, not 1e-12",
    "--config.checkpoint.best=eval/nowhere/avg": "unknown set of eval.sets in checkpoint.best = 'eval/nowhere/avg'",
    "--config.optimizer.clip_norm=nan": "optimizer.clip_norm must be at least 0, not nan",
    "--config.aggregation.constant=0": "aggregation.constant must be above 0, not 0.0",
    "--config.eval.top_p=0": "eval.top_p must be above 0 and at most 1, not 0.0",
    "--config.rollout.temperature=0": "rollout.temperature = 0.0: training samples, so it must be above 0",
    "--config.rollout.temperature=nan": "rollout.temperature = nan: training samples, so it must be above 0",
    "--config.rollout.top_p=0.9": "rollout.top_p = 0.9: nucleus sampling changes the behavior policy",
    "--config.reward.workers=0": "reward.workers must be at least 1, not 0",
    "--config.train.micro_rows=0": "train.micro_rows must be at least 1, not 0",
    "--config.train.staleness=-1": "train.staleness must be at least 0, not -1",
    "--config.train.staleness=2": "train.staleness = 2: a rollout may be 1 step old, or 0",
    "--config.train.pack=maybe": "--config.train.pack=maybe",
    "--config.rollout.slots=-1": "rollout.slots must be at least 0, not -1",
    "--config.policy.head_pieces=-1": "policy.head_pieces must be at least 0, not -1",
    "--config.seed=4294967296": "seed must be at most 4294967295, not 4294967296",  # its keys were those of seed 0
    "--config.steps=99999999999999999999": "steps must be at most 2147483647, not 99999999999999999999",
    "--config.train.micro_rows=99999999999999999999": "train.micro_rows must be at most 2147483647, not 9999999999999",
    f"--config.steps={'9' * 5000}": "bad override: flag --config.steps=99999",
    "--config.optimizer.b1=2": "optimizer.b1 must be at least 0 and below 1, not 2.0",
    "--config.optimizer.b2=0.999999999": "optimizer.b2 must be at least 0 and below 1 in float32, too, not 0.999999",
    "--config.optimizer.learning_rate=inf": "optimizer.learning_rate must be finite, not inf",
    "--config.loss.delta_low=nan": "loss.delta_low must be a number, not nan",
    "--config.loss.delta_low=-1": "loss.delta_low must be at least 0, not -1.0",
    "--config.loss_defaults.cispo.ratio_cap=-5": "loss_defaults.cispo.ratio_cap must be at least 0, not -5.0",
    "--config.critic.discount=-1": "critic.discount must be at least 0 and at most 1, not -1.0",
    "--config.critic.lam=5": "critic.lam must be at least 0 and at most 1, not 5.0",
    "--config.critic.lam_alpha=0": "critic.lam_alpha must be above 0, not 0.0",
    "--config.critic.targets=montecarlo": "unknown critic.targets 'montecarlo'; the nearest is 'monte_carlo'",
    "--config.critic.bounds=(1.0,)": "critic.bounds must be two numbers, as (0.0, 1.0), or (), not (1.0,)",
    "--config.critic.bounds=('a','b')": "critic.bounds must be two numbers, as (0.0, 1.0), or (), not ('a', 'b')",
    "--config.critic.bounds=(1,0)": "critic.bounds = (1, 0): the least reward must be below the greatest",
    "--config.critic.bounds=(1,1)": "critic.bounds = (1, 1): the least reward must be below the greatest",
    "--config.critic.template={prompt}": "critic.template = '{prompt}' is of critic.privileged, which is empty: set it",
    "--config.aggregation.constant=inf": "aggregation.constant must be finite, not inf",
    "--config.eval.temperature=inf": "eval.temperature must be finite, not inf",
    "--config.eval.temperature=1e-30": "eval.temperature must be 0, or at least 1e-06 and at most 1000, not 1e-30",
    "--config.reward.time_limit_s=3e9": "reward.time_limit_s must be at least 0.01 and at most 3600, not 3000000000.0",
    "--config.reward.time_limit_s=inf": "reward.time_limit_s must be finite, not inf",
    "--config.mesh.tensor=0": "mesh.tensor must be -1, or at least 1, not 0",
    "--config.eval.sets.sums.seed=-1": "eval.sets.sums.seed must be at least 0, not -1",
    "--config.log.regions=7": "log.regions must be a tuple of names, but holds 7",
    "--config.log.regions=('kpop','kpop')": "log.regions names 'kpop' twice",
    "--config.log.regions=cispoo": "unknown loss in log.regions 'cispoo'; the nearest is 'cispo'",
    "--config.log.regions=relax_low": "log.regions: 'relax_low' needs loss_defaults.relax_low.alpha, which nothing",
    "--config.lora.targets=7": "lora.targets must be a tuple of names, but holds 7",
    "--config.data.name=\udcff": "data.name: a lone surrogate, \\udcff, which is no character",
    # what can teach nothing
    "--config.optimizer.clip_norm=0": "optimizer.clip_norm = 0 would make every update 0; inf: never clipped",
    "--config.advantage.ddof=1": (
        "advantage.ddof = 1 is for the standard deviations of group_mean_std and batch_norm, and advantage.name = "
        "group_mean has none; set advantage.ddof=0"
    ),
    "--config.advantage.ddof=2": "advantage.ddof must be at most 1, not 2",
    "--config.loss.ratio_cap=0": "ratio_cap = 0 of loss 'dppo_binary_tv' would make every update 0",
    # what does not fit
    "--config.reward.overlong_buffer=7": "reward.overlong_buffer = 7 is longer than a response, rollout.max_new_tokens",
    "--config.rollout.group_size=1000000": "rollout.prompts x rollout.group_size = 8,000,000 rows, more than the",
    "--config.steps=2147483647": "steps x train.epochs x train.minibatches = 4,294,967,294 updates, more than the",
    "--config.data.settings={'max_terms': 3}": (
        "data.kind = 'jsonl' takes no data.settings, but has max_terms; clear them: --config.data.settings={}"
    ),
    "--config.data.kind=reasoning_gym": "data.kind = 'reasoning_gym' generates its examples, but data.path = ",
    "--config.train.minibatches=3": "rollout.prompts = 8 is not divisible by train.minibatches = 3",
    "--config.mesh.data=3": "does not use exactly the",
    "--config.data.max_prompt_len=4": "tokens, more than data.max_prompt_len=4; raise it, or set data.too_long='skip'",
    "--config.rollout.max_new_tokens=60": "rollout.max_new_tokens = 8 + 60 exceeds the model's 64 positions",
    "--config.eval.max_new_tokens=60": (
        "eval.sets.sums.max_prompt_len + eval.max_new_tokens = 8 + 60 exceeds the model's 64 positions"
    ),
    "--config.data.chat=True": "the tokenizer has no chat template; set data.chat=False",
    "--config.data.chat_kwargs={'enable_thinking': False}": (
        "data.chat_kwargs are of a chat template, which data.chat = False leaves out, but has enable_thinking; set "
        "data.chat=True"
    ),
    "--config.eval.sets.sums.chat_kwargs={'x': 1}": "eval.sets.sums.chat_kwargs are of a chat template, which eval.",
    "--config.data.chat_kwargs={'x': 1j}": "data.chat_kwargs.x must be text, a number, True, False, None, or a list or",
    "--config.rollout.stop=7": "rollout.stop must be a tuple of names, but holds 7",
    "--config.rollout.stop=('a','')": "rollout.stop holds an empty text, which every response has at once; leave",
    # files
    "--config.policy.path=~no_such_user/model": "policy.path = '~no_such_user/model': no home folder is known for ~",
    "--config.policy.path=gs:/bucket/model": "policy.path = 'gs:/bucket/model' must have two slashes: write gs://bucket/model",
    "--config.data.path=s3://": "data.path = 's3://' names no bucket: write s3://BUCKET/NAME",
    "--config.eval.sets.sums.path=hdfs://node/rows": "eval.sets.sums.path = 'hdfs://node/rows': hdfs:// addresses",
    "--config.policy.shape=az://bucket/config.json": "policy.shape = 'az://bucket/config.json': az:// addresses are",
    "--config.data.columns.answer=anwser": "has no column 'anwser', which data.columns.answer names; the nearest is",
    "--config.label_cache=gs://bucket/cache": "label_cache = 'gs://bucket/cache' must be on a disk of this machine",
    "--config.label_cache=az://bucket/cache": "label_cache = 'az://bucket/cache': az:// addresses are neither",
    "--config.compile_cache=az://bucket/cache": "compile_cache = 'az://bucket/cache': az:// addresses are neither",
    f"--config.policy.path={'x' * 5000}": "policy.path = 'xxxxxxxx",
    "--config.policy.path=/no/model": "model directory /no/model does not exist",
    "--config.policy.path=": "policy.path is empty: set it to a Hugging Face model directory",
    "--config.data.path=/no/rows.jsonl": "data.path: there is no file '/no/rows.jsonl'",
}


@pytest.mark.parametrize(("override", "sentence"), OVERRIDES.items(), ids=OVERRIDES)
def test_an_override_that_cannot_be(refusal, override, sentence):
    assert sentence in refusal(override)


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "leave_one_out", "max_rl", "batch_norm"])
def test_a_baseline_of_a_group_of_one(refusal, name):
    """Every advantage would be 0."""
    said = refusal(f"--config.advantage.name={name}", "--config.rollout.group_size=1")
    assert said.startswith(f"{name} needs at least 2 responses per prompt, but 8 rows form 8 groups")
    assert "raise rollout.group_size" in said


ALONE = ("--config.advantage.name=reward", "--config.rollout.group_size=1")
NOTHING = {
    "advantage.drop_equal leaves out groups of equal rewards": (*ALONE, "--config.advantage.drop_equal=1"),
    "rollout.resample leaves out groups of equal rewards": (*ALONE, "--config.rollout.resample=2"),
    "advantage.ddof = 1 is for the standard deviations of group_mean_std and batch_norm, and": (
        "--config.advantage.name=gae",
        "--config.advantage.ddof=1",
    ),
    "batch_norm needs at least 2 responses per prompt, but 1 rows form 1 groups": (
        "--config.advantage.name=batch_norm",
        "--config.advantage.ddof=1",
        "--config.rollout.group_size=1",
        "--config.rollout.prompts=1",
        "--config.train.minibatches=1",
    ),
    "critic.whiten: of a batch of one token nothing is left to learn": (
        "--config.advantage.name=gae",
        "--config.rollout.group_size=1",
        "--config.rollout.prompts=1",
        "--config.train.minibatches=1",
        "--config.rollout.max_new_tokens=1",
    ),
    "critic.template must hold '{privileged}', but is '{prompt}'": (
        "--config.advantage.name=gae",
        "--config.critic.privileged=answer",
        "--config.critic.template={prompt}",
    ),
    "critic.max_prompt_len + rollout.max_new_tokens = 134 exceeds the model's 64 positions": (
        "--config.advantage.name=gae",
        "--config.critic.privileged=answer",
    ),
    "loss.correction_low = 6.0 is above loss.correction_high = 5.0: no token would be kept": (
        "--config.loss.name=icepop",
        "--config.loss.correction_low=6",
    ),
    "advantage.name = max_rl is for rewards of 0 and 1, which reward.overlong_buffer lowers": (
        "--config.advantage.name=max_rl",
        "--config.reward.overlong_buffer=3",
    ),
}


@pytest.mark.parametrize(("sentence", "overrides"), NOTHING.items(), ids=NOTHING)
def test_a_config_that_learns_nothing_or_the_wrong_thing(refusal, sentence, overrides):
    assert refusal(*overrides).startswith(sentence)


def test_64_bits(refusal):
    with jax_settings(jax_enable_x64=True):
        assert refusal().startswith("JAX_ENABLE_X64 is set, but rollouts and their keys are made for 32 bits: unset it")


def test_tracked_tokens_that_are_none_or_too_many(refusal):
    topk = "--config.loss.name=dppo_topk_tv"
    assert "needs tracked tokens: set rollout.tracked to at least 1" in refusal(topk, "--config.rollout.tracked=0")
    said = refusal(topk, "--config.rollout.tracked=17")
    assert said == "rollout.tracked = 17 is more than the model's vocabulary of 16"


@pytest.mark.parametrize("loss", ["dppo_binary_tv_proximal", "minirl"])
def test_a_loss_whose_anchor_a_rollout_drawn_early_no_longer_has(refusal, loss):
    said = refusal(f"--config.loss.name={loss}", "--config.train.staleness=1")
    assert said == (
        f"loss '{loss}' needs the policy at the rollout's parameters, which train.staleness = 1 no longer has; "
        "set train.staleness=0"
    )


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_an_attention_of_another_platform(refusal, begun, name):
    """Refused before anything is written."""
    (begun / "checkpoints").mkdir()
    assert "policy.attention" in refusal(f"--config.policy.attention={name}", workdir=begun)


def test_evaluation_without_a_set(refusal, folder, tmp_path):
    config = config_file(tmp_path / "config.py", folder, eval__every=1)
    assert refusal(config=config) == "eval.every = 1, but eval.sets is empty: there is nothing to evaluate on"


# --- the command line and the config file ---


def test_arguments_that_are_missing(refusal, config, monkeypatch, capsys):
    assert refusal(config=None) == "the following arguments are required: --config"
    monkeypatch.setattr(sys, "argv", ["train", f"--config={config}"])
    with pytest.raises(SystemExit) as stop:
        run_main(train.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --workdir DIR is required, for logs and checkpoints\n"


FILES = {
    "def get_config(:": "does not load: SyntaxError: invalid syntax",
    "import no_such_module": "does not load: ModuleNotFoundError: No module named 'no_such_module'",
    "configuration = 3": "has no get_config() that returns a ConfigDict",
    "def get_config():\n    return 3": "has no get_config() that returns a ConfigDict",
    "c.stepz = 3": 'the config is locked; did you mean "steps" instead of "stepz"?',
    "c['loss']['nam'] = 3": 'the config is locked; did you mean "name" instead of "nam"?',
    "c.update({'steqs': 3})": 'the config is locked; did you mean "steps" instead of "steqs"?',
    "c.steps = 2 * c.rollout.promptz": 'did you mean "prompts" instead of "promptz"?',
    "c.steps = 'many'": "TypeError: Could not override field 'steps'",
}


@pytest.mark.parametrize(("text", "sentence"), FILES.items(), ids=FILES)
def test_a_config_file_with_a_mistake(refusal, tmp_path, text, sentence):
    if text.startswith(("c.", "c[")):
        text = f"from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    {text}\n    return c"
    path = tmp_path / "config.py"
    path.write_text(text + "\n")
    said = refusal(config=path)
    assert said.startswith(f"config file {path} ") and sentence in said


def test_a_config_file_that_is_missing(refusal):
    said = refusal(config="configs/no.py")
    assert said == "config file configs/no.py does not exist; the project's are in configs/"


def test_overrides_are_read_whatever_their_place_and_whatever_sys_argv_says(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config.steps=77"])
    got = load_config(str(config), ["--config.loss.ratio_cap=0", "--config.policy.path=a=b", "--config.mesh.fsdp=-1"])
    assert (got.steps, got.loss.ratio_cap, got.policy.path, got.mesh.fsdp) == (4, 0.0, "a=b", -1)
    got = load_config(str(config), ["--config.data.settings={'min_terms': 3}"])
    assert got.data.settings.to_dict() == {"min_terms": 3}
    with pytest.raises(UserError, match="'loss' is a section"):
        load_config(str(config), ["--config.loss={'nam': 3}"])


def test_a_config_file_is_executed_once(tmp_path, folder):
    """A loss of one's own may refuse to be registered twice."""
    path = config_file(tmp_path / "config.py", folder)
    path.write_text(path.read_text() + f"\n\nopen({str(tmp_path / 'count')!r}, 'a').write('x')\n")
    load_config(str(path), ["--config.steps=2"])
    assert (tmp_path / "count").read_text() == "x"


# --- models and data ---


@pytest.fixture
def begun(finished, tmp_path) -> Path:
    """A run that was killed before its first checkpoint: what begins here reads the weights."""
    ignore = shutil.ignore_patterns("checkpoints", "policy")
    return Path(shutil.copytree(finished.folder, tmp_path / "begun", ignore=ignore))


@pytest.fixture
def model(folder, tmp_path) -> Path:
    """A model directory to break."""
    return Path(shutil.copytree(folder / "model", tmp_path / "model"))


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_truncated_shard(refusal, begun, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (begun / "checkpoints").mkdir()
    said = refusal(f"--config.policy.path={model}", workdir=begun)
    assert said.startswith(f"{weights} is truncated or damaged: ")


def test_a_model_without_weights_or_config(refusal, begun, model):
    (begun / "checkpoints").mkdir()
    (model / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refusal(f"--config.policy.path={model}", workdir=begun)
    (model / "config.json").unlink()
    assert refusal(f"--config.policy.path={model}").endswith("has no config.json")


def test_a_model_without_a_tokenizer(refusal, model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    assert "holds none of tokenizer.json" in refusal(f"--config.policy.path={model}")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(architectures=["MambaForCausalLM"], model_type="mamba"), "unsupported architecture 'MambaForCausalLM'"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(rope_scaling={"rope_type": "mrope", "factor": 4.0}), "mrope"),
        (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling of type 'yarn' lacks the field 'factor'"),
        (dict(attention_sink=True), "attention_sink"),
    ],
)
def test_a_model_that_is_not_supported(refusal, model, fields, sentence):
    edit(model / "config.json", **fields)
    said = refusal(f"--config.policy.path={model}")
    assert str(model / "config.json") in said and sentence in said


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        # What transformers would do beyond them depends on each pass's own length.
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 33}, 66),
    ],
)
def test_rows_beyond_what_the_rope_reaches(refusal, model, rope, positions):
    edit(model / "config.json", rope_scaling=rope)
    said = refusal(f"--config.policy.path={model}", "--config.rollout.max_new_tokens=60")
    assert said == f"data.max_prompt_len + rollout.max_new_tokens = 8 + 60 exceeds the model's {positions} positions"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"prompt": "1+1="}', "row 2: has no 'answer'; keys: ['prompt']"),
        ('{"answer": 2}', "row 2: has neither of 'prompt' and 'messages'"),
        ('{"prompt": "1+1=", "answer": "two"}', "row 2: the answer 'two' is not one number"),
        ('{"prompt": "1+1=",', "row 2: broken JSON"),
    ],
)
def test_a_data_row_with_a_fault(refusal, tmp_path, row, sentence):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "0+1=", "answer": 1}\n' + row + "\n")
    said = refusal(f"--config.data.path={rows}")
    assert said.startswith(str(rows)) and sentence in said


def test_an_evaluation_set_with_a_fault(refusal, tmp_path):
    """Found before the first step, not at the first evaluation."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "0+1="}\n')
    assert "row 1: has no 'answer'" in refusal(f"--config.eval.sets.sums.path={rows}")


# --- run folders ---


def test_resuming_with_another_config(refusal, workdir):
    said = refusal("--config.seed=5", "--config.rollout.group_size=2")
    assert said == (
        f"cannot resume '{workdir}' with another config: rollout.group_size was 4 and is now 2; "
        "seed was 0 and is now 5; set the stored values, or take another --workdir"
    )


@pytest.mark.parametrize("sealed", [True, False], ids=["with_fingerprints", "of_older_code"])
def test_resuming_with_a_model_of_another_shape(refusal, model, finished, tmp_path, sealed):
    """The same config, but what stands at policy.path has changed. Found before orbax reads an array."""
    own = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    stored = json.loads((own / "config.json").read_text())
    stored["policy"]["path"] = str(model)
    (own / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    edit(model / "config.json", intermediate_size=48)
    sentence = (
        f"cannot resume '{own}': config.json, generation_config.json or the tokenizer in {model} say another model, or "
        "other ends of a response, than those that this run began with; put them back, or take another --workdir"
    )
    if not sealed:
        for step in own.glob("checkpoints/*"):  # as they were before there were manifests
            (step / "manifest.json").unlink()
            edit(step / "_CHECKPOINT_METADATA", custom_metadata=None)
        sentence = (
            "checkpoint 4 of this run does not fit the config's model: "
            "opt_state/1/0/mu/layers/down is (2, 64, 32) there and (2, 48, 32) here"
        )
    assert refusal(f"--config.policy.path={model}", workdir=own) == sentence


def test_a_workdir_that_cannot_be(refusal, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert refusal(workdir=tmp_path / "file").startswith("cannot make the folder ")
    assert (tmp_path / "file").read_text() == "precious"


# --- meshes ---


def test_a_batch_that_the_mesh_does_not_divide(folder):
    eight = AbstractMesh((2, 4, 1, 1), MESH_AXES)
    for slots in (0, 8, 16):
        checks.check_mesh(small_config(folder, rollout__slots=slots), eight, TINY)
    for changes, sentence in (
        (
            dict(rollout__prompts=12, train__minibatches=1),
            "rollout.prompts is 12 rows, which mesh.data x mesh.fsdp x mesh.expert = 8",
        ),
        (dict(rollout__slots=12), "rollout.slots is 12 rows, which mesh.data x mesh.fsdp x mesh.expert = 8"),
        (dict(rollout__slots=3), "rollout.slots is 3 rows, which .* does not divide; the nearest that fits is 8"),
        (dict(eval__every=1, eval__prompts=12), "eval.prompts is 12 rows, which mesh.data x .* mesh.expert = 8"),
    ):
        with pytest.raises(UserError, match=sentence):
            checks.check_mesh(small_config(folder, **changes), eight, TINY)
    with pytest.raises(UserError, match="parameter embed has vocab = 16, which mesh.tensor = 3 does not divide"):
        checks.check_mesh(small_config(folder), AbstractMesh((1, 1, 3, 1), MESH_AXES), TINY)


# --- once through the real command ---


@pytest.fixture
def command(config, workdir, tmp_path_factory):
    def ask(*arguments, **environment) -> str:
        before = contents(workdir)
        line = [sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={workdir}", *arguments]
        env = hurried_environment(tmp_path_factory) | environment
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout == "" and "Traceback" not in done.stderr
        assert contents(workdir) == before
        return done.stderr.splitlines()[-1]

    return ask


def test_the_command_exits_with_a_sentence(command):
    assert command("--config.loss.name=cispoo") == "error: unknown loss 'cispoo'; the nearest is 'cispo'"


def test_the_command_refuses_rows_that_eight_devices_do_not_divide(command):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    assert command("--config.rollout.prompts=4", XLA_FLAGS=flags, JAX_PLATFORMS="cpu") == (
        "error: rollout.prompts is 4 rows, which mesh.data x mesh.fsdp x mesh.expert = 8 does not divide; "
        "the nearest that fits is 8"
    )


def test_a_tokenizer_that_knows_more_tokens_than_the_model(refusal, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["beyond"] = 999
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has a token 999, beyond the model's vocab_size of" in refusal(f"--config.policy.path={model}")
