from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from support.passes import refuse_other_levels
from torch import Tensor, fx, nn
from torch.export import Dim

from sqcompile import Pass, PassContext, PassResult, Program, trace
from sqcompile.errors import InputError, VerifyError
from sqcompile.passes import ApplyMasks, FoldBatchNorm, MaskWeights
from sqcompile.pipeline import PassManager
from sqcompile.rewrite import Rewriter
from sqcompile.statistics import program_size
from sqcompile.testing import check_pass

ROWS = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)),)
MASK = torch.ops.sqcompile.mask.default


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def masked(item: Pass | None = None) -> Program:
    program = trace(two_layers(), ROWS)
    PassManager([item or MaskWeights(sparsity=0.5)]).run(program, PassContext())
    return program


def mask_nodes(program: Program) -> list[fx.Node]:
    return [node for node in program.compute_nodes() if node.target is MASK]


def test_stores_the_zeros_and_drops_the_masks() -> None:
    checked = check_pass(
        ApplyMasks(),
        masked(),
        ROWS,
        expected="""
            program (level aten)
              input  %input_1: f32[3, 8]
              tensor @0.weight: f32[8, 8]
              tensor @0.bias: f32[8]
              tensor @2.weight: f32[4, 8]
              tensor @2.bias: f32[4]
              %linear: f32[3, 8] = linear(%input_1, @0.weight, @0.bias)
              %relu: f32[3, 8] = relu(%linear)
              %linear_1: f32[3, 4] = linear(%relu, @2.weight, @2.bias)
              return output=%linear_1
        """,
    )
    for name in ("0.weight", "2.weight"):
        weight, mask = checked.after.tensor(name), checked.before.tensor(f"{name}_mask")
        assert torch.equal(weight, checked.before.tensor(name) * mask)
        assert isinstance(weight, nn.Parameter)
        assert not torch.signbit(weight[~mask]).any(), "zeros are +0, which every codec stores as one value"
        assert not checked.after.has_tensor(f"{name}_mask")
    assert checked.record.facts == {"sparsity": {"0.weight": 0.5, "2.weight": 0.5}}
    assert program_size(checked.after).sparsity == 0.5


def test_promises_the_pattern() -> None:
    after = check_pass(ApplyMasks(), masked(MaskWeights(pattern="2:4")), ROWS).after
    assert {name: str(promise.pattern) for name, promise in after.sparsity.items()} == {
        "0.weight": "2:4",
        "2.weight": "2:4",
    }


class Densify(Pass, register=False):
    """Adds to every weight, as a careless pass would."""

    def run(self, program: Program, context: PassContext) -> PassResult:
        edit = Rewriter(program, self.name)
        for node in list(program.graph.nodes):
            if node.op == "get_attr" and node.target == "0.weight":
                edit.replace_tensor(node, program.tensor(node).detach() + 0.1)
        return PassResult(edit.finish())


def test_holds_later_passes_to_the_promise() -> None:
    after = check_pass(ApplyMasks(), masked(), ROWS).after
    with pytest.raises(VerifyError, match="no longer has the sparsity that was promised") as caught:
        PassManager([Densify()]).run(after, PassContext())
    assert "32 weights are nonzero where the mask is 0" in str(caught.value)
    assert "pass densify" in str(caught.value)


def test_lets_batch_norms_be_folded_into_sparse_weights() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    program = trace(model, (torch.randn(1, 4, 5, 5),))
    PassManager([MaskWeights(sparsity=0.5), ApplyMasks(), FoldBatchNorm()]).run(program, PassContext())
    assert program.tensor("0.weight").count_nonzero() == 72


@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_takes_masks_of_torch_prune_and_their_names(amount: float) -> None:
    model = two_layers()
    torch_prune.l1_unstructured(model[0], "weight", amount)
    expected = model[0].weight.detach().clone()
    checked = check_pass(
        ApplyMasks(),
        model,
        ROWS,
        expected="""
            program (level aten)
              input  %input_1: f32[3, 8]
              tensor @0.weight: f32[8, 8]
              tensor @0.bias: f32[8]
              tensor @2.weight: f32[4, 8]
              tensor @2.bias: f32[4]
              %linear: f32[3, 8] = linear(%input_1, @0.weight, @0.bias)
              %relu: f32[3, 8] = relu(%linear)
              %linear_1: f32[3, 4] = linear(%relu, @2.weight, @2.bias)
              return output=%linear_1
        """,
    )
    assert torch.equal(checked.after.tensor("0.weight"), expected)
    assert isinstance(checked.after.tensor("0.weight"), nn.Parameter)
    assert str(checked.after.sparsity["0.weight"].pattern) == "unstructured"


