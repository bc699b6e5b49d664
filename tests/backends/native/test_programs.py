"""The engine without Python: sqrun, the C interface, mutated files under sanitizers, and Arm."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sqcompile.backends.native.backend import BACKEND
from sqcompile.tracing import trace

SOURCE = Path(__file__).resolve().parents[3] / "backends" / "native" / "cpp"
GOLDEN = Path(__file__).parent / "data" / "golden.sqm"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mmap and cross compilers"),
]

Build = Callable[..., Path]

CLIENT = r"""
#include <sqcompile.h>
#include <stdio.h>

int main(int argc, char** argv) {
  const int64_t ids[6] = {0, 1, 2, 3, 4, 5};
  sqc_tensor input = {SQC_I64, 2, {2, 3}, ids}, output;
  sqc_model* model = NULL;
  sqc_session* session = NULL;
  sqc_status status = sqc_model_open(argv[argc - 1], &model);
  if (status.code == SQC_OK) status = sqc_session_create(model, 2, &session);
  sqc_model_close(model); /* the session keeps what it needs */
  if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
  if (status.code == SQC_INVALID_ARGUMENT) status = sqc_session_run(session, &input, 1);
  if (status.code == SQC_OK) status = sqc_session_output(session, 0, &output);
  if (status.code == SQC_OK) {
    for (int i = 0; i < 5; ++i) printf("%.9g ", ((const float*)output.data)[i]);
    status = sqc_session_run(session, &input, 2);
  }
  printf("%d %s\n", (int)status.code, status.message);
  sqc_session_destroy(session);
  return 0;
}
"""


class Many(nn.Module):
    """Operators of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.patches = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        ids = (x[:, :, 0] > 0).to(torch.int64)
        mask = (x > 0) & (x < 1)
        return [
            self.table(ids),
            self.patches(x[:, None]),
            x @ x.transpose(1, 2),
            x.gather(1, ids[:, :, None]),
            x[:, ids[0]],
            torch.where(mask, x, 0.0).permute(2, 0, 1)[3:11:2],
            torch.cat([x, x[:, -2:]], 1).reshape(2, 7 * 16),
            x.sum((0, 2)) + x.mean((0, 2)) + x.amax((0, 2)),
            x.argmax(-1) + ids.cumsum(1),
            mask.any(1),
            *x.topk(3, -1),
            x.softmax(1) * x.abs().sqrt().sin(),
            x.unsqueeze(1).expand(2, 3, 5, 16) + torch.arange(3)[:, None, None],
        ]


def tool(name: str) -> str:
    """A program of the build, from PATH or from beside the interpreter; skips the test without it."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str | Path, timeout: float = 900, code: int = 0, **environment: str) -> str:
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


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function that builds targets with extra CMake definitions and returns their folder."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(*definitions: str, targets: tuple[str, ...]) -> Path:
        folder = folders.setdefault(definitions, tmp_path_factory.mktemp("sqc"))
        ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
        run(
            tool("cmake"),
            "-G",
            "Ninja",
            "-S",
            SOURCE,
            "-B",
            folder,
            ninja,
            "-DSQC_PYTHON=OFF",
            "-DSQC_WERROR=ON",
            *definitions,
        )
        run(tool("cmake"), "--build", folder, "--target", *targets)
        return folder

    return make


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "ids.npy"
    np.save(path, (np.arange(12) % 11).reshape(3, 4))
    return path


def expected() -> np.ndarray:
    result: np.ndarray = np.load(GOLDEN.with_name("golden.npy"))
    return result


def close(result: np.ndarray) -> bool:
    """Within the last bits of exp and the like, which are the C library's own."""
    return bool(np.abs(result - expected()).max() <= 2e-6 * np.abs(expected()).max())


def test_sqrun_runs_a_file_on_arrays(build: Build, ids: Path, tmp_path: Path) -> None:
    sqrun = build("-DSQC_TOOLS=ON", targets=("sqrun",)) / "sqrun"
    info = run(sqrun, GOLDEN, "--info").splitlines()
    assert info[0] == "input  ids: i64[?, ?]" and info[1].startswith("output ")
    name = info[1].removeprefix("output ").split(":")[0]
    run(sqrun, GOLDEN, ids, "--threads", "2", "--out", tmp_path)
    assert close(np.load(tmp_path / f"{name}.npy"))
    (tmp_path / f"{name}.npy").unlink()
    printed = run(sqrun, GOLDEN, f"ids={ids}", "--out", tmp_path, "--repeat", "3", SQCOMPILE_ISA="scalar")
    assert "median of 3 runs" in printed and "scalar" in printed
    assert close(np.load(tmp_path / f"{name}.npy"))


