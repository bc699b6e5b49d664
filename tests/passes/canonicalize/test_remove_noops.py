from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.passes import Function, refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.passes import RemoveNoops
from sqcompile.rewrite import Rewriter
from sqcompile.testing import CheckedPass, check_pass
from sqcompile.text import operator_name

IMAGE = (torch.randn(2, 4, 6, 6),)

NOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "feature dropout": lambda x: F.dropout2d(x, 0.5, training=False),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "detach": lambda x: x.detach(),
    "to the same type": lambda x: x.to(torch.float32),
    "type_as": lambda x: x.type_as(x + 1),
    "all of a slice": lambda x: x[:, 0:],
    "a longer slice": lambda x: x[:, :100],
    "expand to the same shape": lambda x: x.expand(2, 4, 6, 6),
    "expand_as": lambda x: x.expand_as(x + 1),
    "view to the same shape": lambda x: x.view(2, 4, 6, 6),
    "reshape with -1": lambda x: x.reshape(2, -1, 6, 6),
    "flatten nothing": lambda x: x.flatten(1, 1),
    "flatten and unflatten": lambda x: x.flatten(1, 2).unflatten(1, (4, 6)),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze nothing": lambda x: x.squeeze(1),
    "view there and back": lambda x: x.view(8, 36).view(16, 18).view(2, 4, 6, 6),
    "transpose of one axis": lambda x: x.transpose(1, 1),
    "transpose twice": lambda x: x.transpose(1, 2).transpose(2, 1),
    "permute around": lambda x: x.permute(1, 2, 3, 0).permute(1, 2, 3, 0).permute(2, 3, 0, 1),
    "repeat once": lambda x: x.repeat(1, 1, 1, 1),
    "cat of one": lambda x: torch.cat([x], 1),
    "chunk into one": lambda x: x.chunk(1, 1)[0],
    "split into one": lambda x: x.split(4, 1)[0],
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "average over one": lambda x: F.avg_pool2d(x, 1),
    "maximum of one": lambda x: F.max_pool2d(x, 1, stride=1),
    "adaptive average to the same size": lambda x: F.adaptive_avg_pool2d(x, 6),
    "plus 0": lambda x: x + 0,
    "0 plus": lambda x: 0 + x,
    "minus 0": lambda x: x - 0.0,
    "times 1": lambda x: x * 1.0,
    "over 1": lambda x: x / 1,
    "to the power of 1": lambda x: x**1,
}


def _between(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.sigmoid(function(torch.tanh(x)))


@functools.cache
def checked(cases: str) -> CheckedPass:
    """All cases in one model, since tracing is what takes time; the n-th output is that of the n-th case."""
    functions = [_between(function) for function in CASES[cases].values()]
    return check_pass(RemoveNoops(), Function(lambda x: [function(x) for function in functions]), IMAGE)


def operators(program: Program, index: int) -> list[str]:
    """Names of the operators that an output went through, last first."""
    node = program.output.args[0][index]
    names = []
    while node.op != "placeholder":
        names.append(operator_name(node))
        node = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    return names


def test_every_rule_is_exact() -> None:
    """The pass promises less, since a value may lie differently in memory afterwards."""
    for before, after in zip(checked("noops").before(*IMAGE), checked("noops").after(*IMAGE), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", NOOPS)
def test_removes(name: str) -> None:
    index = list(NOOPS).index(name)
    assert len(operators(checked("noops").before, index)) > 2, "the tracer left nothing to remove"
    assert operators(checked("noops").after, index) == ["sigmoid", "tanh"]


NO_NOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "another type": lambda x: x.to(torch.float64),
    "a part": lambda x: x[:, 1:],
    "every second": lambda x: x[:, ::2],
    "a greater shape": lambda x: x[:, :1].expand(2, 4, 6, 6),
    "permuted, same shape": lambda x: x.transpose(2, 3),
    "permuted, not back": lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 3, 1),
    "flipped": lambda x: x.flip(1),
    "moved by padding": lambda x: F.pad(x, (1, -1)),
    "every second of a pool": lambda x: F.avg_pool2d(x, 1, stride=2),
    "a pool that divides": lambda x: F.avg_pool2d(x, 1, divisor_override=2),
    "a pool that moves": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "adaptive to another size": lambda x: F.adaptive_avg_pool2d(x, 3),
    "twice": lambda x: x.repeat(1, 2, 1, 1),
    "two in one": lambda x: torch.cat([x, x], 1),
    "plus little": lambda x: x + 1e-9,
    "times 0": lambda x: x * 0,
    "from 0": lambda x: 0 - x,
    "2 over": lambda x: 2 / x,
}


CASES = {"noops": NOOPS, "others": NO_NOOPS}


