"""Which operators can become ONNX: read from the exporter's own tables."""

from __future__ import annotations

import functools

import torch
from torch import fx

from sqcompile.quantization.format import storage_dtype

_QUANTIZATION = frozenset({"quantize", "dequantize", "lookup", "dynamic_scale", "fake_quantize", "mask"})


def reason_against(node: fx.Node) -> str | None:
    """Return why a node cannot become ONNX, or None if it can."""
    target = node.target
    if node.op == "call_module":
        return "a call of a module that was not traced"
    if not isinstance(target, torch._ops.OpOverload):
        return _reason_against_python(target)
    if target.namespace == "sqcompile":
        return _reason_against_ours(node, target)
    if _complex(node):
        return "complex numbers have no ONNX form here"
    missing = _without_kernel(node, target)
    if missing is not None:
        return f"ONNX Runtime has no kernel of {missing} for it on CPUs; in float32 it has: model.float()"
    if target in _translated() or _qualified(target) in _translated_names() or _decomposes(target):
        return None
    return "neither a translation to ONNX nor a decomposition is known"


def _reason_against_python(target: object) -> str | None:
    if isinstance(target, torch._ops.HigherOrderOperator):
        known = target in _translated() or f"higher_order::{target._name}" in _translated_names()
        return None if known else "a higher-order operator without a translation to ONNX"
    if callable(target) and getattr(target, "__module__", "") in ("_operator", "math", "builtins", "torch"):
        return None  # arithmetic on sizes
    return "not a torch operator"


def _reason_against_ours(node: fx.Node, target: torch._ops.OpOverload) -> str | None:
    name = target._schema.name.removeprefix("sqcompile::")
    if name == "observe":
        return "observers are still in the program; run freeze-observers first"
    if name not in _QUANTIZATION:
        return "no translation to ONNX is known"
    if name in ("quantize", "fake_quantize"):
        qmin, qmax = node.args[5], node.args[6]
        assert isinstance(qmin, int) and isinstance(qmax, int)
        storage_dtype(qmin, qmax)
    return None


def _complex(node: fx.Node) -> bool:
    return any(kind.is_complex for kind in _types(node))


def _without_kernel(node: fx.Node, target: torch._ops.OpOverload) -> str | None:
    """Return the element type for which ONNX Runtime 1.32 has no kernel on CPUs, as was tried, or None."""
    kinds = _types(node).union(*(_types(item) for item in node.all_input_nodes if item.op == "placeholder"))
    if torch.bfloat16 in kinds:
        return "bfloat16"  # nor can its Python interface be given any
    name = target._schema.name.removeprefix("aten::")
    if torch.float64 in kinds and name.startswith(_NOT_IN_DOUBLE):
        return "float64"
    return None


_NOT_IN_DOUBLE = ("conv", "gelu", "avg_pool", "adaptive_avg_pool", "lstm", "gru")


def _types(node: fx.Node) -> set[torch.dtype]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {item.dtype for item in values if isinstance(item, torch.Tensor)}


def _qualified(target: torch._ops.OpOverload) -> str:
    name = target._schema.name
    return name if target._overloadname == "default" else f"{name}.{target._overloadname}"


def _decomposes(target: torch._ops.OpOverload) -> bool:
    if target in _decompositions():
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


@functools.cache
def _translated() -> frozenset[object]:
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import get_torchlib_ops

    return frozenset(item.fx_target for item in get_torchlib_ops())


@functools.cache
def _translated_names() -> frozenset[str]:
    from onnxscript._framework_apis.torch_2_9 import get_torchlib_ops

    return frozenset(item.qualified_name for item in get_torchlib_ops())


@functools.cache
def _decompositions() -> frozenset[object]:
    return frozenset(torch.export.default_decompositions()) | frozenset(torch._decomp.decomposition_table)
