"""The engine without Python: `sqrun`, `libsqcompile.so` and `sqcompile.h`, as installed or built for another CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sqcompile.backends.native import _native
from sqcompile.backends.native.kernel_times import cache_folder
from sqcompile.bundle import this_target
from sqcompile.errors import BackendError, FileError
from sqcompile.files import atomic_folder
from sqcompile.progress import Progress

SOURCE = Path(__file__).parent / "cpp"

FILES = ("sqrun", "libsqcompile.so", "sqcompile.h")

_ELF_MACHINES = {62: "x86_64-linux", 183: "aarch64-linux"}
_SUFFIXES = (".cc", ".h", ".inc", ".txt")
_LINES = 12


def find_runtime(target: str, given: Path | None, progress: Progress) -> Path:
    """Return a folder with the runtime for a target: the given one, the installed one, or one that is built now.

    Args:
        target: Such as `aarch64-linux`.
        given: Folder with a runtime that was built elsewhere, or None.
        progress: Where building reports.

    Raises:
        FileError: If the given folder has no runtime for the target.
        BackendError: If none can be built here; the text says what to install.
    """
    if given is not None:
        return _checked(given, target)
    installed = Path(str(_native.__file__)).parent / "runtime"
    if target == this_target() and _is_whole(installed):
        return installed
    return build_runtime(target, progress)


def build_runtime(target: str, progress: Progress) -> Path:
    """Build the runtime for a target into the user's cache, or return the one that was built before.

    Args:
        target: Such as `aarch64-linux`.
        progress: Where it reports.

    Raises:
        BackendError: If CMake or the compiler is missing, or building fails.
    """
    compiler = _compiler(target)
    folder = cache_folder() / "runtimes" / f"{target}-{_version(compiler)}"
    if _is_whole(folder):
        return folder
    cmake = _require("cmake", target, "CMake", "pip install cmake")
    ninja, make = _find("ninja"), _find("make")
    if ninja is None and make is None:
        _require("ninja", target, "ninja or make", "pip install ninja")
    progress.note(f"building the runtime for {target}: a minute or two, once")
    machine = target.partition("-")[0]
    with atomic_folder(folder) as made, tempfile.TemporaryDirectory(prefix="sqcompile.") as scratch:
        generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ("-G", "Unix Makefiles")
        definitions = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DSQC_PYTHON=OFF", "-DSQC_TOOLS=ON"]
        if target != this_target():
            definitions += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={machine}"]
        _run(target, cmake, *generator, "-S", str(SOURCE), "-B", scratch, *definitions)
        jobs = str(os.cpu_count() or 1)
        _run(target, cmake, "--build", scratch, "--target", "sqrun", "sqcompile", "--parallel", jobs)
        for name in FILES[:2]:
            shutil.copy(Path(scratch) / name, made / name)
        shutil.copyfile(SOURCE / "include" / "sqcompile.h", made / "sqcompile.h")
    return folder


def _checked(folder: Path, target: str) -> Path:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileError(
            f"'{folder}' has no runtime.",
            where=str(folder),
            seen=f"no {', '.join(missing)}",
            expected=", ".join(FILES),
            next_step="build it: cmake -S backends/native/cpp -B FOLDER -DSQC_PYTHON=OFF -DSQC_TOOLS=ON, then copy "
            "include/sqcompile.h beside the programs",
        )
    for name in FILES[:2]:
        found = _machine(folder / name)
        if found != target:
            raise FileError(
                f"The runtime in '{folder}' is for another machine.",
                where=str(folder / name),
                seen=found,
                expected=target,
                next_step=f"pass --target {found}, or the folder of a runtime for {target}",
            )
    return folder


def _machine(path: Path) -> str:
    """Return the machine that an ELF file is for."""
    with path.open("rb") as file:
        head = file.read(20)
    if head[:5] != b"\x7fELF\x02" or len(head) < 20:
        return "no program of a 64-bit Linux"
    number = int.from_bytes(head[18:20], "little")
    return _ELF_MACHINES.get(number, f"machine {number}")


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _compiler(target: str) -> str:
    """Return the C++ compiler for a target."""
    machine = target.partition("-")[0]
    prefixed = f"{machine}-linux-gnu-g++"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"] if target == this_target() else [prefixed]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    package = "g++" if target == this_target() else f"g++-{machine.replace('_', '-')}-linux-gnu"
    return found or _require(names[-1], target, "a C++17 compiler for it", f"apt-get install {package}")


def _require(program: str, target: str, what: str, how: str) -> str:
    path = _find(program)
    if path is not None:
        return path
    raise BackendError(
        f"The runtime for {target} cannot be built here.",
        where=f"bundle for {target}",
        seen=f"no program '{program}'",
        expected=f"{what}, or a runtime that was built elsewhere",
        next_step=f"install it: {how}; or pass the folder of a built runtime: --runtime FOLDER",
    )


def _find(program: str) -> str | None:
    """Return a program from PATH, or from beside the interpreter."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def _version(compiler: str) -> str:
    """Return a text that changes with the sources and with the compiler."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.rglob("*")):
        folder = path.relative_to(SOURCE).parts[0]
        if path.suffix in _SUFFIXES and folder not in ("tests", "bindings"):
            digest.update(str(path.relative_to(SOURCE)).encode() + b"\0" + path.read_bytes())
    shown = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest.update(shown)
    return digest.hexdigest()[:16]


def _run(target: str, *command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode == 0:
        return
    raise BackendError(
        f"Building the runtime for {target} failed.",
        where=" ".join(command[:2]),
        seen="\n    ".join(["", *done.stdout.strip().splitlines()[-_LINES:]]),
        expected="a C++17 compiler: g++ from 9, clang from 10",
        next_step="install another compiler, or pass the folder of a built runtime: --runtime FOLDER",
    )
