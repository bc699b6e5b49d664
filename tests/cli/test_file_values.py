"""What an ONNX file shows of itself: the values of its layers, and those of no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import sqcompile
from sqcompile.api import Compiled, load
from sqcompile.cli.file_values import FileValues
from sqcompile.cli.foreign import ForeignSession
from sqcompile.compare import LayerDistance, NamedValues, ProgramValues, compare_named
from sqcompile.errors import BackendError
from sqcompile.layer_values import LAYERS


class Residual(nn.Module):
    """Convolutions with batch norms to fold, channels to rescale, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm_2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.third, self.norm_3 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        for norm in (self.norm, self.norm_2, self.norm_3):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.norm_2(self.second(x)))
        x = torch.nn.functional.relu6(self.norm_3(self.third(y)) + x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = [
            layer(self.norm(x)).view(batch, length, 4, 8).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        value = torch.nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.o(value.transpose(1, 2).reshape(batch, length, 32))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm_2(x))))


IMAGES, TOKENS = (4, 3, 8, 8), (4, 6, 32)


def made(net: type[nn.Module], shape: tuple[int, ...], passes: str) -> tuple[Compiled, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    compiled = sqcompile.compile(
        net().eval(), passes, (x,), calibration=[x], backend="onnxruntime", dynamic_shapes={"x": {0: "batch"}}
    )
    assert isinstance(compiled, Compiled)
    return compiled, x


def saved(compiled: Compiled, path: Path) -> FileValues:
    compiled.save(path)
    return FileValues(path, load(path, threads=1), 1)  # type: ignore[arg-type]


def against(reference: NamedValues, other: NamedValues, x: torch.Tensor) -> list[LayerDistance]:
    return compare_named(reference, other, reference.layers(), [[x]])


@pytest.mark.parametrize(
    ("net", "shape", "passes", "least"),
    [
        pytest.param(Residual, IMAGES, "", 100, id="dense"),
        pytest.param(Residual, IMAGES, "fold-batch-norm", 100, id="folded"),
        # A few of 2000 values may lie between two steps of the grid, where sums in another order decide.
        pytest.param(Residual, IMAGES, "int8-static", 30, id="rescaled"),
        pytest.param(Residual, IMAGES, "int8-dynamic", 30, id="dynamic"),
        pytest.param(Attention, TOKENS, "int8-static", 30, id="attention"),
        pytest.param(Attention, TOKENS, "smooth-quant,int8-dynamic", 30, id="smooth"),
        # The runtime's kernels round activations to 8 bits, which the program does not.
        pytest.param(Attention, TOKENS, "weight-only{bits=4,group-size=16}", 25, id="few-bits"),
    ],
)
def test_every_layer_shows_what_the_program_computes(
    tmp_path: Path, net: type[nn.Module], shape: tuple[int, ...], passes: str, least: float
) -> None:
    compiled, x = made(net, shape, passes)
    file = saved(compiled, tmp_path / "net.onnx")
    program = ProgramValues(compiled.program)
    rows = against(program, file, x)
    assert [row.name for row in rows] == [layer.name for layer in program.layers()]
    assert all(row.distance.sqnr_db > least for row in rows), rows
    assert [layer.name for layer in file.layers()] == [layer.name for layer in program.layers()]
    assert file.apart.sqnr_db > least
    # The dense model has these layers, too: folded norms and rescaled channels are no error.
    dense = against(ProgramValues(compiled.original), file, x)
    assert [row.name for row in dense] == [row.name for row in rows]
    assert all(row.distance.sqnr_db > 15 for row in dense), dense  # 4 bits; unpaired values would be near 0


def test_a_file_is_equal_to_itself(tmp_path: Path) -> None:
    compiled, x = made(Residual, IMAGES, "int8-static")
    rows = against(saved(compiled, tmp_path / "a.onnx"), saved(compiled, tmp_path / "b.onnx"), x)
    assert [row.name for row in rows] == ["first", "second", "third", "fc"]
    assert all(row.distance.max_error == 0 for row in rows)


def test_rotated_layers_are_left_out(tmp_path: Path) -> None:
    compiled, x = made(Attention, TOKENS, "rotate-weights,weight-only{bits=8,group-size=32}")
    rotated = {node.name for node in compiled.program.compute_nodes() if "rotated" in node.meta}
    assert rotated
    rows = against(ProgramValues(compiled.original), saved(compiled, tmp_path / "net.onnx"), x)
    assert "q" in [row.name for row in rows]
    assert not rotated & {row.node for row in rows}
    assert all(row.distance.sqnr_db > 25 for row in rows), rows


def test_tensors_beside_the_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x = made(Residual, IMAGES, "fold-batch-norm")
    compiled.artifact.external_above_bytes = 100  # type: ignore[attr-defined]
    files = compiled.save(tmp_path / "sub" / "net.onnx")
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    monkeypatch.chdir(tmp_path)
    path = Path("sub") / "net.onnx"
    rows = against(ProgramValues(compiled.program), FileValues(path, load(path), 1), x)  # type: ignore[arg-type]
    assert len(rows) == 4 and all(row.distance.sqnr_db > 100 for row in rows)
    (tmp_path / "sub" / "net.onnx.data").unlink()
    with pytest.raises(BackendError, match="does not show values"):
        session = _Silent()
        FileValues(path, session, 1).show([x], {"batch_norm"}, lambda name, value: None)


class _Silent:
    """A session whose file has gone since it was loaded."""

    signature: Any = None

    def feeds(self, inputs: Any) -> dict[str, Any]:
        return {"x": inputs[0].numpy()}

    def run(self, inputs: Any) -> list[Any]:
        return []


def test_files_of_older_versions_say_nothing_of_layers(tmp_path: Path) -> None:
    compiled, _ = made(Residual, IMAGES, "fold-batch-norm")
    assert saved(compiled, tmp_path / "net.onnx").layers_are_known
    model = onnx.load(tmp_path / "net.onnx")
    kept = [item for item in model.metadata_props if item.key != LAYERS]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    old = FileValues(tmp_path / "old.onnx", _Silent(), 1)
    assert not old.layers_are_known and not list(old.names())


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., FileValues]:
    """Makes files of another tool: a product, ReLU and a product; optionally as a quantizer leaves them."""

    def make(name: str = "plain.onnx", *, quantized: bool = False) -> FileValues:
        weights = [torch.linspace(-1, 1, 16).reshape(4, 4), torch.linspace(-1, 1, 8).reshape(4, 2)]
        stored = [
            helper.make_tensor(f"w{i}", TensorProto.FLOAT, list(w.shape), w.flatten().tolist())
            for i, w in enumerate(weights)
        ]
        before = "relu" if quantized else "linear"
        nodes = [helper.make_node("MatMul", ["x", "w0"], [before], name="/body/first/MatMul")]
        if quantized:  # the clamp is in the codes, and the ReLU's name before it
            stored.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 64]))
            stored.append(helper.make_tensor("zero", TensorProto.UINT8, [], [0]))
            nodes.append(helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["codes"]))
            nodes.append(helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["back"]))
        else:
            nodes.append(helper.make_node("Relu", ["linear"], ["relu"]))
        nodes.append(helper.make_node("MatMul", ["back" if quantized else "relu", "w1"], ["y"], name="last"))
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
            stored,
        )
        path = tmp_path / name
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return FileValues(path, ForeignSession(path, 1), 1)

    return make


def test_other_tools_files_are_paired_by_names(foreign: Callable[..., FileValues]) -> None:
    plain, quantized = foreign(), foreign("q.onnx", quantized=True)
    assert [(layer.name, layer.values) for layer in plain.layers()] == [
        ("body.first", ("linear", "relu")),
        ("last", ("y",)),
    ]
    torch.manual_seed(0)
    x = torch.rand(16, 4)
    first, last = against(plain, quantized, x)
    # Paired behind the ReLU, as its readers see it: before it, negative numbers would be an error of 100 %.
    assert (first.name, last.name) == ("body.first", "last")
    assert 30 < first.distance.sqnr_db < 100 and last.distance.sqnr_db > 30
    # What the file computes besides is the same with and without further outputs.
    assert plain.apart.sqnr_db > 100 and quantized.apart.sqnr_db > 100


def test_values_of_other_shapes_are_no_pair(foreign: Callable[..., FileValues]) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(x))

    compiled = sqcompile.compile(Wide().eval(), (), (torch.ones(2, 4),), backend="reference")
    assert isinstance(compiled, Compiled)
    program = ProgramValues(compiled.program)
    assert set(program.names()) >= {"linear", "relu"}
    assert against(program, foreign(), torch.ones(2, 4)) == []
