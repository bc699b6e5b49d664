from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.passes import Function, refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile.passes import CanonicalizeActivations
from sqcompile.testing import CheckedPass, check_pass
from sqcompile.text import node_text

X = (torch.linspace(-9, 9, 60).reshape(2, 30),)

RELU, RELU6 = "relu(%x)", "clamp(%x, min=0, max=6)"
SILU, HARDSWISH, HARDSIGMOID = "silu(%x)", "hardswish(%x)", "hardsigmoid(%x)"
GELU, GELU_TANH = "gelu(%x)", "gelu(%x, approximate='tanh')"
ROOT = math.sqrt(2 / math.pi)

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu6": (F.relu6, RELU6),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 0.5), "clamp(%x, min=-2, max=0.5)"),
    "hardtanh, default": (F.hardtanh, "clamp(%x, min=-1, max=1)"),
    "hardtanh of relu6": (lambda x: F.hardtanh(x, 0.0, 6.0), RELU6),
    "clamp_min": (lambda x: x.clamp_min(0.25), "clamp(%x, min=0.25)"),
    "clamp_min 0": (lambda x: x.clamp_min(0), RELU),
    "clamp_max": (lambda x: x.clamp_max(0.25), "clamp(%x, max=0.25)"),
    "clamp from 0": (lambda x: x.clamp(min=0.0), RELU),
    "threshold": (lambda x: F.threshold(x, 0, 0), RELU),
    "relu, then at most 6": (lambda x: F.relu(x).clamp(max=6), RELU6),
    "at most 6, then relu": (lambda x: F.relu(x.clamp(max=6)), RELU6),
    "relu twice": (lambda x: F.relu(F.relu(x)), RELU),
    "overlapping clamps": (lambda x: x.clamp(-1, 3).clamp(0.5, 9), "clamp(%x, min=0.5, max=3)"),
    "clamps apart": (lambda x: x.clamp(-3, -1).clamp(1, 2), "clamp(%x, min=1, max=1)"),
    "three clamps": (lambda x: x.clamp(-3).clamp(max=5).relu(), "clamp(%x, min=0, max=5)"),
    "silu": (lambda x: x * torch.sigmoid(x), SILU),
    "silu, other order": (lambda x: torch.sigmoid(x) * x, SILU),
    "silu of two factors": (lambda x: (2 * x) * torch.sigmoid(x) * 0.5, SILU),
    "hardsigmoid": (lambda x: F.relu6(x + 3) / 6, HARDSIGMOID),
    "hardsigmoid by a factor": (lambda x: F.hardtanh(3 + x, 0, 6) * 0.1666667, HARDSIGMOID),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, HARDSWISH),
    "hardswish, grouped": (lambda x: x * (F.relu6(x + 3) / 6), HARDSWISH),
    "hardswish, other order": (lambda x: F.relu6(3 + x) * x * (1 / 6), HARDSWISH),
    "hardswish of hardsigmoid": (lambda x: F.hardsigmoid(x) * x, HARDSWISH),
    "hardswish of clamp": (lambda x: x / 6 * (x + 3).clamp(0, 6), HARDSWISH),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), GELU),
    "gelu, rounded": (lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.70710678)), GELU),
    "gelu, halved last": (lambda x: x * (torch.erf(x / 1.4142135) + 1) / 2, GELU),
    "gelu, tanh": (lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3)))), GELU_TANH),
    "gelu, tanh of products": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
        GELU_TANH,
    ),
    "gelu, tanh factored": (
        lambda x: x * 0.5 * (1 + torch.tanh(x * 0.79788456 * (1 + 0.044715 * x * x))),
        GELU_TANH,
    ),
    "gelu, tanh of squares": (
        lambda x: x * 0.5 * (1 + torch.tanh(ROOT * x * (1 + 0.044715 * x.square()))),
        GELU_TANH,
    ),
}

OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu of another factor": lambda x: x * torch.sigmoid(1.702 * x),
    "silu of another value": lambda x: (x + 1) * torch.sigmoid(x),
    "twice silu": lambda x: 2 * x * torch.sigmoid(x),
    "sigmoid squared": lambda x: torch.sigmoid(x) * torch.sigmoid(x),
    "hardsigmoid shifted by 2": lambda x: (x + 2).clamp(0, 6) / 6,
    "hardsigmoid shifted by 3 · 2": lambda x: torch.add(x, 3, alpha=2).clamp(0, 6) / 6,
    "hardsigmoid over 5": lambda x: (x + 3).clamp(0, 6) / 5,
    "hardsigmoid up to 5": lambda x: (x + 3).clamp(0, 5) / 6,
    "hardswish of another value": lambda x: (x + 1) * (x + 3).clamp(0, 6) / 5,
    "gelu of erf(x)": lambda x: 0.5 * x * (1 + torch.erf(x)),
    "gelu without a half": lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu plus 2": lambda x: 0.5 * x * (2 + torch.erf(x / math.sqrt(2))),
    "gelu, another cubic": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.05 * x**3))),
    "gelu, a square": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "gelu, another scale": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "gelu, alpha": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * torch.add(x, x**3, alpha=2))),
    "threshold above 0": lambda x: F.threshold(x, 0.5, 0.5) * 1.5,
    "divided by a value": lambda x: torch.sigmoid(x) / (x + 20),
}


