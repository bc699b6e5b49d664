from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels
from support.quantize import settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, InputError, PassOptionError, SelectionError
from sqcompile.passes import MaskWeights, SparseGPT
from sqcompile.pipeline import Pass, PassContext, PassManager, parse_pass
from sqcompile.sparsity import Pattern
from sqcompile.testing import check_pass


def batches(depth: int, count: int = 4) -> list[Tensor]:
    """Correlated inputs: independent ones leave nothing to make up with."""
    mix = torch.eye(depth) + 0.5 * values(depth, depth, seed=99)
    return [values(32, depth, seed=seed) @ mix for seed in range(count)]


def chain() -> nn.Module:
    return settled(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def error(item: Pass, model: nn.Module, depth: int = 16) -> float:
    """Squared error of the outputs on fresh data, after a pass."""
    data = batches(depth, 12)
    program = trace(model, (data[0],), dynamic_shapes=({0: Dim("rows")},))
    wanted = [program(x) for x in data[8:]]
    PassManager([item]).run(program, PassContext(calibration=Calibration(data[:8], program.signature)))
    return sum(float((program(x) - y).square().sum()) for x, y in zip(data[8:], wanted, strict=True))


@pytest.mark.parametrize("refit", [False, True])
def test_masks_and_lets_the_others_make_up(refit: bool) -> None:
    checked = check_pass(
        SparseGPT(sparsity=0.5, refit=refit),
        chain(),
        (batches(16)[0],),
        calibration=batches(16),
        expected="""
            program (level aten)
              input  %input_1: f32[32, 16]
              tensor @2.weight_mask: bool[8, 32]
              tensor @0.weight_mask: bool[32, 16]
              tensor @0.weight: f32[32, 16]
              tensor @0.bias: f32[32]
              tensor @2.weight: f32[8, 32]
              tensor @2.bias: f32[8]
              %mask: f32[32, 16] = mask(@0.weight, @0.weight_mask)
              %linear: f32[32, 32] = linear(%input_1, %mask, @0.bias)
              %relu: f32[32, 32] = relu(%linear)
              %mask_1: f32[8, 32] = mask(@2.weight, @2.weight_mask)
              %linear_1: f32[32, 8] = linear(%relu, %mask_1, @2.bias)
              return output=%linear_1
        """,
    )
    assert checked.record.facts["sparsity"] == {"0": 0.5, "2": 0.5}
    assert {str(promise) for promise in checked.after.sparsity.values()} == {"unstructured, 50.0 % zeros"}


def test_is_better_than_magnitude_and_the_refit_better_still() -> None:
    magnitude = error(MaskWeights(sparsity=0.5), chain())
    plain = error(SparseGPT(sparsity=0.5), chain())
    refitted = error(SparseGPT(sparsity=0.5, refit=True), chain())
    assert refitted < plain < 0.9 * magnitude


@pytest.mark.parametrize("text", ["2:4", "1x4", "4x4"])
def test_patterns(text: str) -> None:
    pattern = Pattern.parse(text)
    item = SparseGPT(pattern=pattern, sparsity=None if pattern.m else 0.5)
    checked = check_pass(item, chain(), (batches(16)[0],), calibration=batches(16))
    for promise in checked.after.sparsity.values():
        assert promise.pattern == pattern and pattern.holds(promise.mask) and promise.sparsity == 0.5


def test_sees_what_the_layers_before_have_become() -> None:
    """The second layer's inputs are those of the pruned first one: without sequence its mask is another."""
    data = (batches(16)[0],)
    whole = check_pass(SparseGPT(sparsity=0.7), chain(), data, calibration=batches(16)).after
    alone = check_pass(SparseGPT(sparsity=0.7, exclude=("0",)), chain(), data, calibration=batches(16)).after
    assert not torch.equal(whole.tensor("2.weight"), alone.tensor("2.weight"))


def test_earlier_masks_count() -> None:
    checked = check_pass(
        SparseGPT(sparsity=0.5),
        chain(),
        (batches(16)[0],),
        calibration=batches(16),
        prepare=[MaskWeights(sparsity=0.25)],
    )
    for name, promise in checked.after.sparsity.items():
        before = checked.before.sparsity[name].mask
        assert promise.sparsity == 0.5 and not bool((promise.mask & ~before).any())


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_convolution_is_pruned_as_the_product_that_it_is(refit: bool, pattern: str) -> None:
    """The same as of a linear layer that reads what lies under the kernel, input channels fastest."""
    x = values(6, 4, 7, 7).cumsum(-1)
    convolution = settled(nn.Conv2d(4, 5, (3, 2), stride=2, padding=1))
    # [N, I · places, L] → [N, L, places, I]
    patches = nn.functional.unfold(x, (3, 2), stride=2, padding=1).unflatten(1, (4, 6)).permute(0, 3, 2, 1)
    product = settled(nn.Linear(24, 5))
    with torch.no_grad():
        weight = convolution[0].weight  # type: ignore[index, union-attr]
        product[0].weight.copy_(weight.movedim(1, -1).reshape(5, 24))  # type: ignore[index, union-attr, operator]
    item = SparseGPT(
        sparsity=0.6 if pattern == "unstructured" else None,
        pattern=Pattern.parse(pattern),
        refit=refit,
        step=8,
    )
    found = [
        check_pass(item, model, (data,), calibration=[data]).after
        for model, data in ((convolution, x), (product, patches.flatten(0, 1).flatten(1)))
    ]
    for name in ("0.weight", "0.weight_mask"):
        ours = found[0].tensor(name).movedim(1, -1).reshape(5, 24)
        # Both factor the same matrix; sums may be taken in another order.
        torch.testing.assert_close(ours, found[1].tensor(name), rtol=1e-4, atol=1e-5)
    assert 0.5 <= found[0].sparsity["0.weight"].sparsity <= 0.6


def test_convolutions_that_read_the_same_value_see_each_its_own_of_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 4, 3, padding=1)
            self.point = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.point(x)

    x = values(4, 3, 6, 6)
    checked = check_pass(SparseGPT(sparsity=0.5), settle(Model()), (x,), calibration=[x])
    assert {name: promise.mask.shape for name, promise in checked.after.sparsity.items()} == {
        "wide.weight": (4, 3, 3, 3),
        "point.weight": (4, 3, 1, 1),
    }


