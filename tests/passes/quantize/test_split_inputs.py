"""Splitting the inputs of layers by importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from support.programs import data, seeded
from support.quantize import run
from torch import Tensor, nn

import sqcompile
from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.layers import layers_of
from sqcompile.passes import GPTQ, FoldQDQ, MaskWeights, QuantizeWeights, SplitInputs
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.testing import assert_text
from sqcompile.tracing import trace

THREE, FOUR, EIGHT = (Format.parse(f"uint{bits}:affine:group=8") for bits in (3, 4, 8))
LARGE = torch.tensor([5, 9, 20, 31])
"""Channels of the inputs that are far larger than the others."""


class Pair(nn.Module):
    """Two layers that read one value, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 48), nn.Linear(64, 48, bias=False)
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(0.1 * (self.left(x) + self.right(x))))
        return result


def batches(count: int = 4) -> list[Tensor]:
    sizes = torch.ones(64).index_fill(0, LARGE, 20.0)
    return [data(16, 64, seed=seed) * sizes for seed in range(count)]


def pair() -> Program:
    return trace(seeded(Pair), (data(2, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def split(program: Program, **options: Any) -> Any:
    (record,) = run([SplitInputs(multiple=8, weight=THREE, **options)], program, batches())
    return record


def test_one_product_a_part_and_their_sum() -> None:
    program = pair()
    record = split(program, layers=("left", "right"))
    assert_text(
        str(program),
        """
        program (level aten)
          input  %x: f32[batch, 64]
          tensor @right.inputs_1.weight: f32[48, 56]
          tensor @right.inputs_0.weight: f32[48, 8]
          tensor @left.inputs_1.weight: f32[48, 56]
          tensor @left.inputs_0.weight: f32[48, 8]
          tensor @left.channels_1: i32[56]
          tensor @left.channels_0: i32[8]
          tensor @left.bias: f32[48]
          tensor @head.weight: f32[8, 48]
          tensor @head.bias: f32[8]
          %index_select: f32[batch, 8] = index_select(%x, dim=-1, index=@left.channels_0)
          %index_select_1: f32[batch, 56] = index_select(%x, dim=-1, index=@left.channels_1)
          %linear_3: f32[batch, 48] = linear(%index_select, @left.inputs_0.weight, @left.bias)
          %linear_4: f32[batch, 48] = linear(%index_select_1, @left.inputs_1.weight)
          %add_1: f32[batch, 48] = add(%linear_3, %linear_4)
          %linear_5: f32[batch, 48] = linear(%index_select, @right.inputs_0.weight)
          %linear_6: f32[batch, 48] = linear(%index_select_1, @right.inputs_1.weight)
          %add_2: f32[batch, 48] = add(%linear_5, %linear_6)
          %add: f32[batch, 48] = add(%add_1, %add_2)
          %mul: f32[batch, 48] = mul(%add, other=0.1)
          %tanh: f32[batch, 48] = tanh(%mul)
          %linear_2: f32[batch, 8] = linear(%tanh, @head.weight, @head.bias)
          return output=%linear_2
        """,
    )
    torch.testing.assert_close(program(batches()[0]), pair()(batches()[0]), rtol=1e-4, atol=1e-5)
    assert not record.remarks


def test_large_inputs_are_the_important_ones() -> None:
    program = pair()
    record = split(program)
    assert set(LARGE.tolist()) <= set(program.tensor("left.channels_0").tolist())
    # Four of 64 channels, 20 times as large: 400 · 4 of 400 · 4 + 60 squares.
    assert record.facts["first_part"]["left"] > 0.9


def test_shares_say_how_many_parts() -> None:
    program = pair()
    split(program, shares=(0.05, 0.3))
    sizes = [program.tensor(f"left.inputs_{index}.weight").shape[1] for index in range(3)]
    assert sizes == [8, 24, 32]
    names = [layer.name for layer in layers_of(program)]
    assert names[:6] == [f"{side}.inputs_{part}" for side in ("left", "right") for part in range(3)]
    torch.testing.assert_close(program(batches()[0]), pair()(batches()[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [QuantizeWeights, GPTQ])
def test_fewer_bytes_at_a_smaller_error_than_one_format_for_all(kind: type[Any]) -> None:
    uniform, mixed = pair(), pair()
    left: Any = {"exclude": ("head",), "search": "mse"}
    run([kind(weight=FOUR, **left)], uniform, batches())
    run(
        [
            SplitInputs(multiple=8, weight=THREE),
            kind(weight=THREE, formats=(("*.inputs_0", EIGHT),), **left),
        ],
        mixed,
        batches(),
    )
    x = torch.cat(batches(8)[4:])
    expected = pair()(x)
    before, after = (float((program(x) - expected).square().mean()) for program in (uniform, mixed))
    shape = (48, 64)
    bytes_before = FOUR.size_bits(shape)
    bytes_after = THREE.size_bits((48, 56)) + EIGHT.size_bits((48, 8))
    assert after < before and bytes_after < bytes_before
    formats = {layer.name: layer for layer in layers_of(mixed)}
    assert {"left.inputs_0", "left.inputs_1"} <= formats.keys()


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "native"])
def test_backends_run_the_parts(backend: str) -> None:
    compiled = sqcompile.compile(
        seeded(Pair),
        [
            SplitInputs(multiple=32, weight=Format.parse("int4:group=32")),
            QuantizeWeights(
                weight=Format.parse("int4:group=32"),
                formats=(("*.inputs_0", Format.parse("int8:group=32")),),
                exclude=("head",),
            ),
            FoldQDQ(),
        ],
        (data(2, 64),),
        calibration=batches(),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        backend=backend,
    )
    assert isinstance(compiled, sqcompile.Compiled)
    x = batches(5)[4]
    # Both backends round activations of 4-bit products to 8 bits, a scale a block.
    tolerance = 1e-5 if backend == "reference" else 0.03
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=0, atol=tolerance)
    text = str(compiled.report)
    assert "left.inputs_0" in text and "left.inputs_1" in text


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.tied, self.masked = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.low, self.head = nn.Linear(64, 64).half(), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.tied(self.small(x)))
        result: Tensor = self.head(self.low(self.masked(x).half()).float())
        return result


def test_says_why_a_layer_stays_whole() -> None:
    program = trace(seeded(Refused), (data(2, 8),))
    run([MaskWeights(sparsity=0.5, layers=("masked",))], program)
    (record,) = run([SplitInputs(multiple=8)], program, [data(4, 8)])
    assert record.changes == 0
    assert [remark.reason.removeprefix("is not split: ") for remark in record.remarks] == [
        "its 8 inputs are no more than the first parts take",
        "its weight has other users",
        "its weight has other users",
        "its zeros would be promised of a weight that is gone; prune the parts",
        "its weight is torch.float16",
    ]


def test_refuses_what_cannot_be() -> None:
    for shares in ((), (0.0,), (0.5, 0.5), (-0.1,)):
        with pytest.raises(PassOptionError, match="shares"):
            SplitInputs(shares=shares)
    with pytest.raises(PassOptionError, match="multiple"):
        SplitInputs(multiple=0)
    with pytest.raises(PassOptionError, match="weight"):
        SplitInputs(weight=Format.parse("uint8:affine:dynamic"))
    with pytest.raises(SelectionError, match="nothing_like_it"):
        run([SplitInputs(layers=("nothing_like_it",))], pair(), batches())
    with pytest.raises(CalibrationError):
        run([SplitInputs()], pair())
    refuse_other_levels(SplitInputs())
