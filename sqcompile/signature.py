"""The interface of a program: named inputs and outputs, their shapes, and how a call is bound to them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sqcompile.errors import FileError, InputError, did_you_mean

Dim = int | str
"""A size: a number, or the name of a symbolic dimension (or an expression of names)."""

SIGNATURE = "sqcompile.signature"
"""Key of an ONNX file's metadata under which its signature stands, as JSON."""

_CALL = "call of the program"

_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Value:
    """One leaf of the inputs or outputs.

    Attributes:
        name: Flat name: the argument's, with dots for what is nested in it (`past.0.key`).
        shape: Sizes, or None where the leaf is no tensor.
        dtype: Element type, or None where the leaf is no tensor.
        constant: The value that was traced in, where the leaf is no tensor.
        limit: What an input's numbers are below, where they say which rows of an embedding to take; else None.
    """

    name: str
    shape: tuple[Dim, ...] | None = None
    dtype: torch.dtype | None = None
    constant: Any = None
    limit: int | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether a call passes a tensor here; anything else was fixed when the model was traced."""
        return self.dtype is not None

    def __str__(self) -> str:
        if not self.is_tensor:
            return f"{self.name} = {self.constant!r}"
        return f"{self.name}: {describe_type(self.dtype, self.shape)}"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a program, and the structures they are nested in.

    Attributes:
        inputs: One entry a leaf, in the order of the graph's placeholders.
        outputs: One entry a leaf, in the order of the graph's outputs.
        in_spec: Structure of `(args, kwargs)` as the model was traced.
        out_spec: Structure of what the model returns.
        arg_names: The model's own parameter names, in order; they let a call mix positional and
            keyword arguments freely.
        dims: Smallest and largest size of each symbolic dimension (None: no upper bound).
        provenance: How the program was made, for its artifacts: `sqcompile.provenance`; None if that is not known.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    arg_names: tuple[str, ...] = ()
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(str, values)) for values in (self.inputs, self.outputs))
        return f"({inputs}) -> ({outputs})"

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flatten one call's arguments into the order of the inputs, checking every leaf.

        Args:
            args: Positional arguments, as the model takes them.
            kwargs: Keyword arguments, as the model takes them.

        Returns:
            One value an input: tensors of the declared shape and dtype, and the traced constants.

        Raises:
            InputError: If an argument is missing, unknown, of another structure, type, shape or dtype.
        """
        args, kwargs = self._as_traced(args, kwargs)
        values = _in_order((args, kwargs), self.in_spec)
        leaves, spec = pytree.tree_flatten(values)
        if spec != self.in_spec:
            raise InputError(
                "The inputs are nested differently from those that the model was traced with.",
                where=_CALL,
                seen=_describe_structure(args, kwargs),
                expected=self._expected(),
                next_step="pass the same structure, or trace again with these inputs",
            )
        leaves = [self._check(value, leaf) for value, leaf in zip(self.inputs, leaves, strict=True)]
        self._check_dims(leaves)
        return leaves

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Put flat outputs back into the structure that the model returns."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    @property
    def tensor_inputs(self) -> tuple[Value, ...]:
        """The inputs that are tensors; the others were fixed when the model was traced."""
        return tuple(value for value in self.inputs if value.is_tensor)

    def _as_traced(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positional and keyword so that they stand as in the traced call."""
        traced_args, traced_kwargs = _children(self.in_spec)
        positional = len(_children(traced_args))
        keywords = list(traced_kwargs.context or [])
        if len(args) == positional and set(kwargs) == set(keywords):
            return tuple(args), {name: kwargs[name] for name in keywords}
        # Behind the parameters that have a name stand those of *args.
        names = [*self.arg_names, *(f"input_{index}" for index in range(len(self.arg_names), positional))]
        known = [*names[:positional], *keywords]
        if len(args) > len(names):
            raise InputError(
                f"The program takes {len(known)} input{'s' if len(known) != 1 else ''}.",
                where=_CALL,
                seen=f"{len(args)} positional arguments",
                expected=", ".join(known) or "no inputs",
                next_step="drop the arguments that the model does not take",
            )
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(
                    f"Input '{name}' was given twice.",
                    where=_CALL,
                    seen=f"positional argument {names.index(name)}, and {name}=…",
                    expected="each input once",
                    next_step=f"drop {name}=…, or pass the others by name too",
                )
            given[name] = value
        for name in given:
            if name not in known and given[name] is not None:
                raise InputError(
                    f"The program has no input '{name}'.",
                    where=_CALL,
                    seen=", ".join(given),
                    expected=", ".join(known) or "no inputs",
                    next_step=f"{did_you_mean(name, known)} Or trace again, with example inputs that hold it",
                )
        fixed = {value.name: value.constant for value in self.inputs if not value.is_tensor}
        for name in known:
            if name in given:
                continue
            if name not in fixed:
                raise InputError(
                    f"Input '{name}' is missing.",
                    where=_CALL,
                    seen=", ".join(given) or "no inputs",
                    expected=self._expected(),
                    next_step=f"pass {name}=…",
                )
            given[name] = fixed[name]
        return tuple(given[name] for name in known[:positional]), {name: given[name] for name in keywords}

    def _expected(self) -> str:
        return ", ".join(str(value) for value in self.inputs) or "no inputs"

    def _check(self, value: Value, leaf: Any) -> Any:
        where = f"input '{value.name}'"
        if not value.is_tensor:
            if leaf is not None and not _is_constant(value.constant, leaf):
                raise InputError(
                    f"Input '{value.name}' was fixed when the model was traced.",
                    where=where,
                    seen=_describe_leaf(leaf),
                    expected=_describe_leaf(value.constant),
                    next_step="leave it out, or trace again with this value",
                )
            return value.constant
        if not isinstance(leaf, torch.Tensor):
            try:
                leaf = torch.as_tensor(leaf)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise InputError(
                    f"Input '{value.name}' is not a tensor.",
                    where=where,
                    seen=type(leaf).__name__,
                    expected=str(value),
                    next_step="pass a torch.Tensor or a NumPy array",
                ) from None
        seen = describe_type(leaf.dtype, tuple(leaf.shape))
        if leaf.dtype != value.dtype:
            raise InputError(
                f"Input '{value.name}' has the wrong type.",
                where=where,
                seen=seen,
                expected=str(value),
                next_step=_conversion(leaf.dtype, value.dtype),
            )
        shape = value.shape or ()
        if len(shape) != leaf.dim():
            raise InputError(
                f"Input '{value.name}' has the wrong number of dimensions.",
                where=where,
                seen=seen,
                expected=str(value),
                next_step="reshape it, or trace again with such an input",
            )
        for axis, (expected, size) in enumerate(zip(shape, leaf.shape, strict=True)):
            if isinstance(expected, int) and size != expected:
                raise InputError(
                    f"Input '{value.name}' has the wrong size.",
                    where=f"input '{value.name}', dimension {axis}",
                    seen=seen,
                    expected=str(value),
                    next_step=_channels_first(leaf.shape, shape)
                    or f"pass size {expected}, or make the dimension dynamic with dynamic_shapes",
                )
        if value.limit is not None and leaf.numel() and not leaf.is_meta:
            self._check_rows(value, leaf, value.limit)
        return leaf

    def _check_rows(self, value: Value, leaf: torch.Tensor, limit: int) -> None:
        """Check what says which rows of an embedding to take: runtimes count negative numbers from the end."""
        low, high = (int(bound) for bound in leaf.aminmax())
        if low < 0 or high >= limit:
            first = ((leaf < 0) | (leaf >= limit)).nonzero()[0].tolist()
            raise InputError(
                f"Input '{value.name}' holds what is no row of the model's embedding.",
                where=f"input '{value.name}' at {first}",
                seen=int(leaf[tuple(first)]),
                expected=f"0 to {limit - 1}",
                next_step="correct the values: a tokenizer of another model, or labels such as -100, make such ones"
                if low < -1 or high >= limit
                else "pad with a row that there is, and hide it with the mask: -1 is none",
            )

    def _check_dims(self, leaves: Sequence[Any]) -> None:
        """Check the sizes of symbolic dimensions: each has one size, within its range."""
        found = [
            (expected, int(size), f"input '{value.name}', dimension {axis}")
            for value, leaf in zip(self.inputs, leaves, strict=True)
            if value.is_tensor
            for axis, (expected, size) in enumerate(zip(value.shape or (), leaf.shape, strict=True))
            if isinstance(expected, str)
        ]
        sizes: dict[str, int] = {}
        for name, size, where in found:
            if not name.isidentifier():
                continue
            if sizes.setdefault(name, size) != size:
                raise InputError(
                    f"Dimension '{name}' has two different sizes in one call.",
                    where=where,
                    seen=f"{sizes[name]} and {size}",
                    expected="one size",
                    next_step="make the inputs agree",
                )
            low, high = self.dims.get(name, (0, None))
            if size < low or (high is not None and size > high):
                raise InputError(
                    f"Dimension '{name}' is out of its range.",
                    where=where,
                    seen=size,
                    expected=f"{low} to {'any size' if high is None else high}",
                    next_step="change the input, or the range given in dynamic_shapes",
                )
        for expression, size, where in found:
            wanted = _evaluate(expression, sizes)
            if wanted is not None and wanted != size:
                shown = ", ".join(f"{name} = {sizes[name]}" for name in sizes if name in expression)
                raise InputError(
                    f"A dimension is not '{expression}'.",
                    where=where,
                    seen=f"{size}, with {shown}",
                    expected=f"{expression} = {wanted}",
                    next_step="make the inputs agree",
                )

    def to_json(self) -> str:
        """Return the signature as JSON text, which artifacts carry beside the graph.

        Raises:
            FileError: If inputs or outputs are nested in a class that PyTorch has no name for.
        """
        try:
            return self._to_json()
        except (NotImplementedError, TypeError) as error:
            raise FileError(
                "The structure of the inputs or outputs cannot be stored.",
                where="signature",
                seen=str(error).splitlines()[0],
                expected="tuples, lists, dicts, and classes registered under a name",
                next_step="return a tuple or dict, or register the class with "
                "torch.utils._pytree.register_pytree_node(…, serialized_type_name=…)",
            ) from error

    def _to_json(self) -> str:
        kinds = _kinds_of(self.in_spec) | _kinds_of(self.out_spec)
        for kind in kinds:
            _register(kind)
        return json.dumps(
            {
                "inputs": [_value_to_json(value) for value in self.inputs],
                "outputs": [_value_to_json(value) for value in self.outputs],
                "in_spec": pytree.treespec_dumps(self.in_spec),
                "out_spec": pytree.treespec_dumps(self.out_spec),
                "arg_names": list(self.arg_names),
                "dims": {name: list(bounds) for name, bounds in self.dims.items()},
                "kinds": sorted([kind.__module__, kind.__qualname__] for kind in kinds),
                **({} if self.provenance is None else {"provenance": dict(self.provenance)}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Read what `to_json` wrote.

        Raises:
            FileError: If the text is damaged, or an output class belongs to a package that is missing.
        """
        try:
            data = json.loads(text)
            for module, name in data["kinds"]:
                _register(_find_kind(module, name))
            for spec in ("in_spec", "out_spec"):
                _refuse_references(data[spec])
            signature = cls(
                inputs=tuple(_value_from_json(item) for item in data["inputs"]),
                outputs=tuple(_value_from_json(item) for item in data["outputs"]),
                in_spec=pytree.treespec_loads(data["in_spec"]),
                out_spec=pytree.treespec_loads(data["out_spec"]),
                arg_names=tuple(map(str, data["arg_names"])),
                dims={str(name): (int(low), high) for name, (low, high) in data["dims"].items()},
                provenance=data.get("provenance"),
            )
            counts = signature.in_spec.num_leaves, signature.out_spec.num_leaves
            if counts != (len(signature.inputs), len(signature.outputs)):
                raise ValueError(f"{counts} leaves, and other numbers of inputs and outputs")
            return signature
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            NotImplementedError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise FileError(
                "The signature stored in the file cannot be read.",
                where="signature",
                seen=f"{type(error).__name__}: {error}",
                expected="the JSON text that sqcompile writes",
                next_step="import the package that defines the model's output class, or compile again",
            ) from error


def describe_type(dtype: torch.dtype | None, shape: Sequence[Any] | None) -> str:
    """Return a short type such as `f32[batch, 3, 8, 8]`."""
    sizes = ", ".join(str(size) for size in shape or ())
    return f"{short_dtype(dtype)}[{sizes}]"


def short_dtype(dtype: torch.dtype | None) -> str:
    """Return `f32`, `i64`, `u8`, `bool`, … for a dtype."""
    if dtype is None:
        return "none"
    name = str(dtype).removeprefix("torch.")
    return re.sub(r"^(?:(b)float|(f)loat|(u)int|(i)nt|(c)omplex)(\d+)$", _short, name)


def _short(match: re.Match[str]) -> str:
    kind = next(group for group in match.groups()[:5] if group)
    return {"b": "bf"}.get(kind, kind) + match.group(6)


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return list(spec.children())


def _in_order(value: Any, spec: pytree.TreeSpec) -> Any:
    """Return a structure with the keys of its dicts in the order of the traced one; the rest as it is."""
    if spec.is_leaf():
        return value
    children = _children(spec)
    if type(value) is dict and spec.type is dict:
        if set(value) != set(spec.context):
            return value
        return {key: _in_order(value[key], child) for key, child in zip(spec.context, children, strict=True)}
    if type(value) in (tuple, list) and spec.type is type(value) and len(value) == len(children):
        return type(value)(_in_order(item, child) for item, child in zip(value, children, strict=True))
    return value


def _is_constant(constant: Any, leaf: Any) -> bool:
    """Whether a leaf is the value that was traced in."""
    if isinstance(constant, str) and isinstance(leaf, (torch.dtype, torch.device)):
        return str(leaf) == constant  # as a stored signature holds it
    try:
        return leaf is constant or bool(leaf == constant)
    except (TypeError, ValueError, RuntimeError):  # arrays, and what else cannot be compared
        return False


def _evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """Return the value of a size such as `2*n + 1`, or None where it has parts that are not known."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise KeyError(expression)

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (KeyError, SyntaxError, ArithmeticError, RecursionError):
        return None


def _conversion(seen: torch.dtype, wanted: torch.dtype | None) -> str:
    if wanted is not None and wanted.is_floating_point and not seen.is_floating_point:
        # A byte alone is no number that the model has seen: only its training says what 255 stands for.
        return f"scale it as in training (images are often divided by 255), and convert it with .to({wanted})"
    return f"convert it with .to({wanted})"


def _channels_first(seen: Sequence[int], expected: Sequence[Dim]) -> str:
    """Return what to do about data whose channels come last, or nothing if it would not fit then, either."""
    if len(seen) < 3:
        return ""
    moved = (seen[0], seen[-1], *seen[1:-1])
    if any(isinstance(size, int) and size != found for size, found in zip(expected, moved, strict=True)):
        return ""
    order = ", ".join(map(str, (0, len(seen) - 1, *range(1, len(seen) - 1))))
    return f"the channels come second: pass x.permute({order})"


def _describe_leaf(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return describe_type(leaf.dtype, tuple(leaf.shape))
    return repr(leaf) if isinstance(leaf, (type(None), bool, int, float, str)) else type(leaf).__name__


def _describe_structure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    shown = [str(pytree.tree_map(_describe_leaf, arg)) for arg in args]
    shown += [f"{name}={pytree.tree_map(_describe_leaf, value)}" for name, value in kwargs.items()]
    text = ", ".join(shown) or "no inputs"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


# Characters of a description: nested lists of numbers, which are no tensor, would fill the screen.
_LONGEST = 300


def _value_to_json(value: Value) -> dict[str, Any]:
    constant = value.constant
    if not isinstance(constant, (type(None), bool, int, float, str)):
        constant = str(constant)
    return {
        "name": value.name,
        "shape": None if value.shape is None else list(value.shape),
        "dtype": None if value.dtype is None else str(value.dtype).removeprefix("torch."),
        "constant": constant,
        **({} if value.limit is None else {"limit": value.limit}),
    }


def _value_from_json(item: Mapping[str, Any]) -> Value:
    dtype = None if item["dtype"] is None else getattr(torch, item["dtype"])
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"'{item['dtype']}' is no dtype")
    shape = None if item["shape"] is None else tuple(item["shape"])
    if any(not isinstance(size, (int, str)) for size in shape or ()):
        raise ValueError(f"{shape} is no shape")
    limit = item.get("limit")
    if not (limit is None or type(limit) is int):
        raise ValueError(f"{limit!r} is no limit")
    return Value(str(item["name"]), shape, dtype, item["constant"], limit)


def _kinds_of(spec: pytree.TreeSpec) -> set[type]:
    """Return the classes in a structure, beside Python's own containers."""
    found: set[type] = set()
    if spec.is_leaf():
        return found
    # The type of a named tuple is `namedtuple` for all; its own class is the context.
    kind = spec.context if isinstance(spec.context, type) else spec.type
    if isinstance(kind, type) and kind.__module__ not in _HARMLESS:
        found.add(kind)
    for child in spec.children():
        found |= _kinds_of(child)
    return found


def _register(kind: type) -> None:
    """Give a named tuple or dataclass the name under which PyTorch stores structures of it."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        pytree._register_namedtuple(kind, serialized_type_name=name)
    elif dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(kind, serialized_type_name=name)


def _find_kind(module: str, name: str) -> type:
    """Return a class that a file names; a file may not make us import just anything."""
    if module not in sys.modules:
        if module.split(".")[0] != "transformers":
            raise ValueError(f"it needs the class {module}.{name}, and that module is not imported")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise FileError(
                "What the model returns is a class of transformers, which cannot be imported.",
                where=f"signature, {module}.{name}",
                seen=f"{type(error).__name__}: {error}",
                expected="transformers, beside the file",
                next_step="install it: pip install 'sqcompile[llm]'",
            ) from error
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ValueError(f"{module} has no class {name}")
    return found


# Of these the standard library's default factories are: nothing that they name does anything when imported.
_HARMLESS = frozenset({"builtins", "collections"})


def _refuse_references(text: str) -> None:
    """Refuse a stored structure that makes PyTorch import a module of the file's choice.

    PyTorch imports what default dicts and enumerations name, before it looks whether it is such a thing.
    """

    def visit(value: Any) -> None:
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            try:
                value = json.loads(value)  # contexts are JSON texts inside the JSON text
            except ValueError:
                return
        if isinstance(value, list):
            for item in value:
                visit(item)
        if isinstance(value, dict):
            module = value.get("default_factory_module", "builtins")
            if "__enum__" in value:
                module = str(value.get("fqn")).partition(":")[0]
            if module not in _HARMLESS and module not in sys.modules:
                raise ValueError(f"the structure needs the module '{module}', which is not imported")
            for item in value.values():
                visit(item)

    visit(json.loads(text))
