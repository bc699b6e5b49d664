"""Helpers of these tests: programs with chosen formats, and a look at what ONNX Runtime makes of a model."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import fx

from sqcompile.backends.onnxruntime import BACKEND
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.levels import Level
from sqcompile.operators.table import argument, data_arguments, operator_of
from sqcompile.program import Program
from sqcompile.quantization import affine
from sqcompile.quantization.format import Format, PerChannel
from sqcompile.rewrite import Rewriter

sq = torch.ops.sqcompile


class Quantizer:
    """Makes QDQ programs without the passes, so that a backend test fails for the backend's reasons only."""

    def weights(self, program: Program, text: str, kinds: Sequence[str] = ()) -> Program:
        """Store the weights of layers as codes of a format."""
        edit = Rewriter(program)
        stored: dict[fx.Node, fx.Node] = {}
        for node in list(program.graph.nodes):
            entry = operator_of(node)
            if entry is None or entry.weight is None or (kinds and entry.kind not in kinds):
                continue
            weight = argument(node, entry.weight)
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                if weight not in stored:
                    with edit.before(node):
                        stored[weight] = _store(edit, weight, Format.parse(text), entry.out_axis)
                node.replace_input_with(weight, stored[weight])
        edit.finish()
        program.level = Level.QDQ
        return program

    def activations(
        self,
        program: Program,
        text: str,
        inputs: Sequence[Any],
        *,
        kinds: Sequence[str],
        outputs: bool = False,
    ) -> Program:
        """Quantize what operators of these kinds take and, if asked for, what they return."""
        format = Format.parse(text)
        ranges = _values(program, inputs)
        edit = Rewriter(program)
        done: dict[fx.Node, fx.Node] = {}

        def quantized(value: fx.Node) -> fx.Node:
            if value not in done:
                done[value] = _quantize(edit, value, format, ranges)
            return done[value]

        for node in list(program.graph.nodes):
            entry = operator_of(node)
            if entry is None or entry.kind not in kinds:
                continue
            for value in data_arguments(node):
                if value.op != "get_attr" and value.target is not sq.dequantize.default:
                    node.replace_input_with(value, quantized(value))
            result = _fused_result(node)
            if outputs and result not in done:
                users = list(result.users)
                replacement = quantized(result)
                for user in users:
                    user.replace_input_with(result, replacement)
        edit.finish()
        program.level = Level.QDQ
        return program


def _store(edit: Rewriter, weight: fx.Node, format: Format, out_axis: int) -> fx.Node:
    """Return the dequantization of a weight's codes."""
    values = edit.program.tensor(weight).detach()
    axis, group_size = format.granularity.pair
    if isinstance(format.granularity, PerChannel):
        axis = out_axis % values.dim()
        format = Format(format.bits, format.signed, format.symmetric, PerChannel(axis))
    scale, zero_point = affine.scale_for_tensor(values, format)
    codes = affine.quantize(
        values, scale, zero_point, axis, group_size, format.qmin, format.qmax, format.storage_dtype
    )
    name = str(weight.target)
    return edit.call(
        sq.dequantize.default,
        edit.constant(f"{name}_codes", codes, like=weight),
        edit.constant(f"{name}_scale", scale.contiguous(), like=weight),
        edit.constant(f"{name}_zero_point", zero_point.contiguous(), like=weight),
        axis,
        group_size,
        format.qmin,
        format.qmax,
        like=weight,
    )


def _quantize(edit: Rewriter, value: fx.Node, format: Format, ranges: dict[fx.Node, Any]) -> fx.Node:
    axis, group_size = format.granularity.pair
    limits = (axis, group_size, format.qmin, format.qmax)
    with edit.after(value):
        if format.dynamic:
            pair = edit.call(sq.dynamic_scale.default, value, *limits, format.symmetric, like=value)
            scale, zero_point = (edit.call(operator.getitem, pair, index, like=value) for index in range(2))
        else:
            parameters = affine.scale_for_tensor(ranges[value], format)
            scale, zero_point = (
                edit.constant(f"{value.name}_{kind}", item.contiguous())
                for kind, item in zip(("scale", "zero_point"), parameters, strict=True)
            )
        codes = edit.call(sq.quantize.default, value, scale, zero_point, *limits, like=value)
        return edit.call(sq.dequantize.default, codes, scale, zero_point, *limits, like=value)


def _fused_result(node: fx.Node) -> fx.Node:
    users = list(node.users)
    entry = operator_of(users[0]) if len(users) == 1 else None
    return users[0] if entry is not None and entry.activation else node


def _values(program: Program, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Recorder(program.graph_module).run(*inputs)
    return found


def _lower(program: Program) -> OnnxArtifact:
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, OnnxArtifact)
    onnx.checker.check_model(artifact.to_bytes(), full_check=True)
    return artifact


def _load(source: OnnxArtifact | Path) -> OnnxSession:
    session = BACKEND.load(source, threads=1)
    assert isinstance(session, OnnxSession)
    return session


@pytest.fixture(scope="session")
def quantizer() -> Quantizer:
    """Makes QDQ programs."""
    return Quantizer()


@pytest.fixture(scope="session")
def lower() -> Callable[[Program], OnnxArtifact]:
    """Lowers a program, and has onnx check the model."""
    return _lower


@pytest.fixture(scope="session")
def load() -> Callable[[OnnxArtifact | Path], OnnxSession]:
    """Loads an artifact or a file."""
    return _load


@pytest.fixture
def optimized(tmp_path: Path) -> Callable[[OnnxArtifact], Counter[str]]:
    """Counts the operators that ONNX Runtime really runs, after all its fusions."""

    def count(artifact: OnnxArtifact) -> Counter[str]:
        path = tmp_path / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(artifact.to_bytes(), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(path).graph.node)

    return count


@pytest.fixture(scope="session")
def worst_step() -> Callable[[Sequence[Any], Sequence[Any]], float]:
    """Measures the largest difference of two lists of tensors in steps."""
    return _worst_step


def _worst_step(results: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference in steps of 1/255 of each output's range."""
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        step = (wanted.max() - wanted.min()).clamp(min=1e-30) / 255
        worst = max(worst, float((result - wanted).abs().max() / step))
    return worst
