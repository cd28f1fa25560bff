"""Every page and notebook is held to its word: what it links to is there, and so is what its commands name."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

from dppo_jax.devices.peers import FLAGS
from tests.helpers.places import ROOT

MADE = {"runs", "models", "build"}  # folders that commands make
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python[\w.]* -m (experiments[\w.]*)([^`\n#]*)")
FLAG = re.compile(r"(?<!\S)(--[a-z_]+)(?=[\s=]|$)")
PLACEHOLDERS = ("FILE", "configs/X.py", "configs/methods.py:NAME", "configs/mine.py")


def pages() -> list[Path]:
    """Markdown and notebooks, outside of what is made and of hidden folders."""
    found = [path.relative_to(ROOT) for kind in ("*.md", "*.ipynb") for path in ROOT.rglob(kind)]
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(path for path in shown if path.parts[0] not in MADE)


def text_of(page: Path) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        return "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (ROOT / page.parent / file).resolve() if file else ROOT / page
        if not target.exists() or not target.is_relative_to(ROOT):
            found.append(link)
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target.relative_to(ROOT))):
            found.append(link)
    return found


class Command(NamedTuple):
    page: str
    module: str
    arguments: str


def commands() -> list[Command]:
    """`python -m experiments...` in all pages, continued lines joined."""
    return [
        Command(str(page), *match)
        for page in pages()
        for match in COMMAND.findall(re.sub(r"\s*\\\n\s*", " ", text_of(page)))
    ]


def flags_of(module: str) -> set[str]:
    """What a module's own source, or that of the study behind it, takes as flags; --config where it reads one."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return set()
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:
        files = list(Path(spec.origin).parent.glob("*.py"))
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    if "study" in source:
        source += (ROOT / "experiments" / "study.py").read_text(encoding="utf-8")
    found = set(re.findall(r'"(--[a-z_]+)"(?:,|:)', source))
    found |= {"--config"} if "cli.parse" in source else set()
    return found | (FLAGS.keys() if "peers.FLAGS" in source else set())


def test_pages_are_found():
    """What git knows, so that none is passed over."""
    listed = subprocess.run(["git", "ls-files", "*.md", "*.ipynb"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    assert set(listed.stdout.split()) <= {str(page) for page in pages()}


@pytest.mark.parametrize("page", pages(), ids=str)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    first = "# A word, or two\n[b](docs/b.md#there) [c](docs/c.md) [d](#a-word-or-two) [e](#f)"
    second = "## There\n[up](../README.md) [up](../../README.md) ![x](x.png)\n```\n[no](n)\n```"
    (tmp_path / "README.md").write_text(first)
    (tmp_path / "docs" / "b.md").write_text(second)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert broken(Path("README.md")) == ["docs/c.md", "#f"]
    assert broken(Path("docs/b.md")) == ["../../README.md", "x.png"]


MODULES = sorted({command.module for command in commands()})


@pytest.mark.parametrize("module", MODULES)
def test_commands_name_modules_flags_and_configs_that_are_there(module):
    assert importlib.util.find_spec(module), module
    known = flags_of(module)
    for page, _, arguments in (command for command in commands() if command.module == module):
        for flag in FLAG.findall(arguments):
            assert flag in known, f"{page}: {module} has no {flag}"
        for config in re.findall(r"--config[ =](\S+)", arguments):
            assert config in PLACEHOLDERS or (ROOT / config.partition(":")[0]).is_file(), f"{page}: {config}"
