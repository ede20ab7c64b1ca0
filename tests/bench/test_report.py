"""The file of results, the tables, and the HTML page: what they say, and that they are safe to keep and to open."""

from html.parser import HTMLParser
import json
import math
from pathlib import Path
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import viz
from tokjax.bench import report
from tokjax.errors import UserError

NONE = {
    "method": "none", "setting": "", "accuracy": 0.7983, "macs": 4_608_338_304, "macs_relative": 1.0,
    "mean_tokens": 197.0, "images_per_s": 930.4, "speedup": 1.0,
}  # fmt: skip
TOME = {
    "method": "tome", "setting": {"r": 13}, "target": 0.6, "accuracy": 0.7936, "macs": 2_713_000_000,
    "macs_reducer": 12_000_000, "macs_relative": 0.589, "mean_tokens": 118.5, "images_per_s": 1550.2, "speedup": 1.666,
}  # fmt: skip
RANDOM = TOME | {"method": "random", "setting": "keep=0.5", "accuracy": 0.7, "control": True, "speedup": None}
DROPS = {"method": "drops", "target": 0.6, "unreachable": "at least 0.71 of the MACs"}
ROWS = [RANDOM, TOME, DROPS, NONE]


# --- the file of results ---


def test_rows_come_back_as_plain_json(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    report.append_jsonl(path, TOME)
    numbers = {"np": np.float32(0.5), "jax": jnp.int32(3), "half": jnp.bfloat16(1.5), "list": np.arange(3)}
    missing = {"nan": math.nan, "deep": {"inf": [np.inf, jnp.float32(-jnp.inf)]}}
    report.append_jsonl(path, numbers | missing | {"flag": np.bool_(True), "path": Path("a/b"), "text": "ä\n<"})
    rows = report.read_jsonl(path)
    assert rows[0] == TOME
    assert rows[1] == {
        "np": 0.5, "jax": 3, "half": 1.5, "list": [0, 1, 2], "nan": None, "deep": {"inf": [None, None]}, "flag": True,
        "path": "a/b", "text": "ä\n<",
    }  # fmt: skip
    assert type(rows[1]["jax"]) is int and path.read_bytes().count(b"\n") == 2
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_torn_last_line_is_skipped_and_mended(tmp_path):
    path = tmp_path / "results.jsonl"
    for i in range(3):
        report.append_jsonl(path, {"i": i, "pad": "x" * 70_000})
    whole = path.read_bytes()
    for cut in (1, 40_000, 70_010):  # the newline, half a line, all but a few bytes of it
        path.write_bytes(whole[: len(whole) - cut])
        if cut == 1:
            assert [row["i"] for row in report.read_jsonl(path)] == [0, 1, 2]
            report.append_jsonl(path, {"i": 9})
        else:
            with pytest.warns(UserWarning, match="not written to its end"):
                assert [row["i"] for row in report.read_jsonl(path)] == [0, 1]
            with pytest.warns(UserWarning, match="cut the last line"):
                report.append_jsonl(path, {"i": 9})
        assert [row["i"] for row in report.read_jsonl(path)] == ([0, 1, 2, 9] if cut == 1 else [0, 1, 9])
    path.write_text('{"i": ')  # nothing but a torn line
    with pytest.warns(UserWarning):
        report.append_jsonl(path, {"i": 0})
    assert report.read_jsonl(path) == [{"i": 0}]


def test_processes_may_append_together(tmp_path):
    path = tmp_path / "results.jsonl"
    code = (
        "import sys; from tokjax.bench.report import append_jsonl\n"
        "for i in range(40): append_jsonl(sys.argv[1], {'who': sys.argv[2], 'i': i, 'pad': 'x' * 9000})"
    )
    root = Path(report.__file__).parents[2]
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=root) for who in "ab"]
    assert [process.wait(60) for process in started] == [0, 0]
    rows = report.read_jsonl(path)
    for who in "ab":
        assert [row["i"] for row in rows if row["who"] == who] == list(range(40))


def test_bad_files_and_rows_are_named(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match="no file of results"):
        report.read_jsonl(path)
    path.write_text('{"i": 0}\n\n[1]\n{"i": 1}\n')
    with pytest.raises(UserError, match="line 3"):
        report.read_jsonl(path)
    with pytest.raises(ValueError, match=r"row\['a'\]\[1\] must be .* got object"):
        report.append_jsonl(path, {"a": [1, object()]})
    with pytest.raises(ValueError, match="mapping"):
        report.append_jsonl(path, [1])


