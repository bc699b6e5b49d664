"""Whole models: every transformer and CNN of the zoo, in floating point and quantized by the real passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.machines import machine
from support.parity import Steps
from support.zoo import ZOO, ZooModel

from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.lower import context
from sqcompile.backends.native.session import NativeSession
from sqcompile.calibration import Calibration
from sqcompile.passes.pipelines import int8_static
from sqcompile.passes.prune import ApplyMasks, MaskWeights
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

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

# One of each family for every run of the tests; the others when time does not matter.
OFTEN = {"llama", "bert", "t5_encoder", "opt", "clip_vision", "resnet_bottleneck", "mobilenet_v3", "unet"}
TRANSFORMERS = {"encoder", "decoder", "vision", "audio", "mlp"}
CNNS = {"cnn"}


def _models(often: set[str], families: set[str] = TRANSFORMERS) -> list[Any]:
    names = [name for name, entry in ZOO.items() if entry.family in families]
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow, id=name) for name in names]


PIPELINES: dict[str, tuple[Sequence[Pass], str]] = {
    "static": ((InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ()), "linear_q8"),
    "dynamic": ((QuantizeWeights(activation=Format.parse("uint8:affine:dynamic")),), "linear_q8"),
    "token": ((QuantizeWeights(activation=Format.parse("int8:token:dynamic")),), "linear_q8"),
    "masked": (
        (
            MaskWeights(sparsity=0.5),
            ApplyMasks(),
            QuantizeWeights(activation=Format.parse("uint8:affine:token:dynamic")),
        ),
        "linear_q8_sparse",
    ),
    "blocks": (
        (
            MaskWeights(sparsity=0.6, pattern="1x4"),
            ApplyMasks(),
            QuantizeWeights(activation=Format.parse("uint8:affine:dynamic")),
        ),
        "linear_q8_block",
    ),
}

# Forms of weights that are faster than others on the machine of the test, so that they are chosen.
FAST = {"masked": {"int8__bitmask": 10.0}, "blocks": {"int8_in_1x4_blocks": 10.0}}


def _traced(entry: ZooModel) -> Program:
    return trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)


def _batches(entry: ZooModel, program: Program, count: int) -> list[list[Any]]:
    """Return flat inputs of several calls, of other sizes too where the model takes them."""
    sizes = [(2, 12), (3, 9)] if entry.dynamic_shapes is not None else [(2, 12)]
    calls = [entry.inputs(seed, *sizes[seed % len(sizes)]) for seed in range(count)]
    return [program.signature.bind(*call) for call in calls]


def _quantized(entry: ZooModel, passes: Sequence[Pass]) -> Program:
    program = _traced(entry)
    calibration = Calibration([entry.inputs(seed) for seed in range(3)], program.signature)
    PassManager(passes).run(program, PassContext(calibration=calibration))
    return program


def _steps(session: NativeSession) -> Counter[str]:
    return Counter(name for name, _ in session.model.steps)


@pytest.mark.parametrize("name", _models(OFTEN, TRANSFORMERS | CNNS))
def test_floating_point_models_agree(name: str, lower: Lower, load: Load) -> None:
    entry = ZOO[name]
    program = _traced(entry)
    session = load(lower(program))
    for inputs in _batches(entry, program, 2):
        for result, expected in zip(session.run(inputs), program.run(inputs), strict=True):
            # float32 in another order of operations, through a few dozen layers
            scale = float(expected.detach().abs().max())
            torch.testing.assert_close(result, expected.detach(), rtol=0, atol=2e-6 * max(scale, 1e-3))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", _models({"llama"}))
def test_quantized_models_agree(
    name: str, pipeline: str, lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes and integer products are exact: at most one step on 99.9 % of all outputs; see `support.parity`."""
    entry = ZOO[name]
    passes, operator = PIPELINES[pipeline]
    program = _quantized(entry, passes)
    times = machine(**FAST.get(pipeline, {}))
    monkeypatch.setattr(context, "kernel_times", lambda: (times, ""))
    session = load(lower(program))
    assert _steps(session)[operator] >= 2
    steps = Steps()
    for inputs in _batches(entry, program, 6):
        steps.add(program, inputs, session.run(inputs))
    assert steps.agree(), steps


