"""The plan of a decoder, made into one that takes only the tokens that are new.

A causal language model is traced for whole sequences. Here its plan becomes a second one, in which each size
that was the sequence is one of three: the tokens of this call ("new"), one position a row ("last", the only
one whose logits anybody wants), or all positions so far ("all"). Sizes are followed backward from the logits
through every operator. What a token needs of others, it needs through attention: keys and values stay in a
cache, and the mask has to show that no token sees a later one. Where a rule is missing, or an operator
mixes positions in any other way, the model does not generate, and the reason names the operator.

The rows of a batch lie behind each other in one row of tokens, each with positions of its own: texts of
different lengths need no padding.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import sympy

from sqcompile.backends.native.file import as_size
from sqcompile.backends.native.lower.positions import Positions
from sqcompile.backends.native.plan import (
    NUMPY_DTYPES,
    Generation,
    Plan,
    Shape,
    Size,
    Step,
    SymbolRange,
    Value,
)
from sqcompile.positions import LOW, Affine, Band, Known, match_groups

NEW, LAST, ALL = "new", "last", "all"

TOKENS, ROWS, KEYS = (sympy.Symbol(name, integer=True, positive=True) for name in ("tokens", "rows", "keys"))
_SIZES = {NEW: TOKENS, LAST: ROWS, ALL: KEYS}
_LARGEST = 2**31 - 1
_FRAMES = 6  # of Python, for each step
_FRAME_BYTES = 1024  # of the C stack, where Python uses it (3.10)
_LARGEST_STACK = 1 << 30
_AFFINE, _AFFINE_TENSOR = 2, 3  # what quantize_rows takes its scale from

Role: TypeAlias = str | tuple[int | str, ...] | None
Roles: TypeAlias = tuple[Role, ...]
"""What each dimension of a value is: one of the three above, or None where it is no sequence.

