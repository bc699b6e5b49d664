"""Bundles of the native engine: what a device gets runs there, alone."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.native_build import SOURCE, tool
from torch import nn

import sqcompile
from sqcompile.api import Compiled
from sqcompile.backends.native.runtime import build_runtime, find_runtime
from sqcompile.bundle import this_target, write_bundle
from sqcompile.errors import BackendError, FileError
from sqcompile.passes import pipelines
from sqcompile.progress import SilentProgress

Build = Callable[[str], Path]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bundles are for Linux")

GENERATION = Path(__file__).parent / "data" / "generation.sqm"
OTHER = "x86_64-linux" if platform.machine() == "aarch64" else "aarch64-linux"
BARE = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantized CNN with a dynamic batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    images = torch.randn(8, 3, 8, 8)
    compiled = sqcompile.compile(
        net, pipelines.int8_static(), (images,), calibration=[images], backend="native",
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert isinstance(compiled, Compiled)
    return compiled.save(tmp_path_factory.mktemp("model") / "net.sqm")[0]


def runtime(build: Path, folder: Path) -> Path:
    """The runtime of a build as a folder of its own."""
    folder.mkdir()
    for path in (build / "sqrun", build / "libsqcompile.so", SOURCE / "include" / "sqcompile.h"):
        shutil.copy(path, folder)
    return folder


def shell(commands: str, folder: Path, **environment: str) -> str:
    """Run commands in a folder, with nothing of ours in the environment."""
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=folder,
        env={**BARE, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def commands_of(readme: Path) -> str:
    """The commands that a README gives, in order."""
    return "\n".join(re.findall(r"^    (\S.*)$", readme.read_text(), flags=re.M))


@pytest.mark.slow
def test_every_command_of_the_readme_runs(native_build: Build, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    tool("make"), tool("cc")
    write_bundle(
        model, folder, runtime=runtime(native_build("plain"), tmp_path / "runtime"), threads=2, runs=2
    )
    text = (folder / "README.md").read_text()
    assert "| input | `input` | `f32[batch, 3, 8, 8]` | [2, 3, 8, 8] |" in text
    assert "one call | " in text and "| threads | 2 |" in text
    printed = shell(commands_of(folder / "README.md"), folder)
    assert "make" in commands_of(folder / "README.md") and "input  input: f32[?, 3, 8, 8]" in printed
    (name,) = [path.name for path in (folder / "expected").iterdir()]
    # The same machine, file and threads: the same bits, whoever calls.
    np.testing.assert_array_equal(np.load(folder / "results" / name), np.load(folder / "expected" / name))
    assert re.search(r"^output\S*: 10 values .* at most 0 from what was expected", printed, flags=re.M)


@pytest.mark.slow
def test_the_example_tells_a_wrong_output(native_build: Build, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    tool("make"), tool("cc")
    write_bundle(model, folder, runtime=runtime(native_build("plain"), tmp_path / "runtime"), runs=1)
    shell("make CFLAGS='-Wall -Wextra -Werror -pedantic'", folder)
    (path,) = (folder / "expected").iterdir()
    expected = np.load(path)
    np.save(path, expected + 0.02 * np.abs(expected).max())
    assert "1" == shell("./example > seen || echo $?", folder).strip()
    path.unlink()
    assert f"expected/{path.name}: cannot be opened" in shell("./example 2>&1 || true", folder)
    path.write_bytes(b"no array")
    assert "is no array" in shell("./example 2>&1 || true", folder)
    assert "none.sqm: cannot open" in shell("./example none.sqm 2>&1 || true", folder)


@pytest.mark.long
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
def test_a_bundle_for_arm(native_build: Build, model: Path, tmp_path: Path) -> None:
    emulator, compiler = tool("qemu-aarch64"), tool("aarch64-linux-gnu-gcc")
    folder = tmp_path / "bundle"
    given = runtime(native_build("arm"), tmp_path / "runtime")
    write_bundle(model, folder, target="aarch64-linux", runtime=given)
    text = (folder / "README.md").read_text()
    assert "not measured: this bundle was made on another machine" in text and "threads |" not in text
    # The device's C library, where the cross compiler has put it.
    system = subprocess.run([compiler, "-print-sysroot"], capture_output=True, text=True).stdout.strip()
    places = [path for path in (system, "/usr/aarch64-linux-gnu") if path]
    libraries = next((path for path in places if Path(path, "lib", "ld-linux-aarch64.so.1").exists()), None)
    if libraries is None:
        pytest.skip("the C library for 64-bit Arm is not installed: apt-get install libc6-dev-arm64-cross")
    assert "make CC=aarch64-linux-gnu-gcc" in text
    shell("make CC=aarch64-linux-gnu-gcc", folder, PATH=os.environ["PATH"])
    printed = shell(f"{emulator} -L {libraries} ./example", folder)
    assert "from what was expected" in printed and "neon_dotprod" in printed
    assert "f32[?, 3, 8, 8]" in shell(f"{emulator} ./sqrun model.sqm --info", folder)


@pytest.mark.slow
def test_a_language_model_continues_texts(native_build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    tool("make"), tool("cc")
    write_bundle(GENERATION, folder, runtime=runtime(native_build("plain"), tmp_path / "runtime"), runs=1)
    commands = commands_of(folder / "README.md")
    assert "--generate 64" in commands
    shell(commands.replace("--generate 64", "--generate 8"), folder)  # it takes texts of 16 tokens


def test_a_folder_with_files_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match="is not empty") as caught:
        write_bundle(model, tmp_path)
    assert caught.value.seen == "mine.txt" and caught.value.next_step
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def elf(path: Path, machine: int) -> None:
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + machine.to_bytes(2, "little"))


def test_a_runtime_for_another_machine(model: Path, tmp_path: Path) -> None:
    given, folder = tmp_path / "runtime", tmp_path / "bundle"
    given.mkdir()
    with pytest.raises(FileError, match="has no runtime") as caught:
        write_bundle(model, folder, runtime=given)
    assert caught.value.seen == "no sqrun, libsqcompile.so, sqcompile.h"
    (given / "sqcompile.h").write_text("")
    elf(given / "sqrun", 62)
    elf(given / "libsqcompile.so", 183)
    for target, seen in (("x86_64-linux", "aarch64-linux"), ("aarch64-linux", "x86_64-linux")):
        with pytest.raises(FileError, match="is for another machine") as caught:
            write_bundle(model, folder, target=target, runtime=given)
        assert caught.value.seen == seen and target in (caught.value.expected or "")
    (given / "sqrun").write_text("#!/bin/sh\n")
    with pytest.raises(FileError, match="another machine"):
        write_bundle(model, folder, runtime=given)
    assert not folder.exists()


def test_without_a_compiler_it_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="cannot be built here") as caught:
        write_bundle(model, tmp_path / "bundle", target=OTHER)
    machine = OTHER.partition("-")[0]
    assert f"{machine}-linux-gnu-g++" in (caught.value.seen or "")
    assert "apt-get install g++-" in (caught.value.next_step or "") and "--runtime" in (
        caught.value.next_step or ""
    )
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given = tmp_path / "runtime"
    given.mkdir()
    (given / "sqcompile.h").write_text("")
    for name in ("sqrun", "libsqcompile.so"):
        elf(given / name, 183 if this_target().startswith("aarch64") else 62)
    monkeypatch.setattr("sqcompile.backends.native.bundle.write_arrays", full)
    with pytest.raises(FileError, match="cannot be written"):
        write_bundle(model, tmp_path / "bundle", runtime=given)
    assert [path.name for path in tmp_path.iterdir()] == ["runtime"]


SMALL = """
cmake_minimum_required(VERSION 3.18...4.0)
project(small LANGUAGES CXX)
if(SQC_PYTHON OR NOT SQC_TOOLS)
  message(FATAL_ERROR "other options than a runtime needs")