@pytest.mark.parametrize("name", NO_NOOPS)
def test_keeps(name: str) -> None:
    index = list(NO_NOOPS).index(name)
    assert len(operators(checked("others").after, index)) > 2


def test_keeps_what_changes_a_type_by_a_neutral_number() -> None:
    check_pass(RemoveNoops(), Function(lambda x: (x * 1.0).neg()), (torch.arange(6),), unchanged=True)


def test_keeps_what_broadcasts_with_a_neutral_number() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.ones(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.one).tanh()

    check_pass(RemoveNoops(), Wider(), (torch.randn(3),), unchanged=True)


def test_keeps_a_neutral_parameter_because_training_may_change_it() -> None:
    class Scaled(nn.Module):
        def __init__(self, *, trained: bool) -> None:
            super().__init__()
            one = torch.ones(())
            if trained:
                self.scale = nn.Parameter(one)
            else:
                self.register_buffer("scale", one)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).tanh()

    check_pass(RemoveNoops(), Scaled(trained=True), (torch.randn(3),), unchanged=True)
    removed = check_pass(RemoveNoops(), Scaled(trained=False), (torch.randn(3),))
    assert [str(node.target) for node in removed.after.compute_nodes()] == ["aten.tanh.default"]
    assert not removed.after.has_tensor("scale")


def test_removes_neutral_truth_values_but_not_neutral_numbers_of_integers() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("true", torch.ones((), dtype=torch.bool))

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(mask & self.true, x, 0.0), (x.long() & 1).neg()

    checked = check_pass(RemoveNoops(), Masked(), (torch.randn(3), torch.tensor([True, False, True])))
    targets = [str(node.target) for node in checked.after.compute_nodes()]
    assert targets.count("aten.__and__.Tensor") + targets.count("aten.__and__.Scalar") == 1
    assert not checked.after.has_tensor("true")


def test_merges_changes_of_shape() -> None:
    check_pass(
        RemoveNoops(),
        Function(lambda x: x.tanh().flatten(1).view(2, 16, 9).sum(1)),
        IMAGE,
        expected="""
            program (level aten)
              input  %x: f32[2, 4, 6, 6]
              %tanh: f32[2, 4, 6, 6] = tanh(%x)
              %reshape: f32[2, 16, 9] = reshape(%tanh, shape=[2, 16, 9])
              %sum_1: f32[2, 9] = sum.dim_IntList(%reshape, dim=[1])
              return output=%sum_1
        """,
    )


def test_merges_permutations() -> None:
    check_pass(
        RemoveNoops(),
        Function(lambda x: x.transpose(1, 2).permute(0, 3, 1, 2).tanh()),
        (torch.randn(2, 3, 4, 5),),
        expected="""
            program (level aten)
              input  %x: f32[2, 3, 4, 5]
              %permute_1: f32[2, 5, 4, 3] = permute(%x, dims=[0, 3, 2, 1])
              %tanh: f32[2, 5, 4, 3] = tanh(%permute_1)
              return output=%tanh
        """,
    )


def test_keeps_permutations_of_what_is_used_in_between() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = x.transpose(1, 2)
        return turned.tanh(), turned.permute(0, 3, 1, 2).tanh()

    check_pass(RemoveNoops(), Function(both), (torch.randn(2, 3, 4, 5),), unchanged=True)


def test_composes_permutations_in_their_order() -> None:
    """Three that undo each other in this order, and not in the other; what lies between is used too."""

    def function(x: Tensor) -> list[Tensor]:
        first = x.permute(1, 0, 2)
        second = first.permute(0, 2, 1)
        return [first.tanh(), second.tanh(), second.permute(2, 0, 1).exp()]

    check_pass(
        RemoveNoops(),
        Function(function),
        (torch.randn(3, 4, 5),),
        expected="""
            program (level aten)
              input  %x: f32[3, 4, 5]
              %permute: f32[4, 3, 5] = permute(%x, dims=[1, 0, 2])
              %permute_1: f32[4, 5, 3] = permute(%permute, dims=[0, 2, 1])
              %tanh: f32[4, 3, 5] = tanh(%permute)
              %tanh_1: f32[4, 5, 3] = tanh(%permute_1)
              %exp: f32[3, 4, 5] = exp(%x)
              return output_0=%tanh, output_1=%tanh_1, output_2=%exp
        """,
    )


def test_turns_views_into_reshapes_where_the_copy_before_them_goes() -> None:
    check_pass(
        RemoveNoops(),
        Function(lambda x: x.transpose(1, 2).contiguous().tanh().view(2, -1)),
        (torch.randn(2, 3, 4),),
        expected="""
            program (level aten)
              input  %x: f32[2, 3, 4]
              %transpose: f32[2, 4, 3] = transpose.int(%x, dim0=1, dim1=2)
              %tanh: f32[2, 4, 3] = tanh(%transpose)
              %view: f32[2, 12] = reshape(%tanh, shape=[2, -1])
              return output=%view
        """,
    )


