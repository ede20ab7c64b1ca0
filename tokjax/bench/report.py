"""Results of a comparison: the file they are stored in, tables for the terminal and for a README, one page of HTML.

A row of results is a plain dict, one line of `results.jsonl`:

    method, setting       name of the reducer and its knob ("r=13", or a dict)
    placement             where the reducer stands, e.g. "per-layer" or "staged", if results of both are compared
    target                the budget that was asked for, as a share of the unreduced model's MACs; None if none was
    accuracy              share of right answers in 0..1; other tasks have other metrics, see `tokjax.viz.SHARES`
    macs, macs_reducer    multiply-accumulates an image, those of the reducer apart
    macs_relative         macs over those of the unreduced model
    mean_tokens           tokens entering a layer's MLP, averaged over layers
    images_per_s, speedup measured, the second over the unreduced model
    control               True for random dropping and plain pooling, which every method has to beat
    unreachable           why no setting of the method meets the target; the numbers are then missing

Every key but `method` may be missing, and any others may be there. The unreduced model is the row whose method is named
in `tokjax.viz.BASELINES`.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import html
from importlib import resources
import json
import math
import os
from pathlib import Path
import string
import sys
from typing import IO, Any
import warnings

import jax
from matplotlib.figure import Figure
import numpy as np

from tokjax import viz
from tokjax.errors import UserError

Row = Mapping[str, Any]


# --- the file of results ----------------------------------------------------------------------------------------------


def append_jsonl(path: str | Path, row: Row) -> None:
    """Adds one line to a file of results and waits until it is on disk.

    Numpy and jax scalars and arrays become plain numbers and lists; NaN and infinities become null. The line goes out
    in a single write under a lock, so several processes may append to one file. If a process was killed in the middle
    of the last line, that line is cut off first, with a warning. Of the processes of one job only the first writes.

    Raises:
        ValueError: `row` is no mapping, or holds something that JSON has no word for.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row must be a mapping from names to values, got {type(row).__name__}")
    line = (json.dumps(plain(row), allow_nan=False, ensure_ascii=False) + "\n").encode()
    if jax.process_index():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file, _locked(file):
        line = _mend(file, path) + line
        if file.write(line) != len(line):
            raise OSError(f"could not write a whole line to {path}: is the disk full?")
        os.fsync(file.fileno())


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file of results. A last line that a killed process left unfinished is skipped with a warning.

    Raises:
        UserError: there is no such file, or another line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file of results at {path}")
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _object(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            raise UserError(f"line {number} of {path} is not a JSON object: {line[:60]!r}")
    row = _object(last)
    if row is not None:
        rows.append(row)
    elif last.strip():
        warnings.warn(f"skipped the last line of {path}, which was not written to its end", stacklevel=2)
    return rows


def plain(value: Any, name: str = "row") -> Any:
    """The value in JSON's own types; NaN and infinities become None.

    Raises:
        ValueError: JSON has no word for it.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind in "biufV":  # V: bfloat16 and its kin
            numbers = array if array.dtype.kind in "biu" else array.astype(np.float64)
            return plain(numbers.tolist(), name)
        if array.dtype.kind == "U":
            return array.tolist()
    raise ValueError(f"{name} must be numbers, text, lists and dicts of them, got {type(value).__name__}")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend(file: IO[bytes], path: Path) -> bytes:
    """Cuts off an unfinished last line; returns what has to come before the next one."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return b""
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return b""
    tail, start = b"", end
    while start > 0 and b"\n" not in tail:
        step = min(start, 1 << 16)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    tail = tail.rpartition(b"\n")[2]
    if _object(tail) is not None:  # whole, only its newline is missing
        return b"\n"
    warnings.warn(f"cut the last line of {path}, which was not written to its end", stacklevel=3)
    file.truncate(end - len(tail))
    return b""


@contextlib.contextmanager
def _locked(file: IO[bytes]):
    if sys.platform == "win32":  # no advisory locks: there, one process appends at a time
        yield
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: the key of a row, its title, and how a value that is there is written."""

    key: str
    title: str
    write: Callable[[Any], str]
    numeric: bool = True

    def text(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "-"
        return _line(self.write(value)) or "-"


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _digits(value: float, digits: int = 3) -> str:
    """So many significant digits, never an exponent, never fewer than the integer has."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def _si(value: Any) -> str:
    if not viz.is_number(value):
        return str(value)
    value = float(value)
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return _digits(value / factor) + unit
    return f"{value:g}"


def _number(form: Callable[[float], str]) -> Callable[[Any], str]:
    return lambda value: form(float(value)) if viz.is_number(value) else str(value)


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_words(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{float(value):g}" if viz.is_number(value) and not isinstance(value, int) else str(value)


_percent = _number(lambda share: f"{100 * share:.2f}")
_known = [
    Column("method", "method", str, numeric=False),
    Column("placement", "placement", str, numeric=False),
    Column("setting", "setting", _words, numeric=False),
    Column("target", "target", _words),
    *(Column(key, f"{name} %", _percent) for key, name in viz.SHARES.items()),
    Column("accuracy_all", "accuracy, all %", _percent),
    Column("agreement", "agreement %", _percent),
    Column("similarity", "cosine %", _percent),
    Column("rmse", "RMSE", _number(lambda error: _digits(error, 4))),
    Column("abs_rel", "rel. error", _number(lambda error: _digits(error, 3))),
    Column("macs", "MACs", _si),
    Column("macs_reducer", "reducer MACs", _si),
    Column("macs_relative", "rel. MACs", _number(lambda share: f"{share:.3f}")),
    Column("macs_step", "MACs a token", _si),
    Column("macs_step_relative", "rel. MACs a token", _number(lambda share: f"{share:.3f}")),
    Column("cache_bytes", "cache, bytes", _si),
    Column("cache_relative", "rel. cache", _number(lambda share: f"{share:.3f}")),
    Column("perplexity", "perplexity", _number(lambda value: _digits(value, 4))),
    Column("bits_per_byte", "bits a byte", _number(lambda value: f"{value:.3f}")),
    Column("prefill_ms", "prefill, ms", _number(_digits)),
    Column("prefill_speedup", "prefill's speed-up", _number(lambda factor: f"{factor:.2f}x")),
    Column("step_ms", "ms a token", _number(_digits)),
    Column("step_speedup", "token's speed-up", _number(lambda factor: f"{factor:.2f}x")),
    Column("mean_tokens", "tokens/layer", _number(lambda count: f"{count:.1f}")),
    Column("images_per_s", "images/s", _number(lambda rate: f"{rate:,.0f}" if rate >= 1000 else _digits(rate))),
    Column("encoder_ms", "encoder, ms a text", _number(_digits)),
    Column("encoder_speedup", "encoder's speed-up", _number(lambda factor: f"{factor:.2f}x")),
    Column("ms", "ms a text", _number(_digits)),
    Column("speedup", "speed-up", _number(lambda factor: f"{factor:.2f}x")),
    Column("speedup_by_macs", "of the MACs' ratio", _number(lambda share: f"{share:.2f}")),
    Column("overhead", "reducer's time %", _number(lambda share: f"{100 * share:.1f}")),
    Column("gain", "over the better control, points [95 %; * beyond noise]", _words),
    Column("filled", "slots filled %", _percent),
    Column("largest_difference", "largest difference", _number(lambda value: f"{value:.1e}")),
]
KNOWN_COLUMNS = {column.key: column for column in _known}
COLUMNS = ("method", "setting", "accuracy", "macs", "macs_relative", "mean_tokens", "images_per_s", "speedup")


def _columns(columns: Sequence[str | Column] | None, extra: Sequence[str | Column]) -> list[Column]:
    chosen = [*(COLUMNS if columns is None else columns), *extra]
    if not chosen:
        raise ValueError("columns must name at least one column")
    made = [
        c if isinstance(c, Column) else KNOWN_COLUMNS.get(c) or Column(c, c.replace("_", " "), _words) for c in chosen
    ]
    return list({column.key: column for column in made}.values())


# --- tables -----------------------------------------------------------------------------------------------------------


def format_table(
    rows: Sequence[Row],
    columns: Sequence[str | Column] | None = None,
    *,
    extra: Sequence[str | Column] = (),
    group: str | Sequence[str] = "target",
    baseline: str | None = None,
    controls: Sequence[str] = (),
) -> str:
    """A plain text table with aligned columns.

    Rows of the same target stand together: the unreduced model first, then the methods in the order given, then the
    controls. A missing value is `-`; a row whose target was out of reach says why instead of giving numbers.

    Args:
        rows: results, see the module.
        columns: keys of rows or `Column`s; None: `COLUMNS`.
        extra: further columns behind them, e.g. `["agreement"]`.
        group: key or keys whose values rows of one group share; the unreduced model stands in every group, whatever
            its target. `()` makes one group.
        baseline: method name of the unreduced model; None: any of `tokjax.viz.BASELINES`.
        controls: method names that are controls, beside the rows that say so.

    Raises:
        ValueError: a row is no mapping or has no method, or no column is chosen.
    """
    chosen = _columns(columns, extra)
    body: list[list[str] | str] = []  # cells, or a line that stands alone
    groups = _grouped(rows, group, baseline, controls)
    for heading, members in groups:
        if heading and len(groups) > 1:
            body += ["", heading] if body else [heading]
        body += [_cells(row, role, chosen) for row, role in members]
    titles = [column.title for column in chosen]
    full = [cells for cells in (titles, *body) if isinstance(cells, list) and len(cells) == len(chosen)]
    leads = [cells[:-1] for cells in body if isinstance(cells, list) and len(cells) < len(chosen)]  # a note may run on
    widths = [max(len(cells[i]) for cells in (*full, *leads) if i < len(cells)) for i in range(len(chosen))]

    def aligned(cells: list[str]) -> str:
        pads = [
            text.rjust(width) if column.numeric and len(cells) == len(chosen) else text.ljust(width)
            for text, width, column in zip(cells, widths, chosen, strict=False)
        ]
        return "  ".join(pads).rstrip()

    lines = [aligned(titles), "  ".join("-" * width for width in widths)]
    lines += [line if isinstance(line, str) else aligned(line) for line in body]
    return "\n".join(lines)


def print_table(
    rows: Sequence[Row],
    columns: Sequence[str | Column] | None = None,
    *,
    extra: Sequence[str | Column] = (),
    group: str | Sequence[str] = "target",
    baseline: str | None = None,
    controls: Sequence[str] = (),
    file: IO[str] | None = None,
) -> None:
    """Prints `format_table` of the same arguments to `file` (None: standard output)."""
    table = format_table(rows, columns, extra=extra, group=group, baseline=baseline, controls=controls)
    print(table, file=file, flush=True)


def markdown_table(
    rows: Sequence[Row],
    columns: Sequence[str | Column] | None = None,
    *,
    extra: Sequence[str | Column] = (),
    group: str | Sequence[str] = "target",
    baseline: str | None = None,
    controls: Sequence[str] = (),
) -> str:
    """The same table for a README; arguments and errors as of `format_table`."""
    chosen = _columns(columns, extra)

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def safe(text: str) -> str:
        return (
            text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
        )

    lines = [line(column.title for column in chosen), line("---:" if column.numeric else "---" for column in chosen)]
    groups = _grouped(rows, group, baseline, controls)
    for heading, members in groups:
        if heading and len(groups) > 1:
            lines.append(line([f"**{safe(heading)}**", *[""] * (len(chosen) - 1)]))
        for row, role in members:
            cells = [safe(cell) for cell in _cells(row, role, chosen)]
            lines.append(line(cells + ["-"] * (len(chosen) - len(cells))))
    return "\n".join(lines)


def _check_rows(rows: Sequence[Row]) -> None:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
            raise ValueError(f'rows[{i}] must be a mapping with a text under "method", got {row!r:.80}')


def _grouped(
    rows: Sequence[Row], group: str | Sequence[str], baseline: str | None, controls: Sequence[str]
) -> list[tuple[str, list[tuple[Row, viz.Role]]]]:
    """Heading and members of each group, in order of first appearance."""
    _check_rows(rows)
    keys = (group,) if isinstance(group, str) else tuple(group)
    ranked = [(row, viz.row_role(row, baseline, controls)) for row in rows]
    found: dict[tuple[str, ...], list[tuple[Row, viz.Role]]] = {}
    for row, role in ranked:
        if role != "baseline":
            found.setdefault(tuple(_words(row.get(key)) for key in keys), []).append((row, role))
    unreduced = [pair for pair in ranked if pair[1] == "baseline"]
    if not found:
        return [("", unreduced)] if unreduced else []
    groups = []
    for values, members in found.items():
        mine = [
            (row, role)
            for row, role in unreduced
            if all(key == "target" or _words(row.get(key)) == value for key, value in zip(keys, values, strict=True))
        ]
        heading = ", ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True) if v != "None")
        groups.append((heading, mine + sorted(members, key=lambda pair: pair[1] == "control")))
    return groups


def _cells(row: Row, role: viz.Role, columns: Sequence[Column]) -> list[str]:
    """Texts of a row; for a target out of reach, those of the leading text columns and then the reason."""
    cells: list[str] = []
    for column in columns:
        if column.numeric and column.key != "target" and row.get("unreachable"):
            return [*cells, _reason(row)]
        cells.append(_line(viz.method_label(row["method"], role)) if column.key == "method" else column.text(row))
    return cells


def _reason(row: Row) -> str:
    reason = row["unreachable"]
    return "not reachable" if reason is True else _line(f"not reachable: {reason}")


# --- one page of HTML -------------------------------------------------------------------------------------------------


class Html(str):
    """Text that is already HTML and goes into the page as it is; never make one of untrusted text."""


def write_html(
    path: str | Path,
    *,
    title: str,
    command: str,
    machine: Mapping[str, Any],
    rows: Sequence[Row] = (),
    sections: Sequence[tuple[str, Any]] = (),
    summary: str = "",
    columns: Sequence[str | Column] | None = None,
    extra: Sequence[str | Column] = (),
    baseline: str | None = None,
    controls: Sequence[str] = (),
    quality: str = "accuracy",
) -> Path:
    """Writes a report as one file that needs nothing else: styles, script and pictures are inside it.

    The page shows the unreduced model's figures, a plot of quality over cost whose points say more under the pointer or
    the keyboard's focus, the table of results, the sections in their order, and at the end the command and the machine.
    One filter by method, placement and target holds for the plot and the table, which can be sorted too; without
    JavaScript the whole table is there. The page follows the reader's light or dark setting. Text is escaped; a policy
    in the page forbids it to load anything.

    Args:
        path: of the file; missing folders are made, and the file appears whole or not at all.
        title: heading of the page.
        command: what to type to get the same results.
        machine: name -> value of what it ran on (device, versions, precision, batch size, ...).
        rows: results, see the module; none: no plot and no table.
        sections: (heading, body). A body is text (blank lines separate paragraphs), `Html`, a matplotlib `Figure`, a
            uint8 picture `[H, W, 3]`, a `tokjax.viz.Picture`, a list of pictures (side by side) or of rows (a table).
        summary: one or two sentences below the title.
        columns, extra, baseline, controls: as of `format_table`.
        quality: the metric that the figures show, and the plot at first; one of `tokjax.viz.SHARES`.

    Raises:
        ValueError: rows or bodies of another kind, or an unknown quality.
    """
    if quality not in viz.SHARES:
        raise ValueError(f"quality must be one of {', '.join(viz.SHARES)}, got {quality!r}")
    rows = list(rows)
    _check_rows(rows)
    if not isinstance(machine, Mapping):
        raise ValueError(f"machine must be a mapping from names to values, got {type(machine).__name__}")
    chosen = _columns(columns, extra)
    roles = [viz.row_role(row, baseline, controls) for row in rows]
    parts = []
    if rows:
        parts.append(_cards(rows, roles, quality))
        parts.append(_results(rows, roles, chosen, quality))
    for heading, body in sections:
        parts.append(_section(heading, _body(body, heading, chosen, baseline, controls)))
    facts = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(_words(value))}</dd></div>" for name, value in machine.items()
    )
    reproduce = f'<pre class="command" tabindex="0"><code>{_escape(command.strip())}</code></pre><dl>{facts}</dl>'
    parts.append(_section("Command and machine", reproduce))
    points = [_point(i, rows[i], roles[i]) for i in range(len(rows)) if _drawable(rows[i])]
    page = string.Template(resources.files("tokjax.bench").joinpath("report.html").read_text("utf-8")).substitute(
        title=_escape(title),
        summary=f'<p class="summary">{_escape(summary)}</p>' if summary.strip() else "",
        body="\n".join(parts),
        percent=" ".join(viz.SHARES),
        # Nothing in the data can end the script element or open a comment in it.
        points=json.dumps(plain(points), allow_nan=False).translate(_IN_SCRIPT),
    )
    return viz.write_whole(path, page.encode())


