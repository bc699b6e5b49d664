"""Program -> the program of the tokens that are new, whose attention has a cache.

A causal language model is traced for whole sequences. What works token by token works as well on new tokens
only; attention takes the keys and values of earlier ones from a cache, and positions are counted on. So the graph
stays as it is, but for three things:

    attention    becomes `cached_attention`, if its mask provably shows every query all keys up to itself, or
                 those within a window before it
    positions    what depends on positions only (`positions.py`) is made from `token_positions`
    everything else has to work token by token: an operator that does not, or has no rule, is refused
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sqcompile.attention import Attention, attentions, shape_of, size_of
from sqcompile.backends.onnxruntime import operators  # noqa: F401  registers torch.ops.sqcompile_ort
from sqcompile.backends.onnxruntime.generation.positions import Positions, one_symbol
from sqcompile.backends.onnxruntime.selection.values import Mapping, as_dequantize, as_quantize
from sqcompile.errors import Error
from sqcompile.operators.fills import FILLS
from sqcompile.operators.table import argument
from sqcompile.positions import Affine, Band, Known, Size, match_groups
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate, operator_name

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort
sq = torch.ops.sqcompile

TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"

_HEAD_SIZE_UNIT = 8  # GroupQueryAttention takes multiples of it


class NoGenerationError(Exception):
    """Why a program cannot take a sequence piece by piece."""


@dataclass(frozen=True)
class Cache:
    """Keys and values that one attention keeps.

    Attributes:
        heads: Heads of keys and values.
        head_size: Width of each.
        dtype: What is stored of each number: `float32`, or `int8` with static scales.
    """

    heads: int
    head_size: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Generation:
    """What has to be known to run a program that generates.

    Attributes:
        query_heads: Heads of the queries, of the first attention.
        caches: One an attention, in the order of the program.
        limit: Positions that there may be, or None where nothing ends.
        vocabulary: Tokens that can be looked up; 0 if that cannot be seen.
        rows_differ: Whether rows of a batch may have different lengths, padded on the right.
    """

    query_heads: int
    caches: tuple[Cache, ...]
    limit: int | None
    vocabulary: int
    rows_differ: bool

    def to_json(self) -> str:
        """Return it as text, for the metadata of a model."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Generation:
        """Return what `to_json` wrote."""
        found = json.loads(text)
        caches = tuple(Cache(**cache) for cache in found.pop("caches"))
        return cls(caches=caches, **found)


def generating(program: Program) -> tuple[Program, Generation]:
    """Return the program of new tokens, and what is to be known of it; `program` stays as it is.

    Raises:
        NoGenerationError: If the program is no causal language model, as far as the rules can show.
    """
    try:
        return _Rewrite(program.snapshot(), per_row=True).run()
    except Error:
        # Some shape was fixed for one row of positions: then all rows share it.
        return _Rewrite(program.snapshot(), per_row=False).run()


