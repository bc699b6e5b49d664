"""Programs that torch.export has decomposed come back to the operators of a fresh trace."""

import pytest
import torch
from support.zoo import ZOO
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile import Program


def names(program: Program) -> list[str]:
    return [str(node.target) for node in program.compute_nodes()]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, dilation=2)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.line = nn.Conv1d(4, 5, 3)
        self.layer_norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 6)
        self.free = nn.Linear(6, 2, bias=False)
        with torch.no_grad():
            for value in (self.norm.running_mean, self.norm.weight, self.layer_norm.bias):
                value.add_(torch.rand(value.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.depthwise(self.up(self.norm(self.conv(x)))))
        x = self.line(x.mean(-1)).mean(-1)[:, :4]
        return torch.softmax(self.free(self.linear(self.layer_norm(x))), -1)


LAYERS = (
    "conv2d",
    "batch_norm",
    "conv_transpose2d",
    "max_pool2d",
    "conv1d",
    "layer_norm",
    "linear",
    "softmax",
)


def test_layers_have_their_own_names_again() -> None:
    model = Layers().eval()
    x = torch.randn(2, 3, 12, 12)
    exported = torch.export.export(model, (x,)).run_decompositions()
    found = " ".join(names(sqcompile.trace(exported)))
    assert not [layer for layer in LAYERS if f"aten.{layer}." not in found]
    assert not [name for name in ("convolution", "native", "addmm", "getitem", "_softmax") if name in found]


def test_the_numbers_are_the_same() -> None:
    model = Layers().eval()
    x = torch.randn(2, 3, 12, 12)
    exported = torch.export.export(model, (x,)).run_decompositions()
    # linear and permute + addmm are summed in another order.
    torch.testing.assert_close(sqcompile.trace(exported)(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_result_beside_the_first_keeps_the_operator() -> None:
    class Indices(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return nn.functional.max_pool2d(x, 2, return_indices=True)

    model, x = Indices(), torch.randn(1, 1, 4, 4)
    program = sqcompile.trace(model, (x,))
    assert "aten.max_pool2d_with_indices.default" in names(program)
    assert torch.equal(program(x)[1], model(x)[1])


def test_a_product_with_a_computed_matrix_is_no_layer() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.mm(x, y.t())

    assert "aten.mm.default" in names(sqcompile.trace(Product(), (torch.ones(2, 3), torch.ones(4, 3))))


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v3", "bert", "llama", "whisper_encoder"])
def test_decomposed_architectures(name: str) -> None:
    zoo = ZOO[name]
    model = zoo.make()
    args, kwargs = zoo.inputs()
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=zoo.dynamic_shapes)
        program = sqcompile.trace(exported.run_decompositions())
        args, kwargs = zoo.inputs(seed=3, batch=3, sequence=9)
        actual, expected = program(*args, **kwargs), model(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
