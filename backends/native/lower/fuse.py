"""Steps of a plan that are done in one pass over their rows, or as one product.

    add, norm, quantize_rows                       -> norm_rows
    silu (gelu, …), mul, quantize_rows             -> activation_rows
    x * cos + rotate_half(x) * sin                 -> rope
    attention whose heads are moved behind tokens  -> attention that writes them there
    products that share their activation           -> one product, whose outputs are slices

Each computes what the single steps do, bit for bit. It works on plans, not on programs: whatever a model
spells out has one form here, and lowering knows nothing of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native._native import VALUE_SLACK
from sqcompile.backends.native.lower.quantized import AFFINE_TENSOR
from sqcompile.backends.native.plan import Plan, Size, Step, Value, common_name

# Numbers of activation_rows; those without a step of their own are left out.
_ACTIVATIONS = {"sigmoid": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5, "tanh": 6, "exp": 7}
_NORMS = {"layer_norm": 0, "rms_norm": 1}
_NO_CODES = (-1, 0, 0, 0)
_PANEL = 16


def fuse(plan: Plan, merged: dict[Any, int] | None = None) -> None:
    """Fuse the steps of a plan, in place; steps that nothing needs any more are gone.

    Args:
        plan: The plan. Tensors of merged weights are appended to its tensors.
        merged: Those appended by now, for plans that share their tensors.
    """
    for steps_of in (_rotations, _attentions, _norms, _activations):
        _replace(plan, steps_of(_Uses(plan)))
    _merge_products(plan, {} if merged is None else merged)


class _Uses:
    """Who makes and who uses each value of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.maker: dict[Value, Step] = {}
        self.users: defaultdict[Value, list[Step]] = defaultdict(list)
        self.number: dict[Step, int] = {}
        for number, step in enumerate(plan.steps):
            self.number[step] = number
            self.maker.update(dict.fromkeys(step.outputs, step))
            for value in step.inputs:
                if value is not None:
                    self.users[value].append(step)
        self.results = {value for _, value in plan.outputs}

    def made_by(self, value: Value | None, *operators: str) -> Step | None:
        """Return the step that made a value, behind those that change nothing, if it is one of these."""
        while value is not None and value in self.maker:
            step = self.maker[value]
            if step.operator in operators:
                return step
            if step.operator != "contiguous":
                return None
            value = step.inputs[0]
        return None

    def source(self, value: Value | None) -> Value | None:
        """Return what a value is behind steps that change nothing."""
        while value is not None and value in self.maker and self.maker[value].operator == "contiguous":
            value = self.maker[value].inputs[0]
        return value

    def copies(self, value: Value) -> list[Value]:
        """Return a value, and what steps make of it that change nothing."""
        plain = [step for step in self.users[value] if step.operator == "contiguous"]
        return [value, *(copy for step in plain for copy in self.copies(step.outputs[0]))]

    def final_users(self, value: Value) -> Iterator[Step | None]:
        """Yield who uses a value, behind steps that change nothing; None: the caller of the plan."""
        if value in self.results:
            yield None
        for step in self.users[value]:
            if step.operator == "contiguous":
                yield from self.final_users(step.outputs[0])
            else:
                yield step

    def quantizer(self, value: Value) -> Step | None:
        """Return a step that quantizes rows of a value as they come, if there is one."""
        for step in self.final_users(value):
            if step is None or step.operator != "quantize_rows" or step.ints[0] == AFFINE_TENSOR:
                continue
            if all(item is not None and item.kind == "constant" for item in step.inputs[1:]):
                return step
        return None


_Fused = list[tuple[Step, Step, dict[Value, Value]]]
"""Which step takes the place of which, and what becomes of values."""


def _replace(plan: Plan, fused: _Fused) -> None:
    places = {id(old): new for old, new, _ in fused}
    renamed = {old: new for _, _, names in fused for old, new in names.items()}

    def rename(value: Value | None) -> Value | None:
        while value in renamed:
            value = renamed[value]
        return value

    steps = []
    for step in plan.steps:
        step = places.get(id(step), step)
        inputs = tuple(rename(value) for value in step.inputs)
        steps.append(Step(step.operator, inputs, step.outputs, step.ints, step.floats, step.name))
    plan.outputs = [(name, rename(value) or value) for name, value in plan.outputs]
    plan.steps = _needed(plan, steps)


