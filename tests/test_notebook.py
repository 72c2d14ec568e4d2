"""docs/quickstart.ipynb runs in a Jupyter kernel, and shows its progress there."""

import re

import pytest

from tests.conftest import ROOT, Workspace

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def texts_of(outputs: list) -> list[str]:
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]


def cells_with_code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_notebook_runs_and_shows_its_progress(workspace: Workspace, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in workspace.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_steps=600", "max_steps=30").replace("eval_every=150", "eval_every=10")
    place = {"metadata": {"path": str(workspace.folder)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=place, coalesce_streams=True
    ).execute()

    data, _, training, picture, generation = cells_with_code(notebook)
    assert texts_of(data.outputs)[0].startswith("Training the tokenizer: ")
    progress, lines = texts_of(training.outputs)  # one output that is updated, and a line for each evaluation
    assert progress == "step 30/30"
    evaluations = re.findall(r"step (\d+)  validation loss \d\.\d{4}  perplexity [\d.]+(?:  \(best so far\))?\n", lines)
    assert evaluations == ["10", "20", "30"]
    assert lines.count("\n") == 3
    assert "image/png" in picture.outputs[0]["data"]
    assert texts_of(generation.outputs)[0].startswith("def read_lines(path):")
    assert "\x1b" not in "".join(text for cell in cells_with_code(notebook) for text in texts_of(cell.outputs))


def test_stored_outputs_are_current_and_contain_no_local_path():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = cells_with_code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not re.search(r"/(root|home|tmp|Users)/|\\u001b", NOTEBOOK.read_text())
    assert '"step 600/600"' in NOTEBOOK.read_text()
