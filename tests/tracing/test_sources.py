"""Every node knows the model's own line and the module that it comes from."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import sqcompile
from sqcompile import Program
from sqcompile.text import module_path, source_line


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)  # the gate


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), Gate()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x += 1  # in place
        return x


def line_of(comment: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))
    return f"test_sources.py:{number}"


def places(program: Program, name: str) -> list[tuple[str, str]]:
    nodes = [node for node in program.compute_nodes() if re.sub(r"_\d+$", "", node.name) == name]
    return [(module_path(node), source_line(node)) for node in nodes]


def given(kind: str) -> object:
    model, x = Model().eval(), torch.ones(1, 4)
    if kind == "module":
        return model
    exported = torch.export.export(model, (x,))
    return exported if kind == "exported program" else exported.module()


@pytest.mark.parametrize("kind", ["module", "exported program", "graph module"])
def test_lines_and_module_paths(kind: str) -> None:
    program = sqcompile.trace(given(kind), (torch.ones(1, 4),))
    assert places(program, "sigmoid") == [
        ("blocks.0.1", line_of("the gate")),
        ("blocks.1.1", line_of("the gate")),
    ]
    assert [path for path, _ in places(program, "linear")] == ["blocks.0.0", "blocks.1.0"]


def test_an_operator_made_out_of_place_keeps_its_line() -> None:
    program = sqcompile.trace(Model(), (torch.ones(1, 4),))
    assert places(program, "add") == [("", line_of("in place"))]


def test_symbolic_traces_keep_module_paths() -> None:
    program = sqcompile.trace(fx.symbolic_trace(Model()), (torch.ones(1, 4),))
    assert [path for path, _ in places(program, "linear")] == ["blocks.0.0", "blocks.1.0"]


def test_the_graph_text_shows_them() -> None:
    text = sqcompile.text.program_text(sqcompile.trace(Model(), (torch.ones(1, 4),)), source=True)
    assert f"(blocks.0.1, {line_of('the gate')})" in text
