"""What MkDocs has to be told about this repository, called by it while `make site` builds the site.

- The three folders are laid out as the one package that they install as, for the pages of the API.
- Pages outside docs/ (CONTRIBUTING.md and others) become pages of the site, the decisions get an index.
- Links to sources lead to copies of them: the site knows of no other place where they are.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from check_types import make_view  # noqa: E402

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "readme.md",
    "README.zh-CN.md": "readme.zh-CN.md",
}
"""Pages outside docs/ -> what they are in the site."""

DECISIONS = "decisions/index.md"
SOURCES = "source"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_startup(**_: Any) -> None:
    # Before on_config: there mkdocstrings drops the paths that it is told of and does not find.
    make_view(ROOT / "build" / "site-packages")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    section = next(item["Inside"] for item in config.nav or [] if "Inside" in item)
    section.append({"Decisions": [DECISIONS, *(f"decisions/{path.name}" for path in decisions)]})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=moved_links(text, source, target)))
    files.append(File.generated(config, DECISIONS, content=decisions_index()))
    for path in linked_sources():
        files.append(File.generated(config, site_uri(path), content=source_text(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    return markdown if uri in PAGES.values() else moved_links(markdown, f"docs/{uri}", uri)


def moved_links(markdown: str, source: str, target: str) -> str:
    """Return the page with its links as they have to be in the site.

    Args:
        markdown: The page.
        source: Where it lies in the repository.
        target: Where it lies in the site.
    """

    def moved(match: re.Match[str]) -> str:
        path = in_repository(match[1], source)
        if path is None:
            return match[0]
        return posixpath.relpath(site_uri(path), posixpath.dirname(target) or ".") + (match[2] or "")

    return _LINK.sub(moved, markdown)


def in_repository(link: str, source: str) -> str | None:
    """Return what a link on a page leads to, relative to the repository; None if that is elsewhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if (ROOT / path).exists() else None


def site_uri(path: str) -> str:
    """Return where a file or folder of the repository is in the site; sources are copied as text."""
    if path in PAGES:
        return PAGES[path]
    if path == "docs/decisions":
        return DECISIONS
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{SOURCES}/{path}.txt"


def source_text(path: str) -> str:
    """Return a source, or the names of the files in a folder of them."""
    source = ROOT / path
    if source.is_file():
        return source.read_text(encoding="utf-8")
    return "".join(f"{file.name}\n" for file in sorted(source.iterdir()))


def linked_sources() -> list[str]:
    """Return the sources that pages link to."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in PAGES)]
    found = set()
    for page in pages:
        source = page.relative_to(ROOT).as_posix()
        for match in _LINK.finditer(page.read_text(encoding="utf-8")):
            path = in_repository(match[1], source)
            if path and site_uri(path).startswith(SOURCES):
                found.add(path)
    return sorted(found)


def decisions_index() -> str:
    """Return a page that lists the decisions by their titles."""
    lines = ["# Decisions", "", "Why things are as they are.", ""]
    for path in sorted((ROOT / "docs" / "decisions").glob("*.md")):
        number, _, title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(". ")
        lines.append(f"{number}. [{title}]({path.name})")
    return "\n".join(lines) + "\n"
