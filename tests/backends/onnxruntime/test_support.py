"""What the backend cannot run is said at once, with places and reasons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sqcompile import compile
from sqcompile.backends.onnxruntime import BACKEND
from sqcompile.errors import BackendError, UnsupportedError
from sqcompile.levels import Level
from sqcompile.tracing import trace

_LIBRARY = torch.library.Library("sqcompile_test_ort", "FRAGMENT")
_LIBRARY.define("unknown(Tensor x) -> Tensor")
_LIBRARY.impl("unknown", lambda x: x + 1, "CompositeExplicitAutograd")
_LIBRARY.impl("unknown", lambda x: torch.empty_like(x), "Meta")


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.sqcompile_test_ort.unknown(x)  # first
        return torch.fft.rfft(y).abs() + 1


def test_every_unsupported_operator_is_listed() -> None:
    program = trace(Unknown(), (torch.randn(2, 8),))
    with pytest.raises(UnsupportedError) as caught:
        BACKEND.lower(program)
    text = str(caught.value)
    assert "unknown" in text and "neither a translation to ONNX nor a decomposition" in text
    assert "fft" in text and "complex" in text
    assert "test_support.py" in text
    assert caught.value.next_step is not None
    assert "backend='reference'" in caught.value.next_step and "native" not in caught.value.next_step


def test_observers_are_unsupported() -> None:
    class Observed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.sqcompile.observe(x, "x")

    program = trace(nn.Identity(), (torch.randn(2),))
    program = trace(Observed(), (torch.randn(2),))
    program.level = Level.OBSERVED
    with pytest.raises(UnsupportedError, match="cannot run") as caught:
        BACKEND.lower(program)
    assert caught.value.next_step is not None
    assert "calibrate and freeze-observers" in caught.value.next_step


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_types_that_the_runtime_has_no_kernels_of(kind: torch.dtype) -> None:
    """It would say so itself, when the file is loaded: a node's number, and nothing to do about it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    x = torch.randn(2, 1, 5, 5)
    with pytest.raises(UnsupportedError, match=r"model\.float\(\)") as caught:
        BACKEND.lower(trace(model.to(kind), (x.to(kind),)))
    assert caught.value.next_step is not None
    assert "float32" in caught.value.next_step
    assert compile(model, (), x.to(kind)).report.backend == "reference"
    assert BACKEND.unsupported(trace(model.float(), (x,))) == []


def test_supported_programs_have_nothing_to_list() -> None:
    program = trace(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU()).eval(), (torch.randn(1, 1, 5, 5),)
    )
    assert BACKEND.unsupported(program) == []


def test_a_failing_exporter_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqcompile.backends.onnxruntime import translations

    def broken(x: object) -> object:
        raise ValueError("no such thing")

    monkeypatch.setitem(translations.TABLE, torch.ops.sqcompile_ort.global_average_pool.default, broken)
    program = trace(nn.AdaptiveAvgPool2d(1), (torch.randn(1, 2, 4, 4),))
    with pytest.raises(BackendError, match="cannot be exported") as caught:
        BACKEND.lower(program)
    assert caught.value.where == "node %global_average_pool, sqcompile_ort.global_average_pool.default"
    assert caught.value.seen == "ValueError: no such thing"


class Sized(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


def test_a_computed_number_as_result_is_reported() -> None:
    program = trace(Sized(), (torch.randn(3, 2),), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    with pytest.raises(BackendError, match="number") as caught:
        BACKEND.lower(program)
    assert "output_1" in str(caught.value.where)
