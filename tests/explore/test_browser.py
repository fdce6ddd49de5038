"""Both pages in front of a reader: what Chromium makes of a hostile corpus, and of a hand on a slider."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest

from assay.cli import main
from assay.cli.reporting import label_column, shown_rows
from assay.corpus.scores_folder import open_scores
from assay.explore import open_explorer, open_server, select_command
from assay.report import find_columns
from tests.browser import Page, chromium
from tests.explore.hostile import MARKUP, hostile_scores

WINDOWS = [(1280, 900, False), (1280, 900, True), (390, 844, False), (390, 844, True)]
SHOTS = os.environ.get("ASSAY_SHOTS")
"""A folder for screenshots, to be looked at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hostile_scores(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(folder), "--out", str(path), "--samples", "2"]) == 0
    return path


@pytest.fixture(scope="module")
def server(folder, report):
    scores = open_scores(str(folder))
    columns = find_columns(scores, (), label_column(scores))
    command = lambda where: select_command(str(folder), None, where)  # noqa: E731
    with open_server() as server:
        server.explorer = open_explorer(
            scores, columns, command, lambda rows: shown_rows(scores, rows), report.read_text
        )
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def nothing_ran(page, only):
    """No script of a stranger's, and no word to anybody but where the page is from."""
    assert page.js("typeof planted") == "undefined"
    assert page.events("Page.javascriptDialogOpening") == []
    asked = [its["request"]["url"] for its in page.events("Network.requestWillBeSent")]
    assert asked
    assert [url for url in asked if not url.startswith((only, "data:image/jpeg;base64,", "data:,"))] == []
    logged = [its["entry"]["text"] for its in page.events("Log.entryAdded")]  # such as what the policy had to stop
    assert [text for text in logged if "a status of 400" not in text] == []
    assert page.events("Runtime.exceptionThrown") == []
    strange = "main script, iframe, object, base, [onload], [onerror], img:not([src^='data:image/jpeg;base64,'])"
    assert page.js(f"document.querySelectorAll({json.dumps(strange)}).length") == 0
    text = page.js("document.body.textContent")
    assert text.count(MARKUP) > 5
    assert not {"\x1b", "\x00", "\u202e", "\u2066"} & set(text)
    assert r"\x1b[2J\x07\x00\u202eback\u202c\u2066 =HYPERLINK" in text
    assert "100,000 × 100,000 pixels" in text
    assert page.js("[...document.images].every(its => its.complete && its.naturalWidth > 0)")
    assert page.js("document.images.length") > 0


_CONTRAST = """(selectors) => selectors.filter((selector) => {
  const light = (colour) => {
    const [r, g, b, shown = 1] = colour.match(/[\\d.]+/g).map(Number);
    const linear = (c) => c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
    return shown ? 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) : null;
  };
  const element = document.querySelector(selector);
  const ink = light(getComputedStyle(element).color);
  let ground = null;
  for (let at = element; at && ground === null; at = at.parentElement) {
    ground = light(getComputedStyle(at).backgroundColor);
  }
  return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05) < 4.5;
})"""


def is_readable(page, *selectors):
    """Nobody has to scroll to the side, and text stands out from its ground (WCAG 2's 4.5)."""
    assert page.js("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.js(f"({_CONTRAST})({json.dumps(selectors)})") == []


def shot(page, name, width, dark):
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}-{width}-{'dark' if dark else 'light'}.png")


def test_the_report_runs_nothing_and_is_readable(browser, report):
    page = Page(browser)
    page.open(report.as_uri())
    for width, height, dark in WINDOWS:
        page.look(width, height, dark)
        is_readable(page, "p", ".quiet", "a", ".card .id", "summary", "tbody th", ".column", "dt")
        shot(page, "report-hostile", width, dark)
    nothing_ran(page, report.as_uri())


def test_the_report_of_the_explorer(browser, server):
    page = Page(browser)
    page.open(f"{server.url}report.html")
    assert page.js("getComputedStyle(document.querySelector('.card')).borderRadius") == "8px"
    nothing_ran(page, server.url)


AT_REST = "!asking && !changed && !waiting && document.querySelectorAll('#kept-rows .sample').length > 0"
SCORE = "#cards article:nth-child(%d)"


def test_the_explorer_runs_nothing_and_is_readable(browser, server):
    page = Page(browser)
    page.open(server.url)
    page.until(AT_REST)
    for width, height, dark in WINDOWS:
        page.look(width, height, dark)
        is_readable(page, "#kept", "header p", ".quiet", "summary", ".group td.count", ".sample .id", ".axis", "select")
        shot(page, "explore-hostile", width, dark)
    assert page.js("byId('kept').innerText").startswith("58 of 58 rows kept (100.0 %)")
    assert page.js("byId('copy').disabled")
    nothing_ran(page, server.url)


@pytest.mark.parametrize(("width", "height", "dark"), [WINDOWS[0], WINDOWS[3]], ids=["wide", "phone"])
def test_a_hand_on_the_sliders(browser, server, tmp_path, capsys, width, height, dark):
    page = Page(browser)
    page.look(width, height, dark)
    page.open(server.url)
    page.until(AT_REST)
    page.drag(f"{SCORE % 1} input[type=range]", 0.5, 0.6)
    page.until("cuts[0].on && " + AT_REST)
    page.drag(f"{SCORE % 2} input[type=range]", 0.5, 0.74)
    page.until("document.querySelectorAll('#which button').length === 2 && " + AT_REST)
    is_readable(page, "#kept", "#copy", "#reset", "#which button", "select", "summary", ".share + span, .count")

    kept = page.js("counted.kept")
    assert 0 < kept < 40
    assert page.js("byId('kept').innerText").startswith(f"{kept} of 58 rows kept (")
    assert not any(page.js("counted.bins[1].slice(4)")), "the second score is cut from above"
    heights = page.js(
        f"[...document.querySelectorAll('{SCORE % 1} rect.kept')].map(its => +its.getAttribute('height'))"
    )
    assert [its > 0 for its in heights] == [count > 0 for count in page.js("counted.bins[0]")]
    groups = page.js("[...document.querySelectorAll('.group')].map(its => its.querySelector('tbody').innerText)")
    assert len(groups) == 2
    for text in groups:
        assert sum(int(count) for count in re.findall(r"(\d+) of \d+", text)) == kept

    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.js("byId('copy').click()")
    page.until("byId('copy').textContent === 'Copied'")
    command = page.js("navigator.clipboard.readText()")
    assert command == page.js("byId('command').innerText")
    is_readable(page, "#command")
    shot(page, "explore-hostile-cut", width, dark)
    assert keeps(command, tmp_path, capsys) == kept
    number = f"document.querySelector('{SCORE % 1} input[type=number]')"
    page.js(f"{number}.value = '1e39', {number}.dispatchEvent(new Event('input'))")
    page.until("byId('problem').innerText.includes('within what a score can be')")
    assert page.js("[byId('kept').innerText, byId('copy').disabled]") == ["Not counted.", True]
    page.js("byId('reset').click()")
    page.until("counted.kept === 58 && byId('problem').hidden && " + AT_REST)
    nothing_ran(page, server.url)


def keeps(command, tmp_path, capsys):
    """How many rows the command keeps, as a shell reads it."""
    script = f"assay() {{ printf '%s\\0' \"$@\"; }}; {command}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True, text=True).stdout.split("\0")[:-1]
    assert main([*words[:-1], str(tmp_path / "out")]) == 0
    return int(capsys.readouterr().out.partition("= kept ")[2].split(" ")[0])
