"""Type-check the three packages as the one package that they install as.

mypy follows neither the import hook of an editable install nor the folder mapping in pyproject.toml,
so it is shown a folder of symbolic links, laid out as the installed package is. Messages are printed
with the real paths.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIEW = ROOT / "build" / "types"
MAPPED = ("passes", "backends")  # folders beside sqcompile/ that install inside it


def make_view(view: Path) -> None:
    """Lay out sqcompile in a folder: the core's entries, and the mapped folders among them."""
    package = view / "sqcompile"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for entry in (ROOT / "sqcompile").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)


def real_path(line: str) -> str:
    line = re.sub(rf"\bbuild/types/sqcompile/({'|'.join(MAPPED)})/", r"\1/", line)
    return line.replace("build/types/", "")


def main() -> int:
    make_view(VIEW)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--package", "sqcompile", *sys.argv[1:]],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(VIEW)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print("\n".join(map(real_path, result.stdout.splitlines())))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
