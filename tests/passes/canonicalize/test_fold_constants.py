from __future__ import annotations

import pytest
import torch
from support.passes import Function, refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import trace
from sqcompile.errors import PassOptionError
from sqcompile.passes import FoldConstants, MaskWeights
from sqcompile.rewrite import Rewriter
from sqcompile.testing import check_pass


class Table(nn.Module):
    """Adds a table that is scaled in the forward pass."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(rows * 3.0).reshape(rows, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.table * 0.5)


def test_folds_what_depends_on_stored_tensors_alone() -> None:
    checked = check_pass(
        FoldConstants(),
        Table(),
        (torch.randn(4, 3),),
        expected="""
            program (level aten)
              input  %x: f32[4, 3]
              tensor @folded_sin: f32[4, 3]
              %add: f32[4, 3] = add(%x, @folded_sin)
              return output=%add
        """,
    )
    assert not checked.after.has_tensor("table")


def test_folds_what_depends_on_nothing() -> None:
    check_pass(
        FoldConstants(),
        Function(lambda x: x + torch.arange(3) * 2),
        (torch.randn(4, 3),),
        expected="""
            program (level aten)
              input  %x: f32[4, 3]
              tensor @folded_mul: i64[3]
              %add: f32[4, 3] = add(%x, @folded_mul)
              return output=%add
        """,
    )


def test_folds_what_reads_only_the_type_of_an_input() -> None:
    check_pass(
        FoldConstants(),
        Function(lambda x: (x + torch.zeros_like(x), x * x.new_full((3,), 2.0))),
        (torch.randn(4, 3),),
        expected="""
            program (level aten)
              input  %x: f32[4, 3]
              tensor @folded_new_full: f32[3]
              tensor @folded_zeros_like: f32[4, 3]
              %add: f32[4, 3] = add(%x, @folded_zeros_like)
              %mul: f32[4, 3] = mul(%x, @folded_new_full)
              return output_0=%add, output_1=%mul
        """,
    )


def test_follows_results_through_lists() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            top, bottom = self.table.chunk(2)
            return x + top * bottom

    check_pass(
        FoldConstants(),
        Halves(),
        (torch.randn(2, 3),),
        expected="""
            program (level aten)
              input  %x: f32[2, 3]
              tensor @folded_mul: f32[2, 3]
              %add: f32[2, 3] = add(%x, @folded_mul)
              return output=%add
        """,
    )


class Reparametrized(nn.Module):
    """A linear layer whose weight is a direction times a length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_names_a_weight_after_its_layer_and_keeps_it_trainable() -> None:
    checked = check_pass(
        FoldConstants(),
        Reparametrized(),
        (torch.randn(4, 3),),
        expected="""
            program (level aten)
              input  %x: f32[4, 3]
              tensor @layer.weight: f32[2, 3]
              tensor @layer.bias: f32[2]
              %linear: f32[4, 2] = linear(%x, @layer.weight, @layer.bias)
              return output=%linear
        """,
    )
    weight = checked.after.tensor("layer.weight")
    assert isinstance(weight, nn.Parameter) and weight.requires_grad


def test_keeps_results_that_grow_too_much_but_folds_before_them() -> None:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.row.exp().expand(16, 8)

    inputs = (torch.randn(16, 8),)
    # Of the 16 · 8 floats of the result, 8 replace those of @row.
    check_pass(
        FoldConstants(max_growth_bytes=4 * 15 * 8),
        Grown(),
        inputs,
        expected="""
        program (level aten)
          input  %x: f32[16, 8]
          tensor @folded_expand: f32[16, 8]
          %add: f32[16, 8] = add(%x, @folded_expand)
          return output=%add
    """,
    )
    check_pass(
        FoldConstants(max_growth_bytes=4 * 15 * 8 - 1),
        Grown(),
        inputs,
        expected="""
            program (level aten)
              input  %x: f32[16, 8]
              tensor @folded_exp: f32[8]
              %expand: f32[16, 8] = expand(@folded_exp, size=[16, 8])
              %add: f32[16, 8] = add(%x, %expand)
              return output=%add
        """,
        remarks=["stored, it would add 480 bytes, and max-growth-bytes is 479"],
    )


def test_counts_a_tensor_that_stays_in_use_as_growth() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t() @ self.weight

    inputs = (torch.randn(2, 8),)
    check_pass(
        FoldConstants(max_growth_bytes=0), Tied(), inputs, unchanged=True, remarks=["it would add 256 bytes"]
    )
    folded = check_pass(FoldConstants(), Tied(), inputs).after
    # Not made contiguous: the matrix product would take another path, and round differently.
    assert folded.tensor("folded_t").stride() == (1, 8)


def test_keeps_what_is_returned() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.table.exp(), (self.table + 1).exp()

    checked = check_pass(
        FoldConstants(),
        Returned(),
        (torch.randn(3),),
        expected="""
            program (level aten)
              input  %x: f32[3]
              tensor @folded_add: f32[3]
              tensor @folded_exp: f32[3]
              %add: f32[3] = add(%x, @folded_exp)
              %exp_1: f32[3] = exp(@folded_add)
              return output_0=%add, output_1=%exp_1
        """,
        remarks=["a stored tensor must not be handed out"],
    )
    first = checked.after(torch.zeros(3))[1].zero_()
    assert not torch.equal(checked.after(torch.zeros(3))[1], first)


def test_keeps_what_has_the_size_of_an_input() -> None:
    check_pass(
        FoldConstants(),
        Function(lambda x: x + torch.ones(5, 3)[: x.shape[0]]),
        (torch.randn(4, 3),),
        dynamic_shapes={"x": {0: Dim("rows", max=5)}},
        expected="""
            program (level aten)
              input  %x: f32[rows, 3]
              tensor @folded_ones: f32[5, 3]
              %sym_size_int_1: int = sym_size.int(%x, dim=0)
              %slice_1: f32[rows, 3] = slice(@folded_ones, end=%sym_size_int_1)
              %add: f32[rows, 3] = add(%x, %slice_1)
              return output=%add
        """,
        remarks=["its size depends on an input"],
    )


def test_keeps_what_is_drawn_at_random() -> None:
    program = trace(Function(lambda x: x + torch.ones(3) * 2), (torch.randn(3),))
    edit = Rewriter(program)
    multiplied = next(node for node in program.compute_nodes() if "mul" in node.name)
    with edit.before(multiplied):
        drawn = edit.call(torch.ops.aten.rand.default, [3])
    edit.replace(multiplied, drawn)
    edit.finish()
    check_pass(FoldConstants(), program, unchanged=True)


def test_keeps_masks_and_what_follows_them() -> None:
    program = trace(nn.Linear(4, 4), (torch.randn(1, 4),))
    masked = check_pass(MaskWeights(sparsity=0.5), program).after
    check_pass(FoldConstants(), masked, (torch.randn(1, 4),), unchanged=True)


def test_does_not_touch_the_model() -> None:
    model = Table()
    table = model.table.clone()
    check_pass(FoldConstants(), model, (torch.randn(4, 3),))
    assert torch.equal(model.table, table)


def test_rejects_a_negative_size() -> None:
    with pytest.raises(PassOptionError, match="max_growth_bytes"):
        check_pass(FoldConstants(max_growth_bytes=-1), Table(), (torch.randn(4, 3),))


def test_refuses_other_levels() -> None:
    refuse_other_levels(FoldConstants())
