"""The structural check, and that its shortcuts (nodes checked before) cannot be fooled."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.programs import TwoInputs, conv_net, data, mlp
from torch import fx, nn
from torch.export import Dim

from sqcompile import infer
from sqcompile.errors import LevelError, VerifyError
from sqcompile.levels import Level
from sqcompile.pipeline import verify_program
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.tracing import trace
from sqcompile.verify import check_interface, check_level, check_structure
from sqcompile.verify import structure as structure_module

aten = torch.ops.aten


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in program.graph.nodes if item.name == name)


@pytest.fixture
def checked() -> Program:
    """A program whose every node has been checked."""
    program = mlp(dynamic=True)
    check_structure(program)
    return program


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes whose types are derived anew, as it happens."""
    names: list[str] = []

    def infer_node(item: fx.Node, mode: Any) -> Any:
        names.append(item.name)
        return infer.infer_node(item, mode)

    monkeypatch.setattr(structure_module, "infer_node", infer_node)
    return names


class TestIncremental:
    def test_what_was_checked_is_not_derived_again(self, checked: Program, derived: list[str]) -> None:
        check_structure(checked)
        check_structure(checked.snapshot())
        assert derived == []

    def test_new_nodes_and_their_users_are_derived(self, checked: Program, derived: list[str]) -> None:
        linear = node(checked, "linear")
        with checked.graph.inserting_after(linear):
            negated = checked.graph.call_function(aten.neg.default, (linear,))
        negated.meta["val"] = linear.meta["val"]
        linear.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
        check_structure(checked)
        assert derived == ["neg_default", "relu"]

    def test_what_the_rewriter_derived_is_not_derived_again(
        self, checked: Program, derived: list[str]
    ) -> None:
        edit = Rewriter(checked)
        linear = node(checked, "linear")
        with edit.after(linear):
            edit.replace(linear, edit.call(aten.neg.default, linear, like=linear))
        edit.finish()
        check_structure(checked)
        assert derived == ["relu"]

    @pytest.mark.parametrize("name", ["linear", "relu", "linear_1"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda value: value.new_empty(3, 3),
            lambda value: value.double(),
            lambda value: value.unsqueeze(0),
            lambda value: (value, value),
            lambda value: None,
        ],
        ids=["shape", "dtype", "rank", "tuple", "nothing"],
    )
    def test_a_recorded_value_that_changes_alone(
        self, checked: Program, name: str, change: Callable[[torch.Tensor], Any]
    ) -> None:
        item = node(checked, name)
        item.meta["val"] = change(item.meta["val"])
        with pytest.raises(VerifyError):
            check_structure(checked)

    def test_a_dynamic_size_that_becomes_a_number(self, checked: Program) -> None:
        item = node(checked, "relu")
        item.meta["val"] = item.meta["val"].new_empty(2, 16)
        with pytest.raises(VerifyError, match="recorded type of 'relu' is wrong") as caught:
            check_structure(checked)
        assert caught.value.seen == "f32[2, 16]"

    def test_an_input_that_changes_its_type(self, checked: Program) -> None:
        """The node itself, its arguments and its record are as they were when it was checked."""
        weight, bias = node(checked, "first_weight"), node(checked, "first_bias")
        edit = Rewriter(checked)
        checked.set_tensor("first.weight", torch.zeros(12, 8))
        checked.set_tensor("first.bias", torch.zeros(12))
        for item in (weight, bias):
            item.meta["val"] = infer.fake_tensor(checked.tensor(item), edit._mode)
        for name in ("linear", "relu"):  # consistent with each other, and wrong for what follows
            edit.infer(node(checked, name))
        with pytest.raises(VerifyError, match="arguments of 'linear' do not fit") as caught:
            check_structure(checked)
        assert "%linear_1" in str(caught.value.where)

    def test_a_mark_copied_from_another_node(self, checked: Program) -> None:
        linear, relu = node(checked, "linear"), node(checked, "relu")
        relu.meta = dict(linear.meta)
        relu.meta["val"] = relu.meta["val"].double()
        with pytest.raises(VerifyError):
            check_structure(checked)

    @pytest.mark.parametrize("arguments", [{"args": (0,)}, {"args": (1, 1)}, {"kwargs": {"start_dim": 0}}])
    def test_an_argument_that_is_no_node(self, arguments: dict[str, Any]) -> None:
        program = trace(nn.Flatten(), (data(2, 3, 4),))
        check_structure(program)
        flatten = node(program, "flatten")
        flatten.args = (flatten.args[0], *arguments.get("args", ()))
        flatten.kwargs = arguments.get("kwargs", {})
        with pytest.raises(VerifyError, match="flatten"):
            check_structure(program)

    def test_an_operator_that_is_replaced(self, checked: Program) -> None:
        node(checked, "relu").target = aten.isnan.default
        with pytest.raises(VerifyError, match="'isnan'"):
            check_structure(checked)