def test_sqrun_says_what_is_wrong(build: Build, ids: Path, tmp_path: Path) -> None:
    sqrun = build("-DSQC_TOOLS=ON", targets=("sqrun",)) / "sqrun"
    cut, wide, wrong = tmp_path / "cut.sqm", tmp_path / "wide.npy", tmp_path / "wrong.npy"
    cut.write_bytes(GOLDEN.read_bytes()[:5000])
    np.save(wide, np.full((1, 3), 11))
    np.save(wrong, np.zeros((1, 3), np.float32))
    cases: list[tuple[list[str | Path], int, str]] = [
        ([], 2, "usage: sqrun"),
        ([GOLDEN, "--threads", "x", ids], 2, "usage: sqrun"),
        ([tmp_path / "none.sqm", ids], 1, "cannot open"),
        ([cut, ids], 1, "the file is damaged: it has 5000 bytes"),
        ([GOLDEN], 1, "0 inputs were given; the model takes 1"),
        ([GOLDEN, tmp_path / "none.npy"], 1, "none.npy: cannot be opened"),
        ([GOLDEN, GOLDEN], 1, "is no .npy file"),
        ([GOLDEN, wrong], 1, "input 'ids' is f32 with 2 dimensions; the model takes i64 with 2"),
        ([GOLDEN, wide], 1, "index 11 is out of range for a dimension of 11"),
        ([GOLDEN, ids, "--out", tmp_path / "missing"], 1, "cannot be written"),
    ]
    for arguments, code, text in cases:
        assert text in run(sqrun, *arguments, code=code)
    assert "no instruction set is called 'avx9'" in run(sqrun, GOLDEN, ids, code=1, SQCOMPILE_ISA="avx9")


def test_the_c_interface_from_c(build: Build, tmp_path: Path) -> None:
    folder = build("-DSQC_TOOLS=ON", targets=("sqcompile",))
    source, client = tmp_path / "client.c", tmp_path / "client"
    source.write_text(CLIENT)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{SOURCE / 'include'}"]
    run(tool("cc"), *flags, source, f"-L{folder}", "-lsqcompile", f"-Wl,-rpath,{folder}", "-o", client)
    *numbers, code, message = run(client, GOLDEN).split(maxsplit=6)
    assert np.isfinite([float(number) for number in numbers]).all() and len(numbers) == 5
    assert (code, message.strip()) == ("1", "2 inputs were given; the model takes 1")
    assert run(client, tmp_path / "none.sqm").startswith("6 cannot open")


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the operators that the golden one does not have."""
    model = Many().eval()
    program = trace(model, (torch.linspace(-2, 2, 160).reshape(2, 5, 16),))
    path = tmp_path_factory.mktemp("model") / "operators.sqm"
    BACKEND.lower(program).save(path)
    return path


def test_mutated_files_under_sanitizers(build: Build, operators: Path) -> None:
    """Opened and run, with right checksums, whatever they say: no crash, no byte read outside."""
    folder = build("-DSQC_TESTS=ON", "-DSQC_SANITIZE=address,undefined", targets=("sqc_fuzz",))
    options = "allocator_may_return_null=1:max_allocation_size_mb=512"
    for path in (GOLDEN, operators):
        printed = run(folder / "sqc_fuzz", path, "20000", ASAN_OPTIONS=options)
        mutations, opened = (int(word) for word in printed.replace(",", "").split() if word.isdigit())
        assert mutations == 20000 and opened > 1000


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this is Arm")
def test_arm_runs_the_same_file(build: Build, ids: Path, tmp_path: Path) -> None:
    emulator = tool("qemu-aarch64")
    folder = build(
        f"-DCMAKE_CXX_COMPILER={tool('aarch64-linux-gnu-g++')}",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        "-DSQC_TOOLS=ON",
        targets=("sqrun",),
    )
    for isa in ("scalar", "neon_dotprod"):
        printed = run(
            emulator, folder / "sqrun", GOLDEN, ids, "--out", tmp_path, "--repeat", "2", SQCOMPILE_ISA=isa
        )
        assert isa in printed
        (path,) = tmp_path.glob("*.npy")
        assert close(np.load(path))
        path.unlink()
