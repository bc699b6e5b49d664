"""Comparing a backend with the reference where results are quantized: to a step, but for ties.

A value that lies between two codes to the last bit of float32 may round either way, whoever computes it.
So an output that moves when the reference itself computes with that much noise says nothing about the
backend, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.program import Program


@dataclass
class Steps:
    """How many outputs are more than a step (1/255 of their tensor's range) away.

    Attributes:
        outside: Those that are, though no noise moves them.
        unsettled: Those that noise moves; only looked for where a call has any outside.
        total: All.
    """

    outside: int = 0
    unsettled: int = 0
    total: int = 0

    def add(self, program: Program, inputs: Sequence[Any], results: Sequence[Tensor]) -> None:
        """Take in the results of a call."""
        expected = program.run(inputs)
        wrong = _moved(results, expected, 1.01)
        self.total += wrong.numel()
        if not wrong.any():
            return
        noisy = torch.zeros_like(wrong)
        for seed in range(16):
            noisy |= _moved(_with_noise(program, inputs, seed), expected, 0.5)
        self.unsettled += int(noisy.sum())
        self.outside += int((wrong & ~noisy).sum())

    def agree(self) -> bool:
        """Whether 99.9 % of the outputs are within a step, and most say something."""
        return self.outside <= 0.001 * self.total and self.unsettled <= 0.2 * self.total


def _moved(results: Sequence[Tensor], expected: Sequence[Tensor], steps: float) -> Tensor:
    """Return which of all outputs are more than so many steps away."""
    parts = []
    for result, wanted in zip(results, expected, strict=True):
        step = float(wanted.detach().max() - wanted.detach().min()) / 255
        parts.append(((result - wanted).abs() > steps * step).flatten())
    return torch.cat(parts)


def _with_noise(program: Program, inputs: Sequence[Any], seed: int) -> list[Tensor]:
    """Run the reference with the rounding error of sums: half a last bit of the largest value, everywhere."""
    generator = torch.Generator().manual_seed(seed)

    class Noisy(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op != "call_function" or not isinstance(value, torch.Tensor):
                return value
            if value.dtype != torch.float32 or value.dim() < 2 or value.numel() == 0:
                return value
            bound = torch.finfo(torch.float32).eps / 2 * float(value.abs().max())
            return value + bound * torch.randn(value.shape, generator=generator)

    with torch.no_grad():
        return list(Noisy(program.graph_module).run(*inputs))