class TestStructure:
    @pytest.mark.parametrize("make", [mlp, conv_net])
    def test_traced_programs_are_right(self, make: Callable[[], Program]) -> None:
        verify_program(make())

    def test_dynamic_sizes_stay_dynamic(self) -> None:
        """Deriving types asks questions about sizes; the answers must not pin them."""
        batch, length = Dim("batch"), Dim("length")

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.linear(x).reshape(x.shape[0], -1, 4)
                return torch.softmax(x @ x.transpose(1, 2), -1).mean(1)

        program = trace(Model(), (data(2, 3, 8),), dynamic_shapes=({0: batch, 1: length},))
        text = str(program)
        verify_program(program)
        assert str(program) == text and "f32[batch, length, 8]" in text
        for rows, columns in ((1, 1), (3, 5)):
            assert program(data(rows, columns, 8)).shape == (rows, 2 * columns)

    def test_sizes_that_depend_on_data(self) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x[x > 0] * 2

        program = trace(Model(), (data(6),))
        verify_program(program)
        assert (program(torch.tensor([1.0, -1, 2, -1, -1, -1])) == torch.tensor([2.0, 4.0])).all()

    def test_unused_nodes_need_no_value(self, checked: Program) -> None:
        with checked.graph.inserting_before(checked.output):
            checked.graph.call_function(aten.relu.default, (node(checked, "linear"),))
        check_structure(checked)

    def test_a_node_of_another_graph(self, checked: Program) -> None:
        other = mlp()
        node(checked, "relu").args = (node(other, "linear"),)
        with pytest.raises(VerifyError, match="not well-formed"):
            check_structure(checked)

    @pytest.mark.parametrize(
        ("attribute", "value"),
        [
            ("inputs", ()),
            ("outputs", ()),
            ("inputs", "twice"),
            ("outputs", "twice"),
            ("inputs", "other"),
            ("outputs", "other"),
            ("outputs", "none"),
        ],
    )
    def test_a_signature_of_another_program(self, checked: Program, attribute: str, value: Any) -> None:
        old = getattr(checked.signature, attribute)
        made = {
            "twice": (*old, *old),
            "other": (dataclasses.replace(old[0], dtype=torch.float64),),
            "none": (dataclasses.replace(old[0], dtype=None, shape=None),),
        }
        checked.signature = dataclasses.replace(
            checked.signature, **{attribute: made.get(value, value) if isinstance(value, str) else value}
        )
        with pytest.raises(VerifyError, match="signature") as caught:
            check_structure(checked)
        assert caught.value.where and caught.value.seen and caught.value.expected and caught.value.next_step

    def test_an_output_that_is_no_tuple(self, checked: Program) -> None:
        checked.output.args = (node(checked, "linear_1"),)
        with pytest.raises(VerifyError, match="flat tuple"):
            check_structure(checked)

    @pytest.mark.parametrize("target", [torch.relu, torch.nn.functional.relu, aten.relu, lambda x: x])
    def test_calls_that_are_no_operators(self, checked: Program, target: Any) -> None:
        node(checked, "relu").target = target
        with pytest.raises(VerifyError, match="no operator") as caught:
            check_structure(checked)
        assert "act, programs.py" in str(caught.value.where)

    def test_sizes_are_computed_with_pythons_operators(self) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.new_zeros(max(x.shape[0] * 2 - 1, 3) // 2, x.shape[1])

        program = trace(Model(), (data(4, 3),), dynamic_shapes=({0: Dim("n", min=4)},))
        verify_program(program)


class TestLevels:
    @pytest.mark.parametrize(
        ("operator", "levels"),
        [
            ("mask", set(Level)),
            ("observe", {Level.OBSERVED}),
            ("quantize", {Level.QDQ}),
            ("dequantize", {Level.QDQ}),
            ("dynamic_scale", {Level.QDQ}),
            ("fake_quantize", {Level.QDQ}),
        ],
    )
    def test_operators_of_each_level(self, operator: str, levels: set[Level]) -> None:
        program = mlp()
        relu = node(program, "relu")
        relu.target = getattr(torch.ops.sqcompile, operator).default
        for level in Level:
            program.level = level
            if level in levels:
                check_level(program)
                continue
            with pytest.raises(LevelError, match=f"level {level} cannot hold '{operator}'") as caught:
                check_level(program)
            error = caught.value
            assert (
                error.seen == operator and error.expected and error.next_step and "%relu" in str(error.where)
            )


class TestInterface:
    def test_a_program_has_its_own_interface(self) -> None:
        for make in (mlp, conv_net):
            program = make()
            check_interface(program, program.snapshot())

    def test_an_output_of_another_symbol(self) -> None:
        """Shapes whose names agree by accident are compared by their symbols, too."""

        class Model(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return x + 1, y + 1

        shapes = {"x": {0: Dim("n")}, "y": {0: Dim("m")}}
        before = trace(Model(), (data(3), data(4)), dynamic_shapes=shapes)
        after = before.snapshot()
        first, second = after.output.args[0]
        after.output.args = ((second, first),)
        with pytest.raises(VerifyError):
            check_interface(before, after)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda old: {"arg_names": ("y", "pair", "scale", "extra")}, "nested"),
            (lambda old: {"out_spec": torch.utils._pytree.tree_structure([0, (0, 0)])}, "nested"),
            (lambda old: {"outputs": old.outputs[::-1]}, "outputs"),
            (lambda old: {"inputs": old.inputs[::-1]}, "inputs"),
            (lambda old: {"dims": {"batch": (1, 5)}}, "range of a dimension"),
        ],
    )
    def test_changes_of_the_signature(self, change: Callable[[Any], dict[str, Any]], text: str) -> None:
        pair = {"left": data(3, 4), "right": data(3, 4)}
        before = trace(TwoInputs(), (data(3, 4), pair))
        after = before.snapshot()
        after.signature = dataclasses.replace(before.signature, **change(before.signature))
        with pytest.raises(VerifyError, match=text) as caught:
            check_interface(before, after)
        error = caught.value
        assert error.where and error.seen != error.expected and "changes_interface" in str(error.next_step)


def test_checks_leave_no_trace_that_hinders_copies(checked: Program) -> None:
    copy.deepcopy(checked.graph_module)
    verify_program(checked.snapshot().snapshot())
