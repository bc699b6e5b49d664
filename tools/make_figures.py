"""Draw the documentation's figures from the files that benchmarks wrote.

python benchmarks/trade_offs.py --json benchmarks/results/trade_offs.json
python tools/make_figures.py            writes docs/assets/trade_offs.svg
python tools/make_figures.py --check    fails if it is not what the file says
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 20, 20, 60
SERIES = {
    "rounded to nearest": "#9e9e9e",
    "GPTQ": "#3949ab",
    "mixed, chosen by layer": "#2e7d32",
    "half zero, then GPTQ": "#ef6c00",
}
"""Series -> its colour, readable by those who see few colours: they differ in lightness, and are labelled."""


def trade_offs() -> str:
    """Return the picture of perplexity against bits a weight, one line a series."""
    rows = json.loads((RESULTS / "trade_offs.json").read_text(encoding="utf-8"))["rows"]
    dense = rows[0]["perplexity"]
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in SERIES}
    for row in rows:
        if row["series"] in lines:
            lines[row["series"]].append({**row, "rise": 100 * (row["perplexity"] / dense - 1)})
    points = [row for found in lines.values() for row in found]
    first, last = 3.0, math.ceil(2 * max(row["bits"] for row in points)) / 2
    least, most = 0.1, 20.0

    def x(bits: float) -> float:
        return LEFT + (bits - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(rise: float) -> float:
        share = math.log(max(rise, least) / least) / math.log(most / least)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        "<title>Rise of the perplexity against bits a weight</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fafafa"/>',
    ]
    for rise in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(rise):.1f}" y2="{y(rise):.1f}" stroke="#e0e0e0"/>',
            _text(LEFT - 8, y(rise) + 4, f"{rise:g} %", "end"),
        ]
    for step in range(int((last - first) * 2) + 1):
        bits = first + step / 2
        parts.append(_text(x(bits), HEIGHT - BOTTOM + 18, f"{bits:g}", "middle"))
    parts += [
        _text((LEFT + WIDTH) / 2, HEIGHT - 14, "bits a weight, scales and masks included", "middle"),
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle" fill="#455a64">'
        "rise of the perplexity</text>",
    ]
    for index, (name, found) in enumerate(lines.items()):
        found.sort(key=lambda row: row["bits"])
        path = " ".join(f"{x(row['bits']):.1f},{y(row['rise']):.1f}" for row in found)
        colour = SERIES[name]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row in found:
            parts.append(
                f'<circle cx="{x(row["bits"]):.1f}" cy="{y(row["rise"]):.1f}" r="4" fill="{colour}">'
                f"<title>{name}, {row['point']}: {row['bits']:.2f} bits, +{row['rise']:.2f} %</title></circle>"
            )
        high = TOP + 14 + 20 * index
        parts += [
            f'<line x1="{WIDTH - 230}" x2="{WIDTH - 205}" y1="{high}" y2="{high}" stroke="{colour}" stroke-width="3"/>',
            _text(WIDTH - 198, high + 4, name, "start"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#455a64">{text}</text>'


FIGURES = {"trade_offs.svg": trade_offs}


def stale_figures() -> list[str]:
    """Names of the figures that are not what the files say."""
    return [
        name
        for name, draw in FIGURES.items()
        if not (ASSETS / name).is_file() or (ASSETS / name).read_text(encoding="utf-8") != draw()
    ]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        stale = stale_figures()
        for name in stale:
            print(f"docs/assets/{name} is not what its file says: run python tools/make_figures.py")
        return 1 if stale else 0
    for name, draw in FIGURES.items():
        (ASSETS / name).write_text(draw(), encoding="utf-8")
        print(f"wrote docs/assets/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
