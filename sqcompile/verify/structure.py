"""Structure: the graph is well-formed, its recorded types are right, its level and interface hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.errors import LevelError, VerifyError
from sqcompile.infer import (
    describe_value,
    fake_mode_of,
    infer_node,
    is_derived,
    misfit,
    note_derived,
    same_type,
)
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.signature import Value, describe_type
from sqcompile.text import locate, operator_name, rename_symbols, symbol_names


def check_structure(program: Program) -> None:
    """Check that the graph lints, that every tensor exists, and that recorded types are right.

    A node whose operator, arguments and recorded types are as they were when it was last checked is
    not derived again, so the cost after a pass is that of the nodes which the pass touched.

    Raises:
        VerifyError: If not; the text names the node.
    """
    for node in program.graph.nodes:
        if node.op == "get_attr":
            _check_tensor(program, node)
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerifyError(
            "The graph is not well-formed.",
            seen=str(error).splitlines()[0],
            expected="every value is defined before it is used, and belongs to this graph",
            next_step="insert nodes before their users: with Rewriter.before(node) or Rewriter.after(node)",
        ) from error
    mode = fake_mode_of(program)
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            _check_operator(node)
            _check_call(node, mode)
    check_signature(program)


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
    """Check that inputs and outputs have kept names, order, shapes, types and structure.

    Raises:
        VerifyError: If one has changed.
    """
    declare = "or declare changes_interface = True"
    old, new = before.signature, after.signature
    for what, was, now in (
        ("inputs", _names(before), _names(after)),
        ("inputs", old.inputs, new.inputs),
        ("outputs", old.outputs, new.outputs),
    ):
        if was != now:
            raise VerifyError(
                f"The pass changed the program's {what}.",
                where=f"{what} of the program",
                seen=", ".join(map(str, now)) or f"no {what}",
                expected=", ".join(map(str, was)) or f"no {what}",
                next_step=f"keep their names, number, order, shapes and types, {declare}",
            )
    if (old.in_spec, old.out_spec, old.arg_names) != (new.in_spec, new.out_spec, new.arg_names):
        raise VerifyError(
            "The pass changed how inputs or outputs are nested.",
            where="signature of the program",
            seen=f"{new.arg_names}, {new.in_spec} -> {new.out_spec}",
            expected=f"{old.arg_names}, {old.in_spec} -> {old.out_spec}",
            next_step=f"keep the signature, {declare}",
        )
    outputs = zip(before.output.args[0], after.output.args[0], strict=True)  # type: ignore[arg-type]
    for left, right in (*zip(before.placeholders, after.placeholders, strict=True), *outputs):
        if not same_type(_value(left), _value(right)):
            symbols = symbol_names(before)
            raise VerifyError(
                "The pass changed the type of an input or output.",
                where=locate(right) if isinstance(right, fx.Node) else "outputs of the program",
                seen=describe_value(_value(right), symbols),
                expected=describe_value(_value(left), symbols),
                next_step=f"convert back to the old type, {declare}",
            )
    if dict(old.dims) != dict(new.dims):
        raise VerifyError(
            "The pass changed the range of a dimension.",
            where="signature of the program",
            seen=dict(new.dims),
            expected=dict(old.dims),
            next_step=f"keep the signature, {declare}",
        )


def _names(program: Program) -> list[str]:
    return [node.name for node in program.placeholders]


def check_signature(program: Program) -> None:
    """Check that inputs and outputs of the graph are those which the signature declares.

    Raises:
        VerifyError: If not.
    """
    results = program.output.args[0]
    if not isinstance(results, (tuple, list)):
        raise VerifyError(
            "The program's output is not a flat tuple.",
            where=locate(program.output),
            seen=str(results),
            expected="a tuple of values, one an output",
            next_step="set the output node's arguments to ((value, …),)",
        )
    symbols = symbol_names(program)
    for what, values, declared in (
        ("input", program.placeholders, program.signature.inputs),
        ("output", results, program.signature.outputs),
    ):
        if len(values) != len(declared):
            raise VerifyError(
                f"The program has another number of {what}s than its signature.",
                where=f"{what}s of the program",
                seen=f"{len(values)}: {', '.join(map(str, values))}",
                expected=f"{len(declared)}: {', '.join(map(str, declared))}",
                next_step=f"keep every {what}; placeholders stay even where nothing uses them",
            )
        for item, value in zip(values, declared, strict=True):
            recorded = _value(item)
            if not _fits(value, recorded, symbols):
                raise VerifyError(
                    f"The {what} '{value.name}' is not what the signature says.",
                    where=locate(item) if isinstance(item, fx.Node) else f"{what} '{value.name}'",
                    seen=describe_value(recorded, symbols),
                    expected=describe_type(value.dtype, value.shape) if value.is_tensor else str(value),
                    next_step="convert back to the old type, or declare changes_interface = True "
                    "and set the program's signature",
                )


def _fits(value: Value, recorded: Any, symbols: dict[str, str]) -> bool:
    if not value.is_tensor or not isinstance(recorded, torch.Tensor):
        return value.is_tensor == isinstance(recorded, torch.Tensor)
    shape = value.shape or ()
    if value.dtype != recorded.dtype or len(shape) != recorded.dim():
        return False
    sizes = [size if isinstance(size, int) else rename_symbols(size, symbols) for size in recorded.shape]
    # Equal sizes may be written differently (2*n, n + n); `check_interface` compares those.
    return all(
        size == declared or _is_expression(size) or _is_expression(declared)
        for size, declared in zip(sizes, shape, strict=True)
    )


def _is_expression(size: int | str) -> bool:
    return isinstance(size, str) and not size.isidentifier()


def _check_operator(node: fx.Node) -> None:
    """Check that a node calls an operator: overloads of torch.ops, and Python's own on tuples and sizes."""
    target = node.target
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise VerifyError(
                f"The program holds '{operator_name(node)}', which writes into its arguments.",
                where=locate(node),
                seen=str(target),
                expected="operators that make new values: others may read the old one, and backends move nodes",
                next_step="insert the operator that returns a new value, such as torch.ops.aten.relu.default "
                "for relu_",
            )
        if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            return
        home = getattr(target, "__module__", "") or ""
        name = getattr(target, "__name__", "")
        if home in ("_operator", "math", "builtins") or name.startswith("sym_"):
            return
    raise VerifyError(
        "The program holds a call that is no operator.",
        where=locate(node),
        seen=f"{node.op} {operator_name(node)}",
        expected="an overload such as torch.ops.aten.relu.default",
        next_step="insert operators with Rewriter.call(torch.ops.aten.….default, …)",
    )


