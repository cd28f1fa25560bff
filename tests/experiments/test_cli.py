"""What all entry points share: paths, lists and numbers of the command line, and what a config's paths become."""

import contextlib
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import base
from dppo_jax.devices.compilations import keep_compiled
from dppo_jax.errors import UserError, run_main
from experiments.run import cli
from experiments.run.load import load_prompts, load_text
from experiments.run.model_files import model_directory
from experiments.run.setup import Setup
from experiments.sweep import Run, check
from experiments.trace import trace
from tests.helpers.fixtures import TINY, config_file, no_cache, small_config, tiny
from tests.helpers.places import ROOT

QUICK = ["--config", "configs/quickstart.py"]

# Every flag of every entry point that takes a path, with what else its command must be given.
PATHS: dict[str, dict[str, list[str]]] = {
    "train": {"--workdir": QUICK, "--config": ["--workdir", "x"]},
    "eval": {"--checkpoint": QUICK, "--policy": QUICK, "--results": QUICK},
    "build_sanity_set": {
        "--policy": [*QUICK, "--samples", "2", "--out", "x.parquet"],
        "--out": QUICK,
        "--results": QUICK,
    },
    "sft": {"--workdir": QUICK},
    "export": {"--out": ["x"]},
    "chaos.__main__": {"--workdir": QUICK, "--bucket": [*QUICK, "--workdir", "x"]},
    "sweep": {"--workdir": [*QUICK, "--losses", "cispo"]},
    "questions.necessity.__main__": {"--workdir": [*QUICK, "--out", "x"], "--out": [*QUICK, "--workdir", "x"]},
    "questions.collapse.__main__": {"--workdir": ["--out", "x"], "--out": ["--workdir", "x"]},
    "questions.survival.__main__": {"--workdir": QUICK, "--report": [*QUICK, "--workdir", "x"]},
    "questions.survival.pull": {"--out": QUICK},
    "questions.estimates.__main__": {"--out": QUICK},
    "questions.mismatch.__main__": {"--out": QUICK},
    "compile_for_tpu.__main__": {
        "--json": [*QUICK, "--topology", "v5p:2x2x1"],
        "--hlo": [*QUICK, "--topology", "v5p:2x2x1"],
    },
    "compile_for_tpu.scaling": {"--out": QUICK},
    "compile_for_tpu.calibration": {"--out": []},
    "benchmark.__main__": {"--json": [], "--tunix": [], "--torch": []},
    "plot": {"--runs": ["--out", "x.png"], "--out": ["--runs", "x"]},
    "recipes.smollm2.convert": {"--gguf": ["--out", "x"], "--out": ["--gguf", "x"]},
    "recipes.smollm2.check": {"--gguf": ["--model", "x"], "--model": ["--gguf", "x"]},
    "recipes.reward_model.make": {
        "--replies": ["--policy", "x", "--out", "x"],
        "--out": ["--replies", "x.parquet", "--policy", "x"],
    },
    "questions.reuse.make_model": {"--out": []},
    "chaos.inputs.__main__": {"--out": []},
}


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """refusal(module, *arguments): the sentence that an entry point ends with. It leaves nothing behind."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")  # what is named by a relative path
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)

    def ask(module: str, *arguments: str) -> str:
        main = vars(importlib.import_module(f"experiments.{module}")).get("main")
        if module == "questions.necessity.__main__":
            found = importlib.import_module(f"experiments.{module}")
            main = lambda: found.main(found.__doc__, found.ARMS)  # noqa: E731
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == "", said
        assert sorted(tmp_path.iterdir()) == before
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        return said.err.removeprefix("error: ").strip()

    return ask


FLAGS = [(module, flag, others) for module, flags in PATHS.items() for flag, others in flags.items()]


@pytest.mark.parametrize(("module", "flag", "others"), FLAGS, ids=[f"{m} {f}" for m, f, _ in FLAGS])
def test_a_path_that_cannot_be(refusal, module, flag, others):
    """An address was taken for a local folder called gs:."""
    said = refusal(module, *others, flag, "hdfs://node/run.png")
    assert said.startswith((flag, f"argument {flag}: ")) and "hdfs:// addresses are neither read nor written" in said
    assert "must have two slashes: write gs://bucket/run.png" in refusal(module, *others, flag, "gs:/bucket/run.png")
    assert "no home folder is known for ~" in refusal(module, *others, flag, "~no_such_user/run.png")
    assert "File name too long" in refusal(module, *others, flag, "x" * 300 + ".png")


def test_every_flag_that_takes_a_path_is_in_the_table():
    """A flag's type is Path, for which `cli.Parser` has one reading; the two of plot are lists of text."""
    found = set()
    for file in (ROOT / "experiments").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT / "experiments").with_suffix("").parts)
        for line in file.read_text().splitlines():
            if "type=Path" in line and '"--' in line:
                found.add((module, line.split('"')[1]))
    table = {(module, flag) for module, flag, _ in FLAGS}
    assert ("sweep", "--workdir") in found
    assert {(m, f) for m, f in found if m not in ("study", "cli")} <= table
    assert {f for m, f in found if m == "study"} <= set(PATHS["questions.necessity.__main__"])


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("sweep", ["--seeds", "0"], "--seeds must be at least 1, not 0"),
        ("sweep", ["--seeds", "9" * 20], "--seeds must be at most 10,000, not 99999"),
        ("sweep", ["--rates", "nan"], "--rates must be a finite number above 0, not nan"),
        ("sweep", ["--rates", "1,-1"], "--rates must be a finite number above 0, not -1"),
        ("sweep", ["--rates", "1,1.0"], "argument --rates: '1,1.0' names '1.0' twice"),
        ("sweep", ["--rates", "0.1,0.10000001"], "two runs of the sweep would share the folder 'cispo_x0.1/seed_0'"),
        ("sweep", ["--losses", "cispo,cispo"], "argument --losses: 'cispo,cispo' names 'cispo' twice"),
        ("sweep", ["--losses", "cispo,,kpop"], "argument --losses: 'cispo,,kpop' holds an empty item"),
        ("sweep", ["--workdir", ""], "argument --workdir: the path is empty"),
        ("sweep", ["--config.seed=4294967295"], "seed must be at most 4294967295, not 4294967296"),
        ("questions.survival.__main__", ["--scale", "inf"], "--scale must be a finite number above 0, not inf"),
        ("questions.survival.__main__", ["--lag", "0,0"], "argument --lag: '0,0' names '0' twice"),
        ("questions.survival.pull", ["--batches", "0"], "--batches must be at least 1, not 0"),
        ("questions.estimates.__main__", ["--updates", "-1"], "--updates must be at least 0, not -1"),
        ("compile_for_tpu.__main__", ["--layers", "0"], "--layers must be at least 1, not 0"),
        ("benchmark.__main__", ["--repeats", "1e9"], "--repeats must be a whole number, not 1e9"),
        ("plot", ["--smooth", "1e300"], "--smooth must be a whole number of steps or a fraction between 0 and 1"),
        ("plot", ["--smooth", "nan"], "--smooth must be a whole number of steps or a fraction between 0 and 1"),
        ("train", ["--distributed", "--peer_timeout", "9" * 20], "--peer_timeout must be at most 1,000,000 seconds"),
        ("train", ["--distributed", "--num_processes", "9" * 20], "--num_processes must be at most 1,000,000, not"),
        ("chaos.__main__", ["--kinds", "plian"], "--kinds has no 'plian'; the nearest is 'plain'"),
        ("chaos.__main__", ["--faults", "disk"], "--faults has no 'disk'; the nearest is 'full_disk'"),
        ("chaos.__main__", ["--kinds", "bucket"], "the kind bucket needs --bucket, such as gs://mine/chaos"),
        ("chaos.__main__", ["--kills", "0", "--faults", "none"], "nothing is to be done"),
        ("build_sanity_set", ["--samples", "0"], "--samples must be at least 1, not 0"),
        ("build_sanity_set", ["--high", "1.5"], "--high must be at most 1, not 1.5"),
        ("build_sanity_set", ["--low", "nan"], "--low must be a finite number of at least 0, not nan"),
        ("train", ["--config.zzzzzz=3"], "unknown config key 'zzzzzz'; the keys are in configs/base.py"),
    ],
)
def test_a_number_or_a_list_that_cannot_be(refusal, module, arguments, sentence):
    others = {
        "sweep": [*QUICK, "--workdir=x", "--losses=cispo", "--config.eval.every=0"],
        "questions.survival.__main__": [*QUICK, "--workdir=x"],
        "questions.survival.pull": [*QUICK, "--out=x"],
        "questions.estimates.__main__": [*QUICK, "--out=x"],
        "compile_for_tpu.__main__": [*QUICK, "--topology=v5p:2x2x1"],
        "benchmark.__main__": [],
        "chaos.__main__": [*QUICK, "--workdir=x"],
        "plot": ["--runs=x", "--out=x.png"],
        "train": [*QUICK, "--workdir=x"],
        "build_sanity_set": [*QUICK, "--policy=x", "--samples=2", "--out=x.parquet"],
    }
    assert refusal(module, *others[module], *arguments).startswith(sentence)


