"""What is installed: the locks satisfy every range, the commands of pyproject.toml are there, and a wheel trains."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS: dict[str, str] = PROJECT["scripts"]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PIN = re.compile(r"([a-z0-9][a-z0-9-]*)==([A-Za-z0-9.!+_-]+)")
locker = runpy.run_path(str(ROOT / "requirements" / "make_locks.py"))


def requirements(text: str) -> list[Requirement]:
    """Those of a requirements file."""
    words = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Requirement(word) for word in words if word]


RANGES = {
    **{name: requirements((ROOT / name).read_text()) for name in ("requirements.txt", "requirements-dev.txt")},
    **{extra: requirements("\n".join(found)) for extra, found in PROJECT["optional-dependencies"].items()},
}


def pins(lock: str) -> dict[str, str]:
    """Name to version; fails at a line that is no exact version: an address, a path, a range, an option."""
    found = {}
    for line in lock.splitlines():
        if not line.startswith("#"):
            pin = PIN.fullmatch(line)
            assert pin, line
            found[pin[1]] = pin[2]
    return found


def missing(lock: str, python: str, ranges: list[Requirement]) -> list[str]:
    """What a lock for this Python lacks, or has at a version outside of its range."""
    found, here = pins(lock), {"python_version": python, "python_full_version": f"{python}.0"}
    asked = [one for one in ranges if one.marker is None or one.marker.evaluate(here)]
    return [str(one) for one in asked if not one.specifier.contains(found.get(canonicalize_name(one.name), "0"))]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
@pytest.mark.parametrize("name", RANGES)
def test_a_lock_satisfies_every_range(lock, name):
    """Where not: make lock."""
    assert RANGES[name] and missing(lock.read_text(), lock.stem, RANGES[name]) == []


def test_what_a_lock_lacks_is_seen():
    asked = requirements("jax>=0.10,<0.13  # a comment\n\nMoto[server]>=5\nold>=1; python_version < '3.12'\nnew>=1")
    assert missing("# made\njax==0.9.1\nmoto==5.2\n", "3.12", asked) == ["jax<0.13,>=0.10", "new>=1"]
    for line in ("jax>=0.9", "jax @ https://index/jax.whl", "--index-url https://index", "moto[server]==5.2", "jax"):
        with pytest.raises(AssertionError):
            pins(line)


def test_there_is_a_lock_for_every_supported_python():
    makefile = (ROOT / "Makefile").read_text()
    supported = re.search(r"^SUPPORTED := (.*)$", makefile, re.MULTILINE)[1].split()
    assert [lock.stem for lock in LOCKS] == supported == list(locker["PYTHONS"])
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    for file in ("Dockerfile", "scripts/tpu_vm.sh"):
        text = (ROOT / file).read_text()
        assert set(re.findall(r"(?:python:|PYTHON=|requirements/)(3\.\d+)", text)) == {"3.12"}


def test_locks_are_made_from_pips_indexes(tmp_path, monkeypatch):
    """A variable holds before a file, and a file has several addresses on several lines."""
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://a.dev/simple\nextra-index-url =\n  https://b.dev/simple\n  https://c.dev/simple\n"
    )
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    found = locker["indexes"]()
    said = "--default-index https://a.dev/simple --index https://b.dev/simple --index https://c.dev/simple"
    assert found[:6] == said.split()
    monkeypatch.setenv("PIP_INDEX_URL", "https://d.dev/simple")
    assert locker["indexes"]()[:2] == ["--default-index", "https://d.dev/simple"]


def test_every_command_of_the_readme_is_installed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python -m experiments\.([\w.]+)", readme))
    named |= set(re.search(r"^experiments/ +commands: (.*)$", readme, re.MULTILINE)[1].split(", "))
    named.remove("methods")  # makes a page of the project
    assert len(named) > 8
    assert {f"dppo-{module.rpartition('.')[2].replace('_', '-')}" for module in named} == set(COMMANDS)


@pytest.mark.filterwarnings("ignore:'experiments:RuntimeWarning")  # other tests have imported it
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_the_module_that_it_is_named_after(command, monkeypatch, capsys):
    module, _, name = COMMANDS[command].partition(":")
    function = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{command}", "--help"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        with pytest.raises(SystemExit) as stop:
            function()
    said = capsys.readouterr()
    module = f"experiments.{function.args[0]}"
    assert not stop.value.code and said.out.startswith((f"usage: {command} ", f"usage: python -m {module} ")), said
    assert module.rpartition(".")[2].replace("_", "-") == command.removeprefix("dppo-")


@pytest.mark.slow
def test_a_wheel_trains(tmp_path):
    """In an environment that has the package from a wheel, and everything else from the one at hand."""
    for folder in ("dppo_jax", "experiments", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=ignored)
    for file in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path / "tree")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(tmp_path / "tree")], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    assert {path.name for path in (tmp_path / "venv" / "bin").glob("dppo-*")} == set(COMMANDS)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    found = Path(call(python, "-P", "-c", "from experiments.compile_for_tpu import report; print(report.__file__)"))
    assert found.is_relative_to(site) and (found.parent / "result" / "calibration.json").is_file()
    small = ["steps=1", "rollout.prompts=4", "rollout.group_size=2", "train.minibatches=2", "eval.every=0"]
    train = ["--config", "configs/quickstart.py", "--workdir", str(tmp_path / "run"), "--config.compile_cache="]
    call(tmp_path / "venv" / "bin" / "dppo-train", *train, *(f"--config.{key}" for key in small))
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
