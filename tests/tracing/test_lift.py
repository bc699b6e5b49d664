"""Programs as torch.export's exported programs, and in its files."""

from pathlib import Path

import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile import Program


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.linear.weight
        self.register_buffer("offset", torch.ones(4))

    def forward(
        self, x: Tensor, *, scale: float = 1.0, extra: dict[str, Tensor] | None = None
    ) -> dict[str, object]:
        out = self.head(torch.relu(self.linear(x))) * scale + self.offset
        return {"out": out + extra["y"] if extra else out, "n": 3, "none": None}


X = torch.randn(2, 4)
CALL = ((X,), {"scale": 2.0, "extra": {"y": torch.ones(4)}})
SHAPES = {"x": {0: Dim("batch", max=32)}, "scale": None, "extra": {"y": None}}


def test_an_exported_program_runs_with_the_models_call() -> None:
    model = Model().eval()
    exported = sqcompile.trace(model, CALL, dynamic_shapes=SHAPES).to_exported_program()
    x = torch.randn(7, 4)
    actual = exported.module()(x, scale=2.0, extra={"y": torch.ones(4)})
    expected = model(x, scale=2.0, extra={"y": torch.ones(4)})
    assert torch.equal(actual["out"], expected["out"])
    assert actual["n"] == 3
    assert actual["none"] is None


def test_tensors_are_shared_with_the_program() -> None:
    program = sqcompile.trace(Model(), CALL, dynamic_shapes=SHAPES)
    exported = program.to_exported_program()
    assert exported.state_dict["head.weight"] is program.tensor("head.weight")
    assert list(exported.graph_signature.parameters).count("head.weight") == 1


def test_there_and_back_is_the_same_program() -> None:
    program = sqcompile.trace(Model(), CALL, dynamic_shapes=SHAPES)
    again = sqcompile.trace(program.to_exported_program())
    assert again.text().replace("s0", "batch") == program.text()


@pytest.mark.parametrize("name", ["mobilenet_v3", "llama", "t5_encoder", "lstm"])
def test_files_hold_everything(tmp_path: Path, name: str) -> None:
    zoo = ZOO[name]
    program = sqcompile.trace(zoo.make(), zoo.inputs(), dynamic_shapes=zoo.dynamic_shapes)
    program.save(tmp_path / "program.pt2")
    loaded = Program.load(tmp_path / "program.pt2")
    assert loaded.text() == program.text()
    assert loaded.signature == program.signature
    args, kwargs = zoo.inputs(seed=3, batch=3, sequence=9)
    actual, expected = loaded(*args, **kwargs), program(*args, **kwargs)
    assert type(actual) is type(expected)
    left, right = (torch.utils._pytree.tree_leaves(value) for value in (actual, expected))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
