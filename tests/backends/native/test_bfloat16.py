"""Models in bfloat16: weights stored so, everything computed in float32 without rounding in between."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn

from sqcompile.backends.native import kernels
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.session import NativeSession
from sqcompile.program import Program
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

ULP = 2.0**-8
"""Of bfloat16: it has 8 bits of mantissa, one of them implied."""


def traced(name: str) -> tuple[Program, Program]:
    """A model in bfloat16, and the model of the same weights that computes in float32."""
    entry = ZOO[name]
    model = entry.make().to(torch.bfloat16)
    halves = trace(model, entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
    floats = copy.deepcopy(model).float()
    return halves, trace(floats, entry.inputs(), dynamic_shapes=entry.dynamic_shapes)


def near(result: Tensor, expected: Tensor, bound: float) -> None:
    assert float((result.float() - expected).norm()) < bound * float(expected.norm())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_weights_stay_and_computation_is_float32(name: str, lower: Lower, load: Load) -> None:
    program, floats = traced(name)
    artifact = lower(program)
    weights = [step.inputs[1] for step in artifact.plan.steps if step.operator == "linear"]
    assert weights and all(value is not None and value.dtype == "bf16" for value in weights)
    large = [value for value in artifact.plan.values if value.kind == "constant" and value.rank == 2]
    assert {value.dtype for value in large if value.shape[0] > 64} <= {"bf16", "boolean"}
    session = load(artifact)
    for seed in range(2):
        inputs = program.signature.bind(*ZOO[name].inputs(seed))
        for result, expected in zip(session.run(inputs), floats.run(inputs), strict=True):
            assert result.dtype == torch.bfloat16
            # Float32 sums differ in the last bits, and then which bfloat16 is nearest.
            near(result, expected.detach().to(torch.bfloat16).float(), ULP / 8)
        # The program itself rounds after each operator: some ulp by the end of two layers.
        for result, expected in zip(session.run(inputs), program.run(inputs), strict=True):
            near(result, expected.detach().float(), 4 * ULP)


def test_texts_are_continued_as_whole_sequences_are(lower: Lower, load: Load) -> None:
    program, floats = traced("llama")
    session = load(lower(program))
    assert session.model.generates
    prompt = [5, 9, 33, 12, 60]
    generator = session.generator(rows=1, capacity=32)
    (found,) = generator.generate({0: prompt}, 12).values()
    with torch.no_grad():
        for length in range(len(prompt), len(prompt) + 12):
            text = [*prompt, *found][:length]
            inputs = floats.signature.bind((), {"input_ids": torch.tensor([text])})
            expected = floats.run(inputs)[0][0, -1]
            # Greedy: no other token is better by more than float32 can be off.
            assert float(expected.max() - expected[[*prompt, *found][length]]) < 1e-5


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_inputs_and_outputs_are_bfloat16(
    rows: int, isa: str, lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 50), nn.GELU(), nn.LayerNorm(50), nn.Linear(50, 33)).to(
        torch.bfloat16
    )
    x = torch.randn(rows, 70, dtype=torch.bfloat16)
    artifact = lower(trace(model, (x,)))
    monkeypatch.setenv("SQCOMPILE_ISA", isa)
    (result,) = load(artifact).run([x])
    monkeypatch.setenv("SQCOMPILE_ISA", "scalar")
    assert torch.equal(result, load(artifact).run([x])[0])
    expected = copy.deepcopy(model).float()(x.float()).detach()
    torch.testing.assert_close(result.float(), expected, rtol=ULP, atol=1e-5)