_COSTS = {
    "macs_relative": "MACs, relative",
    "macs": "MACs per image",
    "mean_tokens": "mean tokens a layer",
    "images_per_s": "images per second",
    "speedup": "measured speed-up",
}
_IN_SCRIPT = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})
_CHART = """<div class="pick script"><label>show <select id="pick-y">$y</select></label>
<label>over <select id="pick-x">$x</select></label>$key</div>
<div class="plot script"><svg id="pareto" role="group" aria-label="Quality over cost, a curve for each method; arrow
keys go from point to point, the table below holds the same numbers"></svg><div id="tip" hidden></div></div>
<noscript><p>The plot and the filter need JavaScript; the table holds the same numbers.</p></noscript>"""
_LEGEND: tuple[viz.Role, ...] = ("baseline", "method", "control")
_FILTER = """<fieldset id="filter" class="script"><legend>methods to show</legend>
<div class="pick"><label>methods <input type="search" id="name" placeholder="any name" autocomplete="off"
spellcheck="false" aria-label="show methods whose name contains"></label>
<span><button type="button" data-check="all">all</button>
<button type="button" data-check="none">none</button></span>$picks
<span class="count" role="status"></span></div><div id="legend">$entries</div></fieldset>"""


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _section(heading: str, inner: str) -> str:
    return f'<section class="card"><h2>{_escape(heading)}</h2>{inner}</section>'