def _needed(plan: Plan, steps: list[Step]) -> list[Step]:
    """Return the steps that the plan's outputs depend on."""
    needed = {value for _, value in plan.outputs}
    kept = []
    for step in reversed(steps):
        if needed.isdisjoint(step.outputs):
            continue
        kept.append(step)
        needed.update(value for value in step.inputs if value is not None)
    return kept[::-1]


def _like(plan: Plan, value: Value) -> Value:
    return plan.add_computed(value.dtype, value.shape)


def _nothing(plan: Plan, dtype: str) -> Value:
    return plan.add_computed(dtype, (0,))


def _code_outputs(plan: Plan, quantizer: Step | None) -> list[Value]:
    if quantizer is None:
        return [_nothing(plan, dtype) for dtype in ("u8", "f32", "i32", "i32")]
    return [_like(plan, value) for value in quantizer.outputs]


# --- norms ---------------------------------------------------------------------------------------------


def _norms(uses: _Uses) -> _Fused:
    plan = uses.plan
    found: _Fused = []
    for step in plan.steps:
        if step.operator not in _NORMS:
            continue
        x, weight, bias = (*step.inputs, None, None)[:3]
        y = step.outputs[0]
        assert x is not None
        quantizer = uses.quantizer(y)
        add = _residual_add(uses, step)
        if quantizer is None and add is None:
            continue
        users = list(uses.final_users(y))
        wants_y = any(user is None or user is not quantizer for user in users)
        outputs = [
            _nothing(plan, "f32"),
            _like(plan, y) if wants_y else _nothing(plan, "f32"),
            *_code_outputs(plan, quantizer),
        ]
        names: dict[Value, Value] = {y: outputs[1]} if wants_y else {}
        residual = None
        if add is not None:
            total = add.outputs[0]
            x, residual = add.inputs
            assert x is not None
            if any(user is not step for user in uses.final_users(total)):
                outputs[0] = _like(plan, total)
                # Steps before the norm that change nothing would read the sum too early.
                names |= dict.fromkeys(uses.copies(total), outputs[0])
        if quantizer is not None:
            names |= dict(zip(quantizer.outputs, outputs[2:], strict=True))
        given = quantizer.inputs[1:] if quantizer is not None else ()
        codes = quantizer.ints if quantizer is not None else _NO_CODES
        inputs = (x, residual, weight, bias, *given)
        ints = (_NORMS[step.operator], *codes)
        made = Step("norm_rows", inputs, tuple(outputs), ints, step.floats, step.name)
        found.append((step, made, names))
    return found


def _residual_add(uses: _Uses, norm: Step) -> Step | None:
    """Return the sum that a norm is of, if the norm may do it: all others use it later."""
    add = uses.made_by(norm.inputs[0], "add")
    if add is None:
        return None
    total = add.outputs[0]
    shape = norm.outputs[0].shape
    if total.dtype != "f32" or total.shape != shape:
        return None
    for value in add.inputs:
        # Whole rows in memory: values of steps whose results always are.
        if value is None or value.shape != shape or uses.made_by(value, *_WHOLE) is None:
            return None
    if any(
        uses.number[user] < uses.number[norm]
        for user in uses.final_users(total)
        if user is not None and user is not norm
    ):
        return None
    norms = [user for user in uses.final_users(total) if user is not None and user.operator in _NORMS]
    return add if norms == [norm] else None


# Steps whose outputs are new memory in row-major order.
_WHOLE = (
    *("linear", "linear_q8", "linear_q8_sparse", "linear_q8_block", "linear_q4", "linear_q4_sparse"),
    *("add", "sub", "mul", "index", "cat", "layer_norm", "rms_norm", "norm_rows", "activation_rows"),
)


# --- activations ---------------------------------------------------------------------------------------


def _activations(uses: _Uses) -> _Fused:
    plan = uses.plan
    found: _Fused = []
    for step in plan.steps:
        act, factor = _gate(uses, step)
        if act is None:
            continue
        last = step.outputs[0]
        quantizer = uses.quantizer(last)
        if quantizer is None and factor is None:
            continue
        users = list(uses.final_users(last))
        wants_y = any(user is None or user is not quantizer for user in users)
        y = _like(plan, last) if wants_y else _nothing(plan, "f32")
        outputs = (y, *_code_outputs(plan, quantizer))
        names = {last: y} if wants_y else {}
        if quantizer is not None:
            names |= dict(zip(quantizer.outputs, outputs[1:], strict=True))
        given = quantizer.inputs[1:] if quantizer is not None else ()
        codes = quantizer.ints if quantizer is not None else _NO_CODES
        ints = (_ACTIVATIONS[act.operator], *codes)
        inputs = (act.inputs[0], factor, *given)
        found.append((step, Step("activation_rows", inputs, outputs, ints, (), step.name), names))
    return found


