"""Quantized weights as codes that other tools read, and the convention of compressed-tensors for them.

transformers and vLLM read that convention: of each linear layer `weight_packed` (int32, codes of `num_bits` from the
lowest bit on), `weight_scale`, for affine formats `weight_zero_point` (packed alike, along the outputs) and
`weight_shape` stand for `weight`; the configuration says the format of each.
Source: https://github.com/vllm-project/compressed-tensors, format "pack-quantized".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import PretrainedError
from sqcompile.evaluate import constant_value
from sqcompile.layers import Layer, layers_of
from sqcompile.levels import Level
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate

# Bits of which a word of 32 holds a whole number: releases of compressed-tensors pack others differently.
_BITS = (2, 4, 8)
_DEQUANTIZE = torch.ops.sqcompile.dequantize.default
_OF_DATA = (torch.ops.sqcompile.quantize.default, torch.ops.sqcompile.dynamic_scale.default)


@dataclass(frozen=True)
class PackedWeight:
    """The weight of a layer as codes.

    Attributes:
        kinds: Kinds of the layers that use it: `linear`, `embedding`.
        name: Name of the weight in the model, such as `model.layers.0.mlp.up_proj.weight`.
        bits: Bits a code.
        codes: Codes from -2**(bits - 1) on, int8 [O, K].
        scale: float32 [O, G].
        zero_point: int8 [O, G], or None where all are 0.
        group_size: Inputs that share a scale, or None for one scale an output.
    """

    kinds: tuple[str, ...]
    name: str
    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int | None

    @property
    def module(self) -> str:
        """Name of the layer's module."""
        return self.name.removesuffix(".weight")

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        stored = {
            "weight_packed": pack(self.codes, self.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            stored["weight_zero_point"] = pack(self.zero_point.T, self.bits).T.contiguous()
        return {f"{self.module}.{name}": tensor for name, tensor in stored.items()}

    def scheme(self) -> dict[str, Any]:
        """Return its format as the configuration says it."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.zero_point is None,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as words: int8 [R, C], from -2**(bits - 1) on, to int32 [R, ceil(C · bits / 32)].

    The first code of a word lies in its lowest bits; codes are stored as their distance from the lowest.
    """
    per_word = 32 // bits
    columns = -(-codes.shape[1] // per_word) * per_word
    words = torch.zeros(codes.shape[0], columns, dtype=torch.int64, device=codes.device)
    words[:, : codes.shape[1]] = codes.long() + (1 << (bits - 1))
    shifts = torch.arange(per_word, device=codes.device) * bits
    packed = (words.unflatten(1, (-1, per_word)) << shifts).sum(-1)
    signed: Tensor = packed - (packed >= 2**31).long() * 2**32
    return signed.to(torch.int32)


def readable(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Return the weights that transformers can read back; the others have to stay float.

    It reads zero points only when it dequantizes all weights at once, and that by one format for all; embeddings
    and weights that several layers share it does not read.
    """
    weights = [weight for weight in weights if weight.kinds == ("linear",)]
    if all(weight.zero_point is None for weight in weights):
        return weights
    sizes: dict[str, int] = {}
    for weight in weights:
        sizes[str(weight.scheme())] = sizes.get(str(weight.scheme()), 0) + weight.codes.numel()
    largest = max(sizes, key=sizes.__getitem__)
    return [weight for weight in weights if str(weight.scheme()) == largest]


def quantization_config(weights: Sequence[PackedWeight], linear_layers: Sequence[str]) -> dict[str, Any]:
    """Return what the configuration of a model says about its packed weights.

    Args:
        weights: The packed weights.
        linear_layers: Names of all linear modules of the model.
    """
    groups: dict[str, list[str]] = {}
    schemes: dict[str, dict[str, Any]] = {}
    for weight in weights:
        text = str(weight.scheme())
        schemes[text] = weight.scheme()
        groups.setdefault(text, []).append(weight.module)
    packed = {weight.module for weight in weights}
    everything = len(groups) == 1
    # See `readable`; other readers pass over it.
    dequantize = {"dequantize": True} if any(weight.zero_point is not None for weight in weights) else {}
    return {
        **dequantize,
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if everything else modules,
                "weights": schemes[text],
                "format": "pack-quantized",
            }
            for number, (text, modules) in enumerate(groups.items())
        },
        "ignore": [name for name in linear_layers if name not in packed],
    }


def unpacked(program: Program, names: Mapping[str, Any]) -> tuple[Program, list[PackedWeight]]:
    """Return a float program that computes the same, and the codes of its matrices [O, K].

    Weights of other shapes, as those of convolutions, are float in the program alone.

    Args:
        program: The program; its data is not quantized.
        names: The tensors of the model, by name; stored codes are found by them.

    Raises:
        PretrainedError: If data is quantized, or a matrix has a format that other tools do not know.
    """
    for node in program.compute_nodes():
        if node.target in _OF_DATA:
            raise PretrainedError(
                "A Hugging Face folder holds quantized weights, and this program quantizes data as well.",
                where=locate(node),
                seen=node.name,
                expected="a program whose weights alone are quantized",
                next_step="quantize without an activation format; or save a .pt2, .onnx or .sqm file",
            )
    copy = program.snapshot()
    edit = Rewriter(copy)
    weights: list[PackedWeight] = []
    for node in [node for node in copy.compute_nodes() if node.target is _DEQUANTIZE]:
        users = [layer for layer in layers_of(copy) if layer.weight_value is node]
        value = constant_value(copy, node)
        name = _name(node, names)
        if value is None or name is None:
            raise PretrainedError(
                "A quantized value belongs to no weight of the model.",
                where=locate(node),
                seen=node.name,
                expected="codes of a tensor that the model's class has",
                next_step="leave out passes that fold or replace tensors; or save a .pt2 file",
            )
        if copy.has_tensor(name):
            raise PretrainedError(
                "A tied weight is quantized for one of its layers, and float for another.",
                where=locate(node),
                seen=f"codes of @{name}, and the tensor itself",
                expected="one tensor for all layers that the class ties",
                next_step="quantize all layers that share it (embeddings too), or leave them all out",
            )
        if all(user.kind in ("linear", "embedding") and user.operator.out_axis == 0 for user in users):
            weights.append(_packed(copy, name, users, node))
        edit.replace(node, edit.constant(name, value, like=node))
        edit.erase(node)
    edit.finish()
    copy.level = Level.ATEN
    return copy, weights


def _name(node: fx.Node, names: Mapping[str, Any]) -> str | None:
    """Return the model's name of a weight that is stored as codes."""
    source = node.args[0]
    while isinstance(source, fx.Node) and source.op != "get_attr":
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return None
    text = str(source.target)
    return next((name for name in names if text.startswith(f"{name}_codes")), None)


def _packed(program: Program, name: str, layers: Sequence[Layer], node: fx.Node) -> PackedWeight:
    layer = layers[0]
    source, axis, group_size = node.args[0], argument(node, 3), argument(node, 4)
    qmin, qmax = argument(node, 5), argument(node, 6)
    assert isinstance(source, fx.Node) and isinstance(qmin, int) and isinstance(qmax, int)
    bits = (qmax - qmin).bit_length()
    depth = program.tensor(layer.weight).shape[1]
    obstacle = None
    if source.op != "get_attr":
        obstacle = "a table of values"
    elif bits not in _BITS:
        obstacle = f"{bits} bits"
    elif axis == 0 and group_size is None:
        group_size = None
    elif axis not in (1, -1) or not isinstance(group_size, int):
        obstacle = "one scale for the whole weight" if axis is None else f"scales along axis {axis}"
    elif depth % group_size:
        obstacle = f"groups of {group_size} of {depth} inputs, the last of which is shorter"
    if obstacle is not None:
        raise PretrainedError(
            f"The weight of '{layer.name}' has a format that other tools do not know.",
            where=locate(layer.node),
            seen=obstacle,
            expected=f"{', '.join(map(str, _BITS))} bits, a scale a channel or a whole group of inputs",
            next_step="quantize to uint4:group=32:affine or the like; or save a .pt2, .onnx or .sqm file",
        )
    # Codes from 0 on are stored from -2**(bits - 1) on; a narrow format leaves the lowest one unused.
    lowest = -(1 << (bits - 1))
    shift = lowest - qmin if qmin >= 0 else 0
    scale, zero_point = (constant_value(program, node.args[index]) for index in (1, 2))  # type: ignore[arg-type]
    assert scale is not None and zero_point is not None
    rows = scale.shape[0]
    points = (zero_point.reshape(rows, -1) + shift).to(torch.int8)
    return PackedWeight(
        kinds=tuple(user.kind for user in layers),
        name=name,
        bits=bits,
        codes=(program.tensor(source).to(torch.int16) + shift).to(torch.int8),
        scale=scale.reshape(rows, -1).contiguous(),
        zero_point=points if bool(points.any()) else None,
        group_size=group_size if isinstance(group_size, int) else None,
    )
