from __future__ import annotations

import pytest
import torch
from support.quantize import calls, refuse_level, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Level, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, InputError, PassOptionError, SelectionError
from sqcompile.passes import GPTQ, ApplyMasks, MaskWeights, QuantizeWeights
from sqcompile.pipeline import Pass, PassContext, PassManager, parse_pass
from sqcompile.quantization import Format
from sqcompile.sparsity import Pattern
from sqcompile.testing import check_pass

DEQUANTIZE = torch.ops.sqcompile.dequantize.default


def batches(depth: int, count: int = 4) -> list[Tensor]:
    """Correlated inputs: independent ones leave nothing to make up with."""
    mix = torch.eye(depth) + 0.5 * values(depth, depth, seed=99)
    return [values(32, depth, seed=seed) @ mix for seed in range(count)]


def chain() -> nn.Module:
    return settled(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def compiled(item: Pass, model: nn.Module | None = None) -> tuple[Program, float]:
    """The program after a pass, and the squared error of its outputs on fresh data."""
    data = batches(16, 12)
    program = trace(model or chain(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
    wanted = [program(x) for x in data[8:]]
    PassManager([item]).run(program, PassContext(calibration=Calibration(data[:8], program.signature)))
    with torch.no_grad():
        pairs = zip(data[8:], wanted, strict=True)
        return program, sum(float((program(x) - y).square().sum()) for x, y in pairs)


def test_stores_codes() -> None:
    checked = check_pass(
        GPTQ(weight=Format.parse("uint3:group=8:affine")),
        settled(nn.Linear(16, 4)),
        (batches(16)[0],),
        calibration=batches(16),
        idempotent=False,
        expected="""\
            program (level qdq)
              input  %input_1: f32[32, 16]
              tensor @0.weight_zero_point: i32[4, 2]
              tensor @0.weight_scale: f32[4, 2]
              tensor @0.weight_codes: u8[4, 16]
              tensor @0.bias: f32[4]
              %dequantize: f32[4, 16] = dequantize(@0.weight_codes, @0.weight_scale, @0.weight_zero_point, \
axis=-1, group_size=8, qmin=0, qmax=7)
              %linear: f32[32, 4] = linear(%input_1, %dequantize, @0.bias)
              return output=%linear
        """,
    )
    assert checked.after.level is Level.QDQ and checked.record.facts == {"swept": 1}


@pytest.mark.parametrize(
    "text", ["uint3:group=8:affine", "int3:channel=0:narrow", "int4", "uint2:group=5:affine"]
)
def test_is_better_than_rounding_to_nearest(text: str) -> None:
    format = Format.parse(text)
    nearest = compiled(QuantizeWeights(weight=format, search="mse"))[1]
    assert compiled(GPTQ(weight=format))[1] < 0.7 * nearest


@pytest.mark.parametrize(
    "text", ["int3:group=8:mapping=codebook", "int4:channel=0:mapping=nf", "int2:mapping=tanh"]
)
def test_tables_are_better_than_rounding_to_nearest(text: str) -> None:
    format = Format.parse(text)
    nearest = compiled(QuantizeWeights(weight=format, search="mse"))[1]
    program, loss = compiled(GPTQ(weight=format))
    assert loss < 0.7 * nearest
    assert program.tensor("0.weight_table").numel() == 1 << format.bits
    assert program.tensor("0.weight_codes").dtype == torch.uint8


def test_a_table_is_fitted_to_what_the_hessian_weighs() -> None:
    """Inputs of which half are a hundred times larger: their weights decide where the entries lie."""
    large = torch.cat([torch.full((8,), 100.0), torch.ones(8)])
    data = [x * large for x in batches(16)]
    format = Format.parse("int2:channel=0:mapping=codebook")
    tables = []
    for inputs in (data, [x / large.square() for x in data]):
        program = trace(chain(), (inputs[0],), dynamic_shapes=({0: Dim("rows")},))
        context = PassContext(calibration=Calibration(inputs, program.signature))
        PassManager([GPTQ(weight=format)]).run(program, context)
        tables.append(program.tensor("0.weight_table"))
    assert not torch.equal(*tables)


def test_tables_and_pruning_in_one_sweep() -> None:
    program, _ = compiled(GPTQ(weight=Format.parse("int4:group=8:mapping=nf"), sparsity=0.5))
    assert set(program.sparsity) == {"0.weight_codes", "2.weight_codes"}
    assert {promise.sparsity for promise in program.sparsity.values()} == {0.5}
    for node in calls(program, DEQUANTIZE):
        assert float((program_value(program, node) == 0).float().mean()) >= 0.5


def test_each_option_matters() -> None:
    weight = Format.parse("uint3:group=8:affine")
    codes = [
        compiled(item)[0].tensor("2.weight_codes")
        for item in (
            GPTQ(weight=weight),
            GPTQ(weight=weight, act_order=False),
            GPTQ(weight=weight, search="minmax"),
            GPTQ(weight=weight, dense_targets=False),
            GPTQ(weight=weight, damping=1.0),
        )
    ]
    assert all(not torch.equal(codes[0], other) for other in codes[1:])


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1x4"])
def test_prunes_in_the_same_sweep(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = Format.parse("uint4:group=8:affine")
    item = GPTQ(weight=weight, pattern=pattern, sparsity=None if pattern.m else 0.5)
    program, loss = compiled(item)
    assert set(program.sparsity) == {"0.weight_codes", "2.weight_codes"}
    for promise in program.sparsity.values():
        assert promise.pattern == pattern and pattern.holds(promise.mask) and promise.sparsity == 0.5
    masked, magnitude = _after_magnitude(pattern, weight)
    assert loss < 0.7 * magnitude
    for node in calls(masked, DEQUANTIZE):  # zeros of an earlier mask are exact, too
        codes = node.args[0]
        value = program_value(masked, node)
        assert float((value == 0).float().mean()) >= 0.5, codes


def _after_magnitude(pattern: Pattern, weight: Format) -> tuple[Program, float]:
    data = batches(16, 12)
    program = trace(chain(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
    wanted = [program(x) for x in data[8:]]
    mask = MaskWeights(pattern=pattern, sparsity=None if pattern.m else 0.5)
    context = PassContext(calibration=Calibration(data[:8], program.signature))
    PassManager([mask, GPTQ(weight=weight)]).run(program, context)
    assert {promise.sparsity for promise in program.sparsity.values()} == {0.5}
    return program, sum(float((program(x) - y).square().sum()) for x, y in zip(data[8:], wanted, strict=True))


def test_keeps_zeros_that_were_baked_in() -> None:
    """Applied masks leave no operator behind, only a promise: the sweep must not fill the zeros again."""
    program = trace(chain(), (batches(16)[0],))
    context = PassContext(calibration=Calibration(batches(16), program.signature))
    passes: list[Pass] = [MaskWeights(pattern=Pattern.parse("2:4")), ApplyMasks(), GPTQ()]
    PassManager(passes).run(program, context)
    assert {(str(promise.pattern), promise.sparsity) for promise in program.sparsity.values()} == {
        ("2:4", 0.5)
    }
    for node in calls(program, DEQUANTIZE):
        promise = program.sparsity[str(node.args[0].target)]  # type: ignore[union-attr]
        assert not bool(program_value(program, node)[~promise.mask].any())


def program_value(program: Program, node: torch.fx.Node) -> Tensor:
    from sqcompile.evaluate import constant_value

    value = constant_value(program, node)
    assert value is not None
    return value


def test_rounds_to_nearest_what_has_no_hessian() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
            return self.head(self.fc(x))

    ids = torch.arange(10).reshape(2, 5)
    checked = check_pass(
        GPTQ(formats=(("conv", "float"), ("fc", Format.parse("int8:channel=0")))),
        settle(Model()),
        (ids,),
        calibration=[ids],
        idempotent=False,
        remarks=["its weight has other users", "kind embedding has no Hessian"],
    )
    assert checked.record.facts == {"swept": 1}
    assert checked.after.has_tensor("conv.weight")
    assert checked.after.tensor("fc.weight_codes").dtype == torch.int8
    tied = [name for name, tensor in checked.after.tensors() if tensor.dtype == torch.uint8]
    assert len(tied) == 1  # one set of codes for both uses


@pytest.mark.parametrize("pattern", ["kind:head", "2"])
def test_layers_may_be_rounded_and_lose_nothing(pattern: str) -> None:
    both, _ = compiled(GPTQ(sparsity=0.5))
    assert set(both.sparsity) == {"0.weight_codes", "2.weight_codes"}
    program, _ = compiled(GPTQ(sparsity=0.5, unpruned=(pattern,)))
    assert set(program.sparsity) == {"0.weight_codes"} and program.has_tensor("2.weight_codes")
    assert torch.equal(program.tensor("0.weight_codes"), both.tensor("0.weight_codes"))
    with pytest.raises(SelectionError, match="nothing-like-it"):
        compiled(GPTQ(sparsity=0.5, unpruned=("nothing-like-it",)))


def test_selection_and_mistakes() -> None:
    program, _ = compiled(GPTQ(exclude=("2",)))
    assert program.has_tensor("2.weight") and program.has_tensor("0.weight_codes")
    with pytest.raises(CalibrationError, match="needs calibration data"):
        PassManager([GPTQ()]).run(trace(chain(), (batches(16)[0],)), PassContext())
    broken = chain()
    broken[0].weight.data[0, 0] = float("inf")  # type: ignore[index, union-attr, operator]
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '0'"):
        compiled(GPTQ(), broken)
    refuse_level(GPTQ(), Level.OBSERVED)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("gptq{weight=uint4:affine:dynamic}", "weight"),
        ("gptq{sparsity=1}", "sparsity"),
        ("gptq{pattern=2:4,sparsity=0.3}", "sparsity"),
        ("gptq{pattern=1x4}", "sparsity"),
        ("gptq{damping=-1}", "damping"),
    ],
)
def test_options_that_cannot_be(text: str, option: str) -> None:
    with pytest.raises(PassOptionError, match=f"Option '{option}'"):
        parse_pass(text)