def _check_tensor(program: Program, node: fx.Node) -> None:
    name = str(node.target)
    if not program.has_tensor(name):
        if node.meta.get("val") is None:
            return  # the graph of a higher-order operator
        raise VerifyError(
            f"The program reads the tensor '{name}', which it does not hold.",
            where=locate(node),
            seen="no tensor of that name",
            expected="a parameter or buffer",
            next_step="add it with Rewriter.constant or Program.set_tensor",
        )
    tensor, recorded = program.tensor(name), node.meta.get("val")
    if recorded is None or not same_type(recorded, tensor):
        raise VerifyError(
            f"The recorded type of the tensor '{name}' is wrong.",
            where=locate(node),
            seen=describe_value(recorded),
            expected=describe_value(tensor),
            next_step="replace tensors with Rewriter.replace_tensor",
        )


def _check_call(node: fx.Node, mode: Any) -> None:
    if is_derived(node):
        return
    recorded = node.meta.get("val")
    if recorded is None and not node.users:
        return
    try:
        derived = infer_node(node, mode)
    except Exception as error:
        seen, expected = misfit(error)
        raise VerifyError(
            f"The arguments of '{operator_name(node)}' do not fit together.",
            where=locate(node),
            seen=seen,
            expected=expected,
            next_step="check the shapes that the pass gave to the operator",
        ) from error
    if not same_type(recorded, derived, match_unknown=True):
        raise VerifyError(
            f"The recorded type of '{operator_name(node)}' is wrong.",
            where=locate(node),
            seen=describe_value(recorded),
            expected=describe_value(derived),
            next_step="insert nodes with Rewriter.call, and call Rewriter.infer after changing arguments",
        )
    note_derived(node)


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, fx.Node) else item


def _level_hint(name: str, level: Level) -> str:
    if name == "observe":
        return "freeze the observers first: freeze-observers"
    if level is Level.ATEN:
        return "this pass works on float programs: put it before quantization"
    return "put the pass where the program has the level that it needs"