@pytest.fixture
def home(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """A home folder that holds model/ and questions.jsonl."""
    shutil.copytree(tiny(tmp_path_factory), tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_in_every_path(home, tmp_path, monkeypatch):
    config_file(home / "mine.py", Path("~"))
    config = cli.load_config("~/mine.py", [])
    assert config.policy.path == "~/model" and config.data.path == "~/questions.jsonl"
    assert model_directory(config) == home / "model"
    assert "0.0 million parameters, 2 layers" in trace(config)
    parser = cli.Parser()
    parser.add_argument("--workdir", type=Path)
    assert parser.parse_args(["--workdir", "~/run"]).workdir == home / "run"
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        setup = Setup(config, text=load_text(home / "model", TINY))
        stream, _ = load_prompts(setup, config.data, 4, stack)
    assert stream.mean_prompt_length > 0
    assert list(tmp_path.iterdir()) == [home]


def test_a_compile_cache_that_cannot_be_made_is_told_and_no_reason_to_stop(home, capsys):
    with no_cache():
        for folder, reason in (
            ("/dev/null/x", "cannot make the folder '/dev/null/x': Not a directory"),
            ("~no_such_user/x", "'~no_such_user/x': no home folder is known for ~; write the path out"),
            ("x" * 300, "File name too long"),
            ("/proc/dppo_jax", "cannot make the folder '/proc/dppo_jax': No such file or directory"),
        ):
            keep_compiled(folder)
            said = capsys.readouterr().err
            assert said.startswith("compile_cache: ") and said.count("\n") == 1 and reason in said
            assert said.endswith("; what is compiled is not kept for later runs\n")
            assert jax.config.jax_compilation_cache_dir is None
        keep_compiled("~/cache")
        assert capsys.readouterr().err == ""
        assert jax.config.jax_compilation_cache_dir == str(home / "cache") and (home / "cache").is_dir()


SHAPES = {
    "not json": "broken JSON",
    "[1, 2]": "must hold a JSON object, not a list",
    "": "broken JSON",
    "[" * 100_000: "JSON that is nested too deeply",
    '{"vocab_size": ' + "9" * 5000 + "}": "Exceeds the limit",
}


@pytest.mark.parametrize("text", SHAPES, ids=["words", "list", "empty", "deep", "digits"])
def test_a_shape_that_is_no_json(tmp_path, text):
    (tmp_path / "shape.json").write_text(text)
    config = small_config(tmp_path, policy__shape=str(tmp_path / "shape.json"))
    with pytest.raises(UserError, match=f"^{tmp_path / 'shape.json'}.*{SHAPES[text]}"):
        trace(config)


def test_the_quickstart_config_says_how_to_take_other_data(tmp_path):
    """Its settings are those of its own data set."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=", "answer": 2}) + "\n")
    given = ["--config.data.kind=jsonl", f"--config.data.path={rows}"]
    with pytest.raises(UserError, match=r"clear them: --config.data.settings=\{\}$"):
        trace(cli.load_config(str(ROOT / "configs/quickstart.py"), given))
    config = cli.load_config(str(ROOT / "configs/quickstart.py"), [*given, "--config.data.settings={}"])
    config.policy.path = str(ROOT / "assets/tiny")
    assert trace(config).startswith("model")
    for override, sentence in (
        ("--config.eval.sets.held_out.kind=parquet", r"clear them: --config.eval.sets.held_out.settings=\{\}$"),
        (f"--config.eval.sets.held_out.path={rows}", r"clear it: --config.eval.sets.held_out.path=, or set"),
    ):
        with pytest.raises(UserError, match=sentence):
            trace(cli.load_config(str(ROOT / "configs/quickstart.py"), [override]))


def test_a_number_of_a_loss_without_defaults_is_set_for_a_sweep():
    quickstart = str(ROOT / "configs/quickstart.py")
    config = cli.load_config(quickstart, ["--config.loss_defaults.relax_low.alpha=0.1"])
    assert config.loss_defaults.relax_low.alpha == 0.1
    check(config, [Run("relax_low", 0, 1.0)])
    with pytest.raises(UserError, match=r"unknown config key 'loss_defaults.relax_low.beta'"):
        cli.load_config(quickstart, ["--config.loss_defaults.relax_low.beta=0.1"])


OPTIONAL = [name for name, value in cli.keys(base.get_config()) if value is None]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_key_that_may_be_unset_is_unset_by_none(name):
    own = base.get_config()
    section, _, key = name.rpartition(".")
    own = own[section] if section else own
    given, unset = (f"--config.{name}={text}" for text in ("uniform" if own.get_type(key) is str else "3", "None"))

    def read(*overrides):
        config = cli.load_config(str(ROOT / "configs/base.py"), overrides)
        return dict(cli.keys(config))[name]

    assert read(given) == read(unset, given) == own.get_type(key)(given.partition("=")[2])
    assert read(given, unset) is None


def test_the_size_of_a_set_of_prompts_is_unset_by_none():
    path, key = str(ROOT / "configs/quickstart.py"), "--config.eval.sets.held_out.size"
    assert cli.load_config(path, [f"{key}=3"]).eval.sets.held_out.size == 3
    assert cli.load_config(path, [f"{key}=None"]).eval.sets.held_out.size is None


NOT_UNSET = {
    "steps=None": "steps=None: must be a whole number, not 'None'",
    "train.pack=None": "train.pack=None: must be True or False, not 'None'",
    "rollout.exact=2": "rollout.exact=2: must be True or False, not '2'",
    "critic.privileged=None": "critic.privileged = None: it is a text, which is unset as --config.critic.privileged=$",
}


@pytest.mark.parametrize("override", NOT_UNSET)
def test_a_key_that_has_no_unset_is_not_unset_by_none(override):
    with pytest.raises(UserError, match=NOT_UNSET[override]):
        cli.load_config(str(ROOT / "configs/base.py"), [f"--config.{override}"])


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match=f"--config {tmp_path} is a folder; name a file in it"):
        cli.load_config(str(tmp_path), [])


@pytest.mark.parametrize("arguments", ["'one'", "(1, 2)", "1"])
def test_arguments_are_texts(tmp_path, arguments):
    file = tmp_path / "mine.py"
    file.write_text(f"ARGUMENTS = {arguments}\n\n\ndef get_config(name):\n    raise KeyError(name)\n")
    with pytest.raises(UserError, match="ARGUMENTS of config file .* must be a tuple of texts, not"):
        cli.load_config(f"{file}:one", [])


@pytest.mark.parametrize("module", ["study", "probe", "trace"])
def test_a_module_that_is_no_command_says_so(module):
    done = subprocess.run([sys.executable, "-m", f"experiments.{module}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"experiments.{module} is no command" in done.stderr
