"""Turn observers into scales, zero points and integer weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from sqcompile.layers import Layer, layers_of
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.affine import Search, least_weight_scale, quantize_bias
from sqcompile.quantization.format import PerGroup, PerTensor
from sqcompile.quantization.observed import (
    Parameters,
    codes_source,
    freeze,
    observer_name,
    state_of,
    value_observers,
    weight_observers,
)
from sqcompile.quantization.stored import (
    forget_unused_promises,
    look_up,
    store_bias,
    store_weight,
    weight_decoding,
    weight_tensor,
)
from sqcompile.rewrite import Rewriter

quantize = torch.ops.sqcompile.quantize.default
dequantize = torch.ops.sqcompile.dequantize.default


class FreezeObservers(Pass):
    """Replace observers by explicit quantize and dequantize operators, and weights by their codes.

    A layer whose data is quantized gets its bias as int32 codes with scale s_x · s_w and zero point 0, as
    integer kernels add it. Where a channel's weights are so small that its bias would overflow int32 at
    that scale, the weight's scale is raised. Masks are baked into the codes: masked weights are exactly
    the zero point, and `Program.sparsity` promises it.

    Shapes: scale [] for values; as the format's granularity says for weights; [O] for biases.
    Rewrites: observe(%x)  ==>  dequantize(quantize(%x, @x_scale, @x_zero_point), …);
        observe(@weight)  ==>  dequantize(@weight_codes, @weight_scale, @weight_zero_point).
    Keeps: interface(): this is where quantization changes the numbers.
    Rejects: a bias of weights with scales a group, which stays in floating point.
    Raises: CalibrationError if an observer never saw data; InputError if a weight holds NaN or infinity.
    Source: ONNX QLinearConv-10 (bias).

    Attributes:
        search: How the scales of weights are chosen: `minmax` covers every weight, `mse` has the least
            squared error. Scales that `TrainQuantized` learned stay as they are.
    """

    requires = Level.OBSERVED
    produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.interface()

    search: Search = "minmax"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Freeze the values, then the weights and biases, whose scales depend on them."""
        edit = Rewriter(program, self.name)
        self._freeze_values(edit, context)
        layers = layers_of(program)
        for observe, users in weight_observers(program).items():
            self._freeze_weight(edit, observe, users, context)
        for layer in layers:
            _freeze_bias(edit, layer, context)
        program.observers.clear()
        edit.finish()
        forget_unused_promises(program)
        return PassResult(edit.changes)

    def _freeze_values(self, edit: Rewriter, context: PassContext) -> None:
        program = edit.program
        constants: dict[str, tuple[fx.Node, fx.Node]] = {}
        frozen: dict[str, Parameters] = {}
        for node in value_observers(program):
            name, state = observer_name(node), state_of(program, node)
            if name not in constants:
                frozen[name] = parameters = freeze(state)
                if not any(bool(bound.any()) for bound in state.range()):
                    context.remark(node, "was zero for all calibration data: its scale is 1")
                constants[name] = (
                    edit.constant(f"{name}_scale", parameters.scale, like=node),
                    edit.constant(f"{name}_zero_point", parameters.zero_point, like=node),
                )
            format, entries = frozen[name].format, frozen[name].entries
            options = (*constants[name], None, None, format.qmin, format.qmax)
            value = node.args[0]
            assert isinstance(value, fx.Node)
            with edit.before(node):
                codes = edit.call(quantize, value, *options, like=node)
                if entries is not None:
                    codes = look_up(edit, codes, entries, name)
                edit.replace(node, edit.call(dequantize, codes, *options, like=node))
            edit.erase(node)

    def _freeze_weight(
        self, edit: Rewriter, observe: fx.Node, layers: list[Layer], context: PassContext
    ) -> None:
        state = state_of(edit.program, observe)
        format = state.format
        weight = weight_tensor(edit.program, layers[0])
        least = None
        for layer in layers:
            bound = _least_scale(edit.program, layer)
            if bound is not None:
                least = bound if least is None else torch.maximum(least, bound)
        decoding = weight_decoding(state, weight, self.search, least)
        if least is not None and (raised := int((decoding.scale == least).sum())):
            context.remark(layers[0].node, f"{raised} weight scales were raised so that the bias fits int32")
        value = observe.args[0]
        assert isinstance(value, fx.Node)
        with edit.before(observe):
            stored = store_weight(edit, value, layers[0].weight, weight, decoding, format)
        edit.replace(observe, stored)
        edit.erase(observe)


def _least_scale(program: Program, layer: Layer) -> Tensor | None:
    """Return the least scale a weight may have for the sake of its bias, in the shape of the weight's scale."""
    source = _bias_source(program, layer)
    format = state_of(program, layer.weight_value).format
    if source is None or isinstance(format.granularity, PerGroup):
        return None
    input_scale, bias = source
    least = least_weight_scale(bias, input_scale)
    if isinstance(format.granularity, PerTensor):
        return least.max()
    # Grouped transposed convolutions: one scale serves a channel of every group.
    return least.reshape(_repeats(layer), -1).amax(0)


def _freeze_bias(edit: Rewriter, layer: Layer, context: PassContext) -> None:
    program = edit.program
    source, weight = _bias_source(program, layer), layer.weight_value
    if source is None or weight.target is not dequantize:
        return
    if weight.args[4] is not None:
        context.remark(layer.node, "its bias stays in floating point: its weight has scales a group")
        return
    input_scale, value = source
    scale_node, bias = weight.args[1], layer.bias
    assert isinstance(scale_node, fx.Node) and bias is not None and layer.operator.bias is not None
    weight_scale = program.tensor(scale_node)
    if weight_scale.dim():
        weight_scale = weight_scale.repeat(_repeats(layer))
    codes, scale = quantize_bias(value, input_scale, weight_scale)
    with edit.before(layer.node):
        edit.set_argument(layer.node, layer.operator.bias, store_bias(edit, bias, codes, scale))


def _bias_source(program: Program, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Return the input scale and the stored bias of a layer on integers, or None."""
    if layer.data is None or layer.bias is None or layer.bias.op != "get_attr":
        return None
    source = codes_source(layer.data, dequantize)
    if source is None or not isinstance(source.args[1], fx.Node):
        return None
    return program.tensor(source.args[1]), program.tensor(layer.bias).detach()


def _repeats(layer: Layer) -> int:
    """Return how often a weight's scales along its channels repeat along the outputs."""
    return layer.groups if layer.operator.kind.startswith("conv_transpose") else 1
