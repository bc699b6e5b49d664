"""Wheels themselves are built by `make wheels`, which takes long; here is what decides which, and what refuses them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_wheels", ROOT / "tools" / "make_wheels.py")
assert spec is not None and spec.loader is not None
make_wheels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_wheels)

NATIVE = "sqcompile/backends/native"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["3.10", "3.11", "3.12", "3.13"], {"3.10": "3.10", "3.11": "3.11", "3.12": "3.12"}),
        (["3.13"], {"3.12": "3.13"}),  # the stable ABI's wheel is made by any version that has it
        (["3.11", "3.13"], {"3.11": "3.11", "3.12": "3.13"}),
        ([], {}),
    ],
    ids=lambda value: "-".join(value),
)
def test_one_wheel_serves_all_versions_of_the_stable_abi(found: list[str], expected: dict[str, str]) -> None:
    pythons = {version: Path(f"python{version}") for version in found}
    chosen = make_wheels.one_for_each_wheel(pythons)
    assert chosen == {wheel: Path(f"python{version}") for wheel, version in expected.items()}


def test_versions_without_a_wheel_are_named() -> None:
    assert make_wheels.unserved({"3.10": Path("a"), "3.13": Path("b")}) == ["3.11"]
    assert make_wheels.unserved(dict.fromkeys(make_wheels.VERSIONS, Path("a"))) == []


def test_versions_are_those_that_are_promised() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.search(
        r"\| Python \| (3\.\d+) to (3\.\d+) \|", (ROOT / "docs" / "compatibility.md").read_text()
    )
    assert promised is not None
    assert promised.groups() == (make_wheels.VERSIONS[0], make_wheels.VERSIONS[-1])
    assert f'requires-python = ">={make_wheels.VERSIONS[0]}"' in project
    assert f'wheel.py-api = "cp{make_wheels.STABLE_FROM.replace(".", "")}"' in project


def test_an_interpreter_that_cannot_build_is_named() -> None:
    with pytest.raises(SystemExit, match="is no CPython"):
        make_wheels.find_interpreters(["/nowhere/python3.12"])


def test_an_interpreter_is_known_by_its_version() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version not in make_wheels.VERSIONS or make_wheels.find_interpreters() == {}:
        pytest.skip("no interpreter here has its headers")
    for found, python in make_wheels.find_interpreters().items():
        asked = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == found


def test_arm_flags_get_the_names_that_zig_knows(tmp_path: Path) -> None:
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\n{make_wheels.ARM_FLAGS}printf '%s\\n' \"$@\"\n")
    given = ["-O3", "-march=armv8.2-a+dotprod", "-DA=b c", "-march=native"]
    done = subprocess.run(["sh", script, *given], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-O3", "-mcpu=generic+v8_2a+dotprod", "-DA=b c", "-march=native"]


def wheel(folder: Path, name: str, module: str, machine: int) -> Path:
    """Write the files of a wheel that the check looks at; ELF says its machine in the bytes 18 and 19."""
    path = folder / f"sqcompile-0.1.0-{name}.whl"
    program = b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little")
    with zipfile.ZipFile(path, "w") as archive:
        for file in (f"{NATIVE}/{module}", f"{NATIVE}/runtime/sqrun", f"{NATIVE}/runtime/libsqcompile.so"):
            archive.writestr(file, program)
    return path


X86, ARM = 62, 183


@pytest.mark.parametrize(
    ("name", "module", "machine"),
    [
        ("cp311-cp311-manylinux_2_28_x86_64", "_native.cpython-311-x86_64-linux-gnu.so", X86),
        ("cp311-cp311-manylinux_2_28_aarch64", "_native.cpython-311-aarch64-linux-gnu.so", ARM),
        ("cp312-abi3-manylinux_2_28_aarch64", "_native.abi3.so", ARM),
    ],
)
def test_whole_wheels_pass(tmp_path: Path, name: str, module: str, machine: int) -> None:
    make_wheels.check(wheel(tmp_path, name, module, machine))


@pytest.mark.parametrize(
    ("name", "module", "machine", "fault"),
    [
        ("cp312-abi3-manylinux_2_28_aarch64", "_native.abi3.so", X86, "is for x86_64"),
        ("cp312-abi3-manylinux_2_28_x86_64", "_native.cpython-312-x86_64-linux-gnu.so", X86, "cpython-312"),
        ("cp311-cp311-manylinux_2_28_x86_64", "_native.abi3.so", X86, "abi3"),
        (
            "cp311-cp311-manylinux_2_28_aarch64",
            "_native.cpython-311-x86_64-linux-gnu.so",
            ARM,
            "x86_64-linux",
        ),
        ("cp311-cp311-manylinux_2_28_x86_64", "_other.so", X86, "modules"),
        ("cp312-abi3-manylinux_2_34_x86_64", "_native.abi3.so", X86, "more than glibc 2.28"),
        ("cp312-abi3-linux_x86_64", "_native.abi3.so", X86, "more than glibc"),
    ],
)
def test_wheels_of_another_kind_than_their_name_are_refused(
    tmp_path: Path, name: str, module: str, machine: int, fault: str
) -> None:
    with pytest.raises(SystemExit, match=fault):
        make_wheels.check(wheel(tmp_path, name, module, machine))