@pytest.mark.parametrize("name", _models({"resnet_bottleneck", "unet", "shufflenet_v2"}, CNNS))
def test_quantized_cnns_agree(name: str, lower: Lower, load: Load) -> None:
    """Every convolution is one of codes, and what is around them agrees as above."""
    entry = ZOO[name]
    program = _quantized(entry, int8_static())
    session = load(lower(program))
    steps = _steps(session)
    assert steps["conv_q8"] >= 2
    assert not steps["conv"] and not steps["conv_depthwise"]
    agreement = Steps()
    for inputs in _batches(entry, program, 6):
        agreement.add(program, inputs, session.run(inputs))
    assert agreement.agree(), agreement


@pytest.mark.parametrize(
    ("text", "sparsity", "operator"),
    [
        ("int8:channel=0:narrow", 0.0, "linear_q8"),
        ("int4:group=32", 0.0, "linear_q4"),
        ("int4:group=32", 0.6, "linear_q4_sparse"),
        ("uint4:group=32:affine", 0.0, "linear_q4"),
        ("int4:channel=0", 0.0, "linear_q4"),
        ("int3:group=32", 0.0, "linear_q4"),
        ("int2:group=64", 0.0, "linear_q4"),
    ],
)
def test_weights_alone(text: str, sparsity: float, operator: str, lower: Lower, load: Load) -> None:
    """Activations are rounded to 8 bits on the way in: the error of that, and no more.

    One row's rounding moves a product of random values by about 0.5 / 127 of its size times 1/√3; through two
    layers of each model that stays below 5 % of the largest output, where the weights' own error is over 30 %.
    """
    entry = ZOO["llama"]
    passes: list[Pass] = [MaskWeights(sparsity=sparsity), ApplyMasks()] if sparsity else []
    program = _quantized(entry, [*passes, QuantizeWeights(weight=Format.parse(text))])
    session = load(lower(program))
    steps = _steps(session)
    # Fifteen layers: q, k and v of each block are one product where they have one form, so are gate and up. Of
    # few codes many are zero without any mask, which may be reason enough for a sparse form.
    products = steps[operator] + (0 if sparsity else steps["linear_q4_sparse"])
    assert products == 9 if sparsity or not steps["linear_q4_sparse"] else 9 <= products <= 15
    for inputs in _batches(entry, program, 2):
        for result, expected in zip(session.run(inputs), program.run(inputs), strict=True):
            difference = (result - expected.detach()).norm() / expected.detach().norm()
            assert float(difference) < 0.05


def test_a_format_without_kernel_is_multiplied_in_float_and_said(lower: Lower, load: Load) -> None:
    entry = ZOO["llama"]
    program = _quantized(entry, [QuantizeWeights(weight=Format.parse("int4:group=16"))])
    artifact = lower(program)
    assert sum("no integer kernel has its format" in note for note in artifact.notes) == 15
    session = load(artifact)
    assert _steps(session)["linear"] == 9  # q, k and v are one, and so are gate and up
    inputs = _batches(entry, program, 1)[0]
    expected = program.run(inputs)[0].detach()
    torch.testing.assert_close(
        session.run(inputs)[0], expected, rtol=0, atol=2e-6 * float(expected.abs().max())
    )


def test_threads_and_instruction_sets_do_not_change_integer_layers(lower: Lower, load: Load) -> None:
    entry = ZOO["bert"]
    program = _quantized(entry, PIPELINES["static"][0])
    artifact = lower(program)
    inputs = _batches(entry, program, 1)[0]
    results = [load(artifact, threads).run(inputs)[0] for threads in (1, 2, 3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_everything_unsupported_is_listed_at_once(lower: Lower) -> None:
    from sqcompile.errors import UnsupportedError

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.lgamma().digamma().atan().erfinv().asinh().cumprod(0)

    program = trace(Model(), (torch.rand(3, 4),))
    found = BACKEND.unsupported(program)
    assert len(found) == 6
    with pytest.raises(UnsupportedError) as error:
        lower(program)
    assert all(node.name in str(error.value) for node, _ in found)
