"""Simulation: running an observed program as it will be once its observers are frozen.

Every `observe` becomes the fake quantization that it will freeze to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sqcompile.program import Program
from sqcompile.quantization import affine
from sqcompile.quantization.lookup import lookup
from sqcompile.quantization.observed import (
    Parameters,
    freeze,
    observer_name,
    state_of,
    value_observers,
    weight_observers,
)
from sqcompile.quantization.stored import rounded_weight, weight_decoding, weight_tensor
from sqcompile.stepwise import Stepwise


class Simulation(Stepwise):
    """An observed program, run with the parameters that its observers freeze to.

    Args:
        program: A program of level `OBSERVED`; it is only read.

    Raises:
        CalibrationError: If an observer never saw data.
        InputError: If a weight is not finite.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        frozen: dict[str, Parameters] = {}
        for node in value_observers(program):
            name = observer_name(node)
            if name not in frozen:
                frozen[name] = freeze(state_of(program, node))
        self.functions = {
            node: _fake_quantizer(frozen[observer_name(node)]) for node in value_observers(program)
        }
        for node, layers in weight_observers(program).items():
            state, weight = state_of(program, node), weight_tensor(program, layers[0])
            self.substitutes[node] = rounded_weight(weight, weight_decoding(state, weight), state.format)


def _fake_quantizer(parameters: Parameters) -> Callable[[Any], Tensor]:
    format = parameters.format
    axis, group_size = format.granularity.pair

    def fake_quantize(value: Any) -> Tensor:
        decode = parameters.scale, parameters.zero_point, axis, group_size
        if parameters.entries is None:
            return affine.fake_quantize(value, *decode, format.qmin, format.qmax)
        codes = affine.quantize(value, *decode, format.qmin, format.qmax, format.storage_dtype)
        return affine.dequantize(lookup(codes, parameters.entries), *decode)

    return fake_quantize
