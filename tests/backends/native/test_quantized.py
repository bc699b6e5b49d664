"""Quantize, dequantize and scales from the data: every granularity, to the code; tables of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.machines import machine
from torch import Tensor, nn

from sqcompile.backends.native import kernels
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.lower import context
from sqcompile.backends.native.session import NativeSession
from sqcompile.levels import Level
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.quantization.lookup import nearest_entries
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

sq = torch.ops.sqcompile


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """Codes and values for a scale that is known."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, text: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.format = Format.parse(text)
        size = self.format.granularity.scale_shape(shape)
        self.register_buffer("scale", 0.01 + 0.02 * values(*size, seed=1).abs())
        zero = torch.randint(-9, 10, size, generator=torch.Generator().manual_seed(2))
        self.register_buffer("zero_point", (zero + self.format.middle).to(torch.int32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        format = self.format
        options = (*format.granularity.pair, format.qmin, format.qmax)
        codes = sq.quantize(x, self.scale, self.zero_point, *options)
        return codes, sq.dequantize(codes, self.scale, self.zero_point, *options)


class FromData(nn.Module):
    """Scale, zero point, codes and values for a scale from the data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.format = Format.parse(text)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        format = self.format
        options = (*format.granularity.pair, format.qmin, format.qmax)
        scale, zero_point = sq.dynamic_scale(x, *options, format.symmetric)
        codes = sq.quantize(x, scale, zero_point, *options)
        return scale, zero_point, codes, sq.dequantize(codes, scale, zero_point, *options)


def check(model: nn.Module, inputs: list[Tensor], lower: Lower, load: Load) -> NativeSession:
    program = trace(model, (inputs[0],))
    program.level = Level.QDQ
    session = load(lower(program))
    for x in inputs:
        for result, expected in zip(session.run([x]), program.run([x]), strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)
    return session


FIXED = [
    "uint8",
    "int8",
    "uint8:channel=1",
    "int8:channel=0",
    "int8:group=4",
    "int4:group=8",
    "uint4:group=2@1",
    "uint2",
]


@pytest.mark.parametrize("text", FIXED)
def test_codes_are_the_references(text: str, lower: Lower, load: Load) -> None:
    shape = (3, 4, 16)
    inputs = [values(*shape), 100 * values(*shape, seed=3), torch.zeros(shape)]
    check(Fixed(text, shape), inputs, lower, load)


@pytest.mark.parametrize("columns", [16, 18, 3])
def test_codes_of_rows_that_fill_no_tile(columns: int, lower: Lower, load: Load) -> None:
    session = check(Fixed("uint8", (5, columns)), [values(5, columns)], lower, load)
    assert "quantize_rows" in {name for name, _ in session.model.steps}


FROM_DATA = {
    "uint8:affine:dynamic": True,
    "uint8:affine:token:dynamic": True,
    "uint8:token:dynamic": True,
    "int8:token:dynamic": True,
    "int8:narrow:token:dynamic": True,
    "int8:dynamic": False,
    "int4:token:dynamic": False,
    "uint4:affine:group=4:dynamic": False,
    "int8:channel=1:dynamic": False,
}


@pytest.mark.parametrize("text", FROM_DATA)
def test_scales_from_the_data_are_the_references(text: str, lower: Lower, load: Load) -> None:
    shape = (3, 4, 16)
    mixed = values(*shape, seed=4)
    mixed[0] = 0
    mixed[1, 0] = 1e-30
    mixed[1, 1] = 3e38
    session = check(
        FromData(text), [values(*shape), -values(*shape).abs(), mixed, torch.zeros(shape)], lower, load
    )
    names = {name for name, _ in session.model.steps}
    assert ("quantize_rows" in names) is FROM_DATA[text]


class LookedUp(nn.Module):
    """Values of which only a table's entries are left, for a scale that is known or from the data."""

    entries: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, text: str, known: bool) -> None:
        super().__init__()
        format = Format.parse(text)
        self.known, self.pair = known, format.granularity.pair
        self.register_buffer("entries", nearest_entries(format.mapping.table(format.bits)))
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.int32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options = (*self.pair, 0, 255)
        scale, zero_point = self.scale, self.zero_point
        if not self.known:
            scale, zero_point = sq.dynamic_scale(x, *options, True)
        codes = sq.lookup(sq.quantize(x, scale, zero_point, *options), self.entries)
        return codes, sq.dequantize(codes, scale, zero_point, *options)


@pytest.mark.parametrize("columns", [16, 18, 3])
@pytest.mark.parametrize(
    ("text", "known"),
    [
        pytest.param("int4:mapping=nf", True, id="static"),
        pytest.param("int4:mapping=tanh@2", False, id="tensor"),
        pytest.param("int3:token:dynamic:mapping=mu-law@10", False, id="token"),
    ],
)
def test_values_are_looked_up_as_the_reference_does(
    text: str, known: bool, columns: int, lower: Lower, load: Load
) -> None:
    check(LookedUp(text, known), [values(2, 7, columns), values(2, 7, columns, seed=3) * 5], lower, load)


@pytest.mark.parametrize("text", ["int4:token:dynamic:mapping=nf", "int4:dynamic:mapping=tanh@2"])
def test_layers_of_values_with_tables_are_integer_products(text: str, lower: Lower, load: Load) -> None:
    x = values(6, 24)
    program = trace(nn.Sequential(nn.Linear(24, 8)).eval(), (x,))
    passes = [QuantizeWeights(activation=Format.parse(text))]
    PassManager(passes).run(program, PassContext())
    session = load(lower(program))
    torch.testing.assert_close(session(x), program(x).detach(), rtol=1e-5, atol=1e-5)
    assert {"index", "linear_q8"} <= {name for name, _ in session.model.steps}


def test_values_that_are_no_numbers_reach_the_output(lower: Lower, load: Load) -> None:
    program = trace(nn.Linear(16, 8), (values(3, 16),))
    PassManager([QuantizeWeights(activation=Format.parse("uint8:affine:dynamic"))]).run(
        program, PassContext()
    )
    session = load(lower(program))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        x = values(3, 16)
        x[1, 5] = wrong
        assert session.run([x])[0].isnan().all()


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("int8", 24),
        ("int8:channel=0", 7),
        ("uint8:affine:channel=0", 24),
        ("int4:group=8", 24),
        ("uint4:affine:group=8", 24),
        ("int3:channel=0", 7),
        ("int4", 24),
    ],
)
def test_tables_of_codes_are_looked_up_as_codes(text: str, columns: int, lower: Lower, load: Load) -> None:
    table = nn.Embedding(100, columns)
    with torch.no_grad():
        table.weight.copy_(values(100, columns))
    program = trace(table, (torch.tensor([[1, 2], [3, 4]]),))
    PassManager([QuantizeWeights(weight=Format.parse(text))]).run(program, PassContext())
    artifact = lower(program)
    ids = torch.tensor([[99, 0], [-1, 50]]) % 100
    assert torch.equal(load(artifact).run([ids])[0], program.run([ids])[0])
    code_bytes = 100 * (-(-columns // 2) if Format.parse(text).bits <= 4 else columns)
    assert max(array.nbytes for array in artifact.plan.tensors if array.dtype.itemsize == 1) == code_bytes


def test_layers_that_share_an_activation_quantize_it_once(lower: Lower, load: Load) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Any:
            return self.q(x), self.k(x), self.v(x)

    for item in (
        QuantizeWeights(),
        QuantizeWeights(activation=Format.parse("uint8:affine:dynamic")),
        QuantizeWeights(weight=Format.parse("int4:group=32")),
    ):
        program = trace(Shared(), (values(3, 32),))
        PassManager([item]).run(program, PassContext())
        names = [name for name, _ in load(lower(program)).model.steps]
        assert names.count("quantize_rows") == 1
        assert sum(name.startswith("linear_q") for name in names) == 3


@pytest.mark.parametrize("zeros", [0.0, 0.6])
@pytest.mark.parametrize(
    "text", ["int4:group=32:mapping=nf", "int3:channel=0:mapping=codebook", "int4:mapping=tanh@1.5"]
)
def test_tables_run_on_the_kernels_of_their_bits(text: str, zeros: float, lower: Lower, load: Load) -> None:
    """Products of entries with codes of the activation: those of linear codes, with another table."""
    torch.manual_seed(0)
    model = nn.Linear(96, 64).eval()
    with torch.no_grad():
        model.weight.mul_(torch.rand(64, 96) >= zeros)
    x = values(5, 96)
    program = trace(model, (x,))
    PassManager([QuantizeWeights(weight=Format.parse(text))]).run(program, PassContext())
    session = load(lower(program))
    assert ("linear_q4_sparse" if zeros else "linear_q4") in {name for name, _ in session.model.steps}
    with torch.no_grad():
        (result,), (expected,) = session.run([x]), program.run([x])
    # Activations are rounded to 8 bits by groups: 1/254 of a group's largest value at most.
    assert float((result - expected).norm() / expected.norm()) < 0.01
    rows = values(5, 96).sign() * torch.randint(0, 128, (5, 96), generator=torch.Generator().manual_seed(4))
    rows[:, ::32] = 127.0  # each group's scale is 1, so its codes are the values themselves
    with torch.no_grad():
        (result,), (expected,) = session.run([rows]), program.run([rows])
    # What is left are the weight's scales, which the kernels keep to 11 bits.
    assert float((result - expected).norm() / expected.norm()) < 2**-11


GROUPED = {
    "int2:group=32": 2,
    "uint2:affine:group=64": 2,
    "int3:group=128": 3,
    "uint3:affine:group=32": 3,
    "int3:group=64:mapping=codebook": 3,
    "uint4:affine:group=32": 4,
    "int5:group=32": 8,
    "uint6:affine:group=64": 8,
    "int8:group=128": 8,
    "int8:narrow:group=256": 8,
}


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("text", GROUPED)
def test_groups_are_stored_and_multiplied_at_their_size(
    text: str, isa: str, lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations that are codes already leave only the weights' scales, which the kernels keep to 11 bits."""
    monkeypatch.setattr(context, "kernel_times", lambda: (machine(), ""))  # where zeros save no time
    bits, columns = GROUPED[text], 512
    model = nn.Linear(columns, 48).eval()
    with torch.no_grad():
        model.weight.copy_(values(48, columns))
    program = trace(model, (values(2, columns),), dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}})
    PassManager([QuantizeWeights(weight=Format.parse(text))]).run(program, PassContext())
    artifact = lower(program)
    (step,) = (step for step in artifact.plan.steps if step.operator == "linear_q4")
    assert step.ints[3] == bits
    codes = step.inputs[3]
    assert codes is not None and codes.shape == (48 * columns * bits // 8,)
    monkeypatch.setenv("SQCOMPILE_ISA", isa)
    session = load(artifact)
    monkeypatch.setenv("SQCOMPILE_ISA", "scalar")
    scalar = load(artifact)
    for rows in (1, 3, 21):
        x = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(rows)).float()
        x[:, ::32] = 127.0  # each group's scale is 1, so its codes are the values themselves
        with torch.no_grad():
            (result,), (expected,) = session.run([x]), program.run([x])
        assert float((result - expected).norm() / expected.norm()) < 2**-11
        assert torch.equal(result, scalar.run([x])[0])


def test_groups_of_bytes_that_no_code_of_the_kernel_holds_are_multiplied_in_float(
    lower: Lower, load: Load
) -> None:
    """The kernels' 8-bit weights are -127 to 127; codes 0 to 255 with zero points are 256 values."""
    program = trace(nn.Linear(64, 16), (values(3, 64),))
    PassManager([QuantizeWeights(weight=Format.parse("uint8:affine:group=32"))]).run(program, PassContext())
    artifact = lower(program)
    assert any("no integer kernel has its format" in note for note in artifact.notes)
    x = values(3, 64)
    torch.testing.assert_close(load(artifact).run([x])[0], program.run([x])[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "zeros", "step"),
    [
        ("int3:group=32", 0.5, "linear_q4"),
        ("int3:group=32", 0.8, "linear_q4_sparse"),
        ("int2:group=32", 0.7, "linear_q4"),
        ("int2:group=32", 0.95, "linear_q4_sparse"),
    ],
)
def test_few_bits_get_a_bitmask_only_where_it_is_smaller(
    text: str, zeros: float, step: str, lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "kernel_times", lambda: (machine(), ""))  # where all take the same time
    torch.manual_seed(0)
    model = nn.Linear(256, 64, bias=False).eval()
    with torch.no_grad():
        # No code of what is kept is zero: magnitudes are near each other.
        model.weight.copy_(values(64, 256).sign() * (1 + 0.1 * torch.rand(64, 256)))
        model.weight.mul_(torch.rand(64, 256) >= zeros)
    program = trace(model, (values(2, 256),))
    PassManager([QuantizeWeights(weight=Format.parse(text))]).run(program, PassContext())
    session = load(lower(program))
    assert step in {name for name, _ in session.model.steps}
    x = values(2, 256)
    (result,), (expected,) = session.run([x]), program.run([x])
    # Activations are rounded to 8 bits by groups: 1/254 of a group's largest value at most.
    assert float((result - expected).detach().norm() / expected.detach().norm()) < 0.01


@pytest.mark.parametrize(("rows", "sparsity", "form"), [(1, 0.8, "1x4"), (4, 0.6, "4x4"), (16, 0.9, "16x4")])
def test_blocks_are_those_that_save_the_most_time(
    rows: int, sparsity: float, form: str, lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1x4 blocks that are zero at random four in a row often are, too: skipping those alone would save less."""
    block_ns = {"int8_in_1x4_blocks": 90.0, "int8_in_4x4_blocks": 80.0, "int8_in_16x4_blocks": 70.0}
    monkeypatch.setattr(context, "kernel_times", lambda: (machine(skips=True, int8=150.0, **block_ns), ""))
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=False).eval()
    with torch.no_grad():
        layer.weight.mul_(
            (torch.rand(64 // rows, 64) >= sparsity).repeat_interleave(rows, 0).repeat_interleave(4, 1)
        )
    program = trace(layer, (values(8, 256),))
    PassManager([QuantizeWeights()]).run(program, PassContext())
    artifact = lower(program)
    assert [choice.form for choice in artifact.choices.values()] == [f"int8 in {form} blocks"]
    assert "linear_q8_block" in {name for name, _ in load(artifact).model.steps}
