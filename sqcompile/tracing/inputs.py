"""Example inputs: their forms, whether they fit the model, and making them fit for tracing."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from torch.export.dynamic_shapes import _DimHint, _DimHintType
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from sqcompile.errors import InputError, TraceError, did_you_mean

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def normalize_inputs(example_inputs: Any) -> Inputs:
    """Return example inputs as (args, kwargs), NumPy arrays as tensors.

    Args:
        example_inputs: A tuple or list (positional), a mapping (keyword; a tokenizer's result too), a
            pair (tuple, dict), or one tensor or array.

    Raises:
        InputError: If there are none, or they have another form.
    """
    args, kwargs = _split(example_inputs)
    return tuple(_as_tensors(value) for value in args), {name: _as_tensors(v) for name, v in kwargs.items()}


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of `model.forward`, without `*args` and `**kwargs`."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def check_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that `model.forward` can be called with these arguments, before anything runs.

    Raises:
        InputError: If an argument is missing, unknown, or given twice.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = argument_names(model)
        unknown = [name for name in kwargs if name not in names]
        given = [*names[: len(args)], *kwargs, *["…"] * max(0, len(args) - len(names))]
        raise InputError(
            f"The example inputs do not fit {type(model).__name__}.forward: {error}.",
            where="example_inputs",
            seen=", ".join(given) or "no inputs",
            expected=f"forward{signature}",
            next_step=did_you_mean(unknown[0], names) if unknown else "give the inputs as forward takes them",
        ) from None


def check_weights(model: nn.Module) -> None:
    """Check that the model's tensors hold data.

    Raises:
        TraceError: If one lies on the meta device, which only knows shapes, or is not initialized.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise TraceError(
                "The model's weights are not initialized.",
                where=f"parameter or buffer '{name}'",
                seen="a tensor of a lazy module, whose shape the first call decides",
                expected="weights with a shape",
                next_step="call the model once, and train or load it",
            )
        if tensor.is_meta:
            raise TraceError(
                "The model's weights are not loaded.",
                where=f"parameter or buffer '{name}'",
                seen="a tensor on the meta device: shape and type without data",
                expected="weights on the CPU",
                next_step="load them, for example with model.load_state_dict(weights, assign=True)",
            )


def register_containers(inputs: Inputs, model: nn.Module) -> None:
    """Make torch.export look into dataclasses among the inputs, and into a language model's cache.

    Registration is global, in `torch.utils._pytree`; for a class that is registered it does nothing.
    """
    for leaf in _objects(inputs):
        register_dataclass(type(leaf))
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:  # a release without it: torch.export then names the class, and so do we
        return
    register_dynamic_cache_export_support()


def register_dataclass(kind: type) -> bool:
    """Make torch.export look into a dataclass; return whether that was new."""
    if not dataclasses.is_dataclass(kind) or kind in pytree.SUPPORTED_NODES:
        return False
    torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return True


def enlarge_dynamic_sizes(inputs: Inputs, names: Sequence[str], dynamic_shapes: Any) -> Inputs:
    """Repeat examples to size 2 along every dynamic dimension in which they have size 1.

    torch.export takes sizes 0 and 1 for constants, since a size of 1 broadcasts. One image or one text
    is the natural example, and a repeated one traces to the same program. Examples that are dynamic are
    made contiguous: from a slice of a larger tensor torch.export would take the larger one's size, a
    stride of the slice, for a size that the dimension must not have.

    Raises:
        InputError: If an example is empty along a dynamic dimension.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    axes = dynamic_axes(spec, names, dynamic_shapes)
    for index, (leaf, dims) in enumerate(zip(leaves, axes, strict=True)):
        if not isinstance(leaf, torch.Tensor):
            continue
        for axis, dim in dims.items():
            if not -leaf.dim() <= axis < leaf.dim() or leaf.shape[axis] > 1 or not _is_free(dim):
                continue
            if leaf.shape[axis] == 0:
                raise InputError(
                    "An example input is empty along a dynamic dimension.",
                    where=f"example_inputs, tensor {index}, dimension {axis}",
                    seen=tuple(leaf.shape),
                    expected="a size of 1 or more",
                    next_step="pass an example with data in it",
                )
            leaf = leaf.repeat_interleave(2, dim=axis)
        leaves[index] = leaf.contiguous() if dims else leaf
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def check_dynamic_shapes(inputs: Inputs, names: Sequence[str], dynamic_shapes: Any) -> None:
    """Check what torch.export says nothing useful about: forms, axes that are not there, and sizes that differ.

    Args:
        inputs: The examples.
        names: The model's parameter names, in order.
        dynamic_shapes: As torch.export takes it.

    Raises:
        InputError: If a tensor has no such axis, or a dimension has two sizes in the examples, or one out of range.
    """
    if not isinstance(dynamic_shapes, (Mapping, tuple, list, type(None))):
        raise InputError(
            "dynamic_shapes has a form that nothing can be read from.",
            where="dynamic_shapes",
            seen=repr(dynamic_shapes),
            expected="axes and names of the dimensions of each input",
            next_step='write {"x": {0: "batch"}} for the first dimension of input x',
        )
    leaves, spec = pytree.tree_flatten(inputs)
    sizes: dict[str, tuple[int, int, int]] = {}
    for index, (leaf, dims) in enumerate(zip(leaves, dynamic_axes(spec, names, dynamic_shapes), strict=True)):
        if not isinstance(leaf, torch.Tensor):
            continue
        for axis, dim in dims.items():
            if not -leaf.dim() <= axis < leaf.dim():
                raise InputError(
                    "dynamic_shapes names an axis that the input has not.",
                    where=f"dynamic_shapes, tensor {index}",
                    seen=f"axis {axis} of a tensor of shape {tuple(leaf.shape)}",
                    expected=f"0 to {leaf.dim() - 1}",
                    next_step="count axes from 0",
                )
            if type(dim) is not Dim:
                continue
            here = (leaf.shape[axis], index, axis)
            if not dim.min <= here[0] <= dim.max:
                raise InputError(
                    f"The example has a size that dimension '{dim.__name__}' does not allow.",
                    where=f"dynamic_shapes, tensor {index}, axis {axis}",
                    seen=here[0],
                    expected=f"{dim.min} to {dim.max}",
                    next_step="give the dimension a wider range, or pass an example within it",
                )
            other = sizes.setdefault(dim.__name__, here)
            if other[0] != here[0]:
                raise InputError(
                    f"Dimension '{dim.__name__}' has two sizes in the examples.",
                    where="dynamic_shapes",
                    seen=f"{other[0]} (tensor {other[1]}, axis {other[2]}) and {here[0]} (tensor {index}, axis {axis})",
                    expected="one size for one name",
                    next_step="give the dimensions different names, or correct the examples",
                )


def dynamic_axes(spec: pytree.TreeSpec, names: Sequence[str], dynamic_shapes: Any) -> list[dict[int, Any]]:
    """Return, for each leaf of `(args, kwargs)`, what `dynamic_shapes` says of each axis.

    Args:
        spec: Structure of `(args, kwargs)`.
        names: The model's parameter names, in order.
        dynamic_shapes: As torch.export takes it; other forms are left to torch.export's own check.
    """
    count = spec.num_leaves
    if dynamic_shapes is None:
        return [{} for _ in range(count)]
    args_spec, kwargs_spec = spec.children()
    arguments = [*args_spec.children(), *kwargs_spec.children()]
    if isinstance(dynamic_shapes, Mapping):
        keys = [*names[: args_spec.num_children], *(kwargs_spec.context or [])]
        per_argument = [dynamic_shapes.get(key) for key in keys]
    elif isinstance(dynamic_shapes, (tuple, list)):
        per_argument = list(dynamic_shapes)
    else:
        per_argument = []
    found: list[dict[int, Any]] = []
    for argument, shapes in zip(arguments, per_argument, strict=False):
        found += _leaf_axes(argument, shapes)
    return (found + [{} for _ in range(count)])[:count]


def _leaf_axes(spec: pytree.TreeSpec, shapes: Any) -> list[dict[int, Any]]:
    if spec.is_leaf():
        if isinstance(shapes, Mapping):
            return [{axis: dim for axis, dim in shapes.items() if isinstance(axis, int)}]
        return [dict(enumerate(shapes)) if isinstance(shapes, (tuple, list)) else {}]
    children = spec.children()
    if isinstance(shapes, Mapping):
        keys = spec.context if isinstance(spec.context, list) else []
        inner = [shapes.get(key) for key in keys]
    else:
        inner = list(shapes) if isinstance(shapes, (tuple, list)) else []
    inner += [None] * (len(children) - len(inner))
    return [axes for child, item in zip(children, inner, strict=False) for axes in _leaf_axes(child, item)]


def _is_free(dim: Any) -> bool:
    """Whether a dimension is a variable of its own: not static, not an expression of another."""
    if isinstance(dim, _DimHint):
        return dim.type is _DimHintType.DYNAMIC
    return type(dim) is Dim and dim.max >= 2


def _split(example_inputs: Any) -> Inputs:
    if example_inputs is None:
        raise InputError(
            "There are no example inputs to trace the model with.",
            where="example_inputs",
            seen=None,
            next_step="pass example_inputs=(tensor, …) or a dict of keyword inputs",
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (torch.Tensor, np.ndarray)):
        return (example_inputs,), {}
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(
            "The example inputs have an unknown form.",
            where="example_inputs",
            seen=type(example_inputs).__name__,
            expected="a tuple of positional inputs, a dict of keyword inputs, a pair of both, or one tensor",
            next_step="wrap the input in a tuple: (input,)",
        )
    if len(example_inputs) == 2:
        args, kwargs = example_inputs
        if isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    return tuple(example_inputs), {}


def _as_tensors(value: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, value
    )


def _objects(value: Any) -> Iterator[Any]:
    """Yield the leaves of a value that are dataclass instances, and those inside them."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield leaf
            for field in dataclasses.fields(leaf):
                yield from _objects(getattr(leaf, field.name))
