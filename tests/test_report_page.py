"""The report's page: whole without a network, and in a browser without a mistake."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import data
from torch import nn

import sqcompile
from sqcompile.api import Compiled
from sqcompile.passes import pipelines
from sqcompile.report import Report
from sqcompile.report_page import report_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report() -> Report:
    """A report that has every part."""
    torch.manual_seed(0)
    x = data(4, 8)
    passes = ["mask-weights{sparsity=0.5}", "apply-masks", *pipelines.int8_static()]
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    made = sqcompile.compile(nn.Sequential(*layers).eval(), passes, (x,), [x], backend="reference")
    assert isinstance(made, Compiled)
    made.measure(runs=2)
    made.report.add_quality("accuracy", 0.98, 0.97)
    made.report.notes.append("</script><b>not markup</b> @style@")
    made.report.passes[0].facts.update(
        {
            "sensitivity": {name: {"uint4": 0.1 * (place + 1), "int8": 1e-4} for place, name in enumerate("024")},
            "choice": {"0": "uint4", "2": "int8", "4": "int8"},
            "frontier": [{"cost": 4.0 + step, "predicted": 10.0**-step} for step in range(5)],
            "cost": 6.0, "predicted": 0.01, "unit": "bits a weight", "measure": "fisher",
        }
    )  # fmt: skip
    return made.report


def test_the_page_is_whole_and_asks_nobody(report: Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@data@" not in page and "@script@" not in page
    (stored,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert json.loads(stored) == json.loads(report.to_json())
    # Nothing is loaded: the only address is the name space of SVG.
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)\b|\bsrc=|@import|url\(", page.replace(stored, ""))


def test_the_title_is_text() -> None:
    plain = {"model": "<b>&", "passes": []}
    assert "<title>sqcompile: &lt;b&gt;&amp;</title>" in report_page(plain)


class Page:
    """The page in a browser, with what its console said."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.errors: list[str] = []
        inner.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        inner.on("pageerror", lambda error: self.errors.append(str(error)))
        inner.on("request", lambda request: self.asked.append(request.url))
        self.asked: list[str] = []

    def open(self, path: Path) -> None:
        self.inner.goto(path.as_uri())

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.inner.locator(selector).all_inner_texts()
        return found

    def tab(self, title: str) -> None:
        self.inner.get_by_role("tab", name=title).click()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM} if CHROMIUM else {}
        try:
            started = driver.chromium.launch(args=["--no-sandbox"], **options)
        except playwright.Error as error:
            pytest.skip(f"needs Chromium: apt-get install chromium ({str(error).splitlines()[0]})")
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, report: Report, tmp_path: Path) -> Iterator[Page]:
    report.to_html(tmp_path / "report.html")
    inner = browser.new_page()
    made = Page(inner)
    made.open(tmp_path / "report.html")
    yield made
    inner.close()


@pytest.mark.slow
class TestInABrowser:
    def test_loads_without_errors_and_without_network(self, page: Page) -> None:
        tabs = page.texts("nav button")
        assert tabs == [
            "Overview", "Passes", "Layers", "Sparsity", "Activations", "Mixed precision", "Graph", "Environment"
        ]  # fmt: skip
        for title in tabs:
            page.tab(title)
            assert page.inner.locator("main section:visible").count() == 1
            assert page.inner.locator("main section:visible").inner_text().strip()
        assert page.errors == []
        assert all(url.startswith("file:") for url in page.asked)

    def test_notes_are_text(self, page: Page) -> None:
        assert "</script><b>not markup</b> @style@" in page.inner.locator("#overview").inner_text()

    def test_layers_sort(self, page: Page) -> None:
        page.tab("Layers")

        def names() -> list[str]:
            return page.texts("#layers tbody tr td:first-child")

        head = page.inner.locator("#layers th").filter(has_text="size")
        head.get_by_role("button").click()
        assert names() == ["4", "0", "2"] and head.get_attribute("aria-sort") == "ascending"
        head.get_by_role("button").click()
        assert names() == ["2", "0", "4"] and head.get_attribute("aria-sort") == "descending"
        page.inner.locator("#layers th").filter(has_text="layer").get_by_role("button").click()
        assert names() == ["0", "2", "4"]

    def test_layers_filter(self, page: Page) -> None:
        page.tab("Layers")
        box = page.inner.locator("#layers input")
        box.fill("linear 16×16")
        assert page.texts("#layers tbody tr:visible td:first-child") == ["2"]
        assert "1 shown" in page.inner.locator("#layers .tools").inner_text()
        box.fill("nothing like it")
        assert page.texts("#layers tbody tr:visible td:first-child") == []
        box.fill("")
        assert len(page.texts("#layers tbody tr:visible td:first-child")) == 3

    def test_the_graph_shows_what_a_pass_changed(self, page: Page, report: Report) -> None:
        page.tab("Graph")
        assert report.graphs is not None
        lines = report.graphs.lines
        before, after = report.graphs.stages[0].lines, report.graphs.stages[1].lines
        page.inner.get_by_label("before").select_option("0")
        page.inner.get_by_label("after").select_option("1")
        added = [f"+ {lines[place]}" for place in after if place not in before]
        removed = [f"- {lines[place]}" for place in before if place not in after]
        assert page.texts("#diff .added") == added and page.texts("#diff .removed") == removed
        page.inner.get_by_label("all lines").check()
        whole = [line[2:] for line in page.texts("#diff div:not(.removed)")]
        assert whole == [lines[place] for place in after]
        page.inner.get_by_label("before").select_option("1")
        assert page.texts("#diff .added, #diff .removed") == []

    def test_tabs_by_keyboard_and_by_address(self, page: Page) -> None:
        page.tab("Overview")
        page.inner.keyboard.press("ArrowRight")
        assert page.inner.locator("[aria-selected=true]").inner_text() == "Passes"
        assert page.inner.url.endswith("#passes")
        page.inner.reload()
        assert page.inner.locator("[aria-selected=true]").inner_text() == "Passes"

    def test_light_and_dark(self, page: Page) -> None:
        colour = "getComputedStyle(document.body).backgroundColor"
        page.inner.emulate_media(color_scheme="light")
        light = page.inner.evaluate(colour)
        page.inner.locator("#theme").click()
        assert page.inner.evaluate(colour) != light
        page.inner.locator("#theme").click()
        assert page.inner.evaluate(colour) == light

    def test_narrow_screens_scroll_down_only(self, page: Page) -> None:
        page.inner.set_viewport_size({"width": 360, "height": 740})
        for title in page.texts("nav button"):
            page.tab(title)
            assert page.inner.evaluate("document.documentElement.scrollWidth") <= 360, title

    def test_a_report_with_little_in_it(self, browser: Any, report: Report, tmp_path: Path) -> None:
        bare = Report("Bare", "reference", "asked for", report.original, report.size, 400, [], [])
        bare.to_html(tmp_path / "bare.html")
        inner = browser.new_page()
        shown = Page(inner)
        shown.open(tmp_path / "bare.html")
        assert shown.texts("nav button") == ["Overview", "Environment"] and shown.errors == []
        inner.close()
