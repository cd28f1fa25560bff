"""The notebooks run from top to bottom, and print what is stored in them."""

import base64
import copy
import io

import nbformat
import pytest
from matplotlib import image

from notebooks.run import NOTEBOOKS, complaints, difference, main, read, run
from tests.helpers.fixtures import unhurried_environment

FIGURES = {"1_a_loss_and_its_mask": 4, "2_one_training_step_by_hand": 0, "3_reading_a_run": 3}
MOST_BYTES = 400_000  # of a notebook, figures included


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_notebook_is_tested():
    assert sorted(NOTEBOOKS) == sorted(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_prints_what_is_stored(name, tmp_path, monkeypatch):
    """As Jupyter runs it: from its own folder, in a kernel of its own, compiled as users compile."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    stored = read(NOTEBOOKS[name])
    fresh = run(stored, unhurried_environment())  # raises what a cell raised
    assert complaints(fresh) == []
    changed = difference(stored, fresh)
    assert not changed, f"{name} prints something else than what is stored; `make notebooks` stores it:\n{changed}"


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_stored(name):
    """Outputs of one run from the top, figures that show something, and nothing that the next run would change."""
    stored = read(NOTEBOOKS[name])
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert stored.metadata.language_info == {"name": "python"}
    assert all(cell.metadata == {} for cell in stored.cells)
    assert NOTEBOOKS[name].stat().st_size < MOST_BYTES
    pictures = [output.data["image/png"] for output in outputs(stored) if "image/png" in output.get("data", {})]
    assert len(pictures) == FIGURES[name]
    for picture in pictures:
        pixels = image.imread(io.BytesIO(base64.b64decode(picture)))
        assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02
    assert difference(stored, stored) == ""


@pytest.mark.parametrize("name", FIGURES)
def test_a_changed_output_is_told(name):
    """One character, one figure less, or no outputs at all."""
    stored = read(NOTEBOOKS[name])
    for number, output in enumerate(outputs(stored)):
        changed = copy.deepcopy(stored)
        other = outputs(changed)[number]
        if "text" in output:
            other.text = output.text.rstrip()[:-1] + "#"
        else:
            del other.data["image/png"]
        told = difference(stored, changed)
        assert told.startswith("--- stored\n+++ this run\n")
        assert "\n-(a figure)" in told or sum(line.startswith("+") for line in told.splitlines()) == 2
    bare = copy.deepcopy(stored)
    for cell in bare.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    assert difference(bare, stored)


def test_an_unknown_notebook_is_refused():
    with pytest.raises(ValueError, match="unknown notebook '3_reading'; the nearest is '3_reading_a_run'"):
        main(["3_reading"])
