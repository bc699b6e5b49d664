"""Cutting a program into parts, and joining them."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from support.programs import data, mlp, seeded
from torch import Tensor, nn

from sqcompile.program import Program
from sqcompile.streaming import cut, join
from sqcompile.tracing import trace


class Residual(nn.Module):
    """A block that splits its value, as gated layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(torch.sigmoid(gate) * value) * mask


class Stack(nn.Module):
    """An embedding, blocks that share a mask, and a head that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens > 0).unsqueeze(-1).to(torch.float32)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x.reshape(tokens.shape[0], -1, 8))


@functools.cache
def stack() -> Program:
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    return trace(seeded(Stack), (torch.tensor([[1, 2, 0], [3, 4, 5]]),), dynamic_shapes=shapes)


def operators(program: Program) -> list[str]:
    """The text of a program; in which order it names its tensors does not matter."""
    return [line for line in program.text().splitlines() if not line.startswith("  tensor ")]


TOKENS = torch.tensor([[1, 0, 5, 11], [2, 2, 0, 7], [9, 1, 1, 1]])


def test_cuts_before_each_block_and_behind_the_last() -> None:
    parts = cut(stack())
    assert [part.name for part in parts] == ["start", "layers.0", "layers.1", "layers.2", "end"]
    computed = [node.name for part in parts for node in part.program.compute_nodes()]
    # Every operator is in one part; sizes are computed again where they are needed.
    whole = [node.name for node in stack().compute_nodes()]
    again = {name for name in computed if computed.count(name) > 1}
    assert set(computed) == set(whole) and all(name.startswith("sym_size") for name in again)


def test_a_part_holds_its_own_tensors_and_knows_which_are_shared() -> None:
    start, first, *_, end = cut(stack())
    assert {name for name, _ in first.program.tensors()} == {
        f"layers.0.{name}"
        for name in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
    }
    assert first.program.shared == frozenset()
    assert start.program.shared == end.program.shared == {"head.weight"}


def test_a_part_holds_no_addresses_of_this_process() -> None:
    """torch.export records them in `from_node`; stored parts have to be the same in every process."""
    assert all("from_node" not in node.meta for part in cut(stack()) for node in part.program.graph.nodes)


def test_parts_run_one_after_the_other_are_the_whole() -> None:
    values = {"tokens": TOKENS}
    for part in cut(stack()):
        outputs = part.program.run([values[name] for name in part.inputs])
        values.update(zip(part.outputs, outputs, strict=True))
    assert torch.equal(values["output"], stack()(TOKENS))


def test_joined_parts_are_the_whole_again() -> None:
    parts = cut(stack())
    joined = join(stack(), parts, (part.program for part in parts))
    assert operators(joined) == operators(stack())
    assert torch.equal(joined(TOKENS), stack()(TOKENS))
    assert dict(joined.tensors()).keys() == dict(stack().tensors()).keys()


def test_parts_that_were_stored_join_alike(tmp_path: Path) -> None:
    parts = cut(stack())
    for index, part in enumerate(parts):
        part.program.save(tmp_path / f"{index}.pt2")
    joined = join(stack(), parts, (Program.load(tmp_path / f"{index}.pt2") for index in range(len(parts))))
    assert sorted(operators(joined)) == sorted(operators(stack()))
    assert torch.equal(joined(TOKENS), stack()(TOKENS))


def test_a_shared_tensor_that_became_two_gets_two_names() -> None:
    parts = cut(stack())
    done = [part.program.snapshot() for part in parts]
    done[-1].set_tensor("head.weight", torch.zeros(12, 8))
    joined = join(stack(), parts, done)
    assert torch.equal(joined.tensor("head.weight"), stack().tensor("head.weight"))
    assert not joined(TOKENS).any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_without_blocks_is_one_part(dynamic: bool) -> None:
    (part,) = cut(mlp(dynamic=dynamic))
    assert part.inputs == ("x",) and part.outputs == ("output",)
    x = data(2, 8)
    assert torch.equal(part.program(x)[0], mlp(dynamic=dynamic)(x))
