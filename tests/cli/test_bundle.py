from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def artifact(run, folder: Path) -> str:
    result = run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    assert result.code == 0, result.err
    return "net.onnx"


def test_writes_a_bundle(run, folder: Path, artifact: str) -> None:
    result = run("bundle", artifact, "-o", "out", "-d", "x.npz", "--batch", "3", "--runs", "1")
    assert result.code == 0, result.err
    assert "Wrote out/README.md" in result.out and "out/README.md says how to run it." in result.out
    assert "[3, 3, 8, 8]" in (folder / "out" / "README.md").read_text()
    again = run("bundle", artifact, "-o", "out")
    assert again.code == 1 and "is not empty" in again.err
    files = run("bundle", artifact, "-o", "other", "--runs", "1", "--json").json["files"]
    assert {"other/model.onnx", "other/example.py", "other/inputs/image.npy"} <= set(files)


def test_says_what_is_no_artifact(run, folder: Path) -> None:
    result = run("bundle", "net.py:make", "-o", "out")
    assert result.code == 1 and "compile the model first" in result.err
    result = run("bundle", "none.sqm", "-o", "out")
    assert result.code == 1 and "none.sqm" in result.err
    assert not (folder / "out").exists()


def test_names_the_targets(run, folder: Path, artifact: str) -> None:
    result = run("bundle", artifact, "-o", "out", "--target", "aarch64")
    assert result.code == 1 and "did you mean 'aarch64-linux'" in result.err


def test_a_program_needs_pytorch(run, folder: Path) -> None:
    from sqcompile.bundle import write_bundle
    from sqcompile.errors import BackendError

    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.pt2", "--backend", "reference")
    with pytest.raises(BackendError, match="needs PyTorch"):
        write_bundle("net.pt2", "out")
    assert not (folder / "out").exists()
