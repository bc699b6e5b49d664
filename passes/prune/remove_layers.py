"""Removing whole layers of deep models."""

from __future__ import annotations

import bisect
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from sqcompile.blocks import Block, find_blocks, influences, remove_block
from sqcompile.channels.budget import Budgeted
from sqcompile.channels.cost import Costs
from sqcompile.channels.flow import flow_of
from sqcompile.layers import select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import removed_count


class RemoveLayers(Budgeted):
    """Remove whole blocks of a deep model, such as the layers of a transformer: what enters one leaves it.

    A block is a numbered module (`model.layers.3`, `layer1.0`) that adds something to what passes through it.
    Its sums go, with everything that only they used; norms on the way stay. The other blocks keep
    their names.

    Rewrites: x + f(x)  ==>  x, for every sum on the way through a block.
    Keeps: interface(): removing layers changes what the model computes.
    Rejects: modules without a way from input to output through sums, norms and functions of single
        elements, such as those that change the width.
    Raises: PassOptionError for options out of range, and for a budget that cannot be met; SelectionError for
        patterns that match no block; CalibrationError where data is needed and there is none.
    Source: Men et al. 2024 (influence); Fan et al. 2020 (depth).

    Attributes:
        ratio: Fraction of the blocks to remove (0 ≤ r < 1), rounded down; at least one stays.
        macs: Instead of a ratio: fraction of the multiply-accumulates that may be left.
        parameters: Instead of a ratio: fraction of the parameters that may be left.
        latency: Instead of a ratio: fraction of the measured time of a call that may be left.
        latency_ms: Instead of a ratio: the time that a call may take, in milliseconds.
        backend: Where a latency is measured: `native`, `onnxruntime` or `reference`.
        threads: Threads within an operator when a latency is measured; none: as many as PyTorch uses.
        blocks: Patterns of the blocks to choose from; without a ratio or a budget all that match go.
        exclude: Patterns of blocks that stay.
        importance: `influence`: those go that turn their input least (needs calibration data); `last`: those
            nearest to the output, but the very last one; `random`.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    blocks: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    importance: Literal["influence", "last", "random"] = "influence"

    def __post_init__(self) -> None:
        if self.budget is None and self.blocks == ("*",):
            raise self.reject_option("ratio", "a fraction of the blocks to remove, or patterns of blocks")
        self.check_budget()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find blocks, rank them, and remove those that matter least."""
        known = find_blocks(program)
        if not known:
            context.remark("program", "has no block that could go")
            return PassResult()
        chosen = select_layers(known, self.blocks, self.exclude, where=f"pass {self.name}")
        facts: dict[str, Any] = {}
        if self.budget is not None:
            most = min(len(chosen), len(known) - 1)
            ranked = self._ranked(program, chosen, context)
            if self.ratio is not None:
                count = min(removed_count(len(chosen), self.ratio), most)
            else:
                count, facts = self._count(program, ranked[:most], context)
            chosen = ranked[:count]
        edit = Rewriter(program, self.name)
        for block in sorted(chosen, key=known.index):
            remove_block(edit, block)
        facts["removed"] = sorted(block.name for block in chosen)
        return PassResult(changes=edit.finish(), facts=facts)

    def _count(
        self, program: Program, ranked: Sequence[Block], context: PassContext
    ) -> tuple[int, dict[str, Any]]:
        """Return how many of the ranked blocks have to go to meet the budget, and what was measured."""

        def without(count: int) -> Program:
            return _without(program, [block.name for block in ranked[:count]])

        def cost(count: int) -> int:
            costs = Costs(flow_of(without(count)))
            return costs.macs() if self.parameters is None else costs.parameters()

        share = _shares(cost)

        def fewest(budget: float) -> int:
            """Return the smallest count within a budget; the largest there is if none is."""
            counts = range(len(ranked))
            return bisect.bisect_left(counts, True, key=lambda count: share(count) <= budget)

        if self.budget in ("macs", "parameters"):
            count = fewest(budget := getattr(self, self.budget))
            if share(count) > budget:
                raise self.unreachable(self.budget, share(count), f"without {count} blocks")
            return count, {}

        def candidate(budget: float) -> tuple[int, float]:
            count = fewest(budget)
            return count, share(count)

        count, measured = self.meet_latency(program, 0, candidate, without, context)
        return count, {"latency": measured}

    def _ranked(self, program: Program, blocks: list[Block], context: PassContext) -> list[Block]:
        """Return blocks in the order in which they go."""
        if self.importance == "random":
            return random.Random(context.seed).sample(blocks, len(blocks))
        if self.importance == "last":
            return [*blocks[-2::-1], blocks[-1]] if len(blocks) > 1 else blocks
        program.recompile()
        scores = influences(program, blocks, context.batches("measuring the influence of blocks"))
        return sorted(blocks, key=lambda block: scores[block.name])


def _without(program: Program, names: Sequence[str]) -> Program:
    """Return a copy of a program without some blocks."""
    copy = program.snapshot()
    edit = Rewriter(copy)
    for block in find_blocks(copy):
        if block.name in names:
            remove_block(edit, block)
    edit.finish()
    return copy


def _shares(cost: Callable[[int], int]) -> Callable[[int], float]:
    """Return the cost without so many blocks as a share of the cost with all; each is counted once."""
    counted = functools.cache(cost)
    return lambda count: counted(count) / max(1, counted(0))
