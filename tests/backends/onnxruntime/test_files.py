"""Models in files: whole or not at all, external data, damage, metadata."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sqcompile.backends.onnxruntime import BACKEND
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.errors import BackendError, FileError
from sqcompile.layer_values import LAYERS
from sqcompile.program import Program
from sqcompile.signature import SIGNATURE
from sqcompile.tracing import trace


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    return trace(model.eval(), (torch.randn(2, 32),))


@pytest.fixture
def artifact(program: Program, lower: Callable[[Program], OnnxArtifact]) -> OnnxArtifact:
    return lower(program)


def _check(program: Program, path: Path) -> None:
    x = torch.randn(2, 32)
    torch.testing.assert_close(BACKEND.load(path, threads=1)(x), program(x).detach(), rtol=1e-5, atol=1e-6)


def test_saves_and_loads(program: Program, artifact: OnnxArtifact, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    assert artifact.save(path) == [path]
    assert path.stat().st_size == artifact.size_bytes
    onnx.checker.check_model(path, full_check=True)
    _check(program, path)
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]


def test_large_models_keep_their_tensors_beside_them(
    program: Program, artifact: OnnxArtifact, tmp_path: Path
) -> None:
    artifact.external_above_bytes = 1000
    path = tmp_path / "model.onnx"
    files = artifact.save(path)
    assert files == [path, tmp_path / "model.onnx.data"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 4000 < files[1].stat().st_size
    # the data file pads tensors for alignment, and holds only those of a kilobyte and more
    assert abs(artifact.size_bytes - sum(file.stat().st_size for file in files)) < 400
    onnx.checker.check_model(path, full_check=True)
    _check(program, path)
    bare = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert bare.get_inputs()[0].name
    x = torch.randn(2, 32)
    torch.testing.assert_close(
        BACKEND.load(artifact, threads=1)(x), program(x).detach(), rtol=1e-5, atol=1e-6
    )
    # saving again replaces both, also under another name in another folder
    assert artifact.save(path) == files
    other = artifact.save(tmp_path / "b" / "other.onnx")
    assert [file.name for file in other] == ["other.onnx", "other.onnx.data"]
    _check(program, other[0])


def test_a_missing_data_file_is_reported(artifact: OnnxArtifact, tmp_path: Path) -> None:
    artifact.external_above_bytes = 1000
    path, data = artifact.save(tmp_path / "model.onnx")
    data.unlink()
    with pytest.raises(FileError, match="cannot be loaded") as caught:
        BACKEND.load(path)
    assert caught.value.where == str(path) and ".data" in str(caught.value.expected)


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old file"])
def test_a_full_disk_leaves_nothing_half_written(
    artifact: OnnxArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, old: bool
) -> None:
    path = tmp_path / "model.onnx"
    artifact.external_above_bytes = 1000 if external else 10**9
    if old:
        artifact.save(path)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError) as caught:
        artifact.save(path)
    assert str(path) in str(caught.value.where)
    assert caught.value.seen == "No space left on device" and "room" in str(caught.value.next_step)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_write_error_of_the_system_is_reported(artifact: OnnxArtifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FileError) as caught:
        artifact.save(tmp_path / "file" / "model.onnx")
    assert caught.value.next_step and "choose" in caught.value.next_step


def test_a_damaged_file_is_reported(artifact: OnnxArtifact, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    artifact.save(path)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a model at all"):
        path.write_bytes(content)
        with pytest.raises(FileError) as caught:
            BACKEND.load(path)
        assert caught.value.where == str(path)
    with pytest.raises(FileError, match="cannot be read"):
        BACKEND.load(tmp_path / "none.onnx")


def test_a_model_of_another_tool_is_reported(artifact: OnnxArtifact, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load_from_string(artifact.to_bytes())
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(FileError, match="not written by sqcompile") as caught:
        BACKEND.load(path)
    assert "InferenceSession" in str(caught.value.next_step)


def test_an_artifact_of_another_backend_is_reported(program: Program) -> None:
    from sqcompile.backend import get_backend

    other = get_backend("reference").lower(program)
    with pytest.raises(BackendError, match="another backend"):
        BACKEND.load(other)


def test_a_file_holds_no_traces_of_the_machine(artifact: OnnxArtifact) -> None:
    content = artifact.to_bytes()
    for trace_of in (b"/site-packages/", b"stack_trace", b".py", b"pkg.torch", os.fsencode(Path.home())):
        assert trace_of not in content
    model = onnx.load_from_string(content)
    assert model.producer_name == "sqcompile"
    stated = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert sorted(stated) == sorted([SIGNATURE, LAYERS])
    assert stated[SIGNATURE]["inputs"][0]["shape"] == [2, 32]
    assert stated[LAYERS] == [["0", {"linear": "linear", "relu": "relu"}], ["2", {"linear_1": "output"}]]


def test_models_need_no_newer_runtime_than_they_must(artifact: OnnxArtifact) -> None:
    model = onnx.load_from_string(artifact.to_bytes())
    assert {item.domain: item.version for item in model.opset_import}[""] == 21
    assert model.ir_version <= 10


def test_nodes_are_named_by_the_models_layers(artifact: OnnxArtifact) -> None:
    model = onnx.load_from_string(artifact.to_bytes())
    assert [node.name for node in model.graph.node] == ["0/Gemm", "1/Relu", "2/Gemm"]
    assert {item.name for item in model.graph.initializer} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_equal_programs_make_equal_files(
    program: Program, artifact: OnnxArtifact, lower: Callable[[Program], OnnxArtifact]
) -> None:
    assert lower(program).to_bytes() == artifact.to_bytes()
