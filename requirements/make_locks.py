"""Writes requirements/PYTHON.lock for every supported Python: what `make lock` runs.

    python requirements/make_locks.py

Each holds the exact version of everything that requirements.txt and requirements-dev.txt need on Linux, x86_64. uv
finds them for a Python that need not be there, from the indexes that pip is configured with: the newest that fit.
"""

import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
# pip's key: uv's flag.
FLAGS = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links"}


def indexes() -> list[str]:
    """uv's flags for the indexes in pip's configuration: its files and PIP_ variables, the last of which holds."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    values: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: [":env:" in line, not line.startswith("global.")]):
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = ast.literal_eval(value)
    return [word for key, flag in FLAGS.items() for place in values.get(key, "").split() for word in (flag, place)]


def main() -> None:
    if sys.argv[1:]:
        sys.exit(f"error: no argument is taken, and {sys.argv[1]!r} is given")
    options = ["--python-platform=x86_64-manylinux_2_28", "--index-strategy=unsafe-best-match", "--no-annotate"]
    for python in PYTHONS:
        lock = FOLDER / f"{python}.lock"
        print(f"lock: {lock.name}", flush=True)
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--upgrade", *options, *indexes()]
        command += [f"--python-version={python}", f"--output-file={lock}", "--custom-compile-command=make lock"]
        if subprocess.run([*command, "requirements.txt", "requirements-dev.txt"], cwd=FOLDER.parent).returncode:
            sys.exit(f"error: no versions for Python {python}; uv's message is above")


if __name__ == "__main__":
    main()
