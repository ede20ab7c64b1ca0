"""The notebooks run top to bottom, in a kernel and a folder of their own, and show what their text promises."""

import json
from pathlib import Path
import re
import sys

import nbclient
import nbformat
import numpy as np
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
    monkeypatch.setenv("XLA_FLAGS", "--xla_llvm_disable_expensive_passes=true")  # one device; as in conftest.py
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


def run(name, kernel, folder) -> dict:
    """Executes a notebook in a folder; its code cells by id, with what they gave."""
    notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}
    ).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert not text_of(cells["install"])  # it was there
    return cells


def test_quickstart(kernel, tmp_path):
    cells = run("quickstart", kernel, tmp_path)
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


def test_encoders(kernel, tmp_path):
    cells = run("encoders", kernel, tmp_path)
    assert "siglip2" in text_of(cells["families"]) and "dinov3_vit" in text_of(cells["families"])
    assert all(name in text_of(cells["file"]) for name in ("config.json", "model.safetensors", "tokenizer.json"))
    assert len(pictures_of(cells["zero"])) == 1 and "scene 4" in text_of(cells["zero"])

    table = text_of(cells["reduce"])
    recall = {method: float(re.search(rf"{method}.*\| *([\d.]+) *\|", table)[1]) for method in ("unreduced", "tome")}
    assert recall["unreduced"] > 15  # at 10 of 200; chance is 5
    assert abs(recall["tome"] - recall["unreduced"]) < 15
    assert "image tokens (33, 29, 25, 21) text tokens (18, 16)" in table

    assert "[-1, -1]" in text_of(cells["rope"])
    assert "valid:" in text_of(cells["naflex"]) and len(pictures_of(cells["naflex"])) == 1
    assert float(re.search(r"features: ([\d.]+)", text_of(cells["dense"]))[1]) > 0.7


def test_compare(kernel, tmp_path):
    cells = run("compare", kernel, tmp_path)
    assert len(pictures_of(cells["figure"])) == 1 and len(pictures_of(cells["pictures"])) == 2
    table = text_of(cells["table"])
    accuracy = {name: float(re.search(rf"{name} .*?\| ([\d.]+) \|", table)[1]) for name in ("unreduced", "ToMe")}
    assert 60 < accuracy["ToMe"] <= accuracy["unreduced"] + 1

    solved = re.findall(r"(\w+)\(layers.*?: ([\d.]+) of the MACs", text_of(cells["pick"]))
    assert [name for name, _ in solved] == ["tome", "evit"] and all(abs(float(s) - 0.4) < 0.02 for _, s in solved)
    both, either = map(int, re.search(r"both: (\d+) of (\d+)", text_of(cells["together"])).groups())
    assert 0 < both < either < 64 * 63 / 2


def test_learn_a_reducer(kernel, tmp_path):
    cells = run("learn_a_reducer", kernel, tmp_path)
    learned = re.findall(r"([\d.]+) of the MACs, merged by block \[([\d, ]+)\]", text_of(cells["learn"]))
    assert abs(float(learned[-1][0]) - 0.5) < 0.03
    merged = [int(count) for count in learned[-1][1].split(", ")]
    table = {}
    for line in text_of(cells["compare"]).splitlines()[2:]:
        method, tokens, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        table[method] = [int(count) for count in tokens.split()], *map(float, numbers)
    tokens, share, accuracy, loss = table["learned"]
    assert np.cumsum(merged).tolist() == [65 - left for left in tokens]
    assert abs(share - 0.5) < 0.03 and abs(table["constant"][1] - share) < 0.01
    assert accuracy > 90 and loss < table["unreduced"][3] + 0.05
    assert len(pictures_of(cells["curve"])) == len(pictures_of(cells["picture"])) == 1


def test_mrt5(kernel, tmp_path):
    cells = run("mrt5", kernel, tmp_path)
    assert len(pictures_of(cells["curves"])) == len(pictures_of(cells["pictures"])) == 1
    gone = re.search(r"deleted: (\S+)", text_of(cells["pictures"]))[1]
    assert len(gone) >= 6 and sum(byte in "aeiouAEIOU#" for byte in gone) > 0.8 * len(gone)
    rows = re.findall(r"\| (hard|soft) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text_of(cells["forms"]))
    (_, *hard), (_, *soft) = [(form, *map(float, numbers)) for form, *numbers in rows]
    assert hard[0] < 0.5 and hard[1] > 0.4 and 0.1 < hard[2] == soft[2] < 0.4 and hard[3] < soft[3] == 1
    for text, written in re.findall(r"(\S+) -> (\S+)", text_of(cells["generate"])):
        assert len(text) >= len(written) > 12 and text[:3] == written[:3]
    assert re.search(r"[\d.]+ times faster, with \d+% of the token slots", text_of(cells["speed"]))


def test_decoder(kernel, tmp_path):
    cells = run("decoder", kernel, tmp_path)
    written = text_of(cells["generate"])
    assert written.startswith("Last summer, my") and len(written.split()) > 8
    assert len(pictures_of(cells["keep"])) == 1
    rows = re.findall(r"\| ([\w ()]+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", text_of(cells["cost"]))
    assert [name for name, *_ in rows][:2] == ["unreduced", "SnapKV"] and len(rows) == 6
    (_, whole, *ones), *others = [(name, *map(float, numbers)) for name, *numbers in rows]
    assert ones == [1, 1] and whole < 10
    for name, perplexity, cache, macs in others:
        assert perplexity > 0.95 * whole and abs(cache - 0.5) < 0.06 and (macs < 0.9) == (name == "FastV")
    speeds = re.findall(r"([\d.]+)x", text_of(cells["speed"]))
    assert len(speeds) == 6 and speeds[:2] == ["1.00", "1.00"] and float(speeds[4]) > 1.1
