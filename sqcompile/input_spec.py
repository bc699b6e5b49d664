"""Inputs as text, in the form in which signatures print them: `x: f32[batch, 3, 32, 32]`.

A size is a number; a name, which makes the dimension dynamic; or a name with the size to trace with,
as `height=64`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sqcompile.errors import InputError, RecipeError, did_you_mean
from sqcompile.signature import Signature, describe_type, short_dtype

_DTYPES = {
    short_dtype(dtype): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_LONG_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}

# Sizes to trace with where none is given: neither 0 nor 1, which torch.export takes for constants.
_BATCH, _OTHER = 2, 16


@dataclass(frozen=True)
class InputSpec:
    """What one input of a model looks like.

    Attributes:
        name: Name of the input.
        dtype: Element type.
        shape: Numbers, and names of dynamic dimensions.
        sizes: Size of each dimension to trace with.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read `x: f32[batch, 3, 32, 32]`.

        Raises:
            RecipeError: If the text is no input.
        """
        match = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*:\s*(\w+)\s*\[(.*)\]\s*", text)
        if match is None:
            raise RecipeError(
                f"'{text}' describes no input.",
                where=f"input '{text}'",
                seen=text,
                expected="name: type[sizes], such as 'x: f32[batch, 3, 32, 32]'",
                next_step="on a command line, put it into quotes",
            )
        name, kind, sizes = match.groups()
        dtype = _DTYPES.get(kind) or _LONG_NAMES.get(kind)
        if dtype is None:
            raise RecipeError(
                f"There is no element type '{kind}'.",
                where=f"input '{text}'",
                seen=kind,
                expected=", ".join(_DTYPES),
                next_step=did_you_mean(kind, [*_DTYPES, *_LONG_NAMES]),
            )
        parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
        pairs = [_parse_size(part, axis, text) for axis, part in enumerate(parts)]
        return cls(name, dtype, tuple(size for size, _ in pairs), tuple(number for _, number in pairs))

    def example(self, seed: int = 0) -> torch.Tensor:
        """Return a tensor to trace with: normal numbers, or ones, which are valid tokens and masks."""
        if not self.dtype.is_floating_point:
            return torch.ones(self.sizes, dtype=self.dtype)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.sizes, generator=generator).to(self.dtype)

    def dynamic_axes(self) -> dict[int, str]:
        """Return the name of each dynamic dimension by its axis."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def __str__(self) -> str:
        defaults = [_default_size(axis) for axis in range(len(self.shape))]
        shown = [
            f"{size}={number}" if isinstance(size, str) and number != default else size
            for size, number, default in zip(self.shape, self.sizes, defaults, strict=True)
        ]
        return f"{self.name}: {describe_type(self.dtype, shown)}"


def example_inputs(specs: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """Return one call's keyword inputs for the described inputs."""
    return {spec.name: spec.example(seed) for seed, spec in enumerate(specs)}


def with_dims(
    shapes: Any, inputs: Sequence[str], ranges: Mapping[str, Mapping[str, int]] | None = None
) -> Any:
    """Return dynamic shapes as torch.export takes them: names become `Dim`s, other inputs stay fixed.

    Args:
        shapes: Input -> axis -> name or `Dim`, or such for each input in order; any other form is returned as it is.
        inputs: Names of all inputs of the call.
        ranges: `min` and `max` of names.

    Raises:
        InputError: If an input does not exist.
    """
    given = shapes
    if isinstance(shapes, (list, tuple)) and len(shapes) <= len(inputs):
        shapes = dict(zip(inputs, shapes, strict=False))
    if not isinstance(shapes, Mapping) or not any(
        isinstance(dim, str) for axes in shapes.values() if isinstance(axes, Mapping) for dim in axes.values()
    ):
        return given
    for name in shapes:
        if name not in inputs:
            raise InputError(
                f"The call has no input '{name}'.",
                where="dynamic_shapes",
                seen=name,
                expected=", ".join(inputs),
                next_step=did_you_mean(name, inputs),
            )
    dims: dict[str, Any] = {}

    def dim(item: Any) -> Any:
        if not isinstance(item, str):
            return item
        return dims.setdefault(item, torch.export.Dim(item, **(ranges or {}).get(item, {})))

    return {
        name: {axis: dim(item) for axis, item in (shapes.get(name) or {}).items()} or None for name in inputs
    }


def _parse_size(text: str, axis: int, whole: str) -> tuple[int | str, int]:
    if re.fullmatch(r"\d+", text):
        return int(text), int(text)
    match = re.fullmatch(r"([A-Za-z_]\w*)(?:\s*=\s*(\d+))?", text)
    if match is None:
        raise RecipeError(
            f"'{text}' is no size.",
            where=f"input '{whole}'",
            seen=text,
            expected="a number; a name for a dynamic dimension; or both, as height=64",
            next_step="write a number or a name",
        )
    return match[1], int(match[2]) if match[2] else _default_size(axis)


def _default_size(axis: int) -> int:
    return _BATCH if axis == 0 else _OTHER


def example_call(signature: Signature) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return a call's arguments with random numbers in them, or None if a size cannot be chosen.

    Args:
        signature: Of a traced program; dynamic dimensions get small sizes within their range.
    """
    sizes: dict[str, int] = {}
    leaves: list[Any] = []
    for seed, value in enumerate(signature.inputs):
        if value.shape is None or value.dtype is None:
            leaves.append(value.constant)
            continue
        shape = [_chosen_size(size, axis, signature, sizes) for axis, size in enumerate(value.shape)]
        if None in shape:
            return None
        numbers = tuple(size for size in shape if size is not None)
        leaves.append(InputSpec(value.name, value.dtype, numbers, numbers).example(seed))
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return tuple(args), dict(kwargs)


def _chosen_size(size: int | str, axis: int, signature: Signature, chosen: dict[str, int]) -> int | None:
    if isinstance(size, int):
        return size
    if not size.isidentifier():
        return None  # an expression, such as 2*batch
    if size not in chosen:
        low, high = signature.dims.get(size, (1, None))
        chosen[size] = max(low, min(_default_size(axis), high or _OTHER))
    return chosen[size]