def _gate(uses: _Uses, step: Step) -> tuple[Step | None, Value | None]:
    """Return the activation that a step ends with, and what it is multiplied by, if it is."""
    shape = step.outputs[0].shape
    columns = shape[-1] if shape else None
    if not isinstance(columns, int) or columns < 1:
        return None, None
    if step.operator in _ACTIVATIONS:
        gates = [user for user in uses.users[step.outputs[0]] if _gate_of(uses, user) is step]
        return (None, None) if gates or not _whole(uses, step.inputs[0]) else (step, None)
    act = _gate_of(uses, step)
    if act is None:
        return None, None
    factor = step.inputs[1] if step.inputs[0] is act.outputs[0] else step.inputs[0]
    return act, factor


def _gate_of(uses: _Uses, step: Step) -> Step | None:
    if step.operator != "mul" or step.outputs[0].dtype != "f32":
        return None
    for value, factor in (step.inputs, step.inputs[::-1]):
        act = uses.maker.get(value) if value is not None else None
        if act is None or act.operator not in _ACTIVATIONS or factor is value or factor is None:
            continue
        assert value is not None
        if value in uses.results or uses.users[value] != [step] or value.shape != factor.shape:
            continue
        if _whole(uses, act.inputs[0]) and _whole(uses, factor):
            return act
    return None


def _whole(uses: _Uses, value: Value | None) -> bool:
    return uses.made_by(value, *_WHOLE) is not None


# --- rotary positions ----------------------------------------------------------------------------------


def _rotations(uses: _Uses) -> _Fused:
    plan = uses.plan
    found: _Fused = []
    for step in plan.steps:
        parts = _rotation(uses, step)
        if parts is None:
            continue
        x, cos, sin = parts
        made = Step("rope", (x, cos, sin), (_like(plan, step.outputs[0]),), (), (), step.name)
        found.append((step, made, {step.outputs[0]: made.outputs[0]}))
    return found


def _rotation(uses: _Uses, step: Step) -> tuple[Value, Value, Value] | None:
    """Return x, cos and sin of x * cos + cat(-x2, x1) * sin, where x1 and x2 are the halves of x."""
    if step.operator != "add" or step.outputs[0].dtype != "f32":
        return None
    first, second = (uses.made_by(value, "mul") for value in step.inputs)
    for straight, turned in ((first, second), (second, first)):
        if straight is None or turned is None:
            continue
        for half, sin in (turned.inputs, turned.inputs[::-1]):
            x = _turned(uses, half)
            if x is None or x not in straight.inputs or sin is None:
                continue
            cos = straight.inputs[1] if straight.inputs[0] is x else straight.inputs[0]
            if cos is not None and _fits(x, step.outputs[0], cos, sin):
                if _elements_adjoin(uses, x) and all(_halves_repeat(uses, item) for item in (cos, sin)):
                    return x, cos, sin
    return None


def _fits(x: Value, out: Value, cos: Value, sin: Value) -> bool:
    shape = x.shape
    if len(shape) != 4 or out.shape != shape or cos.rank != 4 or cos.shape != sin.shape:
        return False
    width = shape[3]
    table = (cos.shape[0] in (1, shape[0]), cos.shape[1] == 1, cos.shape[2:] == shape[2:])
    return isinstance(width, int) and width % 2 == 0 and all(table)


