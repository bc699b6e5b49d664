"""Operators outside ONNX itself, described so that onnxscript can call them.

ONNX Runtime's contrib operators, only those that are used here: the schemas of their domain ship with the
runtime, not with onnx. And operators of our own, which stand for others until the model has been exported:
`LOOKUP`, since the exporter would evaluate what it stands for on constants, and store what comes out; and those of
a model that generates, whose inputs and outputs (keys, values, masks) no program has.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnxscript import values

DOMAIN = "com.microsoft"
VERSION = 1

_Schema = onnx.defs.OpSchema
OUR_DOMAIN = "sqcompile"

_FLOAT, _CODES, _INDEX = "tensor(float)", "tensor(uint8)", "tensor(int64)"


def _parameter(name: str, kind: str, *, optional: bool = False) -> Any:
    option = _Schema.FormalParameterOption.Optional if optional else _Schema.FormalParameterOption.Single
    return _Schema.FormalParameter(name, kind, param_option=option)


def _integers(*names: str) -> list[Any]:
    return [_Schema.Attribute(name, _Schema.AttrType.INT, required=True) for name in names]


def _operator(name: str, inputs: list[Any], attributes: list[Any]) -> Any:
    constraints = [
        ("T", [_FLOAT], "values"),
        ("C", [_CODES], "packed codes"),
        ("I", ["tensor(int32)", _INDEX], "indices"),
    ]
    used = {item.type_str for item in inputs} | {"T"}
    schema = _Schema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[_parameter("y", "T")],
        type_constraints=[item for item in constraints if item[0] in used],
        attributes=attributes,
    )
    return values.Op(values.Opset(DOMAIN, VERSION), name, schema)


MATMUL_NBITS = _operator(
    "MatMulNBits",
    [
        _parameter("x", "T"),
        _parameter("packed", "C"),
        _parameter("scales", "T"),
        _parameter("zero_points", "C", optional=True),
        _parameter("groups", "I", optional=True),
        _parameter("bias", "T", optional=True),
    ],
    _integers("K", "N", "bits", "block_size", "accuracy_level"),
)

GATHER_BLOCK_QUANTIZED = _operator(
    "GatherBlockQuantized",
    [
        _parameter("packed", "C"),
        _parameter("indices", "I"),
        _parameter("scales", "T"),
        _parameter("zero_points", "C", optional=True),
    ],
    _integers("bits", "block_size", "gather_axis", "quantize_axis"),
)


def _ours(name: str, inputs: list[Any], types: list[Any], attributes: list[Any] | None = None) -> Any:
    """Return an operator of our own, with one result of the last type."""
    schema = _Schema(
        name,
        OUR_DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[_parameter("y", types[-1][0])],
        type_constraints=types,
        attributes=attributes or [],
    )
    return values.Op(values.Opset(OUR_DOMAIN, VERSION), name, schema)


LOOKUP = _ours(
    "Lookup",
    [_parameter("codes", "C"), _parameter("table", "E")],
    [("C", [_CODES], "indices"), ("E", ["tensor(int8)"], "entries")],
)

CACHED_ATTENTION = _ours(
    "CachedAttention",
    [
        *(_parameter(name, "T") for name in ("query", "key", "value")),
        *(_parameter(name, "T", optional=True) for name in ("key_scale", "value_scale")),
    ],
    [("T", [_FLOAT], "heads")],
    [
        _Schema.Attribute("low", _Schema.AttrType.INT, required=False),
        _Schema.Attribute("scale", _Schema.AttrType.FLOAT, required=True),
    ],
)

TOKEN_POSITIONS, SHARED_POSITIONS = (
    _ours(name, [_parameter("tokens", "I")], [("I", [_INDEX], "tokens")])
    for name in ("TokenPositions", "SharedPositions")
)
