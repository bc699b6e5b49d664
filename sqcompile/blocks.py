"""Blocks: modules that add something to what passes through them, so that a model runs without them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqcompile.evaluate import run_watched
from sqcompile.infer import same_type
from sqcompile.layers import matches
from sqcompile.operators.table import argument
from sqcompile.program import Program, value_of
from sqcompile.text import module_path, operator_name

aten = torch.ops.aten

_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
# What may stand between two sums on the way through a block, beside operators of single elements.
_PASSING = frozenset(
    {"layer_norm", "rms_norm", "batch_norm", "group_norm", "dropout", "to", "clone", "contiguous", "alias"}
)


@dataclass(frozen=True)
class Block:
    """A module with shortcuts from its input to its output.

    Attributes:
        name: Its module path, such as `model.layers.3`.
        input: The value that enters.
        output: The value that leaves.
        sums: Its sums on the way, each with the argument that the way goes through.
    """

    name: str
    input: fx.Node
    output: fx.Node
    sums: tuple[tuple[fx.Node, fx.Node], ...]

    @property
    def kind(self) -> str:
        """What selections call it."""
        return "block"


def find_blocks(program: Program) -> list[Block]:
    """Return the numbered modules (`layers.0`, `layers.1`, …) that the model can do without, in graph order.

    A block has one value of the same type at its input and at its output, and a way between them that
    runs through sums, norms and functions of single elements. Of blocks in blocks the outer ones count.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in program.compute_nodes():
        for path in _numbered_paths(module_path(node)):
            members.setdefault(path, []).append(node)
    found: list[Block] = []
    for path, nodes in members.items():
        if any(matches(block.name, path) for block in found):
            continue
        block = _block(path, nodes)
        if block is not None:
            found.append(block)
    return found


def remove_block(edit: Any, block: Block) -> None:
    """Let what enters a block pass its sums alone; what they added is dead then.

    Args:
        edit: The rewriter.
        block: The block.
    """
    # The last sum first: what used it uses the one before it then, and passes on with that one's users.
    for node, shortcut in reversed(block.sums):
        edit.replace(node, shortcut)


def influences(
    program: Program, blocks: Sequence[Block], batches: Iterable[Sequence[Any]]
) -> dict[str, float]:
    """Return how much each block turns what passes through it: 1 minus the mean cosine, by tokens or samples.

    Source: Men et al. 2024 (ShortGPT, equation 1).
    """
    before: dict[fx.Node, torch.Tensor] = {}
    totals = {block.name: 0.0 for block in blocks}
    counts = {block.name: 0 for block in blocks}
    ends = {block.output: block for block in blocks}
    starts = {block.input for block in blocks}

    def watch(node: fx.Node, value: torch.Tensor) -> None:
        rows = _tokens(value)
        if node in ends:
            block = ends[node]
            cosines = torch.nn.functional.cosine_similarity(before[block.input], rows, dim=-1)
            totals[block.name] += float((1 - cosines).sum())
            counts[block.name] += len(cosines)
        if node in starts:
            before[node] = rows

    for batch in batches:
        before.clear()
        run_watched(program, batch, [*starts, *ends], watch)
    return {name: totals[name] / max(1, counts[name]) for name in totals}


def _tokens(value: torch.Tensor) -> torch.Tensor:
    """Return [tokens, width] of a sequence [..., T, C], [samples, all] of a map [N, C, H, W]."""
    moved = value.detach().to(torch.float64)
    return moved.flatten(1) if moved.dim() > 3 else moved.reshape(-1, moved.shape[-1])


def _numbered_paths(path: str) -> list[str]:
    """Return the leading parts of a module path that end in a number, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index, part in enumerate(parts) if re.fullmatch(r"\d+", part)]


def _block(path: str, nodes: list[fx.Node]) -> Block | None:
    inside = set(nodes)
    leaving = [node for node in nodes if any(user not in inside for user in node.users)]
    entering = dict.fromkeys(
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr" and isinstance(value_of(source), torch.Tensor)
    )
    for output in reversed(leaving):
        if not isinstance(value_of(output), torch.Tensor):
            continue
        for start in entering:
            if same_type(value_of(start), value_of(output)):
                sums = _way(output, start, inside)
                if sums:
                    return Block(path, start, output, tuple(sums))
    return None


def _way(node: fx.Node, start: fx.Node, inside: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return the sums between a block's input and a node, each with its argument on the way."""
    sums: list[tuple[fx.Node, fx.Node]] = []
    while node is not start:
        if node not in inside:
            return None
        if node.target in _ADDITIONS and argument(node, 2) == 1:
            operands = [item for item in node.args[:2] if isinstance(item, fx.Node)]
            ways = [(item, _way(item, start, inside)) for item in operands]
            open_ways = [(item, way) for item, way in ways if way is not None]
            if len(open_ways) != 1 or not same_type(value_of(open_ways[0][0]), value_of(node)):
                return None
            shortcut, rest = open_ways[0]
            return [*rest, (node, shortcut), *sums]
        source = _passes(node)
        if source is None:
            return None
        node = source
    return sums


def _passes(node: fx.Node) -> fx.Node | None:
    """Return what an operator makes its value of, element by element or by a norm; None for any other."""
    data = [
        item
        for item in node.all_input_nodes
        if item.op != "get_attr" and isinstance(value_of(item), torch.Tensor)
    ]
    if len(data) != 1 or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = operator_name(node).partition(".")[0]
    if name in ("view", "reshape"):  # the same elements in the same order
        return data[0]
    if not isinstance(value_of(data[0]), torch.Tensor) or not same_type(value_of(data[0]), value_of(node)):
        return None
    return data[0] if name in _PASSING or torch.Tag.pointwise in node.target.tags else None
