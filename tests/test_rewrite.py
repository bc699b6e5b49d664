"""The rewriter: edits keep types, origins and counts right."""

from __future__ import annotations

import pytest
import torch
from support.programs import Mlp, conv_net, data, mlp, seeded
from torch import fx, nn

from sqcompile.errors import VerifyError
from sqcompile.pipeline import verify_program
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter, delete_unused_tensors, has_side_effect, remove_dead_nodes
from sqcompile.text import module_path, source_line
from sqcompile.tracing import trace

aten = torch.ops.aten


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in program.graph.nodes if item.name == name)


def order(program: Program) -> list[str]:
    return [item.name for item in program.compute_nodes()]


class TestCalls:
    def test_have_types_places_and_an_origin(self) -> None:
        program = mlp(dynamic=True)
        edit = Rewriter(program, "test-pass")
        relu = node(program, "relu")
        with edit.after(relu):
            new = edit.call(aten.gelu.default, relu, like=relu, approximate="tanh")
        edit.replace(relu, new)
        assert edit.finish() == edit.changes > 0
        verify_program(program)
        assert str(new.meta["val"].shape[0]) == str(relu.meta["val"].shape[0])  # the symbol, not a number
        assert module_path(new) == "act" and source_line(new).startswith("programs.py:")
        assert new.meta["origin"] == "test-pass" and "origin" not in relu.meta
        x = data(5, 8)
        first, second = seeded(Mlp).first, seeded(Mlp).second
        expected = second(nn.functional.gelu(first(x).relu(), approximate="tanh"))
        assert torch.equal(program(x), expected)

    def test_are_named_as_the_tracer_names_them(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        with edit.before(program.output):
            names = [
                edit.call(target, node(program, "relu")).name
                for target in (aten.relu.default, aten.neg.default)
            ]
        assert names == ["relu_1", "neg"]

    def test_come_in_the_order_of_the_calls(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        relu = node(program, "relu")
        with edit.after(relu):
            first = edit.call(aten.neg.default, relu)
            edit.call(aten.exp.default, first)
        with edit.before(relu):
            edit.call(aten.sin.default, relu.args[0])
            edit.call(aten.cos.default, relu.args[0])
        assert order(program) == ["linear", "sin", "cos", "relu", "neg", "exp", "linear_1"]

    def test_that_do_not_fit_leave_nothing(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        text = str(program)
        with edit.before(program.output), pytest.raises(VerifyError, match="'mm' do not fit") as caught:
            edit.call(aten.mm.default, node(program, "x"), node(program, "x"), like=node(program, "relu"))
        error = caught.value
        assert str(program) == text and edit.changes == 0
        assert "act, programs.py" in str(error.where) and "mm(%x, %x)" in str(error.seen)
        assert error.expected and error.next_step

    def test_with_several_results(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        with edit.before(program.output):
            new = edit.call(aten.split.Tensor, node(program, "relu"), 8, 1)
        assert [tuple(value.shape) for value in new.meta["val"]] == [(2, 8), (2, 8)]


class TestTensors:
    def test_constants_get_free_names(self) -> None:
        program = mlp()
        edit = Rewriter(program, "test-pass")
        like = node(program, "first_weight")
        first, second = (edit.constant("first.scale", torch.ones(count), like=like) for count in (3, 4))
        assert [first.target, second.target] == ["first.scale", "first.scale_1"]
        assert tuple(second.meta["val"].shape) == (4,) and second.meta["origin"] == "test-pass"
        edit.finish()  # nothing reads them
        assert not program.has_tensor("first.scale")

    def test_one_node_reads_a_tensor(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        assert edit.read("first.weight") is node(program, "first_weight") and edit.changes == 0
        program.set_tensor("table", torch.zeros(2))
        made = edit.read("table")
        assert edit.read("table") is made and edit.changes == 1

    def test_what_is_read_can_be_used_anywhere(self) -> None:
        """A node that reads a tensor stands before all that could use it, wherever the edit is."""
        program = mlp()
        edit = Rewriter(program)
        with edit.before(program.output):
            late = edit.constant("late", torch.ones(16))
        with edit.before(node(program, "relu")):
            early = edit.call(aten.add.Tensor, node(program, "linear"), late)
        edit.replace(node(program, "linear"), early)
        edit.finish()
        verify_program(program)

    def test_replacing(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        weight = node(program, "first_weight")
        old = program.tensor(weight)
        edit.replace_tensor(weight, old)
        assert edit.changes == 0  # the very same tensor: nothing has changed
        edit.replace_tensor(weight, torch.zeros(12, 8, dtype=torch.float64))
        assert edit.changes == 1 and program.tensor(weight).shape == (12, 8)
        assert weight.meta["val"].dtype is torch.float64 and tuple(weight.meta["val"].shape) == (12, 8)

    def test_replacing_what_several_nodes_read(self) -> None:
        program = mlp()
        with program.graph.inserting_before(node(program, "relu")):
            second = program.graph.get_attr("first.weight")
        second.meta["val"] = node(program, "first_weight").meta["val"]
        Rewriter(program).replace_tensor(second, torch.zeros(3, 8))
        assert tuple(node(program, "first_weight").meta["val"].shape) == (3, 8)


class TestReplacing:
    def test_users_of_the_new_node_itself(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        relu = node(program, "relu")
        with edit.after(relu):
            new = edit.call(aten.neg.default, relu)
        edit.replace(relu, new)
        assert new.args == (relu,) and node(program, "linear_1").args[0] is new

    def test_only_some_users(self) -> None:
        program = conv_net()
        edit = Rewriter(program)
        relu = node(program, "relu")
        with edit.after(relu):
            new = edit.call(aten.neg.default, relu)
        edit.replace(relu, new, only=lambda user: user.name == "add")
        assert node(program, "add").args[0] is new and node(program, "conv2d_1").args[0] is relu

    def test_nobody_is_no_change(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        edit.replace(node(program, "relu"), node(program, "linear"), only=lambda user: False)
        assert edit.changes == 0 and edit.finish() == 0

    def test_new_nodes_stand_for_the_old(self) -> None:
        """So that values can be compared with those of the program before, through several passes."""
        program = conv_net()
        edit = Rewriter(program, "first")
        relu = node(program, "relu")
        with edit.after(relu):
            new = edit.call(aten.gelu.default, relu.args[0], like=relu)
        edit.replace(relu, new)
        edit.finish()
        assert new.meta["stands_for"] == "relu"
        again = Rewriter(program, "second")
        with again.after(new):
            newer = again.call(aten.relu.default, new.args[0], like=new)
        again.replace(new, newer)
        assert newer.meta["stands_for"] == "relu"

    def test_nodes_that_stay_in_use_are_not_stood_for(self) -> None:
        program = mlp()
        edit = Rewriter(program, "test")
        relu = node(program, "relu")
        with edit.after(relu):
            new = edit.call(aten.neg.default, relu)
        edit.replace(relu, new)
        assert "stands_for" not in new.meta


class TestArguments:
    def test_setting_one(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        linear = node(program, "linear_1")
        edit.set_argument(linear, 2, None)
        assert edit.changes == 1 and linear.args[2] is None
        edit.set_argument(linear, 2, None)
        assert edit.changes == 1  # it was None already
        edit.finish()
        assert not program.has_tensor("second.bias")

    def test_types_follow(self) -> None:
        program = conv_net()
        edit = Rewriter(program)
        mean = node(program, "mean")
        edit.set_argument(mean, 1, [3])
        assert tuple(mean.meta["val"].shape) == (2, 6, 12)

    def test_arguments_at_their_defaults_or_given_by_name(self) -> None:
        program = conv_net()
        edit = Rewriter(program)
        conv = node(program, "conv2d")
        conv.args, conv.kwargs = conv.args[:2], {"bias": conv.args[2], "padding": [1, 1], "groups": 1}
        bias = conv.kwargs["bias"]
        edit.set_argument(conv, 4, [0, 0])
        assert conv.args[2:] == (bias, [1, 1], [0, 0]) and conv.kwargs == {"groups": 1}
        assert tuple(conv.meta["val"].shape) == (2, 8, 4, 4)

    def test_one_that_does_not_fit(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        linear = node(program, "linear_1")
        before, value = linear.args, linear.meta["val"]
        with pytest.raises(VerifyError, match="'linear' do not fit"):
            edit.set_argument(linear, 1, node(program, "first_weight"))
        assert linear.args == before and linear.meta["val"] is value and edit.changes == 0


class TestCleaning:
    def test_dead_nodes_and_tensors_go(self) -> None:
        program = mlp()
        program.output.args = ((node(program, "relu"),),)
        removed = remove_dead_nodes(program)
        assert removed == 3  # the second layer, its weight and its bias
        assert order(program) == ["linear", "relu"]
        assert [name for name, _ in program.tensors()] == ["first.weight", "first.bias"]
        assert not program.has_tensor("second.weight")

    def test_inputs_stay(self) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return x + 1

        program = trace(Model(), (data(2), data(2)))
        assert remove_dead_nodes(program) == 0 and len(program.placeholders) == 2

    def test_dead_random_operators_go(self) -> None:
        program = mlp()
        with program.graph.inserting_before(program.output):
            dropped = program.graph.call_function(aten.dropout.default, (node(program, "relu"), 0.5, True))
            written = program.graph.call_function(aten.add_.Tensor, (node(program, "relu"), 1))
        assert not has_side_effect(dropped) and has_side_effect(written)
        assert remove_dead_nodes(program) == 1

    def test_tensors_inside_modules_that_are_called_stay(self) -> None:
        program = mlp()
        program.graph_module.add_module("inner", nn.Linear(2, 2))
        with program.graph.inserting_before(program.output):
            program.graph.call_module("inner", (node(program, "relu"),))
        delete_unused_tensors(program)
        assert program.has_tensor("inner.weight")

    def test_nothing_to_do(self) -> None:
        program = conv_net()
        before = program.fingerprint()
        assert Rewriter(program).finish() == 0 and program.fingerprint() == before
