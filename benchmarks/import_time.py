"""What `import sqcompile` takes, as a ratio to `import torch`.

    python benchmarks/import_time.py [--runs 9] [--json out.json]

Each import in a process of its own, the interpreter's start included, in turns. `import sqcompile` imports no PyTorch
until a name is used; so the last row asks for what a script that compiles needs: `compile`, and every pass.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from common import alternate, median_ratio, spread, write_json
from rich.console import Console
from rich.table import Table

BASE = "import torch"
IMPORTS = ("import sqcompile", "import sqcompile; sqcompile.compile; sqcompile.passes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    calls = {code: lambda code=code: run(code) for code in (BASE, *IMPORTS)}
    times = alternate(calls, runs=options.runs, warmup=1)
    rows = [
        {
            "code": code,
            "median_ns": statistics.median(measured),
            "ratio": 1 / median_ratio(times[BASE], measured),
        }
        for code, measured in times.items()
    ]
    table = Table("", "time", "ratio", title="Imports")
    for row in rows:
        table.add_row(row["code"], spread(times[row["code"]]), f"{row['ratio']:.2f}")
    Console().print(table)
    write_json(options.json, "import_time", rows, runs=options.runs)


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
