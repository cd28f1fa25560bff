"""The notebooks run from top to bottom, and are stored without what they print."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.fixtures import hurried_environment

FOLDER = Path(__file__).parents[1] / "notebooks"
# What each must draw and print when it is run as it is.
SHOWN = {
    "1_a_loss_and_its_mask": (4, ["rare, A > 0"]),
    "2_one_training_step_by_hand": (0, ["largest difference from the update by hand", "min π − μ"]),
    "3_reading_a_run": (3, ["reward/mean", "policy/prob_diff_max", "step_000000"]),
}


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_is_stored_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name, tmp_path, tmp_path_factory, monkeypatch):
    """As Jupyter runs it: from its own folder, in a kernel of its own."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    environment = hurried_environment(tmp_path_factory) | {"IPYTHONDIR": str(tmp_path / "ipython")}
    client.execute(env=environment)  # raises what a cell raised

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    pictures, sentences = SHOWN[name]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    for sentence in sentences:
        assert sentence in printed
    complaints = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert complaints == []
