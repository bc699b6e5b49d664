"""The levels of a program: which operators it may hold."""

from __future__ import annotations

from enum import Enum


class Level(Enum):
    """How far a program has come on its way from float to quantized.

    - `ATEN`: float operators and masks.
    - `OBSERVED`: `ATEN` plus observers, which watch values and change none.
    - `QDQ`: `ATEN` plus explicit quantize and dequantize operators.
    """

    ATEN = "aten"
    OBSERVED = "observed"
    QDQ = "qdq"

    def __str__(self) -> str:
        return self.value

    @property
    def operators(self) -> frozenset[str]:
        """Names of the `torch.ops.sqcompile` operators that the level allows beside ATen."""
        return _ALLOWED[self]


_ALLOWED = {
    Level.ATEN: frozenset({"mask"}),
    Level.OBSERVED: frozenset({"mask", "observe"}),
    Level.QDQ: frozenset({"mask", "quantize", "dequantize", "lookup", "dynamic_scale", "fake_quantize"}),
}
