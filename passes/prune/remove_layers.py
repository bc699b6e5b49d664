"""Removing whole layers of deep models."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from sqcompile.blocks import Block, find_blocks, influences, remove_block
from sqcompile.layers import select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import removed_count


class RemoveLayers(Pass):
    """Remove whole blocks of a deep model, such as the layers of a transformer: what enters one leaves it.

    A block is a numbered module (`model.layers.3`, `layer1.0`) that adds something to what passes through it.
    Its sums go, with everything that only they used; norms on the way stay. The other blocks keep
    their names.

    Rewrites: x + f(x)  ==>  x, for every sum on the way through a block.
    Keeps: interface(): removing layers changes what the model computes.
    Rejects: modules without a way from input to output through sums, norms and functions of single
        elements, such as those that change the width.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no block;
        CalibrationError where data is needed and there is none.
    Source: Men et al. 2024 (influence); Fan et al. 2020 (depth).

    Attributes:
        ratio: Fraction of the blocks to remove (0 ≤ r < 1), rounded down; at least one stays.
        blocks: Patterns of the blocks to choose from; without a ratio all that match go.
        exclude: Patterns of blocks that stay.
        importance: `influence`: those go that turn their input least (needs calibration data); `last`: those
            nearest to the output, but the very last one; `random`.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    ratio: float | None = None
    blocks: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    importance: Literal["influence", "last", "random"] = "influence"

    def __post_init__(self) -> None:
        if self.ratio is None and self.blocks == ("*",):
            raise self.reject_option("ratio", "a fraction of the blocks to remove, or patterns of blocks")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise self.reject_option("ratio", "a fraction r of blocks to remove, 0 ≤ r < 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find blocks, rank them, and remove those that matter least."""
        known = find_blocks(program)
        if not known:
            context.remark("program", "has no block that could go")
            return PassResult()
        chosen = select_layers(known, self.blocks, self.exclude, where=f"pass {self.name}")
        if self.ratio is not None:
            count = min(removed_count(len(chosen), self.ratio), len(known) - 1)
            chosen = self._ranked(program, chosen, context)[:count]
        edit = Rewriter(program, self.name)
        for block in sorted(chosen, key=known.index):
            remove_block(edit, block)
        return PassResult(changes=edit.finish(), facts={"removed": sorted(block.name for block in chosen)})

    def _ranked(self, program: Program, blocks: list[Block], context: PassContext) -> list[Block]:
        """Return blocks in the order in which they go."""
        if self.importance == "random":
            return random.Random(context.seed).sample(blocks, len(blocks))
        if self.importance == "last":
            return [*blocks[-2::-1], blocks[-1]] if len(blocks) > 1 else blocks
        program.recompile()
        scores = influences(program, blocks, context.batches("measuring the influence of blocks"))
        return sorted(blocks, key=lambda block: scores[block.name])