class _Rewrite:
    """One rewrite under way.

    Args:
        program: The program, a snapshot.
        per_row: Whether each row gets positions of its own.
    """

    def __init__(self, program: Program, *, per_row: bool) -> None:
        self.program = program
        self.per_row = per_row
        self.edit = Rewriter(program, origin="onnxruntime")
        self.tokens, self.token_name, known = _find_inputs(program)
        self.batch, self.sequence = shape_of(self.tokens)
        self.positions = Positions(program, known)
        self.limits = [_range_end(program, self.sequence)]
        self.caches: list[Cache] = []
        self.query_heads = 0
        self.rows_differ = True
        self._made: dict[object, fx.Node] = {}

    def run(self) -> tuple[Program, Generation]:
        """Rewrite what the logits depend on."""
        logits = self._keep_logits()
        for found in attentions(self.program):
            self._attention(found)
        self.edit.finish()
        if not self.caches:
            raise NoGenerationError("it has no attention that could keep keys and values")
        self._materialize()
        self.edit.finish()
        self._keep_tokens()
        for node in self.program.graph.nodes:
            self._check(node)
        logits = self.program.output.args[0][0]  # type: ignore[index, assignment]
        self._check_logits(logits)
        self.limits.append(self.positions.limit)
        limits = [limit for limit in self.limits if limit is not None]
        generation = Generation(
            self.query_heads,
            tuple(self.caches),
            min(limits, default=None),
            self._vocabulary(),
            self.rows_differ,
        )
        return self.program, generation

    # --- inputs and outputs -------------------------------------------------------------------------

    def _keep_logits(self) -> fx.Node:
        """Leave the logits as the one result."""
        results = self.program.output.args[0]
        assert isinstance(results, (tuple, list))
        signature = self.program.signature
        tensors = [
            (value, item)
            for value, item in zip(signature.outputs, results, strict=True)
            if value.is_tensor and isinstance(item, fx.Node)
        ]
        if len(tensors) != 1:
            names = ", ".join(value.name for value, _ in tensors)
            raise NoGenerationError(f"it returns more than logits: {names}")
        value, logits = tensors[0]
        self._check_logits(logits)
        self.program.output.args = ((logits,),)
        self.program.signature = replace(
            signature,
            outputs=(replace(value, name="logits"),),
            out_spec=pytree.tree_structure((logits,), is_leaf=lambda item: isinstance(item, fx.Node)),
        )
        return logits

    def _keep_tokens(self) -> None:
        """Leave the tokens as the one input: the others were known, but for their sizes."""
        for node in self.program.placeholders:
            if node is self.tokens:
                continue
            for user in list(node.users):
                if user.target is not aten.sym_size.int:
                    raise NoGenerationError(
                        f"it uses its input '{node.name}' for more than masks and positions"
                    )
                user.replace_input_with(node, self.tokens)
            self.program.graph.erase_node(node)
        signature = self.program.signature
        inputs = tuple(value for value in signature.inputs if value.name == self.token_name)
        self.program.signature = replace(
            signature, inputs=inputs, in_spec=pytree.tree_structure(((0,), {})), arg_names=(self.token_name,)
        )

    def _check_logits(self, logits: fx.Node) -> None:
        shape = shape_of(logits)
        if len(shape) != 3 or shape[:2] != (self.batch, self.sequence) or not isinstance(shape[2], int):
            raise NoGenerationError("it returns no logits [batch, sequence, vocabulary]")

    def _vocabulary(self) -> int:
        """Return how many tokens there are to look up; 0 if that cannot be seen."""
        sizes = []
        same = [self.tokens]
        for node in same:
            for user in node.users:
                table = user.args[0]
                if user.target in (aten.embedding.default, aten.index.Tensor) and isinstance(table, fx.Node):
                    sizes.append(shape_of(table)[0])
                elif user.target in (*_VIEWS, aten.to.dtype):
                    same.append(user)
        return min((size for size in sizes if isinstance(size, int)), default=0)

    # --- attention ----------------------------------------------------------------------------------

    def _attention(self, found: Attention) -> None:
        node, query, key, value = found.node, found.query, found.key, found.value
        low = self._window(node, query, key)
        heads, head_size = shape_of(query)[1], shape_of(query)[3]
        kept, width = shape_of(key)[1], shape_of(value)[3]
        if not isinstance(heads, int) or not isinstance(kept, int) or heads % kept:
            raise self._refusal(f"it has {heads} heads of queries for {kept} of keys", node)
        if shape_of(value)[1] != kept or width != head_size or shape_of(key)[3] != head_size:
            raise self._refusal("its keys and values have different shapes", node)
        if not isinstance(head_size, int) or head_size % _HEAD_SIZE_UNIT:
            raise self._refusal(
                f"GroupQueryAttention takes heads of multiples of {_HEAD_SIZE_UNIT}, not {head_size}", node
            )
        scale = argument(node, 6)
        codes = [_codes(item) for item in (key, value)]
        scales: list[fx.Node | None] = [None, None]
        if codes[0] is not None and codes[1] is not None and self._int8(codes[0], codes[1]):
            key, value = codes[0].source, codes[1].source
            scales = [codes[0].scale, codes[1].scale]
        with self.edit.before(node):
            made = self.edit.call(
                ort.cached_attention.default,
                query,
                key,
                value,
                low,
                1 / math.sqrt(head_size) if scale is None else scale,
                *scales,
                like=node,
            )
        self.edit.replace(node, made)
        self.query_heads = self.query_heads or heads
        self.caches.append(Cache(kept, head_size, "float32" if scales[0] is None else "int8"))

    def _int8(self, *pairs: Mapping) -> bool:
        """Whether a cache can hold these codes: int8 around zero, with stored scales a head or a layer."""
        return all(
            pair.fixed
            and (pair.qmin, pair.qmax) == (-128, 127)
            and pair.axis in (None, 1)
            and pair.group_size is None
            and not bool(self.program.tensor(pair.zero_point).any())
            for pair in pairs
        )

    def _window(self, node: fx.Node, query: fx.Node, key: fx.Node) -> int | None:
        """Return the first key that a query sees, counted from itself; None: it sees all before it."""
        if argument(node, 4) != 0.0:
            raise self._refusal("it drops weights at random", node)
        lengths = [shape_of(item)[2:3] for item in (query, key)]
        if lengths != [(self.sequence,)] * 2 or len(shape_of(query)) != 4:
            raise self._refusal("its queries and keys are not the tokens", node)
        mask = argument(node, 3)
        if not isinstance(mask, fx.Node):
            if argument(node, 5) is True:
                return None
            raise self._refusal("it looks at later positions", node)
        known = self.positions.seen(mask)
        rank = len(shape_of(mask))
        if isinstance(known, Band) and (known.query, known.key) == (rank - 2, rank - 1) and known.high == 0:
            return known.low
        raise self._refusal("its mask does not show that it looks at earlier positions only", node)

    # --- positions ----------------------------------------------------------------------------------

    def _materialize(self) -> None:
        """Make what depends on positions only from the positions of the new tokens."""
        changed: set[fx.Node] = set()
        for node in list(self.program.graph.nodes):
            known = self.positions.of(node)
            if known is None:
                if changed.intersection(node.all_input_nodes) and node.op == "call_function":
                    self.edit.infer(node)
                    changed.add(node)
                continue
            users = [user for user in node.users if self.positions.of(user) is None]
            if not users or node.op == "get_attr" or not self._moves(node):
                continue
            with self.edit.after(node):
                made = self._made_of(known, node)
            self._note_limit(known, node, users)
            for user in users:
                user.replace_input_with(node, made)
            changed.add(made)

    def _moves(self, node: fx.Node) -> bool:
        """Whether a value has the sequence in it, or comes from an input that will be gone."""
        return any(self.sequence in _symbols(size) for size in shape_of(node)) or node.op == "placeholder"

    def _made_of(self, known: Known, node: fx.Node) -> fx.Node:
        if isinstance(known, Band):
            raise self._refusal("it uses a mask for something other than attention", node)
        shape = shape_of(node)
        axes = [axis for axis, size in enumerate(shape) if size == self.sequence]
        if known.slopes and (len(known.slopes) != 1 or [known.slopes[0][0]] != axes):
            raise self._refusal("it counts along something other than the sequence", node)
        dtype = node.meta["val"].dtype
        if not known.slopes:
            return self.edit.call(
                aten.full.default, self._sizes(shape, node), known.offset, dtype=dtype, like=node
            )
        axis, slope = known.slopes[0]
        if any(size not in (1, self.batch) for size in shape[:1] if axis) or any(
            size != 1 for place, size in enumerate(shape) if place not in (0, axis)
        ):
            raise self._refusal("it repeats positions", node)
        own = self.per_row and axis > 0
        self.rows_differ = self.rows_differ and own
        made = self._placed(own, len(shape), axis, node)
        if slope != 1:
            made = self.edit.call(aten.mul.Tensor, made, slope, like=node)
        if known.offset != 0:
            made = self.edit.call(aten.add.Tensor, made, known.offset, like=node)
        return made if dtype is torch.int64 else self.edit.call(aten.to.dtype, made, dtype, like=node)

    def _placed(self, own: bool, rank: int, axis: int, node: fx.Node) -> fx.Node:
        """Return the positions along an axis; of each row, or of all rows together."""
        if own:
            made = self.edit.call(ort.token_positions.default, self.tokens, like=node)
            rest = rank - 2
        else:
            made = self.edit.call(ort.shared_positions.default, self.tokens, like=node)
            rest = rank - 1
        ones_before = axis - 1 if own else axis
        for _ in range(ones_before):
            made = self.edit.call(aten.unsqueeze.default, made, 1 if own else 0, like=node)
        for _ in range(rest - ones_before):
            made = self.edit.call(aten.unsqueeze.default, made, -1, like=node)
        return made

    def _sizes(self, shape: Sequence[Size], node: fx.Node) -> list[object]:
        """Return sizes as what a graph can hold."""
        found: list[object] = []
        for size in shape:
            if isinstance(size, int):
                found.append(size)
            elif size in (self.batch, self.sequence):
                axis = 0 if size == self.batch else 1
                found.append(self.edit.call(aten.sym_size.int, self.tokens, axis, like=node))
            else:
                raise self._refusal(f"it has a dimension of {size}", node)
        return found

    def _note_limit(self, known: Known, node: fx.Node, users: Sequence[fx.Node]) -> None:
        """A table that positions are looked up in ends somewhere."""
        if not isinstance(known, Affine) or [slope for _, slope in known.slopes] != [1]:
            return
        for user in users:
            table = user.args[0]
            if user.target in (aten.embedding.default, aten.index.Tensor) and isinstance(table, fx.Node):
                size = shape_of(table)[0]
                if table is not node and isinstance(size, int):
                    self.limits.append(size - known.offset)

    # --- what works token by token ------------------------------------------------------------------

    def _check(self, node: fx.Node) -> None:
        """Refuse what takes in more than one position."""
        if node.op != "call_function":
            return
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, torch.Tensor):
                self._check_shape([size_of(size) for size in value.shape], node)
        reason = self._reason(node)
        if reason is not None:
            raise self._refusal(reason, node)

    def _check_shape(self, shape: Sequence[Size], node: fx.Node) -> None:
        sizes = [size for size in shape if self.sequence in _symbols(size)]
        if len(sizes) > 1:
            raise self._refusal("it compares positions", node)
        for size in sizes:
            factor = size / self.sequence
            if self.sequence in _symbols(factor) or not factor.is_polynomial():
                raise self._refusal("it takes a part of the sequence", node)

    def _along(self, item: object, axes: Sequence[object] | None) -> bool:
        """Whether any of a value's axes (None: all) holds tokens."""
        if not isinstance(item, fx.Node) or not isinstance(item.meta.get("val"), torch.Tensor):
            return False
        shape = shape_of(item)
        chosen = range(len(shape)) if axes is None else [int(axis) % len(shape) for axis in axes]  # type: ignore[call-overload]
        return any(self.sequence in _symbols(shape[axis]) for axis in chosen)

    def _reason(self, node: fx.Node) -> str | None:
        """Return why an operator may mix positions, or None."""
        target, source = node.target, node.args[0] if node.args else None
        if not isinstance(target, torch._ops.OpOverload):
            return None  # arithmetic of sizes, and parts of results
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return None  # sizes
        if target in _MARKERS or target in _PLAIN or target in FILLS:
            return None
        if torch.Tag.pointwise in target.tags:
            numbers = [
                item for item in node.all_input_nodes if not isinstance(item.meta.get("val"), torch.Tensor)
            ]
            return "it computes with the length of the sequence" if numbers else None
        if target in _VIEWS:
            return self._view_reason(node)
        if target in _LAST:
            return self._mixes(source, [-1])
        if target in _NORMS:
            normalized = argument(node, 1)
            assert isinstance(normalized, (list, tuple))
            return self._mixes(source, [-1 - place for place in range(len(normalized))])
        if target in _PRODUCTS:
            return self._mixes(node.args[0], [-1]) or self._mixes(node.args[1], [-2])
        if target is aten.addmm.default:
            return self._mixes(node.args[1], [-1]) or self._mixes(node.args[2], [-2])
        if target in _ALONG:
            axes = argument(node, _ALONG[target])
            return self._mixes(
                source, axes if isinstance(axes, (list, tuple)) else None if axes is None else [axes]
            )
        if target is aten.slice.Tensor:
            assert isinstance(source, fx.Node)
            return None if shape_of(source) == shape_of(node) else self._mixes(source, [argument(node, 1)])
        if target in _JOINING:
            items = node.args[0]
            assert isinstance(items, (list, tuple))
            axis = argument(node, 1)
            if target is aten.stack.default:
                return None
            return next(filter(None, (self._mixes(item, [axis]) for item in items)), None)
        if target in (aten.embedding.default, aten.index.Tensor):
            return self._mixes(source, None)
        if target is sq.dynamic_scale.default:
            return self._scale_reason(node)
        return f"there is no rule for {operator_name(node)}"

    def _mixes(self, item: object, axes: Sequence[object] | None) -> str | None:
        return "it works along the sequence" if self._along(item, axes) else None

    def _view_reason(self, node: fx.Node) -> str | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        groups = match_groups(shape_of(source), shape_of(node))
        if groups is None:
            return "the sequence is merged with another dimension"
        for before, after in groups:
            shape = shape_of(source)
            if (
                len(before) > 1
                and len(after) > 1
                and any(self.sequence in _symbols(shape[d]) for d in before)
            ):
                return "the sequence is merged with another dimension"
        return None

    def _scale_reason(self, node: fx.Node) -> str | None:
        """One scale for all values is finer where there are fewer; one of a channel would be of one token."""
        source, axis = node.args[0], argument(node, 1)
        if axis is None or not isinstance(source, fx.Node):
            return None
        assert isinstance(axis, int)
        others = [place for place in range(len(shape_of(source))) if place != axis % len(shape_of(source))]
        return self._mixes(source, others) if argument(node, 2) is None else None

    def _refusal(self, reason: str, node: fx.Node) -> NoGenerationError:
        return NoGenerationError(f"{reason} ({operator_name(node)} at {locate(node)})")


