"""Bundles for ONNX Runtime: the examples run without sqcompile, and say when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.api import Compiled
from sqcompile.bundle import write_bundle
from sqcompile.errors import FileError
from sqcompile.passes import pipelines

ALONE = """
import runpy, sys
sys.argv = ["example.py"]
try:
    runpy.run_path("example.py", run_name="__main__")
finally:
    assert not {"sqcompile", "torch"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    images = torch.randn(8, 3, 8, 8)
    made = sqcompile.compile(
        net, pipelines.int8_static(), (images,), calibration=[images], backend="onnxruntime",
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert isinstance(made, Compiled)
    return made


@pytest.fixture
def bundle(compiled: Compiled, tmp_path: Path) -> Path:
    compiled.save(tmp_path / "net.onnx")
    write_bundle(tmp_path / "net.onnx", tmp_path / "bundle", threads=2, runs=2)
    return tmp_path / "bundle"


def run_alone(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the example isolated, in its folder; neither sqcompile nor PyTorch may be imported."""
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PATH": os.defpath},
    )


def test_the_python_example_runs_alone(bundle: Path) -> None:
    done = run_alone(bundle)
    assert done.returncode == 0, done.stderr
    # The same runtime, options and inputs: the same bits.
    assert "[2, 5], at most 0 from what was expected" in done.stdout
    text = (bundle / "README.md").read_text()
    assert "| input | `input` | `f32[batch, 3, 8, 8]` | [2, 3, 8, 8] |" in text and "| threads | 2 |" in text
    options = json.loads((bundle / "session_options.json").read_text())
    assert options["intra_op_num_threads"] == 2 and options["graph_optimization_level"] == 99
    model = onnx.load(bundle / "model.onnx")
    assert [item.name for item in model.graph.input] == [path.stem for path in (bundle / "inputs").iterdir()]


def test_the_python_example_tells_a_wrong_output(bundle: Path) -> None:
    (path,) = (bundle / "expected").iterdir()
    expected = np.load(path)
    np.save(path, expected + 0.02 * np.abs(expected).max())
    assert run_alone(bundle).returncode == 1
    np.save(path, expected[:1])
    done = run_alone(bundle)
    assert done.returncode == 1 and "where [1, 5] was expected" in done.stdout


def test_data_beside_the_model_comes_along(compiled: Compiled, tmp_path: Path) -> None:
    artifact = compiled.backend.lower(compiled.program)
    artifact.external_above_bytes = 0  # type: ignore[attr-defined]
    assert len(artifact.save(tmp_path / "large.onnx")) == 2
    files = write_bundle(tmp_path / "large.onnx", tmp_path / "bundle", runs=1)
    assert {path.name for path in files} >= {"model.onnx", "large.onnx.data"}
    (tmp_path / "large.onnx.data").unlink()
    assert run_alone(tmp_path / "bundle").returncode == 0


def test_a_bundle_for_another_machine_has_no_times(compiled: Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.onnx")
    import platform

    other = "x86_64-linux" if platform.machine() == "aarch64" else "aarch64-linux"
    write_bundle(tmp_path / "net.onnx", tmp_path / "bundle", target=other)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert "not measured" in text and "| CPU |" not in text
    assert run_alone(tmp_path / "bundle").returncode == 0  # the files run anywhere


def test_figures_of_the_report_are_in_the_readme(compiled: Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "saved")
    write_bundle(tmp_path / "saved" / "model.onnx", tmp_path / "bundle", runs=1)
    text = (tmp_path / "bundle" / "README.md").read_text()
    assert re.search(r"\| outputs \| [\d.]+ dB SQNR against the dense model", text)


def test_a_damaged_model(tmp_path: Path, compiled: Compiled) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(FileError):
        write_bundle(tmp_path / "net.onnx", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def headers() -> Path | None:
    """ONNX Runtime's headers and library, as its archives and Debian's package have them."""
    roots = [os.environ.get("ORT", ""), "/usr", "/usr/local"]
    for root in filter(None, roots):
        for path in (Path(root, "include"), Path(root, "include", "onnxruntime")):
            if (path / "onnxruntime_cxx_api.h").is_file():
                return path
    return None


@pytest.mark.slow
def test_the_cpp_example_runs(bundle: Path) -> None:
    folder, compiler = headers(), shutil.which("c++")
    if folder is None or compiler is None:
        pytest.skip("needs a C++ compiler and ONNX Runtime's C++ archive (ORT=its folder)")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-I", str(folder), "-L", str(folder.parent / "lib")]
    command = [compiler, "example.cc", "-o", "example", *flags, "-lonnxruntime"]
    built = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    def run() -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(folder.parent / "lib")}
        return subprocess.run(["./example"], cwd=bundle, capture_output=True, text=True, env=environment)

    done = run()
    # Another version of the runtime may fuse, and so round, otherwise: the example judges.
    assert done.returncode == 0 and "10 values, at most" in done.stdout, done.stdout + done.stderr
    (path,) = (bundle / "expected").iterdir()
    np.save(path, np.load(path) * 2)
    assert run().returncode == 1
