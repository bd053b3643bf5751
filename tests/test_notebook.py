"""Every cell of the notebook runs, and the outputs in the file are those of the code."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "lazymar.ipynb"


def outputs(notebook) -> list[set[str]]:
    """The kinds of each code cell's outputs."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [{kind for output in cell.outputs for kind in output.get("data", [output.output_type])} for cell in cells]


def test_every_cell_runs_and_its_outputs_are_in_the_file(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = outputs(notebook)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert outputs(notebook) == stored
    assert sum("image/png" in kinds for kinds in stored) == 6 and NOTEBOOK.stat().st_size < 1e6