def test_leaves_alone_what_has_no_hessian_or_other_users() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
            return self.head(x)

    ids = torch.arange(10).reshape(2, 5)
    checked = check_pass(
        SparseGPT(sparsity=0.5),
        settle(Model()),
        (ids,),
        calibration=[ids],
        unchanged=True,
        remarks=["its inputs are divided into 2 groups", "its weight has other users"],
    )
    assert not checked.after.sparsity


def test_says_that_data_is_too_little() -> None:
    few = [values(2, 16)]
    checked = check_pass(SparseGPT(sparsity=0.5, damping=1e-9), chain(), (few[0],), calibration=few)
    assert any("singular Hessian" in remark.reason for remark in checked.record.remarks)
    assert bool(checked.after(few[0]).isfinite().all())


def test_dynamic_rows_and_several_batches_in_little_memory() -> None:
    program = trace(chain(), (batches(16)[0],), dynamic_shapes=({0: Dim("rows")},))
    data = [*batches(16), values(5, 16)]
    context = PassContext(calibration=Calibration(data, program.signature))
    records = PassManager([SparseGPT(sparsity=0.5, max_bytes=30_000)]).run(program, context)
    assert "more exceed max-bytes" in str(records)


def run(program: Program, item: Pass, calibration: list[Tensor] | None) -> None:
    data = None if calibration is None else Calibration(calibration, program.signature)
    PassManager([item]).run(program, PassContext(calibration=data))


def test_mistakes() -> None:
    program = trace(chain(), (batches(16)[0],))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run(program, SparseGPT(sparsity=0.5), None)
    with pytest.raises(SelectionError, match="matches no layer"):
        run(program, SparseGPT(sparsity=0.5, layers=("fc",)), batches(16))
    broken = chain()
    broken[0].weight.data[0, 0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '0'"):
        run(trace(broken, (batches(16)[0],)), SparseGPT(sparsity=0.5), batches(16))
    refuse_other_levels(SparseGPT(sparsity=0.5))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("sparse-gpt", "sparsity"),
        ("sparse-gpt{sparsity=1}", "sparsity"),
        ("sparse-gpt{pattern=2:4,sparsity=0.3}", "sparsity"),
        ("sparse-gpt{sparsity=0.5,pattern=1x4,step=6}", "step"),
        ("sparse-gpt{sparsity=0.5,step=16,block=24}", "block"),
        ("sparse-gpt{sparsity=0.5,damping=0}", "damping"),
    ],
)
def test_options_that_cannot_be(text: str, option: str) -> None:
    with pytest.raises(PassOptionError, match=f"Option '{option}'"):
        parse_pass(text)
