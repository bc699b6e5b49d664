"""Structure: the graph is well-formed, its recorded types are right, its level and interface hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.errors import LevelError, VerifyError
from sqcompile.infer import fake_mode_of, infer_node, same_type
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.signature import describe_type
from sqcompile.text import locate, operator_name, rename_symbols, symbol_names


def check_structure(program: Program) -> None:
    """Check that the graph lints, that every tensor exists, and that recorded types are right.

    A node whose operator, arguments and recorded types are as they were when it was last checked is
    not derived again, so the cost after a pass is that of the nodes which the pass touched.

    Raises:
        VerifyError: If not; the text names the node.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(
            "The graph is not well-formed.",
            seen=str(error).splitlines()[0],
            expected="every value is defined before it is used, and belongs to this graph",
        ) from error
    mode = fake_mode_of(program)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            _check_tensor(program, node)
        elif node.op == "call_function":
            _check_call(node, mode)


def check_level(program: Program) -> None:
    """Check that the program holds only the operators of its level.

    Raises:
        LevelError: If it holds another of `torch.ops.sqcompile`.
    """
    for node in program.compute_nodes():
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "sqcompile":
            continue
        if operator_name(node) not in program.level.operators:
            raise LevelError(
                f"A program of level {program.level} cannot hold '{operator_name(node)}'.",
                where=locate(node),
                seen=operator_name(node),
                expected=", ".join(sorted(program.level.operators)),
                next_step=_level_hint(operator_name(node), program.level),
            )


def check_interface(before: Program, after: Program) -> None:
    """Check that inputs and outputs have kept names, shapes and types.

    Raises:
        VerifyError: If one has changed.
    """
    if [node.name for node in before.placeholders] != [node.name for node in after.placeholders]:
        raise VerifyError(
            "The pass changed the program's inputs.",
            seen=", ".join(node.name for node in after.placeholders),
            expected=", ".join(node.name for node in before.placeholders),
            next_step="keep every placeholder, or declare changes_interface = True",
        )
    pairs = list(zip(before.placeholders, after.placeholders, strict=True))
    old, new = before.output.args[0], after.output.args[0]
    if len(old) != len(new):  # type: ignore[arg-type]
        raise VerifyError(
            "The pass changed the number of outputs.",
            seen=len(new),  # type: ignore[arg-type]
            expected=len(old),  # type: ignore[arg-type]
        )
    pairs += list(zip(old, new, strict=True))  # type: ignore[arg-type]
    names = symbol_names(before)
    for left, right in pairs:
        was, now = _value(left), _value(right)
        if not same_type(was, now):
            raise VerifyError(
                "The pass changed the type of an input or output.",
                where=locate(right) if isinstance(right, fx.Node) else None,
                seen=_describe(now, names),
                expected=_describe(was, names),
                next_step="convert back to the old type, or declare changes_interface = True",
            )


def _check_tensor(program: Program, node: fx.Node) -> None:
    name = str(node.target)
    if not program.has_tensor(name):
        if node.meta.get("val") is None:
            return  # the graph of a higher-order operator
        raise VerifyError(
            f"The program reads the tensor '{name}', which it does not hold.",
            where=locate(node),
            next_step="add it with Rewriter.constant or Program.set_tensor",
        )
    tensor, recorded = program.tensor(name), node.meta.get("val")
    if recorded is None or not same_type(recorded, tensor):
        raise VerifyError(
            f"The recorded type of the tensor '{name}' is wrong.",
            where=locate(node),
            seen=_describe(recorded, {}),
            expected=_describe(tensor, {}),
            next_step="replace tensors with Rewriter.replace_tensor",
        )


def _check_call(node: fx.Node, mode: Any) -> None:
    key = _signature_of(node)
    if node.meta.get("checked") == key:
        return
    recorded = node.meta.get("val")
    if recorded is None and not node.users:
        return
    try:
        derived = infer_node(node, mode)
    except Exception as error:
        raise VerifyError(
            f"The arguments of '{operator_name(node)}' do not fit together.",
            where=locate(node),
            seen=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            next_step="check the shapes that the pass gave to the operator",
        ) from error
    if not same_type(recorded, derived):
        raise VerifyError(
            f"The recorded type of '{operator_name(node)}' is wrong.",
            where=locate(node),
            seen=_describe(recorded, {}),
            expected=_describe(derived, {}),
            next_step="insert nodes with Rewriter.call, and call Rewriter.infer after changing arguments",
        )
    node.meta["checked"] = key


def _signature_of(node: fx.Node) -> str:
    types = [_describe(_value(argument), {}) for argument in node.all_input_nodes]
    return f"{node.target}|{node.args}|{node.kwargs}|{types}|{_describe(node.meta.get('val'), {})}"


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, fx.Node) else item


def _describe(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        return describe_type(value.dtype, [rename_symbols(size, names) for size in value.shape])
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_describe(item, names) for item in value) + ")"
    return "nothing recorded" if value is None else str(value)


def _level_hint(name: str, level: Level) -> str:
    if name == "observe":
        return "freeze the observers first: freeze-observers"
    if level is Level.ATEN:
        return "this pass works on float programs: put it before quantization"
    return "put the pass where the program has the level that it needs"