def test_keeps_a_copy_whose_memory_is_read() -> None:
    check_pass(
        RemoveNoops(),
        Function(lambda x: x.transpose(1, 2).contiguous().as_strided((2, 2), (4, 1))),
        (torch.randn(2, 3, 4),),
        unchanged=True,
        remarks=["%as_strided depends on how it lies in memory"],
    )


@pytest.mark.parametrize("copy", [lambda x: x.clone(), lambda x: x + 0, lambda x: torch.cat([x])])
def test_keeps_a_copy_that_is_returned(copy: Callable[[Tensor], Tensor]) -> None:
    model = Function(copy)
    checked = check_pass(
        RemoveNoops(), model, (torch.randn(3),), unchanged=True, remarks=["its copy is returned"]
    )
    x = torch.randn(3)
    assert checked.after(x).data_ptr() != x.data_ptr()


def test_removes_an_alias_that_is_returned() -> None:
    check_pass(
        RemoveNoops(),
        Function(lambda x: F.dropout(x, 0.5, training=False)),
        (torch.randn(3),),
        expected="""
            program (level aten)
              input  %x: f32[3]
              return output=%x
        """,
    )


def test_keeps_dropout_in_training_mode() -> None:
    program = trace(Function(lambda x: F.dropout(x, 0.5, training=False).tanh()), (torch.randn(3),))
    dropout = next(program.compute_nodes())
    Rewriter(program).set_argument(dropout, 2, True)
    program.recompile()
    check_pass(RemoveNoops(), program, unchanged=True, remarks=["the model is in training mode"])


def test_removes_dropout_of_nothing_in_training_mode() -> None:
    program = trace(Function(lambda x: F.dropout(x, 0.0, training=False).tanh()), (torch.randn(3),))
    Rewriter(program).set_argument(next(program.compute_nodes()), 2, True)
    program.recompile()
    checked = check_pass(RemoveNoops(), program, (torch.randn(3),))
    assert [str(node.target) for node in checked.after.compute_nodes()] == ["aten.tanh.default"]


def test_removes_dead_operators_and_their_tensors() -> None:
    program = trace(nn.Linear(3, 2), (torch.randn(1, 3),))
    edit = Rewriter(program)
    with edit.before(program.output):
        edit.call(torch.ops.aten.exp.default, edit.constant("unread", torch.ones(3)))
    checked = check_pass(
        RemoveNoops(),
        program,
        (torch.randn(1, 3),),
        expected="""
            program (level aten)
              input  %input_1: f32[1, 3]
              tensor @weight: f32[2, 3]
              tensor @bias: f32[2]
              %linear: f32[1, 2] = linear(%input_1, @weight, @bias)
              return output=%linear
        """,
    )
    assert not checked.after.has_tensor("unread")


def test_follows_dynamic_dimensions() -> None:
    """What keeps a symbolic shape goes; what only might keep it stays."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.tanh()[:, :].view(x.shape[0], x.shape[1], 4).expand(x.shape[0], -1, -1)
        return whole.exp(), x.tanh()[:, :5].exp()

    check_pass(
        RemoveNoops(),
        Function(function),
        (torch.randn(3, 6, 4),),
        dynamic_shapes={"x": {0: Dim("batch", max=8), 1: Dim("length", min=6, max=9)}},
        expected="""
            program (level aten)
              input  %x: f32[batch, length, 4]
              %tanh: f32[batch, length, 4] = tanh(%x)
              %exp: f32[batch, length, 4] = exp(%tanh)
              %tanh_1: f32[batch, length, 4] = tanh(%x)
              %slice_1: f32[batch, 5, 4] = slice(%tanh_1, dim=1, start=0, end=5)
              %exp_1: f32[batch, 5, 4] = exp(%slice_1)
              return output_0=%exp, output_1=%exp_1
        """,
    )


def test_keeps_shared_values_for_their_other_users() -> None:
    def function(x: Tensor) -> Tensor:
        hidden = x.tanh()
        return hidden.clone().exp() + hidden

    check_pass(
        RemoveNoops(),
        Function(function),
        (torch.randn(3),),
        expected="""
            program (level aten)
              input  %x: f32[3]
              %tanh: f32[3] = tanh(%x)
              %exp: f32[3] = exp(%tanh)
              %add: f32[3] = add(%exp, %tanh)
              return output=%add
        """,
    )


def test_refuses_other_levels() -> None:
    refuse_other_levels(RemoveNoops())
