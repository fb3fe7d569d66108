"""The notebook of the documentation: it runs from top to bottom in a kernel, and is stored bare."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    """The notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_stored_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def executed(notebook: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook after all of its cells have run in a new folder."""
    folder = tmp_path_factory.mktemp("notebook")
    ran = nbformat.from_dict(notebook)
    ran.cells = [one for one in ran.cells if "install" not in one.metadata.get("tags", ())]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        NotebookClient(ran, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return ran, folder


def results(notebook: Any) -> list[str]:
    """What the cells return, as text."""
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    return [one.data["text/plain"] for one in outputs if one.output_type == "execute_result"]


def test_every_cell_runs_and_shows_what_it_says(executed: tuple[Any, Path]) -> None:
    ran, folder = executed
    run, test, predicted, compared, exported = results(ran)
    assert "runs/pair" in run
    assert "ensemble" in test and test.splitlines()[-1].startswith("4 ")
    labels = eval(predicted)
    assert [label for label, _ in labels] == [0, 1, 2]
    assert sum(str(label) == best for label, best in labels) >= 2
    assert "independent" in compared and "mutual" in compared
    assert "75,290" in exported or "75290" in exported
    shown = [one.get("data", {}) for cell in ran.cells for one in cell.get("outputs", ())]
    assert sum("image/png" in one for one in shown) == 1
    assert (folder / "exported/resnet8/model.safetensors").is_file()


def test_its_progress_moves_in_place(executed: tuple[Any, Path]) -> None:
    train = next(one for one in executed[0].cells if "dml_accel.train(" in one.source)
    widgets = [one for one in train.outputs if "widget" in str(one.get("data", {}))]
    text = "".join(one.text for one in train.outputs if one.get("name") == "stderr")
    assert widgets or "\r" in text
