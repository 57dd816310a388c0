"""The notebooks of examples/ run from the first cell to the last, in a kernel of their own and an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from logitlab.views.page import module_text

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def outputs(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The data of everything that the cells have shown."""
    return [
        output.data
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    states = book.metadata["widgets"][STATE]["state"]
    shown = [states[data[WIDGET]["model_id"]]["state"] for data in outputs(book) if WIDGET in data]
    grids = [state for state in shown if "_esm" in state]  # others are bars of progress
    assert grids, "no grid was shown"
    for state in grids:
        assert state["data"]["prompts"][0]["tokens"]
        assert state["_esm"] == module_text()


def test_notebooks_are_kept_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "compare_lenses",
        "first_look",
        "steer_and_see",
        "what_does_a_layer_know",
    ]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        kept = [cell for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])]
        assert kept == [], path.name
