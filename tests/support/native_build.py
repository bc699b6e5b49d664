"""The C++ programs of the native engine, built in the ways that the tests need, each once a run.

Test processes share the folder: the first that asks for a build makes it, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "backends" / "native" / "cpp"

# name: (CMake definitions, targets)
_BUILDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("-DSQC_TESTS=ON", "-DSQC_TOOLS=ON"), ("sqc_tests", "sqrun", "sqcompile")),
    # -O1: sanitized code is slow to compile, and its speed is of no interest.
    "address": (
        (
            "-DSQC_TESTS=ON",
            "-DSQC_SANITIZE=address,undefined",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1",
        ),
        ("sqc_tests", "sqc_fuzz"),
    ),
    "thread": (
        (
            "-DSQC_TESTS=ON",
            "-DSQC_SANITIZE=thread",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1",
        ),
        ("sqc_tests", "sqc_share"),
    ),
    "fuzzer": (
        (
            "-DSQC_TESTS=ON",
            "-DSQC_FUZZER=ON",
            "-DSQC_SANITIZE=address,undefined",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1",
        ),
        ("sqc_fuzz",),
    ),
    "arm": (
        (
            "-DSQC_TESTS=ON",
            "-DSQC_TOOLS=ON",
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",
        ),
        ("sqc_tests", "sqrun", "sqcompile"),
    ),
}

_COMPILERS = {"arm": "aarch64-linux-gnu-g++", "fuzzer": "clang++"}


def tool(name: str) -> str:
    """A program of the build, from PATH or from beside the interpreter; skips the test without it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str | Path, timeout: float = 900, code: int = 0, **environment: str) -> str:
    """Run a program and return what it prints; fails the test if it ends with another code."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert result.returncode == code, f"{command} returned {result.returncode}:\n{result.stdout[-6000:]}"
    return result.stdout


def build(name: str, root: Path) -> Path:
    """Return the folder of a build, made if it is not there yet.

    Args:
        name: `plain`, `address` (and undefined behaviour), `thread`, `fuzzer` (libFuzzer, of clang) or `arm`.
        root: A folder that all processes of this run share.
    """
    definitions, targets = _BUILDS[name]
    cmake, ninja = tool("cmake"), tool("ninja")
    compiler = _COMPILERS.get(name)
    if compiler is not None:
        definitions = (*definitions, f"-DCMAKE_CXX_COMPILER={tool(compiler)}")
    folder = root / f"sqc-{name}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"sqc-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            options = (f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSQC_PYTHON=OFF", "-DSQC_WERROR=ON", *definitions)
            run(cmake, "-G", "Ninja", "-S", SOURCE, "-B", folder, *options)
            run(
                cmake, "--build", folder, "--target", *targets, timeout=3600
            )  # five builds may share two cores
            (folder / "done").touch()
    return folder
