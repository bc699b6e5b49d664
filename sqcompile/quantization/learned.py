"""Learned scales: what training leaves behind in place of an observer's range."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.quantization.observers import ObserverState


class LearnedState(ObserverState):
    """The state of an observer whose scale was learned: it freezes to exactly that scale.

    Calibrating anew replaces it, as any other state, by what the data says.

    Args:
        state: The state that training began with.
        scale: The learned scale, in the shape of the state's.
        zero_point: Its zero point, alike.
        table: What codes are looked up in first, int8 [2**bits]; None for linear codes.
    """

    def __init__(
        self, state: ObserverState, scale: Tensor, zero_point: Tensor, table: Tensor | None = None
    ) -> None:
        super().__init__(state.observer, state.format, state.where)
        self.count, self.batches = max(1, state.count), max(1, state.batches)
        self.scale = scale.detach().clone()
        self.zero_point = zero_point.detach().clone()
        self.table = None if table is None else table.detach().clone()

    def parameters(self) -> tuple[Tensor, Tensor]:
        """Return the learned scale and its zero point."""
        return self.scale, self.zero_point

    def observe(self, x: Tensor) -> None:
        """Refuse: a learned scale does not follow data.

        Raises:
            CalibrationError: Always.
        """
        raise self.error(
            "a learned scale does not follow data",
            seen="values to observe",
            expected="freeze-observers after train-quantized",
            next_step="calibrate before training; calibrating anew starts from the data again",
        )

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        raise AssertionError("observe refuses before")

    def _range(self) -> tuple[Tensor, Tensor]:
        ends = (self.format.qmin, self.format.qmax) if self.table is None else self.table[[0, -1]].tolist()
        low, high = ((bound - self.zero_point) * self.scale for bound in ends)
        return low.to(torch.float32), high.to(torch.float32)

    def _merge(self, other: ObserverState) -> None:
        raise self.error("learned scales cannot be merged", seen="two states", expected="one training")