def _codes(node: fx.Node) -> Mapping | None:
    """Return the quantization that a value was just rounded by, or None."""
    decoding = as_dequantize(node)
    encoding = None if decoding is None else as_quantize(decoding.source)
    if decoding is None or encoding is None or decoding.node.args[1:] != encoding.node.args[1:]:
        return None
    return encoding


def _symbols(size: Size) -> set[object]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _range_end(program: Program, size: Size) -> int | None:
    """Return the greatest size that a symbol stands for, or None."""
    found = program.constraints.get(size)
    upper = None if found is None else found.upper
    return int(upper) if upper is not None and upper.is_Integer else None


def _find_inputs(program: Program) -> tuple[fx.Node, str, dict[fx.Node, Known]]:
    """Return the tokens, their name, and what is known of the other inputs: no token is padding."""
    named = {
        value.name: node
        for value, node in zip(program.signature.inputs, program.placeholders, strict=True)
        if value.is_tensor
    }
    token_name = next(iter(named)) if len(named) == 1 else TOKENS
    tokens = named.get(token_name)
    if tokens is None or tokens.meta["val"].dtype is not torch.int64 or tokens.meta["val"].dim() != 2:
        raise NoGenerationError(f"it has no input '{TOKENS}' [batch, sequence] of int64")
    batch, sequence = shape_of(tokens)
    if not one_symbol(sequence):
        raise NoGenerationError(f"its sequences have {sequence} tokens; trace it with a dynamic dimension 1")
    if not one_symbol(batch) and batch != 1:
        raise NoGenerationError(f"its batches have {batch} rows; trace it with a dynamic dimension 0")
    known: dict[fx.Node, Known] = {}
    for name, node in named.items():
        if node is tokens:
            continue
        fits = shape_of(node) == shape_of(tokens) and not node.meta["val"].dtype.is_floating_point
        if not fits or name not in (MASK, POSITIONS):
            raise NoGenerationError(f"nothing is known of its input '{name}'")
        known[node] = Affine((), 1) if name == MASK else Affine(((1, 1),), 0)
    return tokens, token_name, known


_MARKERS = (ort.cached_attention.default, ort.token_positions.default, ort.shared_positions.default)

_PLAIN = (
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    sq.quantize.default,
    sq.dequantize.default,
    sq.fake_quantize.default,
    sq.mask.default,
    sq.lookup.default,
)

_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)

_LAST = (aten.linear.default,)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
_JOINING = (aten.cat.default, aten.stack.default)

# Operators that work along axes, and the position of these.
_ALONG = {
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.any.dim: 1,
    aten.all.dim: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.argmax.default: 1,
    aten.softmax.int: 1,
    aten.log_softmax.int: 1,
    aten.cumsum.default: 1,
    aten.select.int: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.unbind.int: 1,
    aten.topk.default: 2,
    aten.index_select.default: 1,
}
