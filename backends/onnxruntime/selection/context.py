"""What the steps of selection share: the rewriter, and every tensor and node that was made already."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.backends.onnxruntime import packing
from sqcompile.backends.onnxruntime.selection.values import Mapping, dynamic_arguments
from sqcompile.operators.table import operator_of
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort


@dataclass(frozen=True)
class PackedWeight:
    """Nodes and attributes of a weight packed for MatMulNBits."""

    codes: fx.Node
    scales: fx.Node
    zero_points: fx.Node | None
    bits: int
    block_size: int
    columns: int
    outputs: int


class Context:
    """One lowering under way. What it makes it remembers, so that a tied weight is stored once.

    Attributes:
        program: The program being lowered, a snapshot.
        edit: Its rewriter.
        notes: What the report should say about the choices made.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.edit = Rewriter(program, origin="onnxruntime")
        self.notes: list[str] = []
        self._made: dict[tuple[str, ...], fx.Node] = {}
        self._packed: dict[tuple[str, ...], PackedWeight | None] = {}
        self._dynamic: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = {}

    def constant(self, kind: str, sources: tuple[fx.Node, ...], make: Callable[[], Tensor]) -> fx.Node:
        """Return the node of the tensor that `make` derives from stored `sources`; one a kind.

        Args:
            kind: What the tensor is: the suffix of its name.
            sources: The `get_attr` nodes that it depends on; the first gives it its name.
            make: Computes it; called at most once.
        """
        key = (kind, *(str(source.target) for source in sources))
        if key not in self._made:
            self._made[key] = self.edit.constant(f"{sources[0].target}_{kind}", make(), like=sources[0])
        return self._made[key]

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the stored tensor of a `get_attr` node."""
        return self.program.tensor(node).detach()

    def typed_zero_point(self, mapping: Mapping, dtype: torch.dtype) -> fx.Node:
        """Return the stored zero point in the codes' own type, as ONNX wants it."""
        return self.constant(
            str(dtype).removeprefix("torch."),
            (mapping.zero_point, mapping.source if mapping.stored else mapping.zero_point),
            lambda: self.tensor(mapping.zero_point).to(dtype),
        )

    def signed_codes(self, mapping: Mapping) -> tuple[fx.Node, fx.Node]:
        """Return codes and zero point of a weight as int8.

        The integer kernels are fastest with signed weights; unsigned codes move by 128, which changes no value.
        """
        if mapping.qmin < 0:
            return mapping.source, self.typed_zero_point(mapping, torch.int8)
        shift = 1 << (mapping.bits - 1)
        codes = self.constant(
            "int8", (mapping.source,), lambda: (self.tensor(mapping.source).int() - shift).to(torch.int8)
        )
        zero_point = self.constant(
            "signed",
            (mapping.zero_point, mapping.source),
            lambda: (self.tensor(mapping.zero_point) - shift).to(torch.int8),
        )
        return codes, zero_point

    def transposed(self, codes: fx.Node, mapping: Mapping) -> fx.Node:
        """Return a matrix of codes with its axes exchanged.

        A weight that something else reads too is transposed in the graph (ONNX Runtime does it once, at load),
        so that the file holds it once.
        """
        readers = [user for value in mapping.source.users for user in value.users]
        if codes is mapping.source and not all(_multiplies(user) for user in readers):
            return self.edit.call(aten.t.default, codes, like=mapping.node)
        return self.constant("transposed", (codes,), lambda: self.tensor(codes).t().contiguous())

    def dequantized(
        self, mapping: Mapping, codes: fx.Node, zero_point: fx.Node | None, axis: int | None
    ) -> fx.Node:
        """Insert the dequantize node of a weight with one scale, or one for each index of `axis`."""
        return self.edit.call(
            ort.dequantize_linear.default, codes, mapping.scale, zero_point, axis, None, like=mapping.node
        )

    def packed(self, mapping: Mapping, *, outputs_axis: int) -> PackedWeight | None:
        """Return a weight packed for MatMulNBits, or None if it cannot be.

        Args:
            mapping: Dequantization of a matrix.
            outputs_axis: 0 for weights [N, K], 1 for weights [K, N].
        """
        key = (str(mapping.source.target), str(mapping.scale.target), str(outputs_axis))
        if key not in self._packed:
            self._packed[key] = self._pack(mapping, outputs_axis)
        return self._packed[key]

    def dynamic_codes(self, quantized: Mapping) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Return uint8 codes, scale and uint8 zero point of an activation that is quantized as it comes.

        By DynamicQuantizeLinear where that means the same: affine, 8 bits, one scale from the tensor itself.
        """
        node = quantized.node
        if node not in self._dynamic:
            with self.edit.after(node):
                self._dynamic[node] = self._quantize_dynamically(quantized)
        return self._dynamic[node]

    def _quantize_dynamically(self, quantized: Mapping) -> tuple[fx.Node, fx.Node, fx.Node]:
        if dynamic_arguments(quantized) == (quantized.source, None, None, 0, 255, False):
            triple = self.edit.call(
                ort.dynamic_quantize_linear.default, quantized.source, like=quantized.node
            )
            codes, scale, zero_point = (
                self.edit.call(operator.getitem, triple, index, like=quantized.node) for index in range(3)
            )
            return codes, scale, zero_point
        zero_point = self.edit.call(aten.to.dtype, quantized.zero_point, torch.uint8, like=quantized.node)
        return quantized.node, quantized.scale, zero_point

    def is_packed(self, mapping: Mapping) -> bool:
        """Whether the weight [N, K] was packed already."""
        key = (str(mapping.source.target), str(mapping.scale.target), "0")
        return self._packed.get(key) is not None

    def _pack(self, mapping: Mapping, outputs_axis: int) -> PackedWeight | None:
        codes, scale, zero_point = (
            self.tensor(n) for n in (mapping.source, mapping.scale, mapping.zero_point)
        )
        if codes.dim() != 2 or mapping.bits > 8:
            return None
        axis = None if mapping.axis is None else mapping.axis % 2
        grouped = mapping.group_size is not None
        if axis is not None and (axis == outputs_axis) == grouped:
            return None  # a scale for each input, or groups of outputs
        if outputs_axis == 1:
            codes = codes.t()
            scale, zero_point = (item.t() if item.dim() == 2 else item for item in (scale, zero_point))
        result = packing.pack(
            codes, scale, zero_point, qmin=mapping.qmin, qmax=mapping.qmax, group_size=mapping.group_size
        )
        if result is None:
            return None
        sources = (mapping.source, mapping.scale)
        zeros = result.zero_points
        return PackedWeight(
            codes=self.constant("packed", sources, lambda: result.packed),
            scales=self.constant("scales", sources, lambda: result.scales),
            zero_points=None if zeros is None else self.constant("zero_points", sources, lambda: zeros),
            bits=result.bits,
            block_size=result.block_size,
            columns=result.columns,
            outputs=codes.shape[0],
        )


def _multiplies(node: fx.Node) -> bool:
    entry = operator_of(node)
    return entry is not None and entry.kind in ("linear", "matmul")
