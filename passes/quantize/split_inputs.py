"""Split the inputs of layers by importance, so that the channels that matter may have more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from sqcompile.layers import Layer
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import choose_layers
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.quantization.scheme import weight_format
from sqcompile.quantization.stored import fit_decoding, rounded_weight, weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian
from sqcompile.second_order.layers import obstacle, visit_layers

aten = torch.ops.aten

WEIGHT = Format(bits=3, signed=False, symmetric=False, granularity=PerGroup(32))


class SplitInputs(Pass):
    """Write a linear layer as a sum of several, each over the input channels of like importance.

    A layer's bits are best spent on few of its inputs. Where all weights of a channel are rounded, the layer's
    outputs change by the channel's mean square times the squared error of its weights; channels are sorted by
    that, for the format that most of them will have. The parts are layers of their own, named
    `<layer>.inputs_0` (the most important channels), `<layer>.inputs_1`, …: whatever rounds afterwards gives
    them formats by name, `mixed-precision` chooses them, and backends run one product a part and add them up.

        split-inputs{shares=[0.125]},gptq{weight=uint3:affine:group=32,formats={*.inputs_0:uint8:affine:group=32}}

    Layers that read the same value, as q, k and v do, are split alike: its channels are gathered once a part.

    Shapes: x [..., K], weight [O, K]  ==>  x_i [..., K_i], weight_i [O, K_i] with Σ K_i = K.
    Rewrites: linear(%x, @weight, @bias)  ==>  linear(index_select(%x, @channels_0), @weight_0, @bias) + …
    Keeps: close(rtol=1e-4): products are added up in another order.
    Rejects: weights that are masked or promised to be sparse, shared, or not float32; layers with too few inputs.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        CalibrationError without data, or if inputs of a layer are not finite.
    Source: Dettmers et al. 2022, arXiv 2208.07339 (a product in two precisions, by channels); the order is that of
        the Hessian's diagonal times squared errors, as Frantar et al. 2023, arXiv 2210.17323, weigh columns.

    Attributes:
        shares: Share of the channels in each part but the last one, the most important first.
        multiple: Sizes of these parts are rounded up to multiples of it: whole groups of scales.
        weight: Format that the last part will have, by whose errors channels are sorted.
        search: Of its scales while channels are compared.
        layers: Patterns of the layers to split.
        exclude: Patterns of layers to leave whole; `kind:head`: those that make the outputs.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    shares: tuple[float, ...] = (0.125,)
    multiple: int = 32
    weight: Format = WEIGHT
    search: Search = "mse"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("kind:head",)
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if not self.shares or any(share <= 0 for share in self.shares) or not sum(self.shares) < 1:
            raise self.reject_option("shares", "shares above 0, together less than 1")
        if self.multiple < 1:
            raise self.reject_option("multiple", "at least 1")
        if self.weight.dynamic:
            raise self.reject_option("weight", "a static format")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Weigh the channels of each value that layers read, and split the layers."""
        inputs = self._inputs(program, context)
        importance: dict[fx.Node, Tensor] = {}

        def visit(layer: Layer, hessian: Hessian) -> Tensor:
            weight = weight_tensor(program, layer)
            assert layer.data is not None
            error = self._error(layer, weight, hessian)
            known = importance.get(layer.data)
            importance[layer.data] = error if known is None else known + error
            return program.tensor(layer.weight).detach()

        visit_layers(
            program,
            [layer for item in inputs for layer in item.layers],
            visit,
            context,
            max_bytes=self.max_bytes,
            purpose="weighing channels",
        )
        edit = Rewriter(program, self.name)
        concentration = {}
        for item in inputs:
            error = importance[item.data]
            order = error.argsort(descending=True, stable=True)
            parts = [part.sort().values for part in order.split(list(item.sizes))]
            self._split(edit, item, parts)
            total = float(error.sum())
            first = float(error[parts[0]].sum())
            concentration[item.layers[0].name] = first / total if total > 0 else item.sizes[0] / len(order)
        # Of each value, by the first layer that reads it: the share of the error that is the first part's.
        return PassResult(edit.finish(), facts={"first_part": concentration})

    def _inputs(self, program: Program, context: PassContext) -> list[_Input]:
        """Return the values that layers to split read, each with these layers and the sizes of the parts."""
        readers: dict[fx.Node, list[Layer]] = {}
        for layer in choose_layers(program, self.layers, self.exclude, (), where=f"pass {self.name}"):
            reason = self._obstacle(program, layer)
            if reason is not None:
                context.remark(layer.node, f"is not split: {reason}")
                continue
            assert layer.data is not None
            readers.setdefault(layer.data, []).append(layer)
        return [
            _Input(data, tuple(layers), self._sizes(program.tensor(layers[0].weight).shape[1]))
            for data, layers in readers.items()
        ]

    def _obstacle(self, program: Program, layer: Layer) -> str | None:
        reason = obstacle(program, layer)
        if reason is not None:
            return reason
        if layer.kind != "linear":
            return f"it is a {layer.kind}"
        if layer.weight_value is not layer.weight or layer.weight_name in program.sparsity:
            return "its zeros would be promised of a weight that is gone; prune the parts"
        if program.tensor(layer.weight).dtype != torch.float32:
            return f"its weight is {program.tensor(layer.weight).dtype}"
        inputs = program.tensor(layer.weight).shape[1]
        if self._sizes(inputs)[-1] < 1:
            return f"its {inputs} inputs are no more than the first parts take"
        return None

    def _sizes(self, inputs: int) -> tuple[int, ...]:
        """Return how many channels each part gets; nothing is left for the last one where they are too few."""
        sizes = [-(-round(share * inputs) // self.multiple) * self.multiple for share in self.shares]
        sizes = [max(size, self.multiple) for size in sizes]
        return (*sizes, inputs - sum(sizes))

    def _error(self, layer: Layer, weight: Tensor, hessian: Hessian) -> Tensor:
        """Return what rounding each channel alone adds to the mean square of the outputs' errors, [K]."""
        format, _ = weight_format(layer, self.weight, tuple(weight.shape))
        rounded = rounded_weight(weight, fit_decoding(weight, format, self.search), format)
        return (rounded - weight).double().square().sum(0) * hessian.diagonal.double()

    def _split(self, edit: Rewriter, item: _Input, parts: list[Tensor]) -> None:
        program = edit.program
        first = item.layers[0]  # in graph order
        gathered = []
        with edit.before(first.node):
            for index, part in enumerate(parts):
                name = f"{first.name}.channels_{index}"
                channels = edit.constant(name, part.to(torch.int32), like=first.node)
                gathered.append(
                    edit.call(aten.index_select.default, item.data, -1, channels, like=first.node)
                )
        for layer in item.layers:
            weight = program.tensor(layer.weight).detach()
            with edit.before(layer.node):
                total: fx.Node | None = None
                for index, part in enumerate(parts):
                    stored = edit.constant(
                        f"{layer.name}.inputs_{index}.weight",
                        nn.Parameter(weight[:, part].contiguous()),
                        like=layer.node,
                    )
                    bias = [layer.bias] if index == 0 and layer.bias is not None else []
                    made = edit.call(aten.linear.default, gathered[index], stored, *bias, like=layer.node)
                    total = (
                        made if total is None else edit.call(aten.add.Tensor, total, made, like=layer.node)
                    )
            assert total is not None
            edit.replace(layer.node, total)
            edit.erase(layer.node)


@dataclass(frozen=True)
class _Input:
    """A value, the layers to split that read it, and the sizes of the parts."""

    data: fx.Node
    layers: tuple[Layer, ...]
    sizes: tuple[int, ...]
