"""The report as a reader meets it: opened from disk in a real browser, without a network."""

import os
import shutil
import time
from itertools import pairwise

import pytest

from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import new_folder, write_json
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

pytestmark = pytest.mark.system

# The least contrast of small text, WCAG 2.2, 1.4.3.
CONTRAST = 4.5
# Of each text: how far its colour is from what lies behind it.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= .04045 ? v / 12.92
      : ((v + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = parse(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return null;
  };
  const found = [];
  for (const node of document.querySelectorAll("main *, nav *, header *")) {
    const isText = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!isText || !node.getClientRects().length || node.closest(".hoverlayer, g.cbfill")) continue;
    if (node.closest(".heatmaplayer") || node.closest("[hidden]")) continue;  // on its own cell
    const style = getComputedStyle(node);
    const ink = parse(node instanceof SVGElement ? style.fill : style.color);
    const [one, two] = [light(ink), light(behind(node))].sort((a, b) => b - a);
    found.push([(one + .05) / (two + .05), node.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""
# Charts that are drawn: their axes without a title, and how many traces they have.
CHARTS = """() => [...document.querySelectorAll(".plot")].map((node) => ({
  id: node.id,
  traces: node.data?.length ?? 0,
  shapes: node.querySelectorAll(".trace path, .heatmaplayer image, .heatmaplayer path").length,
  untitled: Object.entries(node._fullLayout ?? {})
    .filter(([key, axis]) => /^[xy]axis\\d*$/.test(key) && axis.visible)
    .filter(([key]) => !node.layout[key]?.title?.text).map(([key]) => key),
  drawn: Math.max(0, ...[...node.querySelectorAll(".main-svg")].map(
    (svg) => svg.getBoundingClientRect().right)),
}))"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a regression, a binary and a multiclass target, a profile beside them."""
    root = tmp_path_factory.mktemp("report")
    case = Case(targets=(DELAY, LATE, CARRIER), has_weight=True)
    table, members = case.write(root)
    told = {"resources": Resources(), "recorder": MemoryRecorder()}
    stack(table, members, root / "stack", StackParams(num_resamples=200), **told)
    with new_folder(root / "extract") as folder:
        counts = {"counts": [1, 5, 2], "edges": [0, 1, 2, 3]}
        write_json(folder / "profile.json", {"delay": {"mean": 1.5, "histogram": counts}})
    evaluate(
        table,
        members,
        root / "stack",
        root / "evaluate",
        EvaluateParams(num_resamples=200),
        profile=root / "extract" / "profile.json",
        **told,
    )
    return root / "evaluate" / "report.html"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        tell = pytest.fail if os.environ.get("CI") else pytest.skip  # CI installs it
        tell("Chromium is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser, report):
    """Open the report, wait until all is drawn, and at the end see that nothing went wrong."""
    opened, told, asked = [], [], []

    def open_page(*, width=1280, height=900, **context):
        page = browser.new_page(
            viewport={"width": width, "height": height}, reduced_motion="reduce", **context
        )
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        until = time.monotonic() + 30
        while any(chart["shapes"] == 0 for chart in page.evaluate(CHARTS)):
            assert time.monotonic() < until, [c for c in page.evaluate(CHARTS) if not c["shapes"]]
            page.wait_for_timeout(100)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert told == []
    assert set(asked) == {report.as_uri()}


def column(page, table, number):
    """The values of a column of the ``table``-th table, from the top."""
    rows = page.locator("table").nth(table).locator("tbody tr").all()
    return [row.locator("th, td").nth(number).get_attribute("data-value") for row in rows]


def test_all_charts_are_drawn_and_answer(open_report):
    """Every axis has a title; a choice and other bins change what is drawn; points tell values."""
    page = open_report()
    charts = page.evaluate(CHARTS)
    assert len(charts) > 20
    assert len(charts) == page.locator("figure figcaption").count()
    assert {chart["id"]: chart["untitled"] for chart in charts if chart["untitled"]} == {}

    headings = page.locator("h1, h2, h3, h4, h5").evaluate_all(
        "(all) => all.map((one) => Number(one.tagName[1]))"
    )
    assert all(after <= before + 1 for before, after in pairwise([0, *headings]))

    def first(key, plot):
        return page.evaluate(f"document.getElementById('{plot}').data[0].{key}")

    before = first("x", "target-2-forest")
    page.locator("select[data-of='target-2-forest']").select_option("log-loss")
    assert first("x", "target-2-forest") != before
    bins = len(first("x", "target-1-residuals"))
    page.locator("select[name='bins']").select_option("rule ÷ 2")
    assert len(first("x", "target-1-residuals")) == pytest.approx(2 * bins, abs=2)

    page.locator("#target-1-calibration").scroll_into_view_if_needed()
    box = page.locator("#target-1-calibration .points path").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = page.locator("#target-1-calibration .hoverlayer .hovertext").first
    hover.wait_for(timeout=5000)
    assert "of the rows" in hover.text_content()


def test_tables_sort_by_click_and_by_key(open_report):
    """Numbers as numbers, upwards then downwards; what stands beside them comes along."""
    page = open_report()
    values = [float(value) for value in column(page, 0, 2)]
    rows = sorted(zip(column(page, 0, 2), column(page, 0, 0), strict=True))
    button = page.locator("table").nth(0).locator("thead button", has_text="value")
    button.click()
    assert [float(value) for value in column(page, 0, 2)] == sorted(values)
    assert page.locator("th[aria-sort='ascending']").count() == 1
    button.focus()
    page.keyboard.press("Enter")
    down = [float(value) for value in column(page, 0, 2)]
    assert down == sorted(values, reverse=True)
    assert sorted(zip(column(page, 0, 2), column(page, 0, 0), strict=True)) == rows
    assert page.locator("th[aria-sort='descending']").count() == 1


def test_a_narrow_screen_shows_all_without_scrolling_sideways(open_report):
    """Charts fit, tables scroll in their own frame, the answer stands on the first screen."""
    page = open_report(width=390, height=844, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert max(chart["drawn"] for chart in page.evaluate(CHARTS)) <= 390
    assert page.locator(".answer .value").first.bounding_box()["y"] < 844


def test_texts_stand_out_from_what_is_behind_them(open_report):
    """In charts too, as the reader's system has it and after switching over by hand."""
    page = open_report(color_scheme="dark")
    for is_dark in (True, False):
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background != "rgb(255, 255, 255)") == is_dark
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 500
        assert [found for found in contrasts if found[0] < CONTRAST] == []
        page.locator("#theme").click()


def test_paper_is_white_and_nothing_is_cut(open_report):
    """Of a dark page too: light colours, charts within the margins, no control left."""
    page = open_report(width=718, color_scheme="dark")  # A4 less its margins
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_timeout(300)
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("#theme").is_visible()
    charts = page.evaluate(CHARTS)
    assert max(chart["drawn"] for chart in charts) <= 718
    inks = page.evaluate(
        "[...document.querySelectorAll('.xtick text')].map((one) => getComputedStyle(one).fill)"
    )
    assert set(inks) == {"rgb(0, 0, 0)"}
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
