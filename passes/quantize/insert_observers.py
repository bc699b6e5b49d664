"""Insert observers where static quantization needs codes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from sqcompile.layers import select_layers
from sqcompile.levels import Level
from sqcompile.operators.table import argument, data_arguments, operator_of
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.format import Format, PerChannel, PerTensor
from sqcompile.quantization.observers import Fixed, HistogramMSE, MinMax, Observer
from sqcompile.quantization.placement import Watch, origin, place, takes_elements
from sqcompile.quantization.scheme import Override, Site, choose_formats, sites_of, weight_format
from sqcompile.quantization.stored import weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate

WEIGHT = Format(granularity=PerChannel(0), narrow=True)
ACTIVATION = Format(signed=False, symmetric=False)


class InsertObservers(Pass):
    """Put an observer on every weight and on every value that will be integer codes.

    Weights are quantized whatever is around them; values where integer operators make or take them
    (`sqcompile.quantization.placement` has the rule). A value is observed behind the activation that
    fuses into its operator, values that must share one scale (the inputs of cat) share one observer, and
    operators that only move elements (views, max pooling, padding) need none. Embeddings have integer
    weights only.

    Rewrites: conv2d(%x, @weight)  ==>  observe(conv2d(observe(%x), observe(@weight))).
    Keeps: bitwise(): observers watch and change nothing.
    Rejects: values and weights that are not float32; a number as operand of an element-wise operator.

    Attributes:
        weight: Format of weights; `channel=0` means output channels, `group=n` groups along the inputs; with a
            mapping, the entries of its table become the integers.
        activation: Format of values: one static scale a tensor. With a mapping (`int4:mapping=tanh`), calibration
            fits the table, too.
        observer: How the range of a value is chosen.
        layers: Patterns of the layers and operators to quantize.
        exclude: Patterns of those to leave in floating point.
        kinds: Kinds of operators to quantize (`conv2d`, `linear`, `add`); empty means all.
        formats: Other formats of weights, by pattern or `kind:…`; `float` leaves the operator as it is.
        activation_formats: Other formats of values, alike; `float` quantizes only the weight.
    """

    requires = Level.ATEN
    produces = Level.OBSERVED
    keeps: ClassVar[Keeps] = Keeps.bitwise()

    weight: Format = WEIGHT
    activation: Format = ACTIVATION
    observer: Observer = HistogramMSE()
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
        if any(format.dynamic or not isinstance(format.granularity, PerTensor) for format in values):
            raise self.reject_option(
                "activation", "one static scale a tensor, as uint8:affine; dynamic: quantize-weights"
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose operators and formats, then insert the observers of weights and of values."""
        sites = sites_of(program)
        selected = select_layers(sites, self.layers, self.exclude, self.kinds, where=f"pass {self.name}")
        weights = choose_formats(sites, self.weight, self.formats, where=f"pass {self.name}")
        values = choose_formats(sites, self.activation, self.activation_formats, where=f"pass {self.name}")
        edit = Rewriter(program, self.name)
        integer: list[Site] = []
        formats: dict[fx.Node, Format] = {}
        obstacles: dict[fx.Node, str] = {}
        count = 0
        for site in selected:
            format, activation = weights[site.node], values[site.node]
            if format is None:
                continue
            obstacle = _obstacle(site)
            if obstacle is not None:
                obstacles[site.node] = obstacle
                continue
            if site.layer is not None:
                count += self._observe_weight(edit, site, format, context)
            if activation is not None and site.operator.integer:
                integer.append(site)
                formats[site.node] = activation
        watches = place(integer, formats, context.remark)
        _remark_obstacles(obstacles, {watch.value for watch in watches}, context)
        for watch in watches:
            self._observe_value(edit, watch)
        if not edit.changes:
            context.remark("program", "has no operator to quantize")
        edit.finish()
        return PassResult(edit.changes, facts={"weights": count, "values": len(watches)})

    def _observe_weight(self, edit: Rewriter, site: Site, format: Format, context: PassContext) -> int:
        layer = site.layer
        assert layer is not None and site.operator.weight is not None
        shape = tuple(weight_tensor(edit.program, layer).shape)
        format, reason = weight_format(layer, format, shape)
        if reason is not None:
            context.remark(site.node, reason)
        value = layer.weight_value
        name, count = layer.weight_name, 0
        # A tied weight is observed once, unless its layers want different formats.
        while name in edit.program.observers and edit.program.observers[name].format != format:
            count += 1
            name = f"{layer.weight_name}_format{count}"
        observe = next((user for user in value.users if _observes(user, name)), None)
        if observe is None:
            edit.program.observers[name] = MinMax().start(format, f"layer '{layer.name}'")
            with edit.before(_first_user(value)):
                observe = edit.call(torch.ops.sqcompile.observe.default, value, name, like=value)
        edit.set_argument(site.node, site.operator.weight, observe)
        return int(count == 0)

    def _observe_value(self, edit: Rewriter, watch: Watch) -> None:
        observer = self.observer
        if watch.fixed_range is not None and watch.format.mapping.is_known:
            observer = Fixed(*watch.fixed_range)
        if watch.name not in edit.program.observers:
            edit.program.observers[watch.name] = observer.start(watch.format, locate(watch.value))
        with edit.before(_following(watch.value)):
            observe = edit.call(
                torch.ops.sqcompile.observe.default, watch.value, watch.name, like=watch.value
            )
        users = watch.users
        edit.replace(
            watch.value,
            observe,
            only=lambda user: (
                user is not observe
                and not _observes(user)
                and takes_elements(user)
                and (users is None or user in users)
            ),
        )


def _remark_obstacles(obstacles: dict[fx.Node, str], coded: set[fx.Node], context: PassContext) -> None:
    """Say why layers stay, and operators whose inputs are codes; of all others nobody expects otherwise."""
    for node, reason in obstacles.items():
        entry = operator_of(node)
        is_layer = entry is not None and entry.weight is not None
        if is_layer or any(origin(value) in coded for value in data_arguments(node)):
            context.remark(node, f"stays in floating point: {reason}")


def _obstacle(site: Site) -> str | None:
    """Say why an operator cannot be quantized, or return None."""
    node, entry = site.node, site.operator
    if site.layer is None and entry.weight is not None and entry.kind != "matmul":
        return "its weight is no stored tensor"
    if site.layer is not None and _dtype(site.layer.weight) != torch.float32:
        return f"its weight is {_dtype(site.layer.weight)}; convert the model with model.float()"
    if not entry.integer:
        return None
    for position in entry.data:
        value = argument(node, position)
        if isinstance(value, (int, float)):
            return f"one of its operands is the number {value}"
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if _dtype(item) != torch.float32:
                return f"one of its operands is {_dtype(item)}"
    if entry.kind in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return f"it adds with alpha={node.kwargs['alpha']}"
    if _dtype(node) != torch.float32:
        return f"its result is {_dtype(node)}"
    return None


def _dtype(value: Any) -> torch.dtype | None:
    recorded = value.meta.get("val") if isinstance(value, fx.Node) else None
    return recorded.dtype if isinstance(recorded, torch.Tensor) else None


def _observes(node: fx.Node, name: str | None = None) -> bool:
    if node.target is not torch.ops.sqcompile.observe.default:
        return False
    return name is None or node.args[1] == name


def _following(value: fx.Node) -> fx.Node:
    """Return the node before which an observer of `value` goes: behind it, and behind all inputs."""
    following = value.next
    while following.op in ("placeholder", "get_attr"):
        following = following.next
    return following


def _first_user(value: fx.Node) -> fx.Node:
    following = _following(value)
    while following not in value.users:
        following = following.next
    return following
