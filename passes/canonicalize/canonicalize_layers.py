"""Writing every layer in one form: a product with a stored matrix is `linear`, a stored sum is its bias."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx, nn

from sqcompile.infer import same_type
from sqcompile.layers import Layer, layer_of
from sqcompile.levels import Level
from sqcompile.matching import is_call, is_mask, sole_user, tensor_users, users_text
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter, set_bias
from sqcompile.sparsity import Sparsity

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.addmm.default})
_RESHAPES = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
)
_CONVOLUTIONS = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


class CanonicalizeLayers(Pass):
    """Write every product with a stored matrix as linear, with its bias inside, and every convolution alike.

    Models write the same layer in many ways. What follows (batch norm folding, pruning, quantization,
    kernels) then needs to know one.

    Shapes: x [*, K]; weight of a product [K, O], of linear [O, K]; bias [O].
    Rewrites: addmm(b, x, w), matmul(x, w), mm(x, w)  ==>  linear(x, wᵀ, b), with wᵀ as a new tensor
            `<weight>_transposed`; where w is itself a transposed tensor, that tensor is taken;
        reshape(linear(reshape(x, [-1, K])), [*, O])  ==>  linear(x), with x reshaped to [*, K] if it is not;
        linear(x, w) + b, conv(x, w) + b of stored b, one value a channel  ==>  linear(x, w, b), conv(x, w, b);
        conv(padding="same" or "valid")  ==>  conv(padding=[…]), with a pad before it where one side
            gets more than the other.
        Masks, and promises about zeros, are transposed with their weights.
    Keeps: close(rtol=1e-4): the matrix product may add in another order.
    Rejects: a weight that something else uses as it lies, which would be stored twice; alpha or beta;
        a bias after a layer that has other users.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite in graph order, so that a sum finds the layer that was a product."""
        edit = Rewriter(program, self.name)
        for node in list(program.graph.nodes):
            reason = None
            if node.target in _PRODUCTS:
                reason = _product(edit, node)
            elif node.target in _CONVOLUTIONS:
                _convolution(edit, node)
            elif is_call(node, aten.add.Tensor):
                reason = _sum(edit, node)
            elif node.target in _RESHAPES:
                _reshaped_layer(edit, node)
            if reason is not None:
                context.remark(node, reason)
        return PassResult(changes=edit.finish())


# --- products -------------------------------------------------------------------------------------------


def _product(edit: Rewriter, node: fx.Node) -> str | None:
    """Turn a product with a stored matrix into linear, or say why not."""
    bias: object = None
    if is_call(node, aten.addmm.default):
        bias, x, matrix = node.args
        if node.kwargs:
            return "it scales its summands (alpha, beta)"
        if not isinstance(bias, fx.Node) or value_of(bias).dim() != 1:
            return "what it adds is not one value a column"
    else:
        x, matrix = node.args
    source = _stored_matrix(matrix)
    if source is None:
        return None
    if source is matrix and (reason := _why_not_transposed(edit.program, source)) is not None:
        return reason
    with edit.before(node):
        weight = _transpose(edit, source) if source is matrix else source
        linear = edit.call(aten.linear.default, x, weight, *([bias] if bias is not None else []), like=node)
    edit.replace(node, linear)
    edit.erase(node)
    return None


def _stored_matrix(value: object) -> fx.Node | None:
    """Return the stored (or masked) matrix that a value is, or that it is the transpose of."""
    if _is_stored_matrix(value):
        assert isinstance(value, fx.Node)
        return value
    if not isinstance(value, fx.Node) or not value.args or not _is_stored_matrix(value.args[0]):
        return None
    swaps = (
        is_call(value, aten.t.default)
        or (is_call(value, aten.transpose.int) and {axis % 2 for axis in value.args[1:]} == {0, 1})  # type: ignore[operator]
        or (is_call(value, aten.permute.default) and [axis % 2 for axis in value.args[1]] == [1, 0])  # type: ignore[operator,union-attr]
    )
    assert isinstance(value.args[0], fx.Node)
    return value.args[0] if swaps else None


def _is_stored_matrix(value: object) -> bool:
    if isinstance(value, fx.Node) and is_mask(value):
        return _is_stored_matrix(value.args[0]) and _is_stored_matrix(value.args[1])
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    recorded = value_of(value)
    return isinstance(recorded, torch.Tensor) and recorded.dim() == 2


def _why_not_transposed(program: Program, matrix: fx.Node) -> str | None:
    """Say why a second, transposed copy of a matrix would be needed, or return None."""
    stored = matrix.args[0] if is_mask(matrix) else matrix
    assert isinstance(stored, fx.Node)
    for user in [*matrix.users, *tensor_users(program, str(stored.target))]:
        if user is not matrix and (user.target not in _PRODUCTS or user.args[-1] is not matrix):
            return f"@{stored.target} would be stored twice: %{user.name} uses it as it lies"
    return None


def _transpose(edit: Rewriter, matrix: fx.Node) -> fx.Node:
    """Return the transposed matrix as a stored tensor; with its mask, if it has one."""
    if is_mask(matrix):
        weight, mask = matrix.args
        assert isinstance(weight, fx.Node) and isinstance(mask, fx.Node)
        transposed = _transpose(edit, weight)
        turned = _stored_transpose(edit, mask, f"{transposed.target}_mask")
        masked = next((user for user in transposed.users if is_mask(user) and user.args[1] is turned), None)
        return masked or edit.call(torch.ops.sqcompile.mask.default, transposed, turned, like=matrix)
    name = str(matrix.target)
    transposed = _stored_transpose(edit, matrix, f"{name}_transposed")
    promise = edit.program.sparsity.pop(name, None)
    if promise is not None:
        turned_mask = promise.mask.t().contiguous()
        edit.program.sparsity[str(transposed.target)] = Sparsity(turned_mask, promise.pattern)
    return transposed


def _stored_transpose(edit: Rewriter, source: fx.Node, name: str) -> fx.Node:
    program = edit.program
    tensor = program.tensor(source)
    turned = tensor.detach().t().contiguous()
    if program.has_tensor(name) and torch.equal(program.tensor(name), turned):
        return edit.read(name, like=source)  # for another user of the same matrix
    return edit.constant(
        name, nn.Parameter(turned) if isinstance(tensor, nn.Parameter) else turned, like=source
    )


# --- what stands around a layer -------------------------------------------------------------------------


def _sum(edit: Rewriter, node: fx.Node) -> str | None:
    """Take a stored summand of a layer's output into its bias, or say why not."""
    if argument(node, 2) != 1:
        return None
    for value, other in (node.args[:2], node.args[1::-1]):
        layer = layer_of(edit.program, value) if isinstance(value, fx.Node) else None
        if layer is None or layer.operator.bias is None or not isinstance(other, fx.Node):
            continue
        if other.op != "get_attr" or not _is_per_channel(layer, other):
            continue
        if sole_user(layer.node) is not node:
            return f"the value of {layer.kind} %{layer.node.name} {users_text(layer.node)}"
        if not same_type(value_of(layer.node), value_of(node)):
            return f"it changes the type of {layer.kind} %{layer.node.name}"
        if layer.bias is not None and layer.bias.op != "get_attr":
            return f"the bias of {layer.kind} %{layer.node.name} is computed, not stored"
        _add_to_bias(edit, layer, other)
        edit.replace(node, layer.node)
        edit.erase(node)
        return None
    return None


