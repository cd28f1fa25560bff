"""scripts/tpu_vm.sh and scripts/xpk.sh: what they print with --dry-run is read by the parsers of xpk and of dppo-train,
and compared with gcloud's reference. Bad input is one sentence.

The lines for xpk need `make xpk`, which `.ci/run` does.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from experiments import train
from tests.helpers.places import ROOT

XPK = ROOT / "build" / "xpk"
needs_xpk = pytest.mark.skipif(not XPK.is_dir() and "CI" not in os.environ, reason="xpk is not here: make xpk")

VARIABLES = {
    "TPU": "my-tpu",
    "ZONE": "us-east5-b",
    "PROJECT": "my-project",
    "BUCKET": "my-bucket",
    "ACCELERATOR": "v5litepod-32",
    "VERSION": "v2-alpha-tpuv5-lite",
    "CLUSTER": "rl",
    "TPU_TYPE": "v5litepod-32",
    "IMAGE": "registry.dev/my-project/dppo_jax:1",
    "SPOT": "1",
}
# What a shell could misread, as Python's literals.
STOPS = """("</answer>", "it's $HOME; `id` & {x} #*?", 'a "b" \\\\')"""
SUBCOMMANDS = {
    "create": [],
    "install": [],
    "copy": ["assets"],
    "run": ["run-a", "--config", "configs/quickstart.py", f"--config.rollout.stop={STOPS}", "--config.steps=3"],
    "watch": ["run-a"],
    "stop": ["run-a"],
    "delete": [],
}
SCRIPTS = ["tpu_vm", "xpk"]

# Subcommand: its flags that we may use, and how many words are none, by
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm and .../storage/cp (no package has its parser).
WIDE = {"--project"}
GCLOUD = {
    "compute tpus tpu-vm create": ({"--zone", "--accelerator-type", "--version", "--scopes", "--spot"}, 1),
    "compute tpus tpu-vm scp": ({"--zone", "--worker", "--recurse", "--compress"}, 2),
    "compute tpus tpu-vm ssh": ({"--zone", "--worker", "--command", "--ssh-flag"}, 1),
    "compute tpus tpu-vm delete": ({"--zone", "--async"}, 1),
    "storage cp": ({"--recursive"}, 2),
}
ON_OR_OFF = {"--spot", "--recurse", "--compress", "--async", "--recursive"}

# Prints what xpk's own parser makes of each line; ends with status 2 at what it refuses.
PARSE = """
import argparse, json, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser(prog="xpk")
set_parser(parser=parser)
read = [vars(parser.parse_args(line)) for line in json.loads(sys.argv[1])]
print(json.dumps([{k: v for k, v in one.items() if isinstance(v, str | int | None)} for one in read]))
"""


def call(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with VARIABLES, but for those given: "" unsets one."""
    given = {key: value for key, value in (os.environ | VARIABLES | variables).items() if value}
    command = ["bash", str(ROOT / "scripts" / f"{script}.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=60)


def lines(script: str, subcommand: str, **variables: str) -> list[list[str]]:
    """The commands of a dry run, as a shell splits them."""
    done = call(script, "--dry-run", subcommand, *SUBCOMMANDS[subcommand], **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = [shlex.split(line) for line in done.stdout.splitlines()]
    assert found
    return found


def option(line: list[str], name: str) -> str:
    """The value of --NAME=VALUE."""
    (value,) = (word.partition("=")[2] for word in line if word.startswith(f"--{name}="))
    return value


def all_lines(script: str, tool: str) -> list[list[str]]:
    """Those of every subcommand that call this tool, with and without what may be left out."""
    found = [line for subcommand in SUBCOMMANDS for line in lines(script, subcommand)]
    found += lines(script, "create", SPOT="")
    found += lines("tpu_vm", "create", PROJECT="") if script == "tpu_vm" else []
    return [line[1:] for line in found if line[0] == tool]


@pytest.mark.parametrize("script", SCRIPTS)
def test_gcloud_knows_every_flag(script):
    found = all_lines(script, "gcloud")
    for line in found:
        (name,) = [name for name in GCLOUD if line[: len(name.split())] == name.split()]
        flags, plain = GCLOUD[name]
        rest = line[len(name.split()) :]
        used = [word.partition("=") for word in rest if word.startswith("-")]
        assert {flag for flag, _, _ in used} <= flags | WIDE and len(used) == len({flag for flag, _, _ in used})
        assert all(bool(value) == (flag not in ON_OR_OFF) for flag, _, value in used)
        assert len(rest) - len(used) == plain
    assert len(found) >= (9 if script == "tpu_vm" else 1)


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not here")
@pytest.mark.slow
@pytest.mark.parametrize("name", GCLOUD)
def test_the_table_is_gclouds_own(name):
    said = subprocess.run(["gcloud", *name.split(), "--help"], capture_output=True, text=True).stdout
    said = re.sub(r"\x1b\[[\d;]*m|.\x08", "", said)
    for flag in GCLOUD[name][0] | WIDE:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", said), flag


@needs_xpk
def test_xpk_reads_every_line():
    found = all_lines("xpk", "xpk")
    command = [sys.executable, "-S", "-c", PARSE, json.dumps(found)]  # -S: of xpk's own packages alone
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(XPK)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    assert [one["xpk_subcommands"] for one in read] == ["cluster", *["workload"] * 3, "cluster", "cluster"]
    assert all((one["cluster"], one["project"], one["zone"]) == ("rl", "my-project", "us-east5-b") for one in read)
    created, run, listed, stopped, _, dear = read
    assert (created["tpu_type"], created["num_slices"], created["spot"]) == ("v5litepod-32", 1, True)
    assert not dear["spot"]
    assert (run["workload"], run["docker_image"], run["max_restarts"]) == ("run-a", VARIABLES["IMAGE"], "50")
    assert (run["restart_on_exit_codes"], run["termination_grace_period_seconds"]) == ("2,3,75", "300")
    assert (listed["filter_by_job"], stopped["workload"]) == ("run-a", "run-a")


# In the place of dppo-train: says what it was given, and ends with status 2 when it is told to.
STAND_IN = f"""#!{sys.executable}
import json, signal, sys, time
def end(*_):
    print("told", flush=True)
    sys.exit(2)
signal.signal(signal.SIGTERM, end)
print(json.dumps(sys.argv[1:]), flush=True)
time.sleep(60)
"""


def until(said: Path, words: str) -> str:
    """What a file holds, once it holds these words."""
    for _ in range(300):
        if said.exists() and words in (text := said.read_text()):
            return text
        time.sleep(0.1)
    raise AssertionError(f"{said} lacks {words!r}")


def on_a_tpu_vm(home: Path) -> list[str]:
    """What dppo-train is given by the host's shell there; it is stopped again."""
    (home / "dppo_jax/.venv/bin").mkdir(parents=True)
    program(home / "dppo_jax/.venv/bin/dppo-train")
    (start,), (stop,) = lines("tpu_vm", "run"), lines("tpu_vm", "stop")
    log = home / "dppo_jax/runs/run-a.log"
    for line, said in ((start, "["), (stop, "told")):
        subprocess.run(["bash", "-c", option(line, "command")], cwd=home, check=True, timeout=60)
        text = until(log, said)
    return json.loads(text.splitlines()[0])


def in_a_pod(home: Path) -> list[str]:
    """The same in the container, which starts it as xpk 1.16 does (core/docker_container.py)."""
    program(home / "dppo-train")
    (line,) = lines("xpk", "run")
    start = f"({option(line, 'command')}) > said & PID=$!; until [ -s said ]; do sleep 0.1; done; kill $PID; wait $PID"
    path = f"{home}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", start], cwd=home, env=os.environ | {"PATH": path}, timeout=60)
    assert done.returncode == 2
    return json.loads(until(home / "said", "told").splitlines()[0])


def program(path: Path, text: str = STAND_IN) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("start", [on_a_tpu_vm, in_a_pod])
def test_dppo_train_reads_what_the_hosts_give_it(start, tmp_path, monkeypatch):
    """A folder stands for that of the bucket, and nobody is joined."""
    words = start(tmp_path)
    assert words[:2] == ["--workdir", "gs://my-bucket/runs/run-a"]
    words[1] = str(tmp_path / "run")
    joined, trained = [], []
    monkeypatch.setattr(sys, "argv", ["dppo-train", *words])
    monkeypatch.setattr(train.peers, "join", joined.append)
    monkeypatch.setattr(train, "train", lambda *given: trained.append(given))
    monkeypatch.chdir(ROOT)
    train.main()
    ((config, workdir),) = trained
    assert joined[0].distributed and workdir == tmp_path / "run"
    assert (config.steps, config.rollout.stop) == (3, ast.literal_eval(STOPS))


def test_what_is_printed_is_what_is_run(tmp_path):
    """A program in gcloud's place writes down what it is given; where it fails, nothing more is run."""
    program(tmp_path / "gcloud", f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv), file=calls)
