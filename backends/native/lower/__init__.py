"""Program -> plan.

context.py      the plan under construction, and the table of how operators become steps
shapes.py, elementwise.py, reductions.py, products.py, quantized.py    that table, by kind of operator
convolutions.py, pooling.py                    the same for images; windows.py: where they look
codes.py        patterns of 8-bit codes, as integer steps on images; images.py: how those lie
generation.py   the plan that continues texts; positions.py: what it has to know
linears.py      products with quantized weights; weights.py: their packed forms; choice.py: which of them
patterns.py     several operators that are one step
fuse.py         several steps that are one
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import fx

from sqcompile.backends.native.file import can_encode
from sqcompile.backends.native.lower import (  # noqa: F401  (each registers its operators)
    convolutions,
    elementwise,
    pooling,
    products,
    quantized,
    reductions,
    shapes,
)
from sqcompile.backends.native.lower.choice import Product
from sqcompile.backends.native.lower.codes import find_codes
from sqcompile.backends.native.lower.context import CHECKS, DTYPES, TABLE, Lowering, constant_nodes, is_size
from sqcompile.backends.native.lower.fuse import drop_unused_tensors, fuse
from sqcompile.backends.native.lower.generation import NoGenerationError, generation_of
from sqcompile.backends.native.lower.patterns import find_patterns
from sqcompile.backends.native.plan import Plan
from sqcompile.errors import BackendError
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.text import locate

__all__ = ["constant_nodes", "lower", "reason_against"]

_MAX_RANK = 8


def reason_against(node: fx.Node, constants: Collection[fx.Node]) -> str | None:
    """Return why the engine cannot run a node, or None if it can; `constants` as `constant_nodes` says."""
    if is_size(node):
        expression = getattr(getattr(node.meta["val"], "node", None), "expr", 0)
        return None if can_encode(expression) else f"the size {expression} has no form in a plan"
    if node.op == "call_module":
        return "a call of a module that was not traced"
    if node in constants:
        return None  # PyTorch computes it when the program is lowered
    if node.target is torch.ops.sqcompile.observe.default:
        return "observers are still in the program; run freeze-observers first"
    if node.target not in TABLE:
        return "the native engine has no such operator"
    check = CHECKS.get(node.target)
    return _reason_against_types(node) or (None if check is None else check(node))


def _reason_against_types(node: fx.Node) -> str | None:
    for item in (node, *node.all_input_nodes):
        value = item.meta.get("val")
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(part, torch.Tensor):
                continue
            if part.dtype not in DTYPES:
                return f"values of {part.dtype}"
            if part.dim() > _MAX_RANK:
                return f"tensors of {part.dim()} dimensions"
            for size in part.shape:
                if isinstance(size, torch.SymInt) and not can_encode(size.node.expr):
                    return f"the size {size} has no form in a plan"
    return None


class Lowered(NamedTuple):
    """A program that was lowered.

    Attributes:
        plan: What the engine executes.
        notes: What the report should say about the choices made.
        products: Products with stored weights, by layer.
    """

    plan: Plan
    notes: list[str]
    products: dict[str, Product]


def lower(program: Program, *, exact: bool = False) -> Lowered:
    """Lower a program that has only supported operators.

    Args:
        program: The program.
        exact: Whether products round nothing that the program does not round; see `backends/native/exact.py`.

    Raises:
        BackendError: If the program returns a number that is no tensor.
    """
    context = Lowering(program, exact=exact)
    for node, value in zip(program.placeholders, program.signature.inputs, strict=True):
        if value.is_tensor:
            shape = context.shape(node)
            context.define(node, context.plan.add_input(value.name, DTYPES[node.meta["val"].dtype], shape))
    patterns, inside = find_patterns(program, context)
    makers, inner = find_codes(program, context)
    patterns, inside = patterns | makers, inside | inner
    for node in program.compute_nodes():
        if node in inside or context.is_defined(node) or is_size(node) or context.is_constant(node):
            continue
        context.begin(node)
        make = patterns.get(node)
        context.define(node, make() if make is not None else TABLE[node.target](context, node))
    _define_outputs(program, context)
    if context.rounded:
        context.notes.append(
            f"{context.rounded} layers round their activations to 8 bits, with a scale for each row or group"
        )
    plan = context.plan.without_dead_steps()
    metadata = json.loads(program.signature.to_json())
    try:
        plan.generation = generation_of(plan)
    except NoGenerationError as error:
        metadata["no_generation"] = str(error)
    plan.metadata = json.dumps(metadata)
    plans = [plan] if plan.generation is None else [plan, plan.generation.plan]
    merged: dict[Any, int] = {}
    for part in plans:
        fuse(part, merged)
    drop_unused_tensors(*plans)
    return Lowered(plan, context.notes, context.products)


def _define_outputs(program: Program, context: Lowering) -> None:
    results = argument(program.output, 0)
    assert isinstance(results, (tuple, list))
    for item, value in zip(results, program.signature.outputs, strict=True):
        if not value.is_tensor:
            if isinstance(item, fx.Node):
                raise BackendError(
                    "The program returns a number that it computes from sizes.",
                    where=f"output '{value.name}', {locate(item)}",
                    seen=str(item.meta.get("val")),
                    expected="tensors and constants",
                    next_step="return the tensor instead, whose shape says the same",
                )
            continue
        assert isinstance(item, fx.Node)
        context.plan.outputs.append((value.name, context.contiguous(context.value(item))))
