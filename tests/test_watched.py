from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sqcompile.backend import Artifact, Backend, Session, get_backend
from sqcompile.evaluate import run_watched
from sqcompile.opening import trace_any
from sqcompile.program import Program
from sqcompile.watched import WatchedSession, with_outputs


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    return trace_any(net, ((torch.ones(2, 2, 4, 4),), {}), {"input": {0: "batch"}}, source="net", data=None)


@pytest.fixture
def batches() -> list[list[torch.Tensor]]:
    """Of another size than was traced: what is watched has the program's symbols, too."""
    torch.manual_seed(1)
    return [[torch.randn(5, 2, 4, 4)], [torch.randn(3, 2, 4, 4)]]


class Shifted(Backend):
    """Runs programs in PyTorch and adds a constant to all that it hands over: no other can be mistaken for it."""

    name = "shifted"

    def supports(self, program: Program, node: torch.fx.Node) -> str | None:
        return None

    def lower(self, program: Program) -> Artifact:
        return ShiftedArtifact(program)

    def load(self, source: Artifact | Path, *, threads: int | None = None) -> Session:
        assert isinstance(source, ShiftedArtifact)
        return ShiftedSession(source.program, 1.0)


class ShiftedArtifact(Artifact):
    size_bytes = 0

    def __init__(self, program: Program) -> None:
        self.program = program

    def save(self, path: Path) -> list[Path]:
        raise NotImplementedError


class ShiftedSession(Session):
    def __init__(self, program: Program, shift: float) -> None:
        self.program, self.signature, self.shift = program, program.signature, shift

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            return [value + self.shift for value in self.program.run(inputs)]


def values_of(run: Any, nodes: set[torch.fx.Node], batch: Sequence[Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    run(batch, nodes, lambda node, value: found.__setitem__(node.name, value.clone()))
    return found


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "native"])
def test_each_runtime_hands_over_what_pytorch_computes(
    program: Program, batches: list[list[torch.Tensor]], backend: str
) -> None:
    text = program.text()
    chosen = get_backend(backend)
    nodes = set(program.compute_nodes())  # the last is an output already
    watched = WatchedSession(program, chosen, chosen.load(chosen.lower(program.snapshot())), threads=1)
    for batch in batches:
        expected = values_of(lambda *rest: run_watched(program, *rest), nodes, batch)
        found = values_of(watched, nodes, batch)
        assert list(found) == list(expected)  # in graph order
        for name, value in expected.items():
            # Sums of 18 products, in another order.
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert watched.apart.sqnr_db > 100
    assert program.text() == text


def test_values_are_those_of_the_runtime(program: Program, batches: list[list[torch.Tensor]]) -> None:
    nodes = {next(program.compute_nodes())}
    unwatched = ShiftedSession(program, 1.0)
    watched = WatchedSession(program, Shifted(), unwatched)
    (node,) = nodes
    expected = values_of(lambda *rest: run_watched(program, *rest), nodes, batches[0])
    found = values_of(watched, nodes, batches[0])
    torch.testing.assert_close(found[node.name], expected[node.name] + 1)
    assert math.isinf(watched.apart.sqnr_db)


def test_says_how_far_its_outputs_are_from_those_that_nobody_watches(
    program: Program, batches: list[list[torch.Tensor]]
) -> None:
    watched = WatchedSession(program, Shifted(), ShiftedSession(program, 1.5))
    watched(batches[0], set(), lambda node, value: None)
    assert watched.apart.max_error == pytest.approx(0.5, rel=1e-5)


def test_outputs_follow_those_of_the_program(program: Program, batches: list[list[torch.Tensor]]) -> None:
    nodes = list(program.compute_nodes())[:2]
    extended = with_outputs(program, nodes)
    assert [value.name for value in extended.signature.outputs][1:] == [
        f"watched:{node.name}" for node in nodes
    ]
    assert extended.signature.outputs[1].shape == ("batch", 4, 2, 2)
    assert len(program.signature.outputs) == 1
    with torch.no_grad():
        own, conv, relu = extended.run(batches[0])
        torch.testing.assert_close(own, program.run(batches[0])[0], rtol=0, atol=0)
    torch.testing.assert_close(conv.clamp(min=0), relu, rtol=0, atol=0)
