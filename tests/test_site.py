"""The documentation site: what checks it finds mistakes, and its pages are those of docs/."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation() -> None:
    """`make site` refuses a page that is not; this says so without MkDocs."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w./-]+\.md)", text))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if not page.startswith("decisions/")}  # added by tools/site_hooks.py
    # From outside of docs/, by the same.
    made = {"contributing.md", "changelog.md", "readme.md", "readme.zh-CN.md"}
    assert listed == pages | made


GOOD = '<h1 id="top">A</h1><a href="b.html#there">b</a><a href="https://example.org">out</a><img src="a.svg">'


@pytest.mark.parametrize(
    ("page", "mistake"),
    [
        (GOOD, None),
        (GOOD.replace("b.html", "c.html"), "a.html: there is no c.html#there"),
        (GOOD.replace("#there", "#here"), "a.html: b.html#here has no such place"),
        (GOOD.replace("a.svg", "none.svg"), "a.html: there is no none.svg"),
        (GOOD.replace("a.svg", "https://example.org/a.svg"), "a.html: loads https://example.org/a.svg from"),
        (GOOD + '<script src="//example.org/a.js"></script>', "a.html: loads //example.org/a.js from"),
    ],
    ids=["good", "page", "place", "picture", "other-host", "script"],
)
def test_mistakes_are_found(page: str, mistake: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<h2 id="there">B</h2>')
    (tmp_path / "a.svg").write_text("<svg/>")
    found = list(tool("check_site").mistakes(tmp_path))
    assert len(found) == (0 if mistake is None else 1)
    assert mistake is None or found[0].startswith(mistake)


def test_styles_that_ask_other_hosts_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>A</p>")
    (tmp_path / "a.css").write_text('@import "https://fonts.example.org/a.css"; b { src: url(c.woff) }')
    assert [text.partition(":")[0] for text in tool("check_site").mistakes(tmp_path)] == ["a.css"]


def test_an_empty_site_is_a_mistake(tmp_path: Path) -> None:
    assert list(tool("check_site").mistakes(tmp_path))