endif()
add_executable(sqrun main.cc)
add_library(sqcompile SHARED main.cc)
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the targets of the engine, that builds in seconds; and a cache of its own."""
    source = tmp_path / "source"
    (source / "include").mkdir(parents=True)
    (source / "CMakeLists.txt").write_text(SMALL)
    (source / "main.cc").write_text("int main() { return 0; }\n")
    (source / "include" / "sqcompile.h").write_text("")
    monkeypatch.setattr("sqcompile.backends.native.runtime.SOURCE", source)
    monkeypatch.setenv("SQCOMPILE_CACHE", str(tmp_path / "cache"))
    return source


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_builds_a_runtime_once(small: Path, machine: str) -> None:
    """With the compiler for this machine, and with that for another where it is installed."""
    target = f"{machine}-linux"
    tool("cmake"), tool("make")
    if target != this_target():
        tool(f"{machine}-linux-gnu-g++")
    built = build_runtime(target, SilentProgress())
    assert sorted(path.name for path in built.iterdir()) == ["libsqcompile.so", "sqcompile.h", "sqrun"]
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    assert build_runtime(target, SilentProgress()) == built
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    assert find_runtime(target, built, SilentProgress()) == built  # it is for that machine
    (small / "main.cc").write_text("int main() { return 1; }\n")
    assert build_runtime(target, SilentProgress()) != built, "other sources are another runtime"


def test_a_build_that_fails_leaves_nothing(small: Path, tmp_path: Path) -> None:
    tool("cmake"), tool("make")
    (small / "main.cc").write_text("int main() { return nothing; }\n")
    with pytest.raises(BackendError, match="failed") as caught:
        build_runtime(this_target(), SilentProgress())
    assert "nothing" in (caught.value.seen or "") and "--runtime" in (caught.value.next_step or "")
    assert not list((tmp_path / "cache").rglob("sqrun"))
