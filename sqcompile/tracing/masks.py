"""Taking over the masks of `torch.nn.utils.prune`.

A pruned module keeps `weight_orig` and a float mask `weight_mask`, and multiplies them before every
call. In a program that product is `mask(@weight_orig, @weight_mask)`, with a boolean mask, which the
passes know: it survives fine-tuning, and `ApplyMasks` bakes it in.
"""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.program import Program

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mul.Tensor, _aten.mul_.Tensor})
_CASTS = frozenset({_aten.to.dtype, _aten._to_copy.default, _aten.to.dtype_layout, _aten.type_as.default})


def recognize_masks(program: Program) -> list[str]:
    """Replace products of a stored weight and its stored 0/1 mask by `mask` nodes.

    The program's mask becomes boolean; the model that was traced keeps its own.

    Returns:
        Names of the masks that were taken over.
    """
    found: list[str] = []
    for node in list(program.graph.nodes):
        pair = _masked_weight(program, node)
        if pair is None:
            continue
        weight, mask = pair
        name = str(mask.target)
        if program.tensor(name).dtype is not torch.bool:
            name = _store_boolean(program, mask)
        with program.graph.inserting_before(node):
            stored = program.graph.get_attr(name)
            masked = program.graph.call_function(torch.ops.sqcompile.mask.default, (weight, stored))
        value = mask.meta["val"]
        stored.meta["val"] = (
            value if value.dtype is torch.bool else value.new_empty(value.shape, dtype=torch.bool)
        )
        masked.meta = dict(node.meta)
        node.replace_all_uses_with(masked)
        program.graph.erase_node(node)
        found.append(name)
    if found:
        program.graph.eliminate_dead_code()
        program.recompile()
    return found


def _masked_weight(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return (weight, mask) nodes if `node` multiplies `x_orig` with a mask `x_mask` of zeros and ones."""
    if node.target not in _PRODUCTS or len(node.args) != 2:
        return None
    left, right = (_stored(argument) for argument in node.args)
    for weight, mask in ((left, right), (right, left)):
        if weight is None or mask is None or weight not in node.args:
            continue
        name = str(weight.target)
        if not name.endswith("_orig") or str(mask.target) != name.removesuffix("_orig") + "_mask":
            continue
        stored = program.tensor(mask)
        if stored.shape == program.tensor(weight).shape and bool(((stored == 0) | (stored == 1)).all()):
            return weight, mask
    return None


def _stored(value: object) -> fx.Node | None:
    """Return the node that reads a stored tensor, looking through a conversion of its type."""
    while isinstance(value, fx.Node) and value.target in _CASTS:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _store_boolean(program: Program, mask: fx.Node) -> str:
    name = str(mask.target)
    boolean = program.tensor(mask) != 0
    readers = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == name]
    if any(len(reader.users) > 1 for reader in readers) or len(readers) > 1:
        name = program.free_name(f"{name}_bool")  # something else reads the numbers too
    program.set_tensor(name, boolean)
    return name
