"""Helpers of these tests: programs lowered to the engine, and compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native_build import build
from torch import Tensor, nn

from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.session import NativeSession
from sqcompile.program import Program
from sqcompile.tracing import trace


class Apply(nn.Module):
    """A function of values, with layers that it may use."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _lower(program: Program) -> NativeArtifact:
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, NativeArtifact)
    return artifact


def _load(artifact: Any, threads: int = 2) -> NativeSession:
    session = BACKEND.load(artifact, threads=threads)
    assert isinstance(session, NativeSession)
    return session


def _compare(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    *others: Sequence[Tensor],
    rtol: float = 1e-6,
    dynamic: Any = None,
    **layers: nn.Module,
) -> NativeSession:
    program = trace(Apply(function, **layers).eval(), tuple(inputs), dynamic_shapes=dynamic)
    session = _load(_lower(program))
    for call in (inputs, *others):
        expected = program.run(list(call))
        for place, (result, wanted) in enumerate(zip(session.run(list(call)), expected, strict=True)):
            scale = (
                float(wanted.detach().abs().max()) if wanted.is_floating_point() and wanted.numel() else 0.0
            )
            torch.testing.assert_close(
                result,
                wanted.detach(),
                rtol=rtol,
                atol=rtol * (scale if torch.isfinite(torch.tensor(scale)) else 1.0),
                equal_nan=True,
                msg=lambda text, place=place: f"result {place}: {text}",
            )
    return session


@pytest.fixture(scope="session")
def lower() -> Callable[[Program], NativeArtifact]:
    """Lowers a program."""
    return _lower


@pytest.fixture(scope="session")
def load() -> Callable[..., NativeSession]:
    """Loads an artifact or a file, with two threads unless told otherwise."""
    return _load


@pytest.fixture(scope="session")
def compare() -> Callable[..., NativeSession]:
    """Runs a function in the engine and in PyTorch: within `rtol` of each result's largest value."""
    return _compare


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a build of the C++ sources, by name; see `support.native_build`."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if root.name.startswith("popen-") else root  # one for all processes of a run
    return lambda name: build(name, root)
