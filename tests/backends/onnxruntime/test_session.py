"""Loaded models: calls, structures, names, threads, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from support.programs import TwoInputs
from torch import nn
from torch.export import Dim

import sqcompile
from sqcompile.backends.onnxruntime import BACKEND
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.errors import BackendError, InputError
from sqcompile.program import Program
from sqcompile.tracing import trace

Lower = Callable[[Program], OnnxArtifact]
Load = Callable[[OnnxArtifact], OnnxSession]


@dataclass
class Case:
    program: Program
    session: OnnxSession


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def case(lower: Lower, load: Load) -> Case:
    torch.manual_seed(0)
    program = trace(Scorer().eval(), (torch.randn(2, 8),), dynamic_shapes={"x": {0: Dim("rows", max=16)}})
    return Case(program, load(lower(program)))


def test_is_called_as_the_model_is(case: Case) -> None:
    x = torch.randn(5, 8)
    expected = case.program(x)
    for result in (case.session(x), case.session(x=x)):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-6)


def test_keeps_dynamic_dimensions_and_names(case: Case) -> None:
    (given,) = case.session.inner.get_inputs()
    (made,) = case.session.inner.get_outputs()
    assert (given.name, given.shape) == ("x", ["rows", 8])
    assert (made.name, made.shape) == ("output", ["rows", 4])
    for rows in (1, 3, 16):
        assert case.session(torch.randn(rows, 8)).shape == (rows, 4)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(2, 9), "wrong size"),
        (torch.zeros(2, 8, 1), "dimensions"),
        (torch.zeros(2, 8, dtype=torch.float64), "type"),
        (torch.zeros(17, 8), "rows"),
    ],
)
def test_rejects_wrong_inputs_before_the_runtime_sees_them(case: Case, x: torch.Tensor, what: str) -> None:
    with pytest.raises(InputError, match=what):
        case.session(x)


def test_a_failing_runtime_is_reported(case: Case) -> None:
    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError("out of memory\nat some address")

    session = copy.copy(case.session)
    session.inner = Broken()
    with pytest.raises(BackendError) as caught:
        session(torch.zeros(1, 8))
    assert caught.value.seen == "RuntimeError: out of memory"
    assert caught.value.next_step


def test_returns_the_models_own_structure(lower: Lower, load: Load) -> None:
    x = torch.randn(2, 4)
    pair = {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    program = trace(TwoInputs(), (x, pair))
    result = load(lower(program))(x, pair)
    assert set(result) == {"total", "parts"} and isinstance(result["parts"], tuple)
    torch.testing.assert_close(result["total"], x * 2 + pair["left"])
    torch.testing.assert_close(result["parts"][0], pair["right"])


class Odd(nn.Module):
    """Outputs that are inputs, stored tensors, constants, and the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        y = x + self.table
        return x, self.table, y, y, None, 7


def test_outputs_may_be_anything(lower: Lower, load: Load) -> None:
    x = torch.randn(2, 3)
    program = trace(Odd(), (x,))
    given, table, first, second, nothing, number = load(lower(program))(x)
    assert torch.equal(given, x) and torch.equal(table, torch.arange(3.0))
    torch.testing.assert_close(first, x + table)
    assert torch.equal(first, second) and nothing is None and number == 7


class Renamed(nn.Module):
    """Names that the exporter might give to values of its own."""

    def forward(self, linear: torch.Tensor, add: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"linear": linear * add, "val_0": (linear + add) * 2, "mul": linear - 1}


def test_names_do_not_collide(lower: Lower, load: Load) -> None:
    inputs = torch.randn(2), torch.randn(2)
    program = trace(Renamed(), inputs)
    artifact = lower(program)
    expected = program(*inputs)
    result = load(artifact)(*inputs)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    names = [value.name for value in artifact.model.graph.inputs]
    names += [value.name for value in artifact.model.graph.outputs]
    assert names == ["linear", "add", "linear_1", "val_0", "mul"]


class Types(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, small: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ids + 1, ~mask, small * 2, ids.to(torch.float16)


def test_types_of_inputs_and_outputs_are_kept(lower: Lower, load: Load) -> None:
    inputs = torch.arange(4), torch.tensor([True, False]), torch.ones(2, dtype=torch.int32)
    program = trace(Types(), inputs)
    results = load(lower(program))(*inputs)
    for result, expected in zip(results, program(*inputs), strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected)


@pytest.mark.parametrize("loaded", ["artifact", "file"])
def test_a_recurrent_model_refuses_no_data(loaded: str, tmp_path: Path) -> None:
    """ONNX Runtime would end the process; models of other operators answer with nothing."""
    compiled = {
        kind: sqcompile.compile(
            kind(4, 4, **({"batch_first": True} if kind is nn.LSTM else {})),
            example_inputs=(torch.zeros(2, 3, 4),),
            dynamic_shapes=({0: "batch"},),
            backend="onnxruntime",
        )
        for kind in (nn.LSTM, nn.Linear)
    }
    sessions = {}
    for kind, item in compiled.items():
        sessions[kind] = item.session
        if loaded == "file":
            item.save(tmp_path / f"{kind.__name__}.onnx")
            sessions[kind] = sqcompile.load(tmp_path / f"{kind.__name__}.onnx")
    with pytest.raises(InputError, match="LSTM, GRU and RNN on no data") as caught:
        sessions[nn.LSTM](torch.zeros(0, 3, 4))
    assert caught.value.where == "input 'input'" and caught.value.seen == "sizes [0, 3, 4]"
    assert sessions[nn.Linear](torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert sessions[nn.LSTM](torch.zeros(1, 3, 4))[0].shape == (1, 3, 4)


def test_inputs_of_any_layout(case: Case) -> None:
    x = torch.randn(8, 4).t()
    torch.testing.assert_close(case.session(x), case.session(x.contiguous()))
    torch.testing.assert_close(case.session(np.ones((2, 8), np.float32)), case.session(torch.ones(2, 8)))


def test_threads(case: Case, lower: Lower) -> None:
    artifact = lower(case.program)
    session = BACKEND.load(artifact, threads=2)
    assert isinstance(session, OnnxSession)
    assert session.inner.get_session_options().intra_op_num_threads == 2
    x = torch.randn(3, 8)
    torch.testing.assert_close(session(x), case.session(x))
    with pytest.raises(BackendError, match="so many threads"):
        BACKEND.load(artifact, threads=0)


def test_a_bare_runtime_loads_the_model(case: Case, lower: Lower) -> None:
    x = torch.randn(3, 8)
    bare = onnxruntime.InferenceSession(lower(case.program).to_bytes(), providers=["CPUExecutionProvider"])
    (result,) = bare.run(["output"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), case.session(x))


@pytest.mark.parametrize("counted", [False, True], ids=["range", "counted"])
def test_positions_that_a_model_has_not_are_wrong_inputs(lower: Lower, counted: bool) -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ones = torch.ones_like(x[:, 0], dtype=torch.int64)
            return x + self.table(ones.cumsum(0) - 1 if counted else torch.arange(x.shape[0]))

    program = trace(Places(), (torch.zeros(3, 3),), dynamic_shapes={"x": {0: torch.export.Dim("length")}})
    session = BACKEND.load(lower(program), threads=1)
    assert session(torch.zeros(4, 3)).shape == (4, 3)
    with pytest.raises(InputError, match="no longer than the model takes"):
        session(torch.zeros(5, 3))