Rows that are heads times tokens are a tuple of both, in their order.
"""

Key: TypeAlias = tuple[int, Roles]


class NoGenerationError(Exception):
    """Why a plan cannot take a sequence piece by piece."""


def generation_of(plan: Plan) -> Generation:
    """Return the plan that generates.

    Args:
        plan: The plan for whole sequences; constants that generation needs are added to its tensors.

    Raises:
        NoGenerationError: If the plan is no causal language model, as far as the rules can show.
    """
    return _with_deep_stack(lambda: _rewritten(plan), len(plan.steps))


def _rewritten(plan: Plan) -> Generation:
    stored = len(plan.tensors)
    try:
        first = _Rewriter(plan, frozenset())
        first.run()
    finally:
        del plan.tensors[stored:]
    return _Rewriter(plan, frozenset(first.made)).run()


def _with_deep_stack(work: Callable[[], Generation], steps: int) -> Generation:
    """Follow a plan backward by recursion, which is as deep as the model: on a stack that has room for it."""
    results: list[Generation] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    limit, size = sys.getrecursionlimit(), threading.stack_size()
    sys.setrecursionlimit(limit + _FRAMES * steps)
    threading.stack_size(min(_LARGEST_STACK, (16 << 20) + _FRAME_BYTES * _FRAMES * steps))
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
        sys.setrecursionlimit(limit)
    if errors:
        raise errors[0]
    return results[0]


class _Rewriter:
    """One pass over the plan.

    Args:
        plan: The plan for whole sequences.
        computed: Values, with roles, that are computed for all new tokens: their last ones are picked out.
    """

    def __init__(self, plan: Plan, computed: frozenset[Key]) -> None:
        self.plan = plan
        self.computed = computed
        self.made: dict[Key, Value] = {}
        self.known_made: dict[tuple[Known, str, Shape, Roles], Value] = {}
        self.steps_made: dict[tuple[int, Role], list[Value]] = {}
        self.caches = 0
        self.tokens, self.sequence, known = _find_inputs(plan)
        batch = self.tokens.shape[0]
        assert isinstance(self.sequence, sympy.Symbol)
        one = {batch: 1} if isinstance(batch, sympy.Symbol) else {}
        self.one: dict[sympy.Symbol, int] = one
        self._sizes: dict[Size, Size] = {}
        self.shapes: dict[int, Shape] = {
            value.index: tuple(self._without_batch(size) for size in value.shape) for value in plan.values
        }
        self.positions = Positions(plan, self.shapes, known)
        self.limit = plan.symbols[self.sequence].high
        self.makers = {value.index: step for step in plan.steps for value in step.outputs}
        self.step_numbers = {id(step): number for number, step in enumerate(plan.steps)}
        # Constants of both plans are the same tensors.
        self.result = Plan(
            symbols={symbol: SymbolRange(symbol.name, 1, _LARGEST) for symbol in (TOKENS, ROWS, KEYS)},
            tensors=plan.tensors,
        )
        self.new_tokens = self.result.add_input("tokens", "i64", (1, TOKENS))
        self.new_positions = self.result.add_input("positions", "i64", (TOKENS,))
        self.last_tokens = self.result.add_input("last", "i64", (ROWS,))
        self.key_positions = self.result.add_input("keys", "i64", (KEYS,))
        self.name = ""

    def run(self) -> Generation:
        """Rewrite what the logits depend on."""
        name, logits = self._logits()
        value = self.instance(logits, (None, LAST, None))
        vocabulary = self.shapes[logits.index][2]
        assert isinstance(vocabulary, int)
        value = self._step("reshape", [value], "f32", (ROWS, vocabulary))
        value = self._step("contiguous", [value], "f32", (ROWS, vocabulary))
        self.result.outputs = [(name, value)]
        if not self.caches:
            raise NoGenerationError("it has no attention")
        return Generation(self.result, self.limit, self._vocabulary())

    def _logits(self) -> tuple[str, Value]:
        for name, value in self.plan.outputs:
            shape = self.shapes[value.index]
            if value.dtype == "f32" and len(shape) == 3 and shape[:2] == (1, self.sequence):
                if isinstance(shape[2], int):
                    return name, value
        raise NoGenerationError("it returns no logits [batch, sequence, vocabulary]")

    def _vocabulary(self) -> int:
        """Return how many tokens there are to look up; 0 if that cannot be seen."""
        sizes = [
            self.shapes[step.inputs[0].index][0]
            for step in self.plan.steps
            if step.operator == "index" and step.inputs[1] is self.tokens and step.inputs[0] is not None
        ]
        return min((size for size in sizes if isinstance(size, int)), default=0)

    def _without_batch(self, size: Size) -> Size:
        if not isinstance(size, sympy.Expr):
            return size
        if size not in self._sizes:
            self._sizes[size] = as_size(size.subs(self.one))
        return self._sizes[size]

    # --- values -----------------------------------------------------------------------------------

    def instance(self, value: Value, roles: Roles) -> Value:
        """Return a value for some of the positions."""
        key = (value.index, roles)
        if key not in self.made:
            self.made[key] = self._instance(value, roles)
        return self.made[key]

    def _instance(self, value: Value, roles: Roles) -> Value:
        shape = self.shapes[value.index]
        for size, role in zip(shape, roles, strict=True):
            if role is None and size == self.sequence:
                raise self._refusal("it takes in a whole sequence at once", value)
            if (size == self.sequence) != isinstance(role, str) or (role is None) != isinstance(size, int):
                raise self._refusal(f"it has a dimension of {size}", value)
        known = self.positions.of(value)
        if known is not None and value.kind != "constant":
            return self._materialized(known, value.dtype, shape, roles)
        if value.kind == "constant":
            return self.result.share_constant(value)
        if LAST in roles:
            whole = tuple(NEW if role == LAST else role for role in roles)
            if (value.index, whole) in self.computed or value is self.tokens:
                return self._pick(self.instance(value, whole), roles.index(LAST), self.last_tokens)
        if value is self.tokens and NEW in roles:
            return self.new_tokens
        sequences = [role for role in roles if role is not None]
        step = self.makers.get(value.index)
        if sequences == [ALL] and (step is None or step.operator not in _VIEWS):
            return self._cached(value, roles)
        if step is None:
            raise self._refusal("an input is used that generation does not have", value)
        return self._rewritten(step, value, roles)

    def _rewritten(self, step: Step, value: Value, roles: Roles) -> Value:
        rule = _RULES.get(step.operator)
        place = step.outputs.index(value)
        # What does not depend on the call at all is as it was.
        if rule is None and any(roles):
            raise self._refusal(f"there is no rule for {step.operator}", value)
        before, self.name = self.name, step.name
        try:
            return _copy(self, step, place, roles) if rule is None else rule(self, step, place, roles)
        finally:
            self.name = before

    def _cached(self, value: Value, roles: Roles) -> Value:
        """Return a value at all positions: those before this call were kept."""
        new = self.instance(value, tuple(NEW if role == ALL else role for role in roles))
        number, self.caches = self.caches, self.caches + 1
        return self._step(
            "append",
            [self._step("contiguous", [new], new.dtype, new.shape)],
            value.dtype,
            self.sized(value, roles),
            (roles.index(ALL), number),
        )

    def _pick(self, value: Value, axis: int, places: Value) -> Value:
        """Return the elements of a dimension at some places."""
        shape = (*value.shape[:axis], *places.shape, *value.shape[axis + 1 :])
        return self._step("index", [value, places], value.dtype, shape, (axis,))

    def sized(self, value: Value, roles: Roles) -> Shape:
        """Return the shape of a value for these roles."""
        shape = self.shapes[value.index]
        return tuple(_size(size, role) for size, role in zip(shape, roles, strict=True))

    # --- what depends on positions only -------------------------------------------------------------

    def _positions_of(self, role: str) -> Value:
        if role == NEW:
            return self.new_positions
        if role == ALL:
            return self.key_positions
        key = (-1, (LAST,))
        if key not in self.made:
            self.made[key] = self._pick(self.new_positions, 0, self.last_tokens)
        return self.made[key]

    def _materialized(self, known: Known, dtype: str, shape: Shape, roles: Roles) -> Value:
        key = (known, dtype, shape, roles)
        found = self.known_made.get(key)
        if found is None:
            if isinstance(known, Affine):
                found = self._sum(known, shape, roles)
            else:
                found = self._band(known, shape, roles)
            if found.dtype != dtype:
                found = self._step("cast", [found], dtype, found.shape)
            sizes = tuple(_size(size, role) for size, role in zip(shape, roles, strict=True))
            if found.shape != sizes:
                found = self._step("expand", [found], dtype, sizes)
                found = self._step("contiguous", [found], dtype, sizes)
            self.known_made[key] = found
        return found

    def _number(self, number: int) -> Value:
        return self.result.add_constant(np.array(number, NUMPY_DTYPES["i64"]))

    def _index_along(self, dimension: int, shape: Shape, roles: Roles) -> Value:
        """Return the index of a dimension, in the rank of a shape."""
        role, size = roles[dimension], shape[dimension]
        if isinstance(role, str):
            index = self._positions_of(role)
        elif isinstance(size, int):
            index = self.result.add_constant(np.arange(size))
        else:
            raise NoGenerationError(f"a range over {size}")
        wanted = tuple(index.shape[0] if d == dimension else 1 for d in range(len(shape)))
        return index if wanted == index.shape else self._step("reshape", [index], "i64", wanted)

    def _sum(self, known: Affine, shape: Shape, roles: Roles) -> Value:
        total: Value | None = None
        for dimension, slope in known.slopes:
            index = self._index_along(dimension, shape, roles)
            if slope != 1:
                index = self._step("mul", [index, self._number(slope)], "i64", index.shape)
            total = index if total is None else self._binary("add", total, index, "i64")
        if total is None:
            return self._number(known.offset)
        return total if known.offset == 0 else self._binary("add", total, self._number(known.offset), "i64")

    def _band(self, known: Band, shape: Shape, roles: Roles) -> Value:
        query, key = (self._index_along(d, shape, roles) for d in (known.query, known.key))
        parts = []
        if known.high is not None:
            parts.append(self._binary("le", key, self._shifted(query, known.high), "boolean"))
        if known.low is not None:
            parts.append(self._binary("le", self._shifted(query, known.low), key, "boolean"))
        return parts[0] if len(parts) == 1 else self._binary("bit_and", parts[0], parts[1], "boolean")

    def _shifted(self, value: Value, number: int) -> Value:
        return value if number == 0 else self._binary("add", value, self._number(number), "i64")

    # --- steps --------------------------------------------------------------------------------------

    def _step(
        self,
        operator: str,
        inputs: Sequence[Value | None],
        dtype: str,
        shape: Shape,
        ints: Sequence[Size] = (),
        floats: Sequence[float] = (),
    ) -> Value:
        return self.result.add_step(operator, inputs, [(dtype, shape)], ints, floats, self.name)[0]

    def _binary(self, operator: str, a: Value, b: Value, dtype: str) -> Value:
        rank = max(a.rank, b.rank)
        shapes = [(1,) * (rank - item.rank) + item.shape for item in (a, b)]
        shape = tuple(y if x == 1 else x for x, y in zip(*shapes, strict=True))
        return self._step(operator, [a, b], dtype, shape)

    def add(
        self,
        step: Step,
        inputs: Sequence[Value | None],
        place: int,
        roles: Roles,
        ints: Sequence[Size] | None = None,
    ) -> Value:
        """Add an operator with one output as it was, on other inputs."""
        output = step.outputs[place]
        assert len(step.outputs) == 1
        ints = [self.fixed(size, output) for size in step.ints] if ints is None else ints
        return self._step(step.operator, inputs, output.dtype, self.sized(output, roles), ints, step.floats)

    def fixed(self, size: Size, value: Value) -> Size:
        """Return a whole number that has to be the same for every call."""
        size = self._without_batch(size)
        if not isinstance(size, int):
            raise self._refusal(f"it needs the number {size}", value)
        return size

    def broadcast(self, item: Value | None, roles: Roles) -> Value | None:
        """Return an operand for the roles of a result that it is broadcast to."""
        if item is None:
            return None
        shape = self.shapes[item.index]
        own = roles[len(roles) - len(shape) :] if shape else ()
        return self.instance(
            item, tuple(None if size == 1 else role for size, role in zip(shape, own, strict=True))
        )

    def reshaped(self, source: Shape, target: Shape, roles: Roles, value: Value) -> Roles:
        """Return the roles before a reshape."""
        groups = match_groups(source, target)
        result: list[Role] = [None] * len(source)
        for before, after in groups or ():
            if not any(roles[d] for d in after):
                continue
            # What the dimensions are made of, the outer ones first; then dealt out to those before.
            parts: list[int | str] = []
            for d in after:
                role, size = roles[d], target[d]
                parts += role if isinstance(role, tuple) else [role or size]
            for d in before:
                own = [parts.pop(0)] if parts else []
                while parts and not self._covers(own, source[d]):
                    own.append(parts.pop(0))
                if not own or not self._covers(own, source[d]):
                    raise self._refusal("the sequence is merged with another dimension", value)
                if any(isinstance(part, str) for part in own):
                    result[d] = own[0] if len(own) == 1 else tuple(own)  # type: ignore[assignment]
        if groups is None and any(roles):
            raise self._refusal("the sequence is merged with another dimension", value)
        return tuple(result)

    def _covers(self, parts: Sequence[int | str], size: Size) -> bool:
        """Whether parts make up a dimension."""
        sizes = [self.sequence if isinstance(part, str) else part for part in parts]
        return bool(sympy.simplify(math.prod(sizes) - size) == 0)

    def along(self, roles: Roles, dimensions: Sequence[int], value: Value, what: str) -> None:
        """Refuse a sequence in dimensions that an operator works along."""
        if any(roles[d] is not None for d in dimensions):
            raise self._refusal(f"it {what} along the sequence", value)

    def refuse(self, reason: str, value: Value) -> NoGenerationError:
        """Return the error that names the operator and where it came from."""
        return self._refusal(reason, value)

    def _refusal(self, reason: str, value: Value) -> NoGenerationError:
        step = self.makers.get(value.index)
        where = "an input" if step is None else f"{step.operator} of {step.name or 'the model'}"
        return NoGenerationError(f"{reason} ({where})")


def _size(size: Size, role: Role) -> Size:
    """Return the size of a dimension for its role."""
    if role is None:
        return size
    if isinstance(role, str):
        return _SIZES[role]
    return as_size(math.prod(_SIZES[part] if isinstance(part, str) else part for part in role))


def _find_inputs(plan: Plan) -> tuple[Value, Size, dict[Value, Known]]:
    """Return the tokens, the sequence, and what is known of the other inputs: no token is padding."""
    names = dict(plan.inputs)
    integers = [value for value in names.values() if value.dtype in ("i64", "i32") and value.rank == 2]
    tokens = names.get("input_ids", integers[0] if len(integers) == len(names) == 1 else None)
    if tokens is None or tokens.dtype != "i64" or tokens.rank != 2:
        raise NoGenerationError("it has no input 'input_ids' [batch, sequence] of int64")
    batch, sequence = tokens.shape
    if not isinstance(sequence, sympy.Symbol):
        raise NoGenerationError(f"its sequences have {sequence} tokens; trace it with a dynamic dimension 1")
    if not isinstance(batch, sympy.Symbol) and batch != 1:
        raise NoGenerationError(f"its batches have {batch} rows; trace it with a dynamic dimension 0")
    known: dict[Value, Known] = {}
    for name, value in names.items():
        if value is tokens:
            continue
        if value.shape != tokens.shape or value.dtype not in ("i64", "i32", "boolean"):
            raise NoGenerationError(f"nothing is known of its input '{name}'")
        if name == "attention_mask":
            known[value] = Affine((), 1)
        elif name == "position_ids":
            known[value] = Affine(((1, 1),), 0)
        else:
            raise NoGenerationError(f"nothing is known of its input '{name}'")
    return tokens, sequence, known


# --- rules: how the roles of a result follow to the operands -----------------------------------------

Rule = Callable[[_Rewriter, Step, int, Roles], Value]


def _copy(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    """What has no sequence in it, neither in its result nor in its operands."""
    inputs = []
    for item in step.inputs:
        if item is not None and any(size == r.sequence for size in r.shapes[item.index]):
            raise r.refuse("it takes in a whole sequence at once", step.outputs[place])
        inputs.append(None if item is None else r.instance(item, (None,) * item.rank))
    key = (r.step_numbers[id(step)], None)
    if key not in r.steps_made:
        outputs = [(item.dtype, r.sized(item, (None,) * item.rank)) for item in step.outputs]
        ints = [r.fixed(size, step.outputs[place]) for size in step.ints]
        r.steps_made[key] = r.result.add_step(step.operator, inputs, outputs, ints, step.floats, step.name)
    return r.steps_made[key][place]


def _elementwise(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    return r.add(step, [r.broadcast(item, roles) for item in step.inputs], place, roles)


def _reshape(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    source, output = _first(step), step.outputs[place]
    before = r.reshaped(r.shapes[source.index], r.shapes[output.index], roles, output)
    return r.add(step, [r.instance(source, before)], place, roles)


def _permute(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    before: list[Role] = [None] * len(roles)
    for d, old in enumerate(step.ints):
        before[int(old)] = roles[d]
    return r.add(step, [r.instance(_first(step), tuple(before))], place, roles)


def _slice(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    source, output = _first(step), step.outputs[place]
    axis = step.ints[0]
    assert isinstance(axis, int)
    size = r.shapes[source.index][axis]
    if roles[axis] is None:
        if size == r.sequence:
            raise r.refuse("it takes a part of the sequence", output)
        return r.add(step, [r.instance(source, roles)], place, roles)
    if size == r.sequence:
        if tuple(step.ints[1:]) != (0, 1):
            raise r.refuse("it takes a part of the sequence", output)
        return r.instance(source, roles)
    # The first rows of a table with a row for every position.
    if not isinstance(size, int) or tuple(step.ints[1:]) != (0, 1) or roles[axis] == ALL:
        raise r.refuse("it takes a part of a table", output)
    r.limit = min(r.limit, size)
    inner = r.instance(source, tuple(None if d == axis else role for d, role in enumerate(roles)))
    return r._pick(inner, axis, r._positions_of(str(roles[axis])))


def _cat(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    axis = step.ints[0]
    assert isinstance(axis, int)
    r.along(roles, [axis], step.outputs[place], "joins pieces")
    return r.add(step, [r.instance(item, roles) for item in step.inputs if item is not None], place, roles)


def _index(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    source, indices, first = _first(step), step.inputs[1:], step.ints[0]
    assert isinstance(first, int)
    rank = max(item.rank for item in indices if item is not None)
    inner = (*roles[:first], *((None,) * len(indices)), *roles[first + rank :])
    found = [r.broadcast(item, roles[first : first + rank]) for item in indices]
    for item in indices:
        known, size = r.positions.of(item), r.shapes[source.index][first]
        if isinstance(known, Affine) and len(indices) == 1 and isinstance(size, int):
            if [slope for _, slope in known.slopes] == [1]:  # a table of positions ends somewhere
                r.limit = min(r.limit, size - known.offset)
    return r.add(step, [r.instance(source, inner), *found], place, roles)


def _rowwise(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    """What works along the last dimension, on rows of the first operand."""
    source = _first(step)
    r.along(roles, [len(roles) - 1], step.outputs[place], "works")
    rest = [None if item is None else r.instance(item, (None,) * item.rank) for item in step.inputs[1:]]
    return r.add(step, [r.instance(source, roles), *rest], place, roles)


def _reduce(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    source = _first(step)
    inner = r.shapes[source.index][len(roles) :]
    if any(size == r.sequence for size in inner):
        raise r.refuse("it takes in a whole sequence at once", step.outputs[place])
    return r.add(step, [r.instance(source, (*roles, *((None,) * len(inner))))], place, roles)


def _top_k(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    raise r.refuse("it chooses among elements", step.outputs[place])


def _softmax(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    source = _first(step)
    if roles[-1] is not None:
        late = r.positions.late(source)
        if roles[-1] != ALL or late is None or late > LOW:
            raise r.refuse("it may look at later positions", step.outputs[place])
    return r.add(step, [r.instance(source, roles)], place, roles)


def _matmul(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    a, b = step.inputs
    assert a is not None and b is not None
    inner: str | None = None
    if r.shapes[a.index][-1] == r.sequence:
        if r.positions.late(a) != 0:
            raise r.refuse("it may look at later positions", step.outputs[place])
        inner = ALL
    operands = []
    for item, own in ((a, (roles[-2], inner)), (b, (inner, roles[-1]))):
        shape = r.shapes[item.index]
        leading = roles[len(roles) - len(shape) : -2] if len(shape) > 2 else ()
        leading = tuple(None if size == 1 else role for size, role in zip(shape, leading, strict=False))
        operands.append(r.instance(item, (*leading, *own)))
    return r.add(step, operands, place, roles)


def _attention(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    query, key, value = step.inputs[:3]
    mask = step.inputs[3] if len(step.inputs) > 3 else None
    output = step.outputs[place]
    assert query is not None and key is not None and value is not None
    if r.shapes[key.index][2] != r.sequence or roles[2] not in (NEW, LAST):
        raise r.refuse("its keys are no sequence of tokens", output)
    known = r.positions.of(mask)
    causal = step.ints[0] == 1
    if mask is not None and not causal:
        late = r.positions.late(mask)
        causal = late is not None and (late == 0 if mask.dtype == "boolean" else late <= LOW)
    if not causal:
        raise r.refuse("it may look at later positions", output)
    if isinstance(known, Affine) and known.number == 1 and mask is not None and mask.dtype == "boolean":
        mask = None
    if isinstance(known, Band) and known.low is None and known.high == 0:
        mask = None  # the kernel knows where a query sits
    kept = (None, None, NEW, None)
    inputs = [r.instance(query, roles), r.instance(key, kept), r.instance(value, kept)]
    if mask is not None:
        shape = r.shapes[mask.index]
        row = roles[2] if shape[2] == r.sequence else None
        inputs.append(r.instance(mask, (None, None, row, ALL)))
    number, r.caches = r.caches, r.caches + 1
    return r._step(
        "cached_attention",
        inputs,
        "f32",
        r.sized(output, roles),
        (int(roles[2] == LAST), number),
        step.floats,
    )


def _linear(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    """A product of rows of the first operand, which may have them in fewer dimensions."""
    output, data = step.outputs[place], _first(step)
    r.along(roles, [len(roles) - 1], output, "works")
    rows = r.reshaped(r.shapes[data.index][:-1], r.shapes[output.index][:-1], roles[:-1], output)
    role = next((role for role in rows if role is not None), None)
    inputs: list[Value | None] = [r.instance(data, (*rows, None))]
    for item in step.inputs[1:]:
        if item is None or item.kind == "constant":
            inputs.append(None if item is None else r.result.share_constant(item))
            continue
        maker = r.makers.get(item.index)
        if maker is not None and maker.operator == "quantize_rows":
            inputs.append(_quantized(r, maker, role)[maker.outputs.index(item)])
            continue
        shape = r.shapes[item.index]
        inputs.append(r.instance(item, tuple(None if isinstance(size, int) else role for size in shape)))
    return r.add(step, inputs, place, roles)


def _quantize_rows(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    role: Role = next((role for role in roles if role is not None), NEW)
    if step.ints[0] == _AFFINE_TENSOR and place != 0:
        raise r.refuse("it takes in a whole sequence at once", step.outputs[place])
    return _quantized(r, step, role)[place]


def _quantized(r: _Rewriter, step: Step, role: Role) -> list[Value]:
    """Codes, scales, zero points and sums of some tokens.

    One scale for the whole tensor would mix positions: each token gets its own.
    """
    key = (r.step_numbers[id(step)], role)
    if key in r.steps_made:
        return r.steps_made[key]
    source, codes = _first(step), step.outputs[0]
    shape = r.shapes[source.index]
    rows = r.reshaped(shape[:-1], r.shapes[codes.index][:1], (role,), codes)
    mode = r.fixed(step.ints[0], codes)
    per_token = mode == _AFFINE_TENSOR
    outputs: list[tuple[str, Shape]] = []
    for number, item in enumerate(step.outputs):
        own = r.shapes[item.index]
        sizes = r.sized(item, tuple(None if isinstance(size, int) else role for size in own))
        if per_token and number in (1, 2) and role is not None:
            sizes = (_size(own[0], role),)
        outputs.append((item.dtype, sizes))
    inputs = [r.instance(source, (*rows, None))]
    inputs += [r.instance(item, (None,) * item.rank) for item in step.inputs[1:] if item is not None]
    ints = [_AFFINE if per_token else mode, *(r.fixed(size, codes) for size in step.ints[1:])]
    r.steps_made[key] = r.result.add_step(step.operator, inputs, outputs, ints, step.floats, step.name)
    return r.steps_made[key]


def _first(step: Step) -> Value:
    source = step.inputs[0]
    assert source is not None
    return source


def _refused(r: _Rewriter, step: Step, place: int, roles: Roles) -> Value:
    """What mixes positions; without a sequence it is as it was."""
    if any(roles):
        raise r.refuse("it mixes positions", step.outputs[place])
    return _copy(r, step, place, roles)


# Views that keys and values may have behind the cache, so that it holds no element twice.
_VIEWS = {"reshape", "permute", "expand", "contiguous", "dense_rows"}

_UNARY = (
    "neg abs exp log sqrt rsqrt sin cos tanh sigmoid silu gelu gelu_tanh erf floor ceil round logical_not cast "
    "expand contiguous dense_rows"
)
_BINARY = "add sub mul minimum maximum div pow eq ne lt le bit_and bit_or bit_xor where"

_IMAGES = (
    "conv conv_depthwise conv_q8 conv_q8_depthwise conv_q8_block conv_q8_sparse quantize_image add_codes mul_codes "
    "look_up_codes max_pool average_pool average_codes adaptive_average resize_nearest resize_bilinear pad"
)

_RULES: dict[str, Rule] = {
    **dict.fromkeys((_UNARY + " " + _BINARY).split(), _elementwise),
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "cat": _cat,
    "index": _index,
    **dict.fromkeys(("layer_norm", "rms_norm", "unpack_nibbles"), _rowwise),
    **dict.fromkeys(
        "reduce_sum reduce_mean reduce_max reduce_min reduce_any reduce_all argmax argmin".split(), _reduce
    ),
    "softmax": _softmax,
    "matmul": _matmul,
    "attention": _attention,
    **dict.fromkeys(
        "linear linear_q8 linear_q8_sparse linear_q8_block linear_q4 linear_q4_sparse".split(), _linear
    ),
    "quantize_rows": _quantize_rows,
    **dict.fromkeys("cumsum top_k iota gather unfold".split(), _refused),
    **dict.fromkeys(_IMAGES.split(), _refused),
}
"""How each operator of `cpp/engine/operators.inc` follows."""