def _turned(uses: _Uses, value: Value | None) -> Value | None:
    """Return x of cat(-x2, x1), or None."""
    cat = uses.made_by(value, "cat")
    if cat is None or len(cat.inputs) != 2 or cat.ints != (cat.outputs[0].rank - 1,):
        return None
    negated = uses.made_by(cat.inputs[0], "neg")
    upper = uses.made_by(negated.inputs[0], "slice") if negated is not None else None
    lower = uses.made_by(cat.inputs[1], "slice")
    if upper is None or lower is None or upper.inputs[0] is not lower.inputs[0]:
        return None
    x = lower.inputs[0]
    assert x is not None
    last, width = x.rank - 1, x.shape[-1]
    if not isinstance(width, int) or lower.ints != (last, 0, 1) or upper.ints != (last, width // 2, 1):
        return None
    return x if lower.outputs[0].shape[-1] == upper.outputs[0].shape[-1] == width // 2 else None


def _elements_adjoin(uses: _Uses, value: Value) -> bool:
    """Whether elements of the last dimension lie beside each other: views that leave it where it was."""
    while value in uses.maker:
        step = uses.maker[value]
        source = step.inputs[0] if step.inputs else None
        if source is None or step.operator in _WHOLE or step.operator == "contiguous":
            return True
        if step.operator == "permute" and step.ints[-1] != value.rank - 1:
            return False
        if step.operator == "slice" and step.ints[0] == value.rank - 1 and step.ints[2] != 1:
            return False
        if step.operator not in ("permute", "slice", "reshape"):
            return False
        value = source
    return False


def _picks_rows(step: Step) -> bool:
    """Whether an index leaves the last dimension as it is."""
    source, axis = step.inputs[0], step.ints[0]
    assert source is not None and isinstance(axis, int)
    return axis + len(step.inputs) - 1 < source.rank


def _halves_repeat(uses: _Uses, value: Value) -> bool:
    """Whether the last dimension holds the same numbers twice, and the value is whole in memory."""
    last = value.shape[-1]
    while value in uses.maker:
        step = uses.maker[value]
        if step.operator == "cat":
            same = len(step.inputs) == 2 and step.inputs[0] is step.inputs[1]
            return same and step.ints == (value.rank - 1,)
        sources = [item for item in step.inputs if item is not None]
        if step.operator == "mul" and any(item.rank == 0 for item in sources):
            source = next(item for item in sources if item.rank > 0)
        elif step.operator in ("cos", "sin", "reshape", "contiguous", "cast") and len(sources) == 1:
            source = sources[0]
        elif step.operator == "index" and _picks_rows(step):
            source = sources[0]
        else:
            return False
        if not source.shape or source.shape[-1] != last:
            return False
        value = source
    return False


# --- products ------------------------------------------------------------------------------------------

# For each product: how many inputs are the activation, and what its constants are: panels of outputs that
# lie behind each other, with so many bytes at the end that belong to none; where panels start; or one for all.
_PANELS, _VALUES, _STARTS, _COMMON = range(4)
_PRODUCTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "linear": (1, (_PANELS, _PANELS)),
    "linear_q8": (3, (_PANELS, _PANELS, _PANELS, _PANELS)),
    "linear_q8_sparse": (3, (_PANELS, _VALUES, _STARTS, _PANELS, _PANELS, _PANELS)),
    "linear_q4": (3, (_PANELS, _COMMON, _PANELS, _PANELS, _PANELS)),
    "linear_q4_sparse": (3, (_PANELS, _VALUES, _STARTS, _COMMON, _PANELS, _PANELS)),
}


def _merge_products(plan: Plan, merged: dict[Any, int]) -> None:
    uses = _Uses(plan)
    groups: defaultdict[Any, list[Step]] = defaultdict(list)
    for step in plan.steps:
        key = _merge_key(uses, step)
        if key is not None:
            groups[key].append(step)
    first_of: dict[int, list[Step]] = {}
    gone: set[int] = set()
    for steps in groups.values():
        if len(steps) > 1 and all(_outputs(step) % _PANEL == 0 for step in steps[:-1]):
            first_of[id(steps[0])] = steps
            gone |= {id(step) for step in steps}
    result: list[Step] = []
    for step in plan.steps:
        if id(step) in first_of:
            result += _merged(plan, first_of[id(step)], merged)
        elif id(step) not in gone:
            result.append(step)
    plan.steps = result


def _outputs(step: Step) -> int:
    n = step.ints[0]
    assert isinstance(n, int)
    return n


