"""Check the documentation site as it was built: every link leads somewhere, and nothing asks another host.

    python tools/check_site.py build/site

MkDocs checks links between pages by itself (`--strict`); this reads what came out: pictures, styles, scripts
and the pages of the API, too.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""What a browser fetches by itself when it opens a page."""


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append((tag, name, value))


def mistakes(site: Path) -> Iterator[str]:
    """Yield what is wrong, a line each."""
    pages = {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    if not pages:
        yield f"{site} has no pages"
    for file, page in pages.items():
        name = file.relative_to(site).as_posix()
        for tag, attribute, link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto"):
                continue
            if parts.scheme or parts.netloc:
                # An <a> may lead anywhere; <link rel=canonical> is none of those that are fetched either.
                if (tag, attribute) in LOADED:
                    yield f"{name}: loads {link} from another host"
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name}: there is no {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: {link} has no such place"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        for link in re.findall(r"url\(['\"]?(https?:)?//[^)]*\)|@import[^;]*//", text):
            yield f"{style.relative_to(site)}: loads {link} from another host"


def main() -> int:
    site = Path(sys.argv[1]).resolve()
    found = list(mistakes(site))
    print("\n".join(found) or f"{sum(1 for _ in site.rglob('*.html'))} pages, all links lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
