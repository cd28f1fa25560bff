"""Runs the notebooks and stores each with what it prints and draws.

    python -m notebooks.run [NAME ...]     (make notebooks: all of them)

What is stored is what the next run gives again, figures aside: no times, no versions, no complaints. The test in
tests/project/test_notebooks.py runs them and compares.
"""

import copy
import difflib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from dppo_jax.errors import UserError, lookup, run_main, writing
from experiments.run.cli import Parser

FOLDER = Path(__file__).parent
NOTEBOOKS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}


def read(path: Path) -> NotebookNode:
    """A stored notebook, in the format's current version."""
    return nbformat.read(path, as_version=4)


def run(notebook: NotebookNode, environment: Mapping[str, str] = os.environ) -> NotebookNode:
    """A copy with the outputs of a run on the CPU, in a kernel of its own, from the notebooks' folder.

    Its metadata stay as they were. Raises CellExecutionError where a cell raises.
    """
    done = copy.deepcopy(notebook)
    with tempfile.TemporaryDirectory() as ipython:  # no settings or start-up files of the user's
        client = NotebookClient(
            done,
            kernel_name="python3",
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(FOLDER)}},
        )
        client.execute(env={**environment, "JAX_PLATFORMS": "cpu", "IPYTHONDIR": ipython})
    done.metadata = copy.deepcopy(notebook.metadata)  # the run writes the version of Python into them
    return done


def complaints(notebook: NotebookNode) -> list[str]:
    """What the cells wrote to stderr."""
    return [output.text for _, output in _outputs(notebook) if output.get("name") == "stderr"]


def shown(notebook: NotebookNode) -> list[str]:
    """Every line that the cells print, under the cell's id, with "(a figure)" in the place of each figure."""
    lines = []
    for cell, output in _outputs(notebook):
        lines.append(f"[{cell.id}: {output.get('name', output.output_type)}]")
        data = output.get("data", {"text/plain": output.get("text", "")})
        lines += ["(a figure)"] if "image/png" in data else []
        lines += data.get("text/plain", "").splitlines()
    return lines


def difference(stored: NotebookNode, fresh: NotebookNode) -> str:
    """Where `shown` differs, as a unified diff; empty where nothing does."""
    return "\n".join(difflib.unified_diff(shown(stored), shown(fresh), "stored", "this run", lineterm="", n=2))


def _outputs(notebook: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """(code cell, one of its outputs), in order."""
    return [(cell, output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def store(path: Path) -> None:
    """Runs a notebook and writes it back; the file stays as it is where a cell raises or complains."""
    try:
        done = run(read(path))
    except CellExecutionError as error:
        raise UserError(f"{path.name} does not run: {error.ename}: {error.evalue}") from error
    if said := complaints(done):
        raise UserError(f"{path.name} complains: {said[0].strip()}")
    with writing(path.parent):
        nbformat.write(done, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m notebooks.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NOTEBOOKS)}; without one, all")
    names = parser.parse_args(argv).names or list(NOTEBOOKS)
    for path in [lookup(NOTEBOOKS, name, "notebook") for name in names]:
        print(path.relative_to(FOLDER.parent), flush=True)
        store(path)


if __name__ == "__main__":
    run_main(main)
