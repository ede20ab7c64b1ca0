"""The notebooks run top to bottom, in a kernel and a folder of their own, and show what their text promises."""

import json
from pathlib import Path
import re
import sys

import nbclient
import nbformat
import pytest

from tokjax.bench import report

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """A kernel of this Python, whichever are installed for the user; it finds this checkout."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "",
        "language": "python",
    }
    (folder := tmp_path / "jupyter" / "kernels" / "tested").mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return "tested"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_clean(path):
    """Without outputs, so that differences can be read; with an id for every cell."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


def text_of(cell) -> str:
    """Everything that a cell printed or showed as text."""
    printed = [out.text for out in cell.outputs if out.output_type == "stream"]
    shown = [str(out.data.get("text/markdown", "")) for out in cell.outputs if "data" in out]
    return "".join(printed + shown)


def pictures_of(cell) -> list[str]:
    return [out.data["image/png"] for out in cell.outputs if "data" in out and "image/png" in out.data]


def test_quickstart(kernel, tmp_path):
    notebook = nbformat.read(ROOT / "colabs" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not text_of(cells["install"])  # it was there
    assert (tmp_path / "runs" / "quickstart" / "model" / "model.safetensors").is_file()

    before, after = map(float, re.findall(r"([\d.]+)%", text_of(cells["accuracy"])))
    assert before > 90 and after > 85
    assert "(65, 65, 65, 65) -> (53, 41, 29, 17)" in text_of(cells["reduce"])
    first, second = pictures_of(cells["pictures"])
    assert first != second and min(len(first), len(second)) > 2000

    turned = text_of(cells["turn"])
    assert all(f"ToMe r={r}" in turned for r in (0, 6, 12, 18, 24)) and "| 65.0" in turned
    assert len(pictures_of(cells["turn"])) == 1
    swept = text_of(cells["sweep"])
    rows = {row["method"]: row for row in report.read_jsonl(tmp_path / "runs" / "quickstart" / "results.jsonl")}
    assert rows["ToMe"]["accuracy"] > rows["random drop"]["accuracy"] - 0.02  # by 0.017 above it, as a rule
    assert all(abs(row["macs_relative"] - 0.35) < 0.02 for row in rows.values() if row["target"])
    assert all(method in swept for method in ("unreduced", "ToMe", "EViT", "random drop", "average pooling"))
    assert "merged (2, 49, 48) restored (2, 65, 48)" in text_of(cells["arrays"])