def test_keeps_the_name_of_torch_prune_where_the_other_is_taken() -> None:
    model = two_layers()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    program = trace(model, ROWS)
    edit = Rewriter(program)
    taken = edit.constant("0.weight", torch.ones(()))
    first = mask_nodes(program)[0]
    user = next(iter(first.users))
    with edit.before(user.next):
        scaled = edit.call(torch.ops.aten.mul.Tensor, user, taken)
    edit.replace(user, scaled, only=lambda node: node is not scaled)
    edit.finish()
    after = check_pass(ApplyMasks(), program, ROWS).after
    assert "0.weight_orig" in after.sparsity and after.tensor("0.weight").dim() == 0


def test_applies_a_shared_mask_once_for_all_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    program = trace(Tied(), ROWS)
    PassManager([MaskWeights(sparsity=0.5)]).run(program, PassContext())
    assert len(mask_nodes(program)) == 1
    after = check_pass(ApplyMasks(), program, ROWS).after
    (name,) = after.sparsity
    assert after.tensor(name).count_nonzero() == 32


def test_applies_masks_upon_masks() -> None:
    program = masked()
    edit = Rewriter(program)
    inner = mask_nodes(program)[0]
    keep = torch.arange(64).reshape(8, 8) % 2 == 0
    with edit.before(inner.next):
        outer = edit.call(MASK, inner, edit.constant("second", keep))
    edit.replace(inner, outer)
    edit.finish()
    expected = program.tensor("0.weight") * program.tensor("0.weight_mask") * keep
    after = check_pass(ApplyMasks(), program, ROWS).after
    assert not mask_nodes(after) and torch.equal(after.tensor("0.weight"), expected)
    assert torch.equal(after.sparsity["0.weight"].mask, program.tensor("0.weight_mask") & keep)


def test_leaves_a_weight_that_is_used_without_its_mask() -> None:
    program = masked()
    edit = Rewriter(program)
    node = mask_nodes(program)[0]
    with edit.before(program.output):
        total = edit.call(torch.ops.aten.sum.default, node.args[0])
        result = edit.call(torch.ops.aten.add.Tensor, program.output.args[0][0], total)
    program.output.args = ((result,),)
    edit.finish()
    checked = check_pass(
        ApplyMasks(), program, ROWS, remarks=["stays a mask: %sum_1 uses @0.weight without it"]
    )
    assert len(mask_nodes(checked.after)) == 1


def test_leaves_a_mask_that_is_computed() -> None:
    program = masked()
    edit = Rewriter(program)
    node = mask_nodes(program)[0]
    with edit.before(node):
        computed = edit.call(torch.ops.aten.logical_not.default, node.args[1])
    edit.set_argument(node, 1, computed)
    program.sparsity.clear()
    edit.finish()
    checked = check_pass(ApplyMasks(), program, ROWS, remarks=["stays a mask: it is computed, not stored"])
    assert len(mask_nodes(checked.after)) == 1
    check_pass(MaskWeights(sparsity=0.75), program, remarks=["is not pruned: its mask is computed"])


def test_leaves_a_weight_that_is_computed() -> None:
    program = masked()
    edit = Rewriter(program)
    node = mask_nodes(program)[0]
    with edit.before(node):
        computed = edit.call(torch.ops.aten.mul.Tensor, node.args[0], 2.0)
    edit.set_argument(node, 0, computed)
    program.sparsity.clear()
    edit.finish()
    check_pass(ApplyMasks(), program, ROWS, remarks=["stays a mask: what it masks is computed"])


def test_leaves_a_program_without_masks() -> None:
    check_pass(ApplyMasks(), two_layers(), ROWS, unchanged=True)


def test_follows_dynamic_dimensions() -> None:
    program = trace(two_layers(), ROWS, dynamic_shapes={"input": {0: Dim("batch", max=8)}})
    PassManager([MaskWeights(sparsity=0.5)]).run(program, PassContext())
    after = check_pass(ApplyMasks(), program, ROWS).after
    assert "%linear_1: f32[batch, 4] = linear(%relu, @2.weight, @2.bias)" in after.text()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rejects_weights_that_are_not_finite(value: float) -> None:
    program = masked()
    weight = program.tensor("0.weight").detach().clone()
    weight[0, 0] = value
    program.set_tensor("0.weight", weight)
    program.sparsity.clear()
    with pytest.raises(InputError, match="A weight to prune is not finite") as caught:
        check_pass(ApplyMasks(), program)
    assert "tensor @0.weight" in str(caught.value) and "1 of 64 weights" in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"pattern": "2:4"}, {"pattern": "1x4", "sparsity": 0.5}, {"sparsity": 0.7}]
)
def test_survives_saving(tmp_path: Any, options: dict[str, Any]) -> None:
    after = check_pass(ApplyMasks(), masked(MaskWeights(**options)), ROWS).after
    after.save(tmp_path / "sparse.pt2")
    loaded = Program.load(tmp_path / "sparse.pt2")
    assert {name: str(promise) for name, promise in loaded.sparsity.items()} == {
        name: str(promise) for name, promise in after.sparsity.items()
    }
    assert torch.equal(loaded(*ROWS), after(*ROWS))


def test_refuses_other_levels() -> None:
    refuse_other_levels(ApplyMasks())
