"""The report as one HTML file that needs nothing else: its style, its script and the report's JSON are inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        report: What `Report.to_json` holds.
    """
    # Inside a script nothing may look like its end.
    data = json.dumps(report, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = {
        "title": escape(f"sqcompile: {report['model']}"),
        "style": _read("page.css"),
        "script": _read("page.js"),
        "data": data,
    }
    page = _read("page.html")
    head, *rest = page.split("@")
    # Split once, so that what is put in is not looked through: names stand at every other place.
    return head + "".join(parts[text] if place % 2 == 0 else text for place, text in enumerate(rest))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