def _merge_key(uses: _Uses, step: Step) -> Any:
    """Return what products have in common that can be one, or None for one that stays alone."""
    if step.operator not in _PRODUCTS:
        return None
    activation, kinds = _PRODUCTS[step.operator]
    constants = (*step.inputs[activation:], *[None] * len(kinds))[: len(kinds)]
    # What uses the slices has to take rows that lie apart.
    users = uses.users[step.outputs[0]]
    if not users or any(user.operator not in ("reshape", "activation_rows") for user in users):
        return None
    if step.outputs[0] in uses.results:
        return None
    form: list[Any] = []
    for value, kind in zip(constants, kinds, strict=True):
        if value is None:
            form.append(None)
            continue
        common = uses.plan.tensors[value.source].tobytes() if kind == _COMMON else None
        form.append((value.dtype, value.layout, common))
    rows = tuple(uses.source(value) for value in step.inputs[:activation])
    return (step.operator, rows, tuple(form), step.ints[1:], step.floats, step.outputs[0].shape[:-1])


def _merged(plan: Plan, steps: Sequence[Step], merged: dict[Any, int]) -> list[Step]:
    first = steps[0]
    activation, kinds = _PRODUCTS[first.operator]
    columns = zip(*(step.inputs[activation:] for step in steps), strict=True)
    constants: list[Value | None] = []
    for kind, values in zip(kinds, columns, strict=False):
        constants.append(_joined(plan, kind, list(values), merged))
    n = sum(_outputs(step) for step in steps)
    shape = first.outputs[0].shape[:-1]
    out = plan.add_computed("f32", (*shape, n))
    inputs = (*first.inputs[:activation], *constants)
    name = common_name([step.name for step in steps])
    result = [Step(first.operator, inputs, (out,), (n, *first.ints[1:]), first.floats, name)]
    begin = 0
    for step in steps:
        ints: tuple[Size, ...] = (len(shape), begin, 1)
        result.append(Step("slice", (out,), step.outputs, ints, (), step.name))
        begin += _outputs(step)
    return result


def _joined(plan: Plan, kind: int, values: Sequence[Value | None], merged: dict[Any, int]) -> Value | None:
    first = values[0]
    if first is None or kind == _COMMON:
        return first
    sources = [value.source for value in values if value is not None]
    key = (kind, *sources)
    if key not in merged:
        merged[key] = len(plan.tensors)
        plan.tensors.append(_join(kind, [plan.tensors[source] for source in sources]))
    array = plan.tensors[merged[key]]
    return plan.add_shared(first.dtype, array.shape, merged[key], first.layout)


def _join(kind: int, arrays: list[NDArray[Any]]) -> NDArray[Any]:
    arrays = [array.reshape(-1) for array in arrays]
    if kind == _STARTS:
        ends = np.cumsum([array[-1] for array in arrays], dtype=np.uint64)
        later = [array[1:] + end for array, end in zip(arrays[1:], ends, strict=False)]
        return np.concatenate([arrays[0], *later]).astype(np.uint64)
    if kind == _VALUES:
        # Room behind the values is read, never used: once at the end suffices.
        arrays = [*(array[:-VALUE_SLACK] for array in arrays[:-1]), arrays[-1]]
    return np.concatenate(arrays)


# --- attention ------------------------------------------------------------------------------------------

_HEADS_BEHIND_TOKENS = (0, 2, 1, 3)


def _attentions(uses: _Uses) -> _Fused:
    """Find attention that nobody sees but with its heads behind its tokens, where it need not be copied."""
    fused: _Fused = []
    for step in uses.plan.steps:
        if step.operator != "attention" or len(step.ints) > 1:
            continue
        users = list(uses.final_users(step.outputs[0]))
        if len(users) != 1 or users[0] is None or users[0].operator != "permute":
            continue
        moved = users[0].outputs[0]
        if users[0].ints != _HEADS_BEHIND_TOKENS:
            continue
        out = uses.plan.add_computed("f32", moved.shape)
        made = Step("attention", step.inputs, (out,), (*step.ints, 1), step.floats, step.name)
        fused.append((step, made, {moved: out}))
    return fused


# --- what is left ----------------------------------------------------------------------------------------


def drop_unused_tensors(*plans: Plan) -> None:
    """Remove tensors that no step of any of these plans uses; they share one list of tensors."""
    counts: Counter[int] = Counter()
    for plan in plans:
        values = [value for step in plan.steps for value in step.inputs if value is not None]
        values += [value for _, value in plan.outputs]
        counts.update({value.source for value in values if value.kind == "constant"})
    kept = sorted(counts)
    places = {source: place for place, source in enumerate(kept)}
    tensors = plans[0].tensors
    tensors[:] = [tensors[source] for source in kept]
    for plan in plans:
        plan.renumber(places)
