"""What the tests of passes share: the zoo traced once a process, and a check that a level is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sqcompile.errors import LevelError
from sqcompile.levels import Level
from sqcompile.pipeline import Pass, PassContext, PassManager, verify_program
from sqcompile.program import Program
from sqcompile.tracing import trace

from .zoo import ZOO

CNNS = [name for name, model in ZOO.items() if model.family == "cnn"]


@functools.cache
def zoo_program(name: str) -> Program:
    """A model of the zoo, traced; passes get snapshots of it."""
    model = ZOO[name]
    program = trace(model.make(), model.inputs(), dynamic_shapes=model.dynamic_shapes)
    verify_program(program)  # nodes remember that they were checked, and so do those of snapshots
    return program


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def refuse_other_levels(item: Pass) -> None:
    """Check that a pass for float programs refuses one that is past them, and leaves it alone."""
    program = trace(nn.Linear(3, 2), (torch.ones(1, 3),))
    before = program.text()
    program.level = Level.QDQ
    with pytest.raises(LevelError, match=f"Pass {item.name} needs a program of level aten"):
        PassManager([item]).run(program, PassContext())
    program.level = Level.ATEN
    assert program.text() == before
