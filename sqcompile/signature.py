"""The interface of a program: named inputs and outputs, their shapes, and how a call is bound to them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sqcompile.errors import FileError, InputError, did_you_mean

Dim = int | str
"""A size: a number, or the name of a symbolic dimension (or an expression of names)."""

_NAME = re.compile(r"[A-Za-z_]\w*$")


@dataclass(frozen=True)
class Value:
    """One leaf of the inputs or outputs.

    Attributes:
        name: Flat name: the argument's, with dots for what is nested in it (`past.0.key`).
        shape: Sizes, or None where the leaf is no tensor.
        dtype: Element type, or None where the leaf is no tensor.
        constant: The value that was traced in, where the leaf is no tensor.
    """

    name: str
    shape: tuple[Dim, ...] | None = None
    dtype: torch.dtype | None = None
    constant: Any = None

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
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    arg_names: tuple[str, ...] = ()
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)

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
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise InputError(
                "The inputs are nested differently from those that the model was traced with.",
                where="call of the program",
                seen=_describe_structure(args, kwargs),
                expected=", ".join(str(value) for value in self.inputs),
                next_step="pass the same structure, or trace again with these inputs",
            )
        sizes: dict[str, int] = {}
        return [self._check(value, leaf, sizes) for value, leaf in zip(self.inputs, leaves, strict=True)]

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
        if not self.arg_names:
            self._reject_call(args, kwargs)
        if len(args) > len(self.arg_names):
            raise InputError(
                f"The program takes {len(self.arg_names)} arguments.",
                where="call of the program",
                seen=f"{len(args)} positional arguments",
                expected=", ".join(self.arg_names),
                next_step="drop the arguments that the model does not take",
            )
        given = dict(zip(self.arg_names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"Argument '{name}' was given twice.", where="call of the program")
            given[name] = value
        names = list(self.arg_names[:positional])
        unknown = [name for name in given if name not in names and name not in keywords]
        for name in unknown:
            if given[name] is None:
                continue
            raise InputError(
                f"The program has no input '{name}'.",
                where="call of the program",
                seen=", ".join(given),
                expected=", ".join([*names, *keywords]),
                next_step=did_you_mean(name, [*names, *keywords])
                + " — or trace again with example inputs that hold it",
            )
        fixed = self._constants()
        for name in [*names, *keywords]:
            if name not in given:
                if name not in fixed:
                    raise InputError(
                        f"Input '{name}' is missing.",
                        where="call of the program",
                        seen=", ".join(given) or "no inputs",
                        expected=", ".join(str(value) for value in self.inputs),
                        next_step=f"pass {name}=…",
                    )
                given[name] = fixed[name]
        return tuple(given[name] for name in names), {name: given[name] for name in keywords}

    def _constants(self) -> dict[str, Any]:
        return {value.name: value.constant for value in self.inputs if not value.is_tensor}

    def _reject_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        raise InputError(
            "The call does not fit the program's inputs.",
            where="call of the program",
            seen=_describe_structure(args, kwargs),
            expected=", ".join(str(value) for value in self.inputs),
            next_step="pass the inputs as the model was traced with",
        )

    def _check(self, value: Value, leaf: Any, sizes: dict[str, int]) -> Any:
        where = f"input '{value.name}'"
        if not value.is_tensor:
            if leaf is not None and leaf != value.constant:
                raise InputError(
                    f"Input '{value.name}' was fixed when the model was traced.",
                    where=where,
                    seen=repr(leaf),
                    expected=repr(value.constant),
                    next_step=f"leave it out, or trace again with {value.name}={leaf!r}",
                )
            return value.constant
        if not isinstance(leaf, torch.Tensor):
            try:
                leaf = torch.as_tensor(leaf)
            except (TypeError, ValueError, RuntimeError):
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
                next_step=f"convert it with .to({value.dtype})",
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
            self._check_size(value, axis, expected, int(size), seen, sizes)
        return leaf

    def _check_size(
        self, value: Value, axis: int, expected: Dim, size: int, seen: str, sizes: dict[str, int]
    ) -> None:
        where = f"input '{value.name}', dimension {axis}"
        if isinstance(expected, int):
            if size != expected:
                raise InputError(
                    f"Input '{value.name}' has the wrong size.",
                    where=where,
                    seen=seen,
                    expected=str(value),
                    next_step=f"pass size {expected}, or make the dimension dynamic with dynamic_shapes",
                )
            return
        if not _NAME.match(expected):
            return
        if sizes.setdefault(expected, size) != size:
            raise InputError(
                f"Dimension '{expected}' has two different sizes in one call.",
                where=where,
                seen=f"{sizes[expected]} and {size}",
                expected="one size",
                next_step="make the inputs agree",
            )
        low, high = self.dims.get(expected, (0, None))
        if size < low or (high is not None and size > high):
            raise InputError(
                f"Dimension '{expected}' is out of its range.",
                where=where,
                seen=size,
                expected=f"{low} to {'any size' if high is None else high}",
                next_step="change the input, or the range given in dynamic_shapes",
            )

    def to_json(self) -> str:
        """Return the signature as JSON text, which artifacts carry beside the graph."""
        return json.dumps(
            {
                "inputs": [_value_to_json(value) for value in self.inputs],
                "outputs": [_value_to_json(value) for value in self.outputs],
                "in_spec": pytree.treespec_dumps(self.in_spec),
                "out_spec": pytree.treespec_dumps(self.out_spec),
                "arg_names": list(self.arg_names),
                "dims": {name: list(bounds) for name, bounds in self.dims.items()},
                "modules": sorted(_modules_of(self.in_spec) | _modules_of(self.out_spec)),
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
            _import_modules(data.get("modules", []))
            return cls(
                inputs=tuple(_value_from_json(item) for item in data["inputs"]),
                outputs=tuple(_value_from_json(item) for item in data["outputs"]),
                in_spec=pytree.treespec_loads(data["in_spec"]),
                out_spec=pytree.treespec_loads(data["out_spec"]),
                arg_names=tuple(data["arg_names"]),
                dims={name: (bounds[0], bounds[1]) for name, bounds in data["dims"].items()},
            )
        except (KeyError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise FileError(
                "The signature stored in the file cannot be read.",
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


def _describe_structure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def describe(leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return describe_type(leaf.dtype, tuple(leaf.shape))
        return type(leaf).__name__

    shown = [str(pytree.tree_map(describe, arg)) for arg in args]
    shown += [f"{name}={pytree.tree_map(describe, value)}" for name, value in kwargs.items()]
    return ", ".join(shown) or "no inputs"


def _value_to_json(value: Value) -> dict[str, Any]:
    constant = value.constant
    if not isinstance(constant, (type(None), bool, int, float, str)):
        constant = str(constant)
    return {
        "name": value.name,
        "shape": None if value.shape is None else list(value.shape),
        "dtype": None if value.dtype is None else str(value.dtype).removeprefix("torch."),
        "constant": constant,
    }


def _value_from_json(item: Mapping[str, Any]) -> Value:
    return Value(
        name=item["name"],
        shape=None if item["shape"] is None else tuple(item["shape"]),
        dtype=None if item["dtype"] is None else getattr(torch, item["dtype"]),
        constant=item["constant"],
    )


def _modules_of(spec: pytree.TreeSpec) -> set[str]:
    """Names of the modules whose import registers the structure's own classes."""
    found: set[str] = set()
    if not spec.is_leaf():
        kind = spec.type
        if isinstance(kind, type) and kind.__module__ not in ("builtins", "collections"):
            found.add(kind.__module__)
        for child in spec.children():
            found |= _modules_of(child)
    return found


def _import_modules(names: Sequence[str]) -> None:
    """Import what registers the output classes; a file may not make us import just anything."""
    for name in names:
        package = name.split(".")[0]
        if package in ("torch", "builtins") or name in sys.modules:
            continue
        if package != "transformers":
            raise ValueError(f"the outputs need the module '{name}', which is not imported")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"the outputs need the package '{package}'") from error
