"""Taking over the masks of `torch.nn.utils.prune`.

A pruned module keeps `weight_orig` and a float mask `weight_mask`, and multiplies them before every
call. In a program that product is `mask(@weight_orig, @weight_mask)`, with a boolean mask, which the
passes know: it survives fine-tuning, and `ApplyMasks` bakes it in.
"""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

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
    edit = Rewriter(program)
    for node in list(program.graph.nodes):
        pair = _masked_weight(program, node)
        if pair is None:
            continue
        weight, mask = pair
        stored = _boolean(edit, mask)
        with edit.before(node):
            masked = edit.call(torch.ops.sqcompile.mask.default, weight, stored, like=node)
        node.replace_all_uses_with(masked)
        edit.erase(node)
        found.append(str(stored.target))
    if found:
        edit.finish()
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


def _boolean(edit: Rewriter, mask: fx.Node) -> fx.Node:
    """Return the node of the mask as a boolean tensor: the same node, unless others read its numbers."""
    tensor = edit.program.tensor(mask)
    if tensor.dtype is torch.bool:
        return mask
    if len(mask.users) > 1:
        return edit.constant(f"{mask.target}_bool", tensor != 0, like=mask)
    edit.replace_tensor(mask, tensor != 0)
    return mask
