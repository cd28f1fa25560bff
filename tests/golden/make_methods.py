"""Writes methods.json: what each method sets beyond configs/quickstart.py, and around which policy.

    python -m tests.golden.make_methods

It reads the 48 files that held one method each before configs/methods.py became their table. They are in the history,
at COMMIT, so that a clone without history cannot make them anew.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from experiments.run.cli import keys

COMMIT, FOLDER = "435a4df", "configs/methods/"


def git(*arguments: str) -> str:
    """What git prints, in this repository."""
    root = Path(__file__).parents[2]
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def beyond_quickstart(config: ConfigDict) -> dict[str, Any]:
    """Dotted name and value of every key, not a section, that differs from the quickstart's or is not there."""
    plain = dict(keys(quickstart.get_config()))
    own = {key: value for key, value in keys(config) if not isinstance(value, ConfigDict)}
    return {key: value for key, value in sorted(own.items()) if key not in plain or plain[key] != value}


def main() -> None:
    found = {}
    for path in git("ls-tree", "--name-only", COMMIT, FOLDER).split():
        if Path(path).stem != "__init__":
            names: dict[str, Any] = {}
            exec(git("show", f"{COMMIT}:{path}"), names)
            sets = beyond_quickstart(names["get_config"]())
            found[Path(path).stem] = {"anchor": names["METHOD"]["anchor"], "sets": sets}
    Path(__file__).with_name("methods.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
