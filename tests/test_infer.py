"""Inference of recorded values, and what calls may share one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sqcompile.operators  # noqa: F401 - registers our operators
from sqcompile.errors import InputError
from sqcompile.infer import infer_node, misfit

aten = torch.ops.aten


def call(mode: FakeTensorMode, target: torch._ops.OpOverload, *args: object) -> torch.Tensor:
    """Infer a call whose tensor arguments are real ones."""
    graph = fx.Graph()
    made = []
    for argument in args:
        if isinstance(argument, torch.Tensor):
            node = graph.placeholder("x")
            node.meta["val"] = mode.from_tensor(argument)
            argument = node
        made.append(argument)
    return infer_node(graph.call_function(target, tuple(made)), mode)


def test_equal_calls_are_inferred_once():
    mode = FakeTensorMode()
    runs = []
    add = aten.add.Tensor

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            runs.append(func)
            return func(*args, **(kwargs or {}))

    with Counted():
        first = call(mode, add, torch.ones(2, 3), torch.ones(3))
        again = call(mode, add, torch.zeros(2, 3), torch.zeros(3))
    assert again is first
    assert runs.count(add) == 1


def test_a_difference_in_anything_is_inferred_anew():
    mode = FakeTensorMode()
    assert call(mode, aten.add.Tensor, torch.ones(2, 3), torch.ones(3)).shape == (2, 3)
    assert call(mode, aten.add.Tensor, torch.ones(4, 3), torch.ones(3)).shape == (4, 3)
    assert call(mode, aten.add.Tensor, torch.ones(2, 3).int(), torch.ones(3).int()).dtype == torch.int32
    assert call(mode, aten.add.Tensor, torch.ones(3, 2).T, torch.ones(2, 3).T.T).stride() != (2, 1)
    # 1, 1.0 and True are equal in Python, and give different types.
    assert call(mode, aten.add.Tensor, torch.ones(2).int(), 1).dtype == torch.int32
    assert call(mode, aten.add.Tensor, torch.ones(2).int(), 1.0).dtype == torch.float32
    assert call(mode, aten.add.Tensor, torch.ones(2).bool(), True).dtype == torch.bool
    assert call(mode, aten.add.Tensor, torch.ones(2).bool(), 1).dtype == torch.int64


def test_sizes_that_depend_on_data_are_never_shared():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    first = call(mode, aten.nonzero.default, torch.ones(5))
    second = call(mode, aten.nonzero.default, torch.ones(5))
    assert str(first.shape[0]) != str(second.shape[0])


def test_two_modes_share_nothing():
    one, other = FakeTensorMode(), FakeTensorMode()
    assert call(one, aten.relu.default, torch.ones(2)).fake_mode is one
    assert call(other, aten.relu.default, torch.ones(2)).fake_mode is other


def test_what_does_not_fit_is_raised_and_not_logged(caplog, capfd):
    """PyTorch logs a traceback of what it raises, which would stand above the error of four parts."""
    with pytest.raises(RuntimeError, match=r"must match the size|broadcast"):
        call(FakeTensorMode(), aten.add.Tensor, torch.ones(2, 3), torch.ones(4))
    with pytest.raises(RuntimeError) as caught:
        call(FakeTensorMode(), aten.linear.default, torch.ones(2, 3), torch.ones(4, 5))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not any(capfd.readouterr())
    seen, expected = misfit(caught.value)
    assert seen.startswith("RuntimeError: ") and expected == "shapes and types that the operator takes"


def test_what_one_of_our_operators_expects_is_said():
    weight, mask = torch.ones(2, 3), torch.ones(2, dtype=torch.bool)
    with pytest.raises(InputError) as caught:
        call(FakeTensorMode(), torch.ops.sqcompile.mask.default, weight, mask)
    seen, expected = misfit(caught.value)
    assert "torch.bool of shape [2]" in seen and expected == "torch.bool of shape [2, 3]"
