"""What the tests of quantization share: small models with settled weights, and programs written with Q and DQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sqcompile import Program, trace
from sqcompile.errors import LevelError
from sqcompile.levels import Level
from sqcompile.passes import Calibrate, FreezeObservers, InsertObservers
from sqcompile.pipeline import Pass, PassContext, PassManager

OBSERVE = torch.ops.sqcompile.observe.default
QUANTIZE = torch.ops.sqcompile.quantize.default
DEQUANTIZE = torch.ops.sqcompile.dequantize.default


def settled(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    """A chain of modules in eval mode, whose weights depend on the seed alone."""
    return settle(nn.Sequential(*modules), seed)


def settle(model: nn.Module, seed: int = 0) -> Any:
    """Fill parameters from the seed: normal values of magnitude 0.3."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return model.eval()


def values(*shape: int, seed: int = 1) -> Tensor:
    """Normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls(program: Program, target: object) -> list[fx.Node]:
    """The nodes that call an operator."""
    return [node for node in program.compute_nodes() if node.target is target]


def observed(program: Program) -> dict[str, str]:
    """Observer names of computed values -> the node that makes the value."""
    return {
        str(node.args[1]): node.args[0].name  # type: ignore[union-attr]
        for node in calls(program, OBSERVE)
        if "." not in str(node.args[1])
    }


def written(module: nn.Module, inputs: Any, **options: Any) -> Program:
    """A program that its module writes with quantize and dequantize operators."""
    program = trace(module.eval(), inputs, **options)
    program.level = Level.QDQ
    return program


class Written(nn.Module):
    """A function of values, with a scale and a zero point to quantize with."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, function: Callable[..., Any], scale: float = 0.1, zero_point: int = 128) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.register_buffer("other_scale", torch.tensor(2 * scale))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)

    def q(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        result: Tensor = QUANTIZE(
            x, self.scale if scale is None else scale, self.zero_point, None, None, 0, 255
        )
        return result

    def dq(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        result: Tensor = DEQUANTIZE(
            codes, self.scale if scale is None else scale, self.zero_point, None, None, 0, 255
        )
        return result


def frozen(model: nn.Module | Program, x: Tensor, **options: Any) -> Program:
    """A model, statically quantized with one calibration batch."""
    program = model.snapshot() if isinstance(model, Program) else trace(model, (x,))
    run([InsertObservers(**options), Calibrate(), FreezeObservers()], program, [x])
    return program


def run(passes: list[Pass], program: Program, batches: list[Any] | None = None) -> list[Any]:
    """Run passes with calibration batches; the records."""
    from sqcompile.calibration import Calibration

    calibration = None if batches is None else Calibration(batches, program.signature)
    return PassManager(passes).run(program, PassContext(calibration=calibration))


def refuse_level(item: Pass, level: Level) -> None:
    """Check that a pass refuses a program of a level that it is not for, and leaves it alone."""
    program = trace(nn.Linear(3, 2), (torch.ones(1, 3),))
    before = program.text()
    program.level = level
    with pytest.raises(LevelError, match=f"Pass {item.name} needs a program of level {item.requires}"):
        PassManager([item]).run(program, PassContext())
    program.level = Level.ATEN
    assert program.text() == before