def _is_per_channel(layer: Layer, summand: fx.Node) -> bool:
    """Whether a stored tensor broadcasts along a layer's output as one value a channel."""
    output, shape = value_of(layer.node), list(value_of(summand).shape)
    axis = -1 if layer.kind == "linear" else 1 - value_of(layer.weight).dim()
    if len(shape) > output.dim() or len(shape) < -axis:
        return False
    channels = shape.pop(axis)
    return channels == output.shape[axis] and all(size == 1 for size in shape)


def _add_to_bias(edit: Rewriter, layer: Layer, summand: fx.Node) -> None:
    program = edit.program
    assert layer.operator.bias is not None
    if layer.bias is None and value_of(summand).dim() == 1:
        edit.set_argument(layer.node, layer.operator.bias, summand)
        return
    dtype = value_of(layer.node).dtype
    total = program.tensor(summand).detach().to(torch.float64).reshape(-1)
    if layer.bias is not None:
        total = total + program.tensor(layer.bias).detach().to(torch.float64)
    set_bias(edit, layer, total.to(dtype))


def _reshaped_layer(edit: Rewriter, node: fx.Node) -> None:
    """Let linear work on all axes itself, where they are merged before it and split after it."""
    linear = node.args[0]
    if not is_call(linear, aten.linear.default):
        return
    assert isinstance(linear, fx.Node)
    merged = linear.args[0]
    if sole_user(linear) is not node or not isinstance(merged, fx.Node) or merged.target not in _RESHAPES:
        return
    source, depth = merged.args[0], value_of(merged).shape[-1]
    assert isinstance(source, fx.Node)
    if value_of(node).shape[-1] != value_of(linear).shape[-1]:
        return  # what it splits is the outputs of the layer
    with edit.before(node):
        x = source if _has_shape(source, value_of(node), depth) else _split(edit, source, node, depth)
        if x is None:
            return
        whole = edit.call(aten.linear.default, x, *linear.args[1:], like=linear, **linear.kwargs)
    edit.replace(node, whole)
    edit.erase(node)
    edit.erase(linear)


def _has_shape(x: fx.Node, output: torch.Tensor, depth: int) -> bool:
    """Whether a value is shaped as the input of a linear with that output: the same but for the last axis."""
    value = value_of(x)
    wanted = output.new_empty((*output.shape[:-1], depth), dtype=value.dtype)
    return same_type(value, wanted)


def _split(edit: Rewriter, source: fx.Node, node: fx.Node, depth: int) -> fx.Node | None:
    """Reshape a layer's input as a reshape of its output says, if that says it in sizes."""
    if is_call(node, aten.flatten.using_ints):
        return None
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    return edit.call(aten.reshape.default, source, [*sizes[:-1], depth], like=node)


# --- convolutions ---------------------------------------------------------------------------------------


def _convolution(edit: Rewriter, node: fx.Node) -> None:
    """Write a convolution's padding as numbers."""
    x, weight = node.args[:2]
    bias, stride, padding, dilation, groups = (argument(node, position) for position in range(2, 7))
    assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
    kernel = value_of(weight).shape[2:]
    spacing = list(dilation) * (len(kernel) // len(dilation))  # type: ignore[call-overload,arg-type]
    totals = [
        step * (size - 1) if padding == "same" else 0 for step, size in zip(spacing, kernel, strict=True)
    ]
    with edit.before(node):
        if any(total % 2 for total in totals):  # the odd one goes to the end
            amounts = [amount for total in reversed(totals) for amount in (0, total % 2)]
            x = edit.call(aten.constant_pad_nd.default, x, amounts, 0.0, like=node)
        convolution = edit.call(
            _CONVOLUTIONS[node.target],  # type: ignore[index]
            x,
            weight,
            bias,
            stride,
            [total // 2 for total in totals],
            dilation,
            groups,
            like=node,
        )
    edit.replace(node, convolution)
    edit.erase(node)
