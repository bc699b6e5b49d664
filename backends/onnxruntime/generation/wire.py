"""The exported model, with its cache: inputs `past_key_values.*` and `attention_mask`, outputs `present.*`.

Names and meanings are those of onnxruntime-genai. `attention_mask` [batch, total] is 1 for tokens, those of the
cache before those of this call, and 0 for padding on the right; so it says how long each row is. Cached keys and
values of a row lie behind each other from the first place on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from sqcompile.backends.onnxruntime.contrib import DOMAIN, OUR_DOMAIN, VERSION
from sqcompile.backends.onnxruntime.generation.rewrite import MASK, TOKENS, Cache, Generation
from sqcompile.backends.onnxruntime.weights import constant

LOGITS = "logits"
PAST = "past_key_values.{layer}.{kind}"
PRESENT = "present.{layer}.{kind}"

_Dim: TypeAlias = int | str | ir.SymbolicDim

_TOTAL, _PAST_LENGTH = "total_sequence_length", "past_sequence_length"
_LOWEST = float(np.finfo(np.float32).min)


def wire(model: ir.Model, generation: Generation) -> None:
    """Give a model the inputs and outputs of its cache; it is changed in place.

    Args:
        model: An exported program of new tokens.
        generation: What is known of it.
    """
    _Wiring(model.graph, generation).run()
    model.opset_imports[DOMAIN] = VERSION


class _Wiring:
    """One model under way."""

    def __init__(self, graph: ir.Graph, generation: Generation) -> None:
        self.graph = graph
        self.generation = generation
        (self.tokens,) = graph.inputs
        assert self.tokens.shape is not None
        self.batch, self.sequence = self.tokens.shape
        self._first = next(iter(graph))
        self._count = 0
        self._biases: dict[int, ir.Value] = {}
        self._positions: dict[str, ir.Value] = {}

    def run(self) -> None:
        """Replace every operator of ours."""
        self._interface()
        self._lengths()
        layer = 0
        for node in list(self.graph):
            if node.domain != OUR_DOMAIN:
                continue
            self._first = node  # what is made for it stands before it
            match node.op_type:
                case "CachedAttention":
                    self._attention(node, layer)
                    layer += 1
                case "TokenPositions":
                    self._replace(node, self._row_positions())
                case "SharedPositions":
                    self._replace(node, self._shared_positions())
        self.graph.outputs[0].name = LOGITS

    # --- inputs -------------------------------------------------------------------------------------

    def _interface(self) -> None:
        """Leave the tokens as the one input of the program, and add the mask."""
        self.graph.inputs.clear()
        self.tokens.name = TOKENS
        self.mask = self._input(MASK, ir.DataType.INT64, [self.batch, _TOTAL])
        self.graph.inputs.extend([self.tokens, self.mask])

    def _input(self, name: str, dtype: ir.DataType, shape: Sequence[_Dim]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def _lengths(self) -> None:
        """Compute what all layers share: how long this call, the past and each row are."""
        self.new = self._call("Shape", [self.tokens], "new", start=1, end=2)
        self.total = self._call("Shape", [self.mask], "total", start=1, end=2)
        self.past = self._call("Sub", [self.total, self.new], "past")
        self.total_int32 = self._call("Cast", [self.total], "total_int32", to=ir.DataType.INT32)
        self.lengths = self._call("ReduceSum", [self.mask, self._numbers("axis", [1])], "lengths", keepdims=1)
        last = self._call("Sub", [self.lengths, self._numbers("one", [1])], "last")
        last = self._call("Squeeze", [last, self._numbers("axis", [1])], "last_of_rows")
        self.last_int32 = self._call("Cast", [last], "last_int32", to=ir.DataType.INT32)

    def _offsets(self) -> ir.Value:
        """Return 0, 1, .. for the new tokens."""
        if "offsets" not in self._positions:
            scalar = self._call("Squeeze", [self.new], "new_number")
            self._positions["offsets"] = self._call(
                "Range", [self._number("zero", 0), scalar, self._number("step", 1)], "offsets"
            )
        return self._positions["offsets"]

    def _shared_positions(self) -> ir.Value:
        """Return the positions [sequence] of new tokens, where no row is padded."""
        if "shared" not in self._positions:
            self._positions["shared"] = self._call("Add", [self.past, self._offsets()], "shared_positions")
        return self._positions["shared"]

    def _row_positions(self) -> ir.Value:
        """Return the positions [batch, sequence] of new tokens: from 0 in a prompt, else behind each row's end."""
        if "rows" not in self._positions:
            zero = self._numbers("none", [0])
            prompt = self._call("Equal", [self.past, zero], "prompt")
            before = self._call("Sub", [self.lengths, self.new], "before")
            first = self._call("Where", [prompt, zero, before], "first")
            self._positions["rows"] = self._call("Add", [first, self._offsets()], "positions")
        return self._positions["rows"]

    def _bias(self, low: int) -> ir.Value:
        """Return what hides keys before a window [batch, 1, sequence, total]."""
        if low not in self._biases:
            number = self._call("Squeeze", [self.total], f"total_number_{-low}")
            keys = self._call(
                "Range", [self._number("zero", 0), number, self._number("step", 1)], f"keys_{-low}"
            )
            first = self._call(
                "Add", [self._row_positions(), self._numbers(f"low_{-low}", [low])], f"window_{-low}"
            )
            first = self._call("Unsqueeze", [first, self._numbers("axes", [1, 3])], f"window_start_{-low}")
            seen = self._call("GreaterOrEqual", [keys, first], f"window_seen_{-low}")
            shown, hidden = (
                constant(self.graph, f"generation/{name}", np.array(value, np.float32))
                for name, value in (("shown", 0.0), ("hidden", _LOWEST))
            )
            self._biases[low] = self._call("Where", [seen, shown, hidden], f"window_bias_{-low}")
        return self._biases[low]

    # --- attention ----------------------------------------------------------------------------------

    def _attention(self, node: ir.Node, layer: int) -> None:
        cache = self.generation.caches[layer]
        shape = [self.batch, cache.heads, _PAST_LENGTH, cache.head_size]
        dtype = ir.DataType.INT8 if cache.dtype == "int8" else ir.DataType.FLOAT
        past = [self._input(PAST.format(layer=layer, kind=kind), dtype, shape) for kind in ("key", "value")]
        self.graph.inputs.extend(past)
        merged = [
            self._merged(value, layer, kind)
            for value, kind in zip(node.inputs[:3], ("q", "k", "v"), strict=True)
        ]
        low = node.attributes["low"].as_int() if "low" in node.attributes else None
        heads = _heads(node)
        inputs: list[ir.Value | None] = [*merged, *past, self.last_int32, self.total_int32]
        inputs += [None, None, None, None if low is None else self._bias(low)]
        attributes = [
            ir.AttrInt64("num_heads", heads),
            ir.AttrInt64("kv_num_heads", cache.heads),
            ir.AttrFloat32("scale", node.attributes["scale"].as_float()),
        ]
        if cache.dtype == "int8":
            scales = [self._scales(value, cache) for value in node.inputs[3:5]]
            inputs += [None, *scales]
            attributes.append(ir.AttrInt64("kv_cache_bit_width", 8))
            attributes += [ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL") for kind in "kv"]
        while inputs[-1] is None:
            inputs.pop()
        attention = ir.Node(
            DOMAIN,
            "GroupQueryAttention",
            inputs,
            attributes,
            num_outputs=3,
            name=node.name,
        )
        self.graph.insert_before(node, attention)
        result, *present = attention.outputs
        result.name = f"{node.outputs[0].name}/merged"
        for value, kind in zip(present, ("key", "value"), strict=True):
            value.name = PRESENT.format(layer=layer, kind=kind)
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([self.batch, cache.heads, _TOTAL, cache.head_size])
        self.graph.outputs.extend(present)
        heads_apart = self._call(
            "Reshape",
            [result, self._numbers(f"apart_{heads}_{cache.head_size}", [0, 0, heads, cache.head_size])],
            f"{layer}/apart",
        )
        self._replace(node, self._call("Transpose", [heads_apart], f"{layer}/result", perm=[0, 2, 1, 3]))

    def _scales(self, value: ir.Value | None, cache: Cache) -> ir.Value:
        """Return the scales of an int8 cache, one for each channel of each head."""
        assert value is not None and value.const_value is not None
        scale = value.const_value.numpy().astype(np.float32).reshape(1, -1, 1, 1)
        spread = np.broadcast_to(scale, (1, cache.heads, 1, cache.head_size))
        return constant(self.graph, f"{value.name}/channels", spread)

    def _merged(self, value: ir.Value | None, layer: int, kind: str) -> ir.Value:
        """Return heads [batch, heads, sequence, width] as [batch, sequence, heads · width]."""
        assert value is not None
        turned = self._call("Transpose", [value], f"{layer}/{kind}/turned", perm=[0, 2, 1, 3])
        return self._call("Reshape", [turned, self._numbers("merged", [0, 0, -1])], f"{layer}/{kind}/merged")

    # --- nodes --------------------------------------------------------------------------------------

    def _call(self, operator: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"generation/{name}")  # type: ignore[arg-type]
        node.outputs[0].name = f"generation/{name}"
        self.graph.insert_before(self._first, node)
        return node.outputs[0]

    def _numbers(self, name: str, numbers: list[int]) -> ir.Value:
        return constant(self.graph, f"generation/{name}", np.array(numbers, np.int64))

    def _number(self, name: str, number: int) -> ir.Value:
        return constant(self.graph, f"generation/{name}_number", np.array(number, np.int64))

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def _heads(node: ir.Node) -> int:
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    heads = query.shape[1]
    assert isinstance(heads, int)
    return heads
