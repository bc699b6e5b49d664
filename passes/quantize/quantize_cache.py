"""Round what attention keeps of earlier tokens to integers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, fx

from sqcompile.attention import attentions
from sqcompile.evaluate import run_watched
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.format import Format, PerChannel, PerTensor
from sqcompile.quantization.observers import MinMax, ObserverState
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate

quantize = torch.ops.sqcompile.quantize.default
dequantize = torch.ops.sqcompile.dequantize.default


class QuantizeCache(Pass):
    """Round keys and values of attention to codes, with static scales from calibration data.

    For runtimes whose cache has one scale for all positions, as ONNX Runtime's GroupQueryAttention: there the cache
    holds the codes, in a quarter of the memory. The native engine's int8 cache finds a scale for each position and
    head when it is written, needs no calibration and is more exact; leave this pass out for it.

    Shapes: keys and values [B, heads, S, D], before heads are repeated; scale [heads], or [] with `tensor`.
    Rewrites: attention(%q, %k, %v)  ==>  attention(%q, dequantize(quantize(%k)), dequantize(quantize(%v))).
    Keeps: interface().
    Rejects: keys and values that are codes already; others than float32.
    Raises: CalibrationError without data, or if keys or values are not finite; PassOptionError for a format
        that no cache has.

    Attributes:
        format: Format of the codes: symmetric, with one scale a head (`channel=1`) or a layer (`tensor`).
    """

    requires = produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.interface()

    format: Format = Format(granularity=PerChannel(1))

    def __post_init__(self) -> None:
        format = self.format
        known = isinstance(format.granularity, PerTensor) or format.granularity == PerChannel(1)
        if not (known and format.symmetric and format.signed and format.mapping.is_linear) or format.dynamic:
            raise self.reject_option("format", "static and symmetric, as int8:channel=1 or int8")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Observe keys and values of all batches, then insert their rounding."""
        kept = dict.fromkeys(item for found in attentions(program) for item in (found.key, found.value))
        states: dict[fx.Node, ObserverState] = {}
        for node in kept:
            reason = _obstacle(node)
            if reason is None:
                states[node] = MinMax().start(self.format, locate(node))
            else:
                context.remark(node, reason)
        if not states:
            context.remark("program", "has no attention whose keys and values could be rounded")
            return PassResult()

        def feed(node: fx.Node, value: Tensor) -> None:
            states[node].observe(value)

        for batch in context.batches("measuring keys and values"):
            run_watched(program, batch, states, feed)
        edit = Rewriter(program, self.name)
        for node, state in states.items():
            self._round(edit, node, state)
        return PassResult(edit.finish(), facts={"values": len(states)})

    def _round(self, edit: Rewriter, node: fx.Node, state: ObserverState) -> None:
        scale, zero_point = state.parameters()
        options = (
            edit.constant(f"{node.name}_cache_scale", scale, like=node),
            edit.constant(f"{node.name}_cache_zero_point", zero_point, like=node),
            *self.format.granularity.pair,
            self.format.qmin,
            self.format.qmax,
        )
        with edit.after(node):
            codes = edit.call(quantize, node, *options, like=node)
            values = edit.call(dequantize, codes, *options, like=node)
        edit.replace(node, values, only=lambda user: user is not codes)


def _obstacle(node: fx.Node) -> str | None:
    if node.target is dequantize:
        return "stays as it is: it is made of codes already"
    dtype = node.meta["val"].dtype
    return None if dtype is torch.float32 else f"stays as it is: it is {dtype}"
