"""Tests name what exists. A name that has moved is else found by the slow tests alone, or by none."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers.places import ROOT

OURS = ("configs", "dppo_jax", "experiments", "notebooks", "tests")


def file_of(module: str) -> Path | None:
    """Where a module's code is; a package's folder, if that has none."""
    path = ROOT / module.replace(".", "/")
    places = (path.with_suffix(".py"), path / "__init__.py", path)
    return next((place for place in places if place.exists()), None)


def outer(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under a module that are not inside a function or class."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield from outer(child)


@cache
def names(module: str) -> set[str]:
    """What a module has, its submodules too."""
    path = file_of(module)
    folder = path if path.is_dir() else path.parent if path.name == "__init__.py" else None
    found = {"__doc__", "__file__", "__name__"} | ({child.stem for child in folder.iterdir()} if folder else set())
    for node in outer(ast.parse(path.read_text())) if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def missing(code: str) -> list[str]:
    """The names of this project that a module imports, or takes from a module of it, and that are not there."""
    tree, modules, found = ast.parse(code), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            for alias in node.names:
                if file_of(node.module) is None or alias.name not in names(node.module):
                    found.add(f"{node.module}.{alias.name}")
                elif file_of(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in stored:
            module = modules.get(node.value.id)
            if module and node.attr not in names(module):
                found.add(f"{module}.{node.attr}")
    return sorted(found)


def test_what_tests_name_exists():
    found = {str(path.relative_to(ROOT)): missing(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(found) > 100 and {path: absent for path, absent in found.items() if absent} == {}


def test_a_name_that_moved_is_found():
    code = "from experiments.run import checks\nfrom experiments.run.checks import nothing\nchecks.remarks(1)\n"
    assert missing(code) == ["experiments.run.checks.nothing", "experiments.run.checks.remarks"]
