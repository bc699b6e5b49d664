"""Quantize weights without calibration data, and optionally the layers' data at run time."""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerChannel
from sqcompile.quantization.lookup import nearest_entries
from sqcompile.quantization.observed import ENTRIES
from sqcompile.quantization.scheme import Override, choose_formats, sites_of, weight_format
from sqcompile.quantization.stored import (
    fit_decoding,
    forget_unused_promises,
    look_up,
    store_weight,
    weight_tensor,
)
from sqcompile.rewrite import Rewriter

WEIGHT = Format(granularity=PerChannel(0), narrow=True)


class QuantizeWeights(Pass):
    """Store the weights of layers as integer codes; with `activation`, quantize their data as well.

    Weight-only quantization makes models smaller, and faster where reading weights is what takes the
    time. A dynamic activation format adds integer arithmetic: the scale of a layer's data is taken from
    the data itself at every call, once for all layers that share the value (the q, k and v of attention).
    Embeddings, convolutions and layers without dynamic kernels get integer weights only.

    Shapes: weight [O, K]: scale [O] a channel, [O, ceil(K / n)] a group of n; data [..., K]: scale [] a
        tensor, [..., 1] a token.
    Rewrites: linear(%x, @weight)  ==>  linear(dequantize(quantize(%x, dynamic_scale(%x))), dequantize(@codes)).
    Keeps: interface().
    Rejects: weights that are not float32 (remark); a tied weight of which one use is left out keeps a
        floating-point copy for it (remark).
    Raises: InputError if a weight holds NaN or infinity.

    Attributes:
        weight: Format of weights: `channel=0` means output channels, `group=n` groups along the inputs;
            `mapping=nf` (NF4), `tanh`, `sigmoid`, `mu-law`, `log2` or `codebook` for codes that are no even steps.
        activation: Format of the data of linear layers, dynamic; None for weights only. Its mapping has to be known:
            `int4:token:dynamic:mapping=nf`, `tanh@2`.
        search: Of scales: `minmax` covers every weight; `mse` has the least squared error; `half-quadratic`
            the least sum of a low power of the errors, which forgives outliers.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        kinds: Kinds of layers to quantize (`linear`, `embedding`, `conv2d`); empty means all.
        formats: Other formats of weights, by pattern or `kind:…` (`kind:head`: the layers that make the
            outputs); `float` leaves the layer as it is.
        activation_formats: Other formats of data, alike; `float` quantizes only the weight.
    """

    requires = Level.ATEN
    produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.interface()
    local: ClassVar[bool] = True

    weight: Format = WEIGHT
    activation: Format | None = None
    search: Search = "minmax"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    formats: tuple[Override, ...] = ()
    activation_formats: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        weights = [self.weight, *(choice for _, choice in self.formats if isinstance(choice, Format))]
        if any(format.dynamic for format in weights):
            raise self.reject_option(
                "weight", "a static format: a weight's scale is known when it is quantized"
            )
        values = [
            self.activation,
            *(choice for _, choice in self.activation_formats if isinstance(choice, Format)),
        ]
        for format in values:
            if format is None:
                continue
            if not format.dynamic:
                raise self.reject_option(
                    "activation", "a dynamic format, as uint8:affine:dynamic; static: insert-observers"
                )
            if isinstance(format.granularity, PerChannel):
                raise self.reject_option("activation", "one scale a tensor, token or group")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize layer by layer; tied weights and shared values once."""
        where = f"pass {self.name}"
        sites = [site for site in sites_of(program) if site.layer is not None]
        selected = {
            site.node for site in select_layers(sites, self.layers, self.exclude, self.kinds, where=where)
        }
        weights = choose_formats(sites, self.weight, self.formats, where=where)
        values = choose_formats(sites, self.activation, self.activation_formats, where=where)
        edit = Rewriter(program, self.name)
        stored: dict[tuple[fx.Node, Format], fx.Node] = {}
        coded: dict[tuple[fx.Node, Format], fx.Node] = {}
        for layer in context.progress.track(layers_of(program), "quantizing weights"):
            format, activation = weights[layer.node], values[layer.node]
            if layer.node not in selected or format is None:
                continue
            if program.tensor(layer.weight).dtype != torch.float32:
                context.remark(layer.node, _wrong_dtype(program, layer))
                continue
            self._quantize_weight(edit, layer, format, stored, context)
            if activation is not None:
                self._quantize_data(edit, layer, activation, coded, context)
        for layer in layers_of(program):
            if layer.weight.users and any(key[0] is layer.weight_value for key in stored):
                context.remark(
                    layer.node, f"'{layer.name}' keeps a floating-point copy of a weight that others quantize"
                )
        if not edit.changes:
            context.remark("program", "has no layer to quantize")
        edit.finish()
        forget_unused_promises(program)
        return PassResult(edit.changes)

    def _quantize_weight(
        self,
        edit: Rewriter,
        layer: Layer,
        format: Format,
        stored: dict[tuple[fx.Node, Format], fx.Node],
        context: PassContext,
    ) -> None:
        weight = weight_tensor(edit.program, layer)
        format, reason = weight_format(layer, format, tuple(weight.shape))
        if reason is not None:
            context.remark(layer.node, reason)
        value = layer.weight_value
        if (value, format) not in stored:
            decoding = fit_decoding(weight, format, self.search)
            with edit.before(layer.node):
                stored[value, format] = store_weight(edit, value, layer.weight, weight, decoding, format)
        assert layer.operator.weight is not None
        edit.set_argument(layer.node, layer.operator.weight, stored[value, format])

    def _quantize_data(
        self,
        edit: Rewriter,
        layer: Layer,
        format: Format,
        coded: dict[tuple[fx.Node, Format], fx.Node],
        context: PassContext,
    ) -> None:
        data = layer.data
        if data is None:
            return
        if layer.kind not in ("linear", "matmul"):
            context.remark(layer.node, "only its weight is quantized: dynamic data is for linear layers")
            return
        if data.meta["val"].dtype != torch.float32:
            context.remark(layer.node, f"only its weight is quantized: its data is {data.meta['val'].dtype}")
            return
        if (data, format) not in coded:
            with edit.before(layer.node):
                coded[data, format] = _insert_dynamic(edit, data, format)
        position = next(index for index in layer.operator.data if index != layer.operator.weight)
        edit.set_argument(layer.node, position, coded[data, format])


def _insert_dynamic(edit: Rewriter, data: fx.Node, format: Format) -> fx.Node:
    linear = format.mapping.is_linear
    granularity = (
        *format.granularity.pair,
        *((format.qmin, format.qmax) if linear else (ENTRIES.qmin, ENTRIES.qmax)),
    )
    pair = edit.call(
        torch.ops.sqcompile.dynamic_scale.default, data, *granularity, format.symmetric, like=data
    )
    scale = edit.call(operator.getitem, pair, 0, like=data)
    zero_point = edit.call(operator.getitem, pair, 1, like=data)
    codes = edit.call(torch.ops.sqcompile.quantize.default, data, scale, zero_point, *granularity, like=data)
    if not linear:
        codes = look_up(edit, codes, nearest_entries(format.mapping.table(format.bits)), data.name)
    return edit.call(
        torch.ops.sqcompile.dequantize.default, codes, scale, zero_point, *granularity, like=data
    )


def _wrong_dtype(program: Program, layer: Layer) -> str:
    dtype = program.tensor(layer.weight).dtype
    return f"stays in floating point: its weight is {dtype}; convert the model with model.float()"