# --- tables ---


def test_table_groups_orders_and_marks(capsys):
    report.print_table(ROWS, extra=["macs_reducer", "note"])
    lines = capsys.readouterr().out.splitlines()
    header, dashes, *body = lines
    assert [line.split()[0] for line in body] == ["unreduced", "tome", "drops", "random"]
    assert "random (control)" in body[3] and "r=13" in body[1]
    assert all(text in body[0] for text in ("79.83", "4.61 G", "1.000", "197.0", "930", "1.00x"))
    assert all(text in body[1] for text in ("1,550", "1.67x", "12.0 M"))
    assert body[2].split(None, 2)[2] == "not reachable: at least 0.71 of the MACs"
    assert len({len(line) for line in (header, dashes, body[0], body[1], body[3])} - {len(dashes)}) <= 2
    end = header.index("accuracy %") + len("accuracy %")
    assert header[end - 1] == "%" and body[0][end - 5 : end] == "79.83" and body[1][end - 5 : end] == "79.36"


def test_the_unreduced_model_stands_in_every_group():
    rows = [NONE, TOME, TOME | {"target": 0.4}, RANDOM | {"target": 0.4}]
    lines = report.format_table(rows).splitlines()[2:]
    assert [line.split()[0] if line else "" for line in lines] == [
        *("target", "unreduced", "tome"), "", *("target", "unreduced", "tome", "random")
    ]  # fmt: skip
    assert lines[0] == "target 0.6"
    by_model = [NONE | {"model": "a"}, NONE | {"model": "b"}, TOME | {"model": "a"}, TOME | {"model": "b"}]
    text = report.format_table(by_model, ["method", "model"], group=("model", "target"))
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("unreduced", "tome"))] == list("aabb")
    assert report.format_table(rows, group=()).count("unreduced") == 1
    assert len(report.format_table([]).splitlines()) == 2


def test_numbers_read_well():
    column = report.KNOWN_COLUMNS
    macs = [column["macs"].text({"macs": value}) for value in (0, 950, 12_345, 999_900_000, 4.6e12, "4 G", None)]
    assert macs == ["0", "950", "12.3 k", "1,000 M", "4.60 T", "4 G", "-"]
    assert column["images_per_s"].text({"images_per_s": 0.01234}) == "0.0123"
    assert column["accuracy"].text({"accuracy": math.nan}) == "-"
    assert column["setting"].text({"setting": {"r": (8, -1.0), "on": True}}) == "r=8 -1, on=yes"
    assert column["setting"].text({"setting": "two\nlines"}) == "two lines"


def test_markdown_table_is_one_table():
    text = report.markdown_table([NONE, TOME | {"method": "a_b|c", "setting": "<x>"}, DROPS | {"target": 0.3}])
    lines = text.splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[1].startswith("| --- | --- | ---: |")
    assert r"a\_b\|c" in text and "&lt;x>" in text and "**target 0.3**" in text
    assert "| drops | - | not reachable: at least 0.71 of the MACs | - |" in text


def test_rows_without_a_method_are_refused():
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        report.format_table([NONE, {"accuracy": 1.0}])
    with pytest.raises(ValueError, match="at least one column"):
        report.format_table([NONE], [])


# --- the page ---