def _options(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    there = [key for key in names if any(viz.is_number(row.get(key)) for row in rows)]
    return "".join(f'<option value="{key}">{names[key]}</option>' for key in there)


def _results(rows: Sequence[Row], roles: Sequence[viz.Role], columns: Sequence[Column], quality: str) -> str:
    """Plot, filter and table; the page's script ties them together by `data-row` and `data-method`."""
    drawn, chart = [row for row in rows if _drawable(row)], ""
    placements = [value for value in _values(drawn, "placement") if value != "-"]
    if drawn:
        key = "".join(f'<span class="key"><svg aria-hidden="true"></svg>{_escape(name)}</span>' for name in placements)
        chart = string.Template(_CHART).substitute(
            x=_options(drawn, _COSTS),
            y=_options(drawn, {quality: viz.SHARES[quality], **viz.SHARES}),
            key=key if len(placements) > 1 else "",
        )
    methods: dict[str, viz.Role] = {}
    for row, role in sorted(zip(rows, roles, strict=True), key=lambda pair: _LEGEND.index(pair[1])):
        methods.setdefault(row["method"], role)
    icon = '<svg aria-hidden="true"></svg>' if drawn else ""
    entries = "".join(
        f'<label data-method="{_escape(method)}" data-role="{role}"><input type="checkbox" checked autocomplete="off">'
        f"{icon}<span>{_escape(viz.method_label(method, role))}</span></label>"
        for method, role in methods.items()
    )
    choices = {key: [value for value in _values(rows, key) if value != "-"] for key in ("placement", "target")}
    picks = "".join(
        f'<label>{key} <select data-filter="{key}" autocomplete="off"><option value="">all</option>'
        + "".join(f'<option value="{_escape(value)}">{_escape(value)}</option>' for value in values)
        + "</select></label>"
        for key, values in choices.items()
        if len(values) > 1
    )
    filters = string.Template(_FILTER).substitute(picks=picks, entries=entries)
    table = _html_table(rows, roles, _with_filters(columns, rows), "results", numbered=True)
    return f'<section class="card" id="results"><h2>Results</h2>{chart}{filters}{table}</section>'


def _values(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(KNOWN_COLUMNS[key].text(row) for row in rows))


def _drawable(row: Row) -> bool:
    return all(any(viz.is_number(row.get(key)) for key in keys) for keys in (_COSTS, viz.SHARES))


def _point(number: int, row: Row, role: viz.Role) -> dict[str, Any]:
    """What the plot needs of a row: numbers for the axes, and the texts of the table for what hovering shows."""
    keys = [key for key in (*viz.SHARES, *_COSTS) if viz.is_number(row.get(key))]
    details = [KNOWN_COLUMNS[key].text(row) for key in ("placement", "setting")]
    return {
        "row": number,
        "method": row["method"],
        "placement": details[0].strip("-"),
        "name": viz.method_label(row["method"], role),
        "role": role,
        "detail": [text for text in details if text != "-"],
        "values": {key: row[key] for key in keys},
        "texts": [[KNOWN_COLUMNS[key].title, KNOWN_COLUMNS[key].text(row)] for key in keys],
    }


def _cards(rows: Sequence[Row], roles: Sequence[viz.Role], quality: str) -> str:
    """The unreduced model's figures, and the cheapest result that stays within one point of its quality."""
    unreduced = [row for row, role in zip(rows, roles, strict=True) if role == "baseline"]
    if len(unreduced) != 1:
        return ""
    base, cards = unreduced[0], []
    for key, name in (
        (quality, viz.SHARES[quality]),
        ("macs", "MACs per image"),
        ("images_per_s", "images per second"),
    ):
        if viz.is_number(base.get(key)):
            unit = " %" if key == quality else ""
            cards.append((KNOWN_COLUMNS[key].text(base) + unit, f"{name}, unreduced"))
    near = [
        (row["macs_relative"], row, role)
        for row, role in zip(rows, roles, strict=True)
        if role != "baseline"
        and all(viz.is_number(r.get(key)) for r in (row, base) for key in (quality, "macs_relative"))
        and row[quality] >= base[quality] - 0.01
        and row["macs_relative"] < base["macs_relative"]
    ]
    if near:
        share, row, role = min(near, key=lambda found: found[0])
        name = " ".join([viz.method_label(row["method"], role), KNOWN_COLUMNS["setting"].text(row).strip("-")]).strip()
        cards.append((f"{100 * share:.0f} % MACs", f"cheapest within one point of {viz.SHARES[quality]}: {name}"))
    inner = "".join(f"<div><b>{_escape(value)}</b><span>{_escape(name)}</span></div>" for value, name in cards)
    return f'<div class="cards">{inner}</div>' if cards else ""


def _with_filters(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns, with those that rows are filtered by: the placement before the setting, the target behind it."""
    found = list(columns)
    for key, behind in (("placement", 0), ("target", 1)):
        if len(_values(rows, key)) > 1 and all(column.key != key for column in found):
            place = next((i + behind for i, column in enumerate(found) if column.key == "setting"), len(found))
            found.insert(place, KNOWN_COLUMNS[key])
    return found


def _html_table(
    rows: Sequence[Row], roles: Sequence[viz.Role], columns: Sequence[Column], name: str, numbered: bool = False
) -> str:
    head = "".join(f'<th scope="col"{_kind(column)}>{_escape(column.title)}</th>' for column in columns)
    body = []
    for number in sorted(range(len(rows)), key=lambda i: roles[i] != "baseline"):
        row, role = rows[number], roles[number]
        cells, texts = [], _cells(row, role, columns)
        for i, text in enumerate(texts):
            column, value = columns[i], row.get(columns[i].key)
            sort = f' data-v="{float(value):.9g}"' if viz.is_number(value) else ""
            if len(texts) < len(columns) and i == len(texts) - 1:
                cells.append(f'<td class="note" colspan="{len(columns) - i}">{_escape(text)}</td>')
            elif column.key == "method":
                name = "unreduced" if row["method"] in viz.BASELINES else _line(row["method"])
                kind = {"baseline": "unreduced", "control": "control"}.get(role, name)
                pill = f' <span class="pill">{kind}</span>' if kind != name else ""
                cells.append(f'<th scope="row">{_escape(name)}{pill}</th>')
            else:
                cells.append(f"<td{_kind(column)}{sort}>{_escape(text)}</td>")
        data = "".join(f' data-{key}="{_escape(KNOWN_COLUMNS[key].text(row))}"' for key in ("placement", "target"))
        place = f' data-row="{number}"' if numbered else ""
        body.append(f'<tr class="{role}" data-method="{_escape(row["method"])}"{data}{place}>{"".join(cells)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(name)}, a table">{table}</div>'


def _kind(column: Column) -> str:
    return ' class="num"' if column.numeric else ""


def _body(body: Any, heading: str, columns: Sequence[Column], baseline: str | None, controls: Sequence[str]) -> str:
    if isinstance(body, Html):
        return str(body)
    if isinstance(body, str):
        return "".join(f"<p>{_escape(text.strip())}</p>" for text in body.split("\n\n") if text.strip())
    if isinstance(body, (Figure, np.ndarray)):
        body = viz.Picture(body)
    if isinstance(body, viz.Picture):
        return _picture(body, heading)
    if isinstance(body, (list, tuple)) and body:
        if all(isinstance(entry, Mapping) for entry in body):
            _check_rows(body)
            return _html_table(body, [viz.row_role(row, baseline, controls) for row in body], columns, heading)
        if all(isinstance(entry, (viz.Picture, Figure, np.ndarray)) for entry in body):
            pictures = [entry if isinstance(entry, viz.Picture) else viz.Picture(entry) for entry in body]
            return f'<div class="gallery">{"".join(_picture(picture, heading) for picture in pictures)}</div>'
    raise ValueError(
        f"the body of section {heading!r} must be text, Html, a Figure, a uint8 picture, a Picture, or a list of "
        f"pictures or rows that is not empty, got {type(body).__name__}"
    )


def _picture(picture: viz.Picture, heading: str) -> str:
    data = base64.b64encode(viz.png_bytes(picture.image)).decode()
    kind = "drawn" if isinstance(picture.image, Figure) else "photo"
    caption = f"<figcaption>{_escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img class="{kind}" alt="{_escape(picture.caption or heading)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{caption}</figure>"
