"""The report in a real browser: it needs no network, and its filter, points, keys and sorting do what they say."""

import browser
import numpy as np
import pytest

from tokjax import viz
from tokjax.bench import report

EVIL = "</script><b id='evil'>&amp;\"'"
NAMES = ["ToMe", "ToFu", *(f"method {i}" for i in range(22)), EVIL]


def rows():
    """26 methods and a control, two placements, three targets, of which one method misses some."""
    found = [{"method": "unreduced", "accuracy": 0.9, "macs": 1000, "macs_relative": 1.0, "speedup": 1.0}]
    for i, method in enumerate([*NAMES, "random"]):
        for placement in ("per-layer", "staged"):
            for target in (0.8, 0.6, 0.4):
                row = {"method": method, "placement": placement, "target": target, "control": method == "random"}
                if method == "ToFu" and target == 0.4:
                    found.append(row | {"unreachable": "0.5 to 0.9 of the MACs"})
                    continue
                quality = 0.9 - (1 - target) * (0.1 + 0.01 * i + 0.02 * (placement == "staged"))
                measured = {"accuracy": quality, "agreement": quality - 0.01, "macs": int(1000 * target)}
                cost = {"macs_relative": target, "speedup": 1 / target, "setting": f"r={i}"}
                found.append(row | measured | cost)
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def chromium():
    path = browser.find()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed: the report was not opened in a browser")
    with browser.Browser(path) as started:
        started.command(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        yield started


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return report.write_html(
        tmp_path_factory.mktemp("report") / "report.html",
        title="Comparison",
        command="python -m tokjax.main",
        machine={"device": "cpu"},
        rows=ROWS,
        sections=[("Picture", picture), ("Plot", viz.pareto_plot(ROWS[:13])), ("Table", ROWS[:3])],
    )


@pytest.fixture
def page(chromium, path):
    chromium.open(path)
    return chromium


def visible(page):
    """(method, placement, target) of the rows of the table that a reader sees."""
    return page.evaluate(
        "Array.from(document.querySelectorAll('#results tbody tr')).filter((row) => row.checkVisibility())"
        ".map((row) => [row.dataset.method, row.dataset.placement, row.dataset.target])"
    )


def curves(page):
    """(method, placement, number of points) of the curves in the plot."""
    return page.evaluate(
        "Array.from(document.querySelectorAll('#pareto g[data-method]'))"
        ".map((g) => [g.dataset.method, g.dataset.placement || '', g.querySelectorAll('.dot').length])"
    )


def methods(found):
    return {entry[0] for entry in found}


def tip(page):
    return page.evaluate(
        "document.getElementById('tip').checkVisibility() ? document.getElementById('tip').innerText : ''"
    )


def test_it_opens_without_a_network_and_without_complaints(page, path):
    page.evaluate("new Promise((done) => setTimeout(done, 100))")  # whatever would be loaded late
    names = [name for name, _ in page.events]
    asked = [event["request"]["url"] for name, event in page.events if name == "Network.requestWillBeSent"]
    assert asked[0] == path.as_uri() and all(url.startswith("data:image/png") for url in asked[1:])
    assert not {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"} & set(names), page.events
    loaded = "Array.from(document.images).every((image) => image.complete && image.naturalWidth > 0)"
    assert page.evaluate(loaded) and page.evaluate("document.images.length") == 2


def test_everything_is_shown_at_first(page):
    assert len(visible(page)) == len(ROWS) and methods(curves(page)) == {"unreduced", *NAMES, "random"}
    assert len(curves(page)) == 1 + 2 * 26
    assert ["ToFu", "staged", 2] in curves(page)  # the third is out of reach, which the table says
    assert page.evaluate("document.getElementById('evil')") is None
    styles = page.evaluate(
        "Array.from(document.querySelectorAll('#legend label[data-role=method] svg'))"
        ".map((svg) => svg.style.color + svg.querySelector('.dot').getAttribute('d'))"
    )
    assert len(styles) == 25 == len(set(styles))


def test_a_checkbox_hides_the_curve_and_the_rows(page):
    page.click("#legend label[data-method=ToMe] input")
    assert "ToMe" not in methods(visible(page)) | methods(curves(page))
    assert len(visible(page)) == len(ROWS) - 6 and len(curves(page)) == 2 * 25 + 1
    assert page.evaluate("document.querySelector('.count').textContent") == f"{len(ROWS) - 6} of {len(ROWS)} rows"
    page.click("#legend label[data-method=ToMe]")
    assert len(visible(page)) == len(ROWS) and len(curves(page)) == 1 + 2 * 26


def test_none_and_all_keep_the_unreduced_model(page):
    page.click("button[data-check=none]")
    assert methods(visible(page)) == methods(curves(page)) == {"unreduced"}
    page.click("#legend label[data-method=unreduced]")
    assert not visible(page) and not curves(page)
    assert page.evaluate("document.getElementById('pareto').textContent") == "nothing to show"
    page.click("button[data-check=all]")
    assert methods(visible(page)) == methods(curves(page)) == {*NAMES, "random"}


def test_a_name_filters_methods(page):
    page.click("#name")
    page.type("tome, CONTROL")
    assert methods(visible(page)) == methods(curves(page)) == {"unreduced", "ToMe", "random"}
    assert (
        page.evaluate(
            "Array.from(document.querySelectorAll('#legend label')).filter((e) => e.checkVisibility()).length"
        )
        == 3
    )
    page.click("button[data-check=none]")  # of those that are listed
    page.evaluate("document.getElementById('name').select()")
    page.type(" ")
    assert methods(visible(page)) == {"unreduced", *NAMES} - {"ToMe"}


def test_placement_and_target_filter_too(page):
    page.evaluate("document.querySelector('[data-filter=placement]').focus()")
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert {entry[1] for entry in visible(page) if entry[0] != "unreduced"} == {"staged"}
    assert len(curves(page)) == 1 + 26
    page.evaluate("document.querySelector('[data-filter=target]').focus()")
    page.press("ArrowDown")
    assert {entry[2] for entry in visible(page) if entry[0] != "unreduced"} == {"0.8"}
    assert len(visible(page)) == 27 and all(entry[2] == 1 for entry in curves(page))


def test_hovering_a_point_says_what_it_is(page):
    assert tip(page) == ""
    page.move("g[data-method=random][data-placement=staged] .dot")
    said = tip(page)
    for text in ("random (control)", "staged", "r=25", "67.80", "66.80", "0.400", "400", "2.50x"):
        assert text in said
    dim = "Array.from(document.querySelectorAll('g[data-method]')).filter((g) => !g.classList.contains('dim'))"
    assert page.evaluate(f"Array.from(new Set({dim}.map((g) => g.dataset.method)))") == ["unreduced", "random"]
    page.move("h1")
    assert tip(page) == ""


def test_the_keyboard_reaches_every_point(page):
    page.evaluate("document.getElementById('pick-x').focus()")
    page.press("Tab")
    assert tip(page).startswith("unreduced")
    seen = set()
    for _ in curves(page):
        page.press("ArrowDown")
        for _ in range(3):
            page.press("ArrowRight")
            seen.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert len(seen) == 1 + 26 * 2 * 3 - 2 and "ToMe, per-layer, r=0, accuracy % 88.00" in " ".join(seen)
    assert tip(page)
    page.press("Escape")
    assert tip(page) == ""
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "name"  # one stop for the whole plot


def test_the_axis_can_be_the_speed_up(page):
    page.evaluate("document.getElementById('pick-x').focus()")
    for _ in page.evaluate("Array.from(document.getElementById('pick-x').options, (o) => o.value)"):
        page.press("ArrowDown")
    assert page.evaluate("document.getElementById('pick-x').value") == "speedup"
    assert "measured speed-up" in page.evaluate("document.getElementById('pareto').textContent")
    assert len(curves(page)) == 1 + 2 * 26


def test_columns_sort(page):
    column = "#results thead th:nth-child(5) button"
    values = "Array.from(document.querySelectorAll('#results tbody tr'), (row) => row.cells[4]?.dataset.v ?? null)"
    assert page.evaluate(f"document.querySelector({column!r}).textContent") == "accuracy %"
    for order in ("descending", "ascending"):
        page.click(column)
        *there, last, least = page.evaluate(values)
        assert last is None and least is None  # what is out of reach stays last
        assert there == sorted(there, key=float, reverse=order == "descending")
        assert page.evaluate(f"document.querySelector({column!r}).parentNode.ariaSort") == order


def test_it_fits_a_telephone_and_follows_the_dark(chromium, path):
    pages = {}
    for dark in (False, True):
        chromium.open(path, width=420, dark=dark)
        assert chromium.evaluate("document.documentElement.scrollWidth") <= 420
        assert chromium.evaluate("document.getElementById('pareto').getBoundingClientRect().width") > 300
        pages[dark] = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len(set(pages.values())) == 2


def test_the_table_is_there_without_a_script(chromium, path):
    chromium.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(path)
        assert len(visible(chromium)) == len(ROWS)
        assert not chromium.evaluate("document.getElementById('filter').checkVisibility()")
        assert "need JavaScript" in chromium.evaluate("document.body.innerText")
    finally:
        chromium.command("Emulation.setScriptExecutionDisabled", value=False)
