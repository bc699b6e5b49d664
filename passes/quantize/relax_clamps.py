"""Turn bounded activations whose bound does not matter into ReLU."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from sqcompile.evaluate import run_watched
from sqcompile.levels import Level
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten


class RelaxClamps(Pass):
    """Replace ReLU6, and any clamp from zero to a bound that values hardly reach, by ReLU.

    Layers around a ReLU can be equalized, those around a clamp cannot: its bound is the same for every
    channel. Whether the bound matters is measured on calibration data.

    Rewrites: clamp(%x, 0, c)  ==>  relu(%x).
    Keeps: interface(): values above the bound pass, up to the share `cut` of them on calibration data.
    Rejects: a clamp that cuts a larger share of its values off.
    Raises: CalibrationError without data.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 5.1.1 (all ReLU6 replaced, unmeasured).

    Attributes:
        cut: The largest share of values above the bound, 0 ≤ cut ≤ 1; 1 replaces every such clamp.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()
    local: ClassVar[bool] = True

    cut: float = 0.001

    def __post_init__(self) -> None:
        if not 0 <= self.cut <= 1:
            raise self.reject_option("cut", "a share of values, 0 ≤ cut ≤ 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Count the values above each bound, then replace the clamps that cut little."""
        bounds = {node: bound for node in program.compute_nodes() if (bound := _bound(node)) is not None}
        if not bounds:
            context.remark("program", "has no clamp from zero to a bound")
            return PassResult()
        shares = _shares_above(program, bounds, context)
        edit = Rewriter(program, self.name)
        for node, share in shares.items():
            if share > self.cut:
                context.remark(
                    node, f"stays a clamp: {100 * share:.2f} % of its values are above {bounds[node]:g}"
                )
                continue
            value = node.args[0]
            with edit.before(node):
                edit.replace(node, edit.call(aten.relu.default, value, like=node))
            edit.erase(node)
        return PassResult(edit.finish())


def _bound(node: fx.Node) -> float | None:
    """Return the upper bound of a clamp from zero, or None."""
    if node.target in (aten.clamp.default, aten.hardtanh.default):
        low, high = argument(node, 1), argument(node, 2)
        return float(high) if low == 0 and isinstance(high, (int, float)) else None
    return 6.0 if node.target is aten.relu6.default else None


def _shares_above(
    program: Program, bounds: dict[fx.Node, float], context: PassContext
) -> dict[fx.Node, float]:
    above, total = dict.fromkeys(bounds, 0), dict.fromkeys(bounds, 0)
    clamps: dict[fx.Node, list[fx.Node]] = {}
    for node in bounds:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        clamps.setdefault(source, []).append(node)

    def count(source: fx.Node, value: Any) -> None:
        for node in clamps[source]:
            above[node] += int((value > bounds[node]).sum())
            total[node] += value.numel()

    for batch in context.batches("measuring clamps"):
        run_watched(program, batch, clamps, count)
    return {node: above[node] / max(1, total[node]) for node in bounds}
