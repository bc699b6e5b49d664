"""Block-wise distillation: each block towards what it made in the dense model."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from sqcompile.blockwise import (
    Descent,
    Region,
    modules_of,
    numbered,
    outermost,
    recover_regions,
    region_of,
)
from sqcompile.errors import CalibrationError, InputError
from sqcompile.hidden import output_of_module
from sqcompile.layers import select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter


class DistillBlocks(Pass):
    """Train each block until it makes what it made in the dense model, one block after the other.

    Recovery after one-shot compression without labels, without a training function, and in little memory: each
    block is trained alone, on calibration data that went through the compressed blocks before it, towards what
    left the same block of the model before the first pass. So it also makes up for what those before it got
    wrong. Masks hold. A block that training does not bring nearer keeps the weights that it had.

    A block is an outermost numbered module (`model.layers.3`, `layer1.0`), or any module that `blocks` names.

    Rewrites: nothing: parameters get new values.
    Keeps: interface(): training changes the numbers.
    Rejects: blocks whose output has another shape than the dense model's, or that the dense model does not have;
        weights that something outside of the block reads as well.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no block;
        InputError for a block that is named and whose output has another shape than the dense model's;
        CalibrationError if there is no calibration data, or no dense program; TrainingError if training diverges.
    Source: Li et al. 2021 (BRECQ), section 3.2, with weights in place of rounding.

    Attributes:
        epochs: Passes over the calibration batches, for each block; each batch is one step.
        rate: Highest learning rate of AdamW; it is warmed up, and falls to zero along a cosine.
        blocks: Patterns of the blocks to train.
        exclude: Patterns of blocks to leave as they are.
        max_bytes: Memory for the values of all batches at one place of both graphs, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    epochs: int = 10
    rate: float = 5e-4
    blocks: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise self.reject_option("epochs", "1 or more")
        if not 0 < self.rate < math.inf:
            raise self.reject_option("rate", "a positive number")
        if self.max_bytes < 1:
            raise self.reject_option("max_bytes", "a positive number of bytes")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the blocks of both programs, train those of the compressed one, and take the weights."""
        dense = context.original
        if dense is None:
            raise CalibrationError(
                "There is no dense program to learn from.",
                where=f"pass {self.name}",
                seen="a pass that runs outside of a pipeline",
                expected="a pipeline, whose first program is the dense one",
                next_step="run it through sqcompile.compile or PassManager, behind the passes that compress",
            )
        regions = self._regions(program, dense, context)
        if not regions:
            context.remark("program", "has no block to distil")
            return PassResult()
        found = recover_regions(
            program,
            dense,
            regions,
            Descent(self.epochs, self.rate, context.seed),
            context,
            max_bytes=self.max_bytes,
        )
        edit = Rewriter(program, self.name)
        for region in regions:
            recovery = found[region.name]
            if not recovery.trained:
                context.remark(
                    region.output,
                    f"block '{region.name}' stays: training brought it no nearer to the dense one",
                )
            for name, value in recovery.trained.items():
                reader, old = region.parameters[name][0], program.tensor(name)
                edit.replace_tensor(reader, nn.Parameter(value, requires_grad=old.requires_grad))
        facts = {
            region.name: {"error before": found[region.name].before, "error after": found[region.name].after}
            for region in regions
        }
        return PassResult(edit.finish(), facts=facts)

    def _regions(self, program: Program, dense: Program, context: PassContext) -> list[Region]:
        """Return the chosen blocks in graph order, and say why one is left out that nobody named."""
        modules, where = modules_of(program), f"pass {self.name}"
        known = modules if self.blocks != ("*",) else numbered(modules)
        found: list[Region] = []
        for module in outermost(select_layers(known, self.blocks, self.exclude, where=where)):
            try:
                region = region_of(program, dense, module.name)
            except InputError as error:
                if self.blocks != ("*",):
                    raise
                context.remark(output_of_module(program, module.name), f"cannot be distilled: {error.seen}")
                continue
            if region.parameters:
                found.append(region)
        return found
