"""Whole models: every architecture of the zoo, in floating point and quantized by the real passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.parity import Steps
from support.zoo import ZOO, ZooModel

from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.calibration import Calibration
from sqcompile.passes.canonicalize import FoldBatchNorm
from sqcompile.passes.quantize import (
    Calibrate,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    QuantizeWeights,
)
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], OnnxArtifact]
Load = Callable[[OnnxArtifact], OnnxSession]

# One of each family for every run of the tests; the others when time does not matter.
OFTEN = {"resnet_basic", "mobilenet_v3", "llama", "bert", "t5_encoder", "opt"}
MODELS = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow, id=name) for name in ZOO]

PIPELINES: dict[str, Sequence[Pass]] = {
    "static": (FoldBatchNorm(), InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ()),
    "dynamic": (FoldBatchNorm(), QuantizeWeights(activation=Format.parse("uint8:affine:dynamic"))),
}


def _traced(entry: ZooModel) -> Program:
    return trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)


def _batches(entry: ZooModel, program: Program, count: int) -> list[list[Any]]:
    """Return flat inputs of several calls, of other sizes too where the model takes them."""
    sizes = [(2, 12), (3, 9)] if entry.dynamic_shapes is not None else [(2, 12)]
    calls = [entry.inputs(seed, *sizes[seed % len(sizes)]) for seed in range(count)]
    return [program.signature.bind(*call) for call in calls]


@pytest.mark.parametrize("name", MODELS)
def test_floating_point_models_agree(name: str, lower: Lower, load: Load) -> None:
    entry = ZOO[name]
    program = _traced(entry)
    session = load(lower(program))
    assert [item.name for item in session.inner.get_inputs()] == [
        value.name for value in program.signature.tensor_inputs
    ]
    for inputs in _batches(entry, program, 2):
        for result, expected in zip(session.run(inputs), program.run(inputs), strict=True):
            # float32 in another order of operations, through a few dozen layers
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(result, expected.detach(), rtol=0, atol=2e-6 * max(scale, 1e-3))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_models_agree(name: str, pipeline: str, lower: Lower, load: Load) -> None:
    """At most one step on 99.9 % of all outputs; see `support.parity`."""
    entry = ZOO[name]
    program = _traced(entry)
    calibration = Calibration([entry.inputs(seed) for seed in range(3)], program.signature)
    PassManager(PIPELINES[pipeline]).run(program, PassContext(calibration=calibration))
    session = load(lower(program))
    steps = Steps()
    for inputs in _batches(entry, program, 6):
        steps.add(program, inputs, session.run(inputs))
    assert steps.agree(), steps