@functools.cache
def checked(cases: str) -> CheckedPass:
    """All cases in one model, since tracing is what takes time; the n-th output is that of the n-th case."""
    functions = [case[0] for case in FORMS.values()] if cases == "forms" else list(OTHERS.values())
    return check_pass(
        CanonicalizeActivations(), Function(lambda x: [function(x) for function in functions]), X
    )


@pytest.mark.parametrize("name", FORMS)
def test_recognizes(name: str) -> None:
    node = checked("forms").after.output.args[0][list(FORMS).index(name)]
    assert node_text(node).split(" = ")[1] == FORMS[name][1]


def test_leaves_nothing_of_what_it_recognizes() -> None:
    assert len(list(checked("forms").after.compute_nodes())) == len(FORMS)


def test_leaves_all_else() -> None:
    assert checked("others").record.changes == 0
    assert not checked("others").reasons


def test_leaves_canonical_forms() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [
            F.relu(x),
            x.clamp(0, 6),
            F.silu(x),
            F.hardswish(x),
            F.hardsigmoid(x),
            F.gelu(x),
            F.leaky_relu(x),
        ]

    check_pass(CanonicalizeActivations(), Function(function), X, unchanged=True)


def test_replaces_in_a_network() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(30, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y * torch.sigmoid(y))

    check_pass(
        CanonicalizeActivations(),
        Block(),
        X,
        expected="""
            program (level aten)
              input  %x: f32[2, 30]
              tensor @first.weight: f32[4, 30]
              tensor @first.bias: f32[4]
              tensor @second.weight: f32[2, 4]
              tensor @second.bias: f32[2]
              %linear: f32[2, 4] = linear(%x, @first.weight, @first.bias)
              %silu: f32[2, 4] = silu(%linear)
              %linear_1: f32[2, 2] = linear(%silu, @second.weight, @second.bias)
              return output=%linear_1
        """,
    )


def test_keeps_a_part_that_is_used_elsewhere() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(x)
        return x * gate, gate + 1

    remark = "it is silu, but its part sigmoid %sigmoid has 2 users"
    check_pass(CanonicalizeActivations(), Function(function), X, unchanged=True, remarks=[remark])


def test_keeps_a_part_that_is_returned() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        gate = F.hardsigmoid(x)
        return x * gate, gate

    remark = "it is hardswish, but its part hardsigmoid %hardsigmoid is an output of the program"
    check_pass(CanonicalizeActivations(), Function(function), X, unchanged=True, remarks=[remark])


def test_keeps_clamps_of_what_is_used_in_between() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        positive = F.relu(x)
        return positive.clamp(max=6), positive + 1

    check_pass(CanonicalizeActivations(), Function(function), X, unchanged=True)


def test_keeps_clamps_by_values_and_clamps_that_contradict_themselves() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x.clamp(x.mean(), x.max()), x.clamp(3.0, 1.0), F.relu(x.clamp(3.0, 1.0))]

    check_pass(CanonicalizeActivations(), Function(function), X, unchanged=True)


def test_takes_numbers_that_are_stored() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("three", torch.tensor(3.0))
            self.register_buffer("six", torch.tensor(6.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x + self.three).clamp(0, 6) / self.six

    after = check_pass(CanonicalizeActivations(), Stored(), X).after
    assert [node_text(node).split(" = ")[1] for node in after.compute_nodes()] == [HARDSWISH]
    assert not after.has_tensor("three")


def test_keeps_numbers_that_training_may_change() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.six = nn.Parameter(torch.tensor(6.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x + 3).clamp(0, 6) / self.six

    check_pass(CanonicalizeActivations(), Trained(), X, unchanged=True)


def test_keeps_a_product_that_changes_the_type() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.ones(1, 1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x) * self.one * 2 + 1

    class Promoted(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return self.one * x * torch.sigmoid(x)

    for model in (Wide(), Promoted()):
        after = check_pass(CanonicalizeActivations(), model, X).after
        assert after.signature.outputs[0].dtype is torch.float64


def test_follows_dynamic_dimensions() -> None:
    check_pass(
        CanonicalizeActivations(),
        Function(lambda x: x * torch.sigmoid(x)),
        X,
        dynamic_shapes={"x": {0: Dim("batch", max=8)}},
        expected="""
            program (level aten)
              input  %x: f32[batch, 30]
              %silu: f32[batch, 30] = silu(%x)
              return output=%silu
        """,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_works_in_other_types(dtype: torch.dtype) -> None:
    function = FORMS["gelu, tanh"][0]
    after = check_pass(CanonicalizeActivations(), Function(function), (X[0].to(dtype),)).after
    assert [node_text(node).split(" = ")[1] for node in after.compute_nodes()] == [GELU_TANH]


def test_refuses_other_levels() -> None:
    refuse_other_levels(CanonicalizeActivations())
