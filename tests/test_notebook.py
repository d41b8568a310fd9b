"""The notebook runs from its first cell to its last, with fewer steps and pictures, and shows what it says."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "distillation.ipynb"
SHORT = "TEACHER_STEPS, STUDENT_STEPS = 3, 3\nTRAIN_IMAGES, STUDENT_IMAGES, VAL_IMAGES = 12, 6, 4"


@pytest.fixture(scope="module")
def cells():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = SHORT
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parents[1]}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_it_prints_the_precision_of_each_detector(cells):
    texts = [printed(cell) for cell in cells]
    assert any(text.startswith("AP: teacher 0.") and "plain student 0." in text for text in texts)
    assert any("'loss_fbkd_feature'" in text and "distilled 0." in text for text in texts)


def test_it_draws_the_attention(cells):
    (picture,) = (output.data["image/png"] for output in cells[-1].outputs if "image/png" in output.get("data", {}))
    assert len(picture) > 20_000


def test_it_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
