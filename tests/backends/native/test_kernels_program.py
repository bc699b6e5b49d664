"""The C++ test program, built several ways: guard pages, sanitizers, other CPUs.

`sqc_tests` compares every kernel with the scalar one and that with plain loops, on arrays that end at a
page without access. It needs no Python, so that it runs where Python tests cannot.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.native_build import run, tool

IS_X86_LINUX = platform.machine() == "x86_64" and sys.platform == "linux"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mmap and cross compilers"),
]

Build = Callable[[str], Path]


def compiles(flag: str, tmp_path: Path) -> bool:
    """Whether the C++ compiler links a program with this flag."""
    source = tmp_path / "probe.cc"
    source.write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, flag, str(source), "-o", str(tmp_path / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def kernels_tested(output: str) -> set[str]:
    return {line.split(": ")[1] for line in output.splitlines() if line.startswith("tested: ")}


def test_every_kernel_stays_inside_its_buffers(native_build: Build) -> None:
    output = run(native_build("plain") / "sqc_tests")
    assert " 0 failures" in output
    from sqcompile.backends.native import kernels

    assert kernels_tested(output) == {kernel.name for kernel in kernels.list_kernels() if kernel.available}


@pytest.mark.parametrize("cpu,isa", [("Nehalem", "scalar"), ("Haswell", "avx2")])
@pytest.mark.skipif(not IS_X86_LINUX, reason="emulates x86 CPUs on x86")
def test_a_lesser_cpu_runs_only_what_it_has(native_build: Build, cpu: str, isa: str) -> None:
    """An instruction that the emulated CPU lacks ends the program."""
    version = run(tool("qemu-x86_64"), "--version").split("version ")[1].split(".")
    if isa == "avx2" and (int(version[0]), int(version[1].split("(")[0])) < (7, 2):
        pytest.skip("qemu emulates AVX2 from 7.2 on")
    output = run(tool("qemu-x86_64"), "-cpu", cpu, native_build("plain") / "sqc_tests", "tails", "isa")
    assert f"isa: {isa}\n" in output
    assert kernels_tested(output) and all(
        name.endswith(("_scalar", f"_{isa}")) for name in kernels_tested(output)
    )


@pytest.mark.long
def test_address_and_undefined_behaviour_sanitizers(native_build: Build, tmp_path: Path) -> None:
    if not compiles("-fsanitize=address,undefined", tmp_path):
        pytest.skip("the compiler has no address and undefined behaviour sanitizers")
    program = native_build("address") / "sqc_tests"
    # The leak checker needs ptrace, which containers refuse.
    assert " 0 failures" in run(program, ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")


def without_randomization() -> list[str]:
    """Start of a command without address randomization: TSan's fixed memory map collides with that of newer kernels."""
    setarch = shutil.which("setarch")
    prefix = [setarch, platform.machine(), "-R"] if setarch else []
    if prefix and subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        return []  # a container may forbid it
    return prefix


@pytest.mark.long
def test_thread_sanitizer(native_build: Build, tmp_path: Path) -> None:
    if not compiles("-fsanitize=thread", tmp_path):
        pytest.skip("the compiler has no thread sanitizer")
    program = native_build("thread") / "sqc_tests"
    assert " 0 failures" in run(*without_randomization(), program, "pool", "threads")


@pytest.mark.long
def test_sessions_and_generators_share_a_model_under_the_thread_sanitizer(
    native_build: Build, tmp_path: Path
) -> None:
    if not compiles("-fsanitize=thread", tmp_path):
        pytest.skip("the compiler has no thread sanitizer")
    model = Path(__file__).parent / "data" / "generation.sqm"
    program = native_build("thread") / "sqc_share"
    output = run(*without_randomization(), program, model, "4")
    assert output.startswith("3 users agree in 4 rounds, on 32 tokens and ")


@pytest.mark.long
@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is an Arm CPU: the other tests cover it")
def test_arm_kernels_on_an_emulated_cpu(native_build: Build) -> None:
    emulator = tool("qemu-aarch64")
    program = native_build("arm") / "sqc_tests"
    output = run(emulator, "-cpu", "max", program)
    assert " 0 failures" in output and "isa: neon_dotprod\n" in output
    assert {name for name in kernels_tested(output) if name.endswith("_neon_dotprod")} == {
        name.replace("_scalar", "_neon_dotprod")
        for name in kernels_tested(output)
        if name.endswith("_scalar")
    }
    # Cortex-A57 is Armv8.0: it has no sdot.
    output = run(emulator, "-cpu", "cortex-a57", program, "tails", "isa")
    assert "isa: scalar\n" in output and all(name.endswith("_scalar") for name in kernels_tested(output))
