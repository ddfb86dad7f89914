"""The notebooks run from top to bottom, and show what they are kept with."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> str:
    """Return what the cells wrote to standard output."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in output.get("data", ()) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_with_its_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count is None] == []
    assert pictures(notebook)
    assert not re.search(r"(?<![\w.:/])/\w[\w.-]*/", printed(notebook)), "an absolute path, which is of one machine"


@pytest.mark.slow
def test_own_photographs(tmp_path: Path) -> None:
    """On drawn pictures: most that the model has never seen are told, and the exported model tells the same."""
    notebook = nbformat.read(ROOT / "examples" / "own_photographs.ipynb", as_version=4)
    inline = "module://matplotlib_inline.backend_inline"  # Streamlit, tested in the same process, sets another
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "MPLBACKEND": inline}
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "examples")}}
    )
    client.execute(env=environment)
    text = printed(notebook)
    right = re.search(r"^(\d+) of 80 are right", text, re.MULTILINE)
    assert right and int(right[1]) > 40, text  # 20 by chance
    assert re.search(r"; 80 of 80 labels the same$", text, re.MULTILINE), text
    assert pictures(notebook) >= 2
