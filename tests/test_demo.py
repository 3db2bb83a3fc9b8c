"""The notebook: shipped with its outputs, without traces of a machine, and still running."""

import json
import re
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "docs" / "demo.ipynb"


def test_it_was_executed_once_in_order_and_names_no_machine() -> None:
    text = DEMO.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1, "the imports alone show nothing"
    assert not re.search(r"/(work|tmp|home|root|Users)/", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_it_runs() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(DEMO, as_version=4)
    kernel = {"metadata": {"path": str(DEMO.parent)}}
    nbclient.NotebookClient(book, timeout=1800, kernel_name="python3", resources=kernel).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and all(output.output_type != "error" for cell in code for output in cell.outputs)