sys.exit("scp" in sys.argv and 7)
""")
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    done = call("tpu_vm", "run", *SUBCOMMANDS["run"], **more)
    assert (done.returncode, done.stdout) == (0, "")
    (printed,) = [shlex.split(line) for line in done.stderr.splitlines()]
    (called,) = map(json.loads, (tmp_path / "calls").read_text().splitlines())
    assert printed[1:] == called[1:] and [printed] == lines("tpu_vm", "run")
    for tree in ("scripts", "build"):
        (tmp_path / "here" / tree).mkdir(parents=True)
    for file in (ROOT / "scripts").glob("*.sh"):
        shutil.copy(file, tmp_path / "here" / "scripts")
    install = ["bash", str(tmp_path / "here/scripts/tpu_vm.sh"), "install"]
    for git, status, said in (
        (False, 2, "error: install copies what is committed, and this is no git repository"),
        (True, 7, "note: 1 files are changed or new, and not committed: not copied"),
    ):
        if git:
            for words in ("init", "add scripts", "-c user.name=a -c user.email=a@b commit -m a"):
                subprocess.run(["git", *words.split()], cwd=tmp_path / "here", check=True, capture_output=True)
            (tmp_path / "here" / "new").touch()
        environment = os.environ | VARIABLES | more | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        done = subprocess.run(install, env=environment, capture_output=True, text=True)
        assert done.returncode == status and said in done.stderr, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    with tarfile.open(tmp_path / "here/build/dppo_jax.tar.gz") as archive:
        assert "dppo_jax/scripts/tpu_vm.sh" in archive.getnames() and "dppo_jax/new" not in archive.getnames()


FAULTS = [
    ("", {}, "no subcommand is given; known: create install copy run watch stop delete (--help says what they do)"),
    ("crate", {}, "unknown subcommand 'crate'; the nearest is 'create'"),
    ("launch-it-now", {}, "unknown subcommand 'launch-it-now'; known: create install copy run watch stop delete"),
    ("--dryrun create", {}, "unknown option '--dryrun'; the nearest is '--dry-run'"),
    ("create now", {}, "create takes no argument, and 'now' is given"),
    ("create", {"ZONE": ""}, "ZONE is not set; write, say, export ZONE="),
    ("create", {"ZONE": "a b"}, "ZONE must be a name, such as "),
    ("run run-a --config x", {"BUCKET": "gs://b"}, "BUCKET must be a name, such as my-bucket, not 'gs://b'"),
    ("run", {}, "run needs the name of a run, and the arguments of dppo-train, such as: run run-a --config FILE"),
    ("run run-a", {}, "run needs --config FILE, such as: run run-a --config configs/paper/dense_base.py"),
    ("run Run_A --config x", {}, "a run's name is up to 40 small letters, digits and hyphens, such as run-a, not 'Run"),
    ("run run-a --config x --workdir=y", {}, "--workdir is given by this script; leave it out"),
    ("watch", {}, "watch needs the name of a run, such as: watch run-a"),
    ("stop run-a run-b", {}, "stop takes the name of a run alone, and 'run-b' is given"),
    ("copy", {}, "copy needs files or folders, such as: copy models/mine"),
    ("copy no/such", {}, "there is no file or folder 'no/such'"),
]
OF_XPK = [
    ("run run-a --config x", {"RESTARTS": "many"}, "RESTARTS must be a whole number from 0 to 9999, not 'many'"),
    ("install", {"IMAGE": ""}, "IMAGE is not set; write, say, export IMAGE="),
]


@pytest.mark.parametrize(
    ("script", "words", "variables", "sentence"),
    [(script, *fault) for script in SCRIPTS for fault in FAULTS] + [("xpk", *fault) for fault in OF_XPK],
)
def test_bad_input_is_one_sentence(script, words, variables, sentence):
    for dry in ([], ["--dry-run"]):
        done = call(script, *dry, *words.split(), **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("script", "subcommand", "tool"),
    [("tpu_vm", "create", "gcloud"), ("xpk", "create", "xpk"), ("xpk", "install", "docker"), ("xpk", "copy", "gcloud")],
)
def test_a_tool_that_is_not_installed(tmp_path, script, subcommand, tool):
    for needed in ("bash", "dirname", "readlink"):
        (tmp_path / needed).symlink_to(shutil.which(needed))
    done = call(script, subcommand, *SUBCOMMANDS[subcommand], PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tool} is not installed; "), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_subcommand_and_variable(script):
    source = (ROOT / "scripts" / f"{script}.sh").read_text() + (ROOT / "scripts" / "common.sh").read_text()
    subcommands = re.search(r"^SUBCOMMANDS=\((.*)\)$", source, re.MULTILINE)[1].split()
    assert subcommands == list(SUBCOMMANDS)
    for words in (["--help"], ["run", "--help"]):
        done = call(script, *words, TPU="", CLUSTER="")
        assert (done.returncode, done.stderr) == (0, "")
        assert re.findall(r"^  (\w+) .*  \w", done.stdout, re.MULTILINE)[: len(subcommands)] == subcommands
        needed = set(re.findall(r"need ([A-Z_]+) ", source)) | set(re.findall(r"\$\{(SPOT|PROJECT|RESTARTS):", source))
        assert needed <= set(re.findall(r"(?:^|  )([A-Z_]+)  ", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_the_page_are_read(script, tmp_path):
    (tmp_path / "models/mine").mkdir(parents=True)
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    (block,) = [block for block in page.split("```")[1::2] if f"scripts/{script}.sh" in block]
    dry = block.replace(f"scripts/{script}.sh", f"{ROOT}/scripts/{script}.sh --dry-run")
    kept = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(["bash", "-euc", dry], cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= block.count(f"scripts/{script}.sh") >= 6
