"""Finding attention, and the keys and values that a cache would keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.quantize import settle, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.attention import attentions, before_repeating, shape_of, size_of

Repeat = Callable[[Tensor], Tensor]


class Attend(nn.Module):
    """Four heads of queries and two of keys, which are repeated in one way or another."""

    def __init__(self, repeat: Repeat, grouped: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.repeat, self.grouped = repeat, grouped

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed: Tensor = nn.functional.scaled_dot_product_attention(
            q, self.repeat(k), self.repeat(v), is_causal=True, enable_gqa=self.grouped
        )
        return mixed


def expanded(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], 4, -1, 8)


def repeated(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, 2, 1)


def program(repeat: Repeat, grouped: bool = False, dynamic: bool = False) -> Program:
    shapes = ({0: Dim("batch"), 1: Dim("sequence", min=3)},) if dynamic else None
    return trace(settle(Attend(repeat, grouped)), (values(2, 5, 16),), dynamic_shapes=shapes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_keys_are_those_before_they_are_repeated(dynamic: bool) -> None:
    (found,) = attentions(program(expanded, dynamic=dynamic))
    assert found.node.target is torch.ops.aten.scaled_dot_product_attention.default
    assert [int(shape_of(item)[1]) for item in (found.query, found.key, found.value)] == [4, 2, 2]
    assert found.key is not found.value and shape_of(found.key)[3] == 8


def test_keys_that_are_not_repeated_are_themselves() -> None:
    whole = program(lambda x: x, grouped=True)
    (found,) = attentions(whole)
    assert (found.query, found.key, found.value) == found.node.args[:3]
    assert before_repeating(found.key) is found.key


def test_heads_in_another_order_are_not_repetitions() -> None:
    """`repeat` puts all heads behind all heads: head 1 of the queries would get head 1 of the keys, not head 0."""
    (found,) = attentions(program(lambda x: x.repeat(1, 2, 1, 1)))
    assert [int(shape_of(item)[1]) for item in (found.query, found.key, found.value)] == [4, 4, 4]


class Watch(torch.fx.Interpreter):
    """Keeps every value."""

    def run_node(self, node: torch.fx.Node) -> object:
        self.seen[node] = super().run_node(node)
        return self.seen[node]


@pytest.mark.parametrize("repeat", [expanded, repeated])
def test_what_is_found_makes_what_attention_takes(repeat: Repeat) -> None:
    """Whatever operators the program repeats heads with."""
    traced = program(repeat)
    (found,) = attentions(traced)
    watch = Watch(traced.graph_module, garbage_collect_values=False)
    watch.seen = {}
    with torch.no_grad():
        watch.run(values(2, 5, 16))
    taken, kept = watch.seen[found.node.args[1]], watch.seen[found.key]
    assert torch.equal(taken, kept.repeat_interleave(4 // kept.shape[1], 1))


def test_models_without_attention_have_none() -> None:
    assert attentions(trace(settle(nn.Linear(4, 4)), (values(2, 4),))) == []


def test_sizes_are_numbers_or_expressions() -> None:
    traced = program(expanded, dynamic=True)
    (x,) = traced.placeholders
    batch, sequence, width = shape_of(x)
    assert width == 16 and batch.is_Symbol and sequence.is_Symbol and batch != sequence
    assert size_of(7) == 7 and size_of(x.meta["val"].shape[0]) == batch
