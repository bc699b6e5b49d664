"""Prove that an installed sqcompile is whole: run by `make wheel-check`, outside the repository."""

import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("sqcompile", "sqcompile.passes", "sqcompile.backends", "sqcompile.backends.native")


def main() -> None:
    for name in PACKAGES:
        module = importlib.import_module(name)
        path = Path(module.__file__ or "")
        print(f"{name}: {path}")
        assert Path(sys.prefix) in path.parents, f"{name} is not the installed copy"

    package_folder = Path(importlib.import_module("sqcompile").__file__ or "").parent
    sources = [path for path in package_folder.rglob("*") if path.suffix in {".cc", ".h", ".inc"}]
    assert not sources, f"C++ sources in the wheel: {sources}"

    from sqcompile.backends.native import cpu_features

    print(f"sqcompile {version('sqcompile')} on {cpu_features()}")

    command = Path(sys.executable).with_name("sqcompile")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
