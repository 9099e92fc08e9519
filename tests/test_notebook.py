"""The notebook runs, prints what it shows, and is small."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "ema_is_regression.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[list[str], list[str]]]:
    """Of each cell: the texts that it printed, and the kinds of what it showed."""
    return [
        (
            [output["text"] for output in cell.get("outputs", ()) if "text" in output],
            [kind for output in cell.get("outputs", ()) for kind in sorted(output.get("data", ()))],
        )
        for cell in notebook.cells
    ]


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning")  # those of Jupyter
def test_the_notebook_runs_and_shows_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """To store its outputs anew: jupyter execute --inplace examples/ema_is_regression.ipynb."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(stored)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(fresh, timeout=600, startup_timeout=600, kernel_name="python3").execute()
    assert outputs(fresh) == outputs(stored)
    assert sum("image/png" in kinds for _, kinds in outputs(stored)) == 3


def test_the_notebook_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 250_000