class Page(HTMLParser):
    """Collects elements with their attributes and the text inside, and complains about tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "input", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def write(tmp_path, **changes):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    arguments = {
        "title": "Comparison",
        "command": "python -m tokjax.main --config=configs/compare.py",
        "machine": {"device": "NVIDIA H100", "batch": 256},
        "rows": ROWS,
        "sections": [
            ("Pictures", [viz.Picture(image, "first"), image, viz.pareto_plot(ROWS)]),
            ("Curves", viz.curves_plot([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])),
            ("More", [TOME]),
            ("Words", "One.\n\nTwo."),
            ("Raw", report.Html("<p>raw <b>html</b></p>")),
        ],
    }
    path = report.write_html(tmp_path / "out" / "report.html", **(arguments | changes))
    text = path.read_text("utf-8")
    return text, Page(text)


def test_the_page_needs_nothing_but_itself(tmp_path):
    text, page = write(tmp_path)
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttpRequest", re.sub(r'base64,[^"]*', "", text)
    )
    assert not page.all("link") and not any("src" in script for script in page.all("script"))
    sources = [image["src"] for image in page.all("img")]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(image["alt"] for image in page.all("img"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in text


def test_the_page_says_what_the_rows_say(tmp_path):
    text, page = write(tmp_path)
    rows = [attributes for attributes in page.all("tr") if "data-method" in attributes]
    assert [row["data-method"] for row in rows] == ["none", "random", "tome", "drops", "tome"]
    assert [row["class"] for row in rows] == ["baseline", "control", "method", "method", "method"]
    assert "0.7936" in [cell.get("data-v") for cell in page.all("td")]
    for shown in ("79.36", "2.71 G", "1.67x", "not reachable: at least 0.71 of the MACs", "NVIDIA H100", "batch"):
        assert shown in text
    assert "python -m tokjax.main --config=configs/compare.py" in page.text["code"]
    assert "59 % MACs" in text and "tome r=13" in text  # the cheapest within one point
    points = json.loads(page.text["script"].split("\n")[0])
    assert [point["name"] for point in points] == ["random (control)", "tome", "unreduced"]
    assert points[1]["values"]["macs"] == 2_713_000_000 and ["rel. MACs", "0.589"] in points[1]["texts"]
    drawn = [int(row["data-row"]) for row in page.all("tr") if "data-row" in row]
    assert drawn == [3, 0, 1, 2] and [point["row"] for point in points] == [0, 1, 3]
    entries = [(label["data-method"], label["data-role"]) for label in page.all("label") if "data-method" in label]
    assert entries == [("none", "baseline"), ("tome", "method"), ("drops", "method"), ("random", "control")]
    assert all(box.get("checked", "") is None for box in page.all("input") if box["type"] == "checkbox")
    options = [option["value"] for option in page.all("option")]
    assert options[:2] == ["accuracy", "macs_relative"] and "agreement" not in options
    assert "<b>html</b>" in text


def test_placements_are_told_apart(tmp_path):
    rows = [NONE, TOME | {"placement": "per-layer"}, TOME | {"placement": "staged"}, DROPS | {"placement": "staged"}]
    text, page = write(tmp_path, rows=rows, sections=[])
    titles = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', text)
    assert titles[:4] == ["method", "placement", "setting", "target"]
    assert '<td class="note" colspan="6">' in text  # behind the method, its placement, setting and target
    assert [row["data-placement"] for row in page.all("tr") if "data-row" in row] == [
        "-",
        "per-layer",
        "staged",
        "staged",
    ]
    points = json.loads(page.text["script"].split("\n")[0])
    assert [point["detail"] for point in points] == [[], ["per-layer", "r=13"], ["staged", "r=13"]]
    picks = [select["data-filter"] for select in page.all("select") if "data-filter" in select]
    assert picks == ["placement"] and text.count('class="key"') == 2
    assert 'class="key"' not in write(tmp_path, rows=rows[:2])[0]


def test_everything_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$title"
    rows = [NONE, {"method": evil, "setting": evil, "target": evil, "accuracy": 0.5, "macs_relative": 0.5, evil: evil}]
    image = np.zeros((4, 4, 3), np.uint8)
    text, page = write(
        tmp_path, title=evil, command=evil, summary=evil, machine={evil: evil}, rows=rows, extra=[evil],
        sections=[(evil, evil), (evil, viz.Picture(image, evil)), ("t", [DROPS | {"unreachable": evil}])],
    )  # fmt: skip
    assert len(page.all("script")) == 2 and len(page.all("img")) == 1 and "onerror" not in page.all("img")[0]
    assert "<script>alert" not in text and "<img src=x" not in text
    points = json.loads(page.text["script"].split("\n")[0])
    assert points[1]["name"] == points[1]["method"] == evil
    assert not set("<>&") & set(page.text["script"].split("\n")[0])
    assert [label["data-method"] for label in page.all("label") if "data-method" in label] == ["none", evil]
    assert page.text["h1"] == evil and page.text["title"] == evil


def test_a_page_without_rows_or_with_rows_that_cannot_be_plotted(tmp_path):
    _, page = write(tmp_path, rows=[], sections=[])
    assert not page.all("table") and not page.all("svg") and page.text["code"]
    _, page = write(tmp_path, rows=[DROPS], sections=[])
    assert page.all("table") and not page.all("svg")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"accuracy": 1}]}, r"rows\[0\]"),
        ({"machine": ["cpu"]}, "machine must be a mapping"),
        ({"sections": [("S", 3)]}, "body of section 'S'"),
        ({"sections": [("S", [])]}, "body of section 'S'"),
        ({"sections": [("S", np.zeros((4, 4, 3)))]}, "uint8"),
    ],
)
def test_a_bad_page_is_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert not list(tmp_path.rglob("*"))
