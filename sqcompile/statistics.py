"""What a program weighs: parameters, zeros, bits, bytes — in total and by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sqcompile.evaluate import constant_value
from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.quantization.format import middle_code


@dataclass(frozen=True)
class Size:
    """Size of a program's stored tensors.

    Attributes:
        parameters: Number of weights and other floating-point or code elements.
        zeros: How many of the layers' weights are zero once masks are applied.
        weights: Number of the layers' weights (each stored tensor once).
        size_bytes: Bytes at the declared bits: 4-bit codes count half a byte, masks one bit.
    """

    parameters: int
    zeros: int
    weights: int
    size_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that are zero."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Average bits a parameter, scales and zero points included."""
        return 8 * self.size_bytes / self.parameters if self.parameters else 0.0


def multiply_adds(program: Program, inputs: Sequence[Any]) -> dict[str, int]:
    """Count the multiply-adds of each layer in one call, those with zeros included; a table that is read has none.

    Args:
        program: The program.
        inputs: Flat, checked inputs of the call.
    """
    sizes: dict[sympy.Symbol, int] = {}
    for node, item in zip(program.placeholders, inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(item, torch.Tensor):
            sizes.update(zip(map(_expression, value.shape), item.shape, strict=True))

    def count(node: fx.Node) -> int:
        return int(math.prod(sympy.sympify(_expression(size)).subs(sizes) for size in node.meta["val"].shape))

    found: dict[str, int] = {}
    for layer in layers_of(program):
        if layer.kind == "embedding" or layer.data is None:
            continue
        weight = layer.weight_value.meta["val"]
        # Each input of a transposed convolution meets as many weights as each output of any other layer.
        transposed = layer.kind.startswith("conv_transpose")
        places = count(layer.data if transposed else layer.node)
        axis = layer.operator.in_axis if transposed else layer.operator.out_axis
        each = weight.numel() // max(weight.shape[axis], 1)
        found[layer.name] = found.get(layer.name, 0) + places * each
    return found


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def program_size(program: Program) -> Size:
    """Measure a program's stored tensors."""
    bits = stored_bits(program)
    layers = {layer.weight_name: layer for layer in layers_of(program)}
    auxiliary = _auxiliary(program)
    parameters = zeros = weights = total_bits = 0
    for name, tensor in program.tensors():
        total_bits += math.ceil(tensor.numel() * bits.get(name, 8 * tensor.element_size()) / 8) * 8
        # Beside weights there are tables of integers: positions, indices, what masks attention.
        if name not in auxiliary and (tensor.is_floating_point() or name in bits):
            parameters += tensor.numel()
        if name in layers:
            weights += tensor.numel()
            zeros += weight_zeros(program, layers[name])
    return Size(parameters, zeros, weights, total_bits // 8)


def stored_bits(program: Program) -> dict[str, float]:
    """Return the declared bits of an element, by name, of every stored tensor of codes and masks.

    A zero point takes as many bits as a code; those of symmetric formats are all the same and take none.
    """
    bits: dict[str, float] = {}
    for node in program.compute_nodes():
        name = _operator(node)
        source = node.args[0] if node.args else None
        if name == "dequantize" and isinstance(source, fx.Node) and _is_stored(source):
            qmin, qmax = argument(node, 5), argument(node, 6)
            assert isinstance(qmin, int) and isinstance(qmax, int)
            width = (qmax - qmin).bit_length()
            if source.op == "get_attr":
                bits[str(source.target)] = width
            zero = node.args[2]
            if isinstance(zero, fx.Node) and zero.op == "get_attr":
                fixed = bool((program.tensor(zero) == middle_code(qmin, qmax)).all())
                bits[str(zero.target)] = 0 if fixed else width
        elif name == "lookup" and isinstance(source, fx.Node) and source.op == "get_attr":
            table = node.args[1]
            assert isinstance(table, fx.Node)
            bits[str(source.target)] = (table.meta["val"].numel() - 1).bit_length()
        elif name == "mask" and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
            bits[str(node.args[1].target)] = 1
    return bits


def _is_stored(node: fx.Node) -> bool:
    """Whether a node is a stored tensor, or a lookup of one."""
    if _operator(node) == "lookup":
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node.op == "get_attr"


def weight_zeros(program: Program, layer: Layer) -> int:
    """Count the zeros of a layer's weight as the operator sees it: masked, dequantized."""
    stored = program.tensor(layer.weight)
    value = layer.weight_value
    if value is layer.weight:
        return stored.numel() - int(torch.count_nonzero(stored))
    if _operator(value) == "dequantize" and value.args[0] is layer.weight:
        zero = value.args[2]
        if isinstance(zero, fx.Node) and zero.op == "get_attr" and not bool(program.tensor(zero).any()):
            return stored.numel() - int(torch.count_nonzero(stored))
    full = constant_value(program, value)
    return 0 if full is None else full.numel() - int(torch.count_nonzero(full))


def _auxiliary(program: Program) -> set[str]:
    """Names of tensors that serve others: masks, scales, zero points, tables."""
    found: set[str] = set()
    for node in program.compute_nodes():
        name = _operator(node)
        if name in ("quantize", "dequantize", "fake_quantize"):
            served = node.args[1:3]
        elif name in ("mask", "lookup"):
            served = node.args[1:2]
        else:
            continue
        found |= {str(item.target) for item in served if isinstance(item, fx.Node) and item.op == "get_attr"}
    return found


def _operator(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "sqcompile":
        return target._schema.name.removeprefix("sqcompile::")
    return ""
