"""The reference backend: the program itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.programs import conv_net, data, mlp

from sqcompile.backend import Artifact, Backend, Session, backend_names, get_backend
from sqcompile.backends.reference import BACKEND, ReferenceArtifact
from sqcompile.errors import BackendError, FileError, InputError, UnsupportedError
from sqcompile.program import Program


def test_runs_the_program(tmp_path: Path) -> None:
    program = conv_net()
    x = data(2, 3, 6, 6)
    artifact = BACKEND.lower(program)
    (path,) = artifact.save(tmp_path / "model.pt2")
    for session in (BACKEND.load(artifact), BACKEND.load(path), BACKEND.load(artifact, threads=1)):
        assert isinstance(session, Session)
        assert torch.equal(session(x), program(x)) and torch.equal(session(x=x), program(x))
        assert not session(x).requires_grad and session.signature == program.signature
        assert torch.equal(session.run([x])[0], program(x))


def test_supports_everything() -> None:
    program = conv_net()
    assert BACKEND.unsupported(program) == [] and BACKEND.require_support(program) is None


def test_an_artifact_does_not_follow_the_program() -> None:
    program = mlp()
    artifact = BACKEND.lower(program)
    expected = program(data(2, 8))
    program.set_tensor("first.weight", torch.zeros(16, 8))
    assert torch.equal(BACKEND.load(artifact)(data(2, 8)), expected)
    assert artifact.size_bytes == 4 * 212 and artifact.suffix == ".pt2" and list(artifact.notes) == []


def test_refuses_inputs_that_do_not_fit() -> None:
    session = BACKEND.load(BACKEND.lower(mlp()))
    for bad in (data(2, 9), data(2, 8).double(), None):
        with pytest.raises(InputError):
            session(bad)


def test_layers_cannot_be_timed() -> None:
    assert BACKEND.load(BACKEND.lower(mlp())).profile([data(2, 8)], {"first": 1}) == {}


class Other(Artifact):
    suffix = ".other"

    @property
    def size_bytes(self) -> int:
        return 0

    def save(self, path: Path) -> list[Path]:
        return []


def test_other_artifacts(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="programs only") as caught:
        BACKEND.load(Other())
    error = caught.value
    assert error.where and error.seen == "Other" and error.expected and error.next_step
    with pytest.raises(FileError):
        BACKEND.load(tmp_path / "missing.pt2")


class TestFinding:
    def test_by_name(self) -> None:
        assert get_backend("reference") is BACKEND and "reference" in backend_names()
        assert isinstance(BACKEND.lower(mlp()), ReferenceArtifact)

    def test_unknown(self) -> None:
        with pytest.raises(BackendError) as caught:
            get_backend("refrence")
        error = caught.value
        assert "'reference'" in str(error.next_step) and "auto" in str(error.expected) and error.where

    def test_whose_runtime_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sqcompile import backend

        monkeypatch.setitem(backend._BACKENDS, "broken", "sqcompile.backends.no_such_backend")
        with pytest.raises(BackendError, match="cannot be loaded") as caught:
            get_backend("broken")
        assert "no_such_backend" in str(caught.value.seen) and caught.value.next_step


class Picky(Backend):
    """Runs linear layers only."""

    name = "picky"

    def supports(self, program: Program, node: torch.fx.Node) -> str | None:
        return None if "linear" in node.name else "it is not linear"

    def lower(self, program: Program) -> Artifact:
        self.require_support(program)
        return Other()

    def load(self, source: Artifact | Path, *, threads: int | None = None) -> Session:
        raise NotImplementedError


def test_every_unsupported_operator_is_listed_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        Picky().lower(conv_net())
    error = caught.value
    assert error.what == "The picky backend cannot run 6 of the program's operators."
    assert error.seen == "add, conv2d, conv_transpose2d.input, mean.dim, relu"
    for part in ("conv2d at node %conv2d (stem, programs.py:", "it is not linear", "%mean"):
        assert part in str(error.where)
    assert error.next_step
    assert [node.name for node, _ in Picky().unsupported(mlp())] == ["relu"]


def test_threads_are_checked_here_too() -> None:
    with pytest.raises(BackendError, match="so many threads"):
        BACKEND.load(BACKEND.lower(mlp()), threads=0)
