"""Names that are used and never defined, which the linter does not tell from the shapes in annotations."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.places import ROOT


def undefined(folder: Path, *paths: str) -> list[str]:
    """ "FILE:LINE message" of every undefined name that does not stand in a string."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--output-format=json"]
    found = json.loads(subprocess.run([*command, *paths], cwd=folder, capture_output=True, text=True).stdout)
    strings: dict[str, set[tuple[int, int]]] = {}
    for file in {fault["filename"] for fault in found}:
        nodes = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        constants = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        strings[file] = {
            (node.lineno, column) for node in constants for column in range(node.col_offset, node.end_col_offset or 0)
        }
    at = [(fault, (fault["location"]["row"], fault["location"]["column"] - 1)) for fault in found]
    return [
        f"{fault['filename']}:{place[0]} {fault['message']}"
        for fault, place in at
        if place not in strings[fault["filename"]]
    ]


def test_every_name_is_defined():
    assert undefined(ROOT, "dppo_jax", "experiments", "configs", "notebooks", "tests") == []


def test_an_undefined_name_is_found_beside_the_shapes_of_arrays(tmp_path):
    (tmp_path / "a.py").write_text('def f(x: Float32[Array, "B"]):\n    return y\n')
    names = [fault.rpartition(" ")[2] for fault in undefined(tmp_path, "a.py")]
    assert names == ["`Float32`", "`Array`", "`y`"]
