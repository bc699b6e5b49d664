from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.passes import refuse_other_levels
from support.quantize import run, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import trace
from sqcompile.errors import CalibrationError, InputError, PassOptionError
from sqcompile.passes import EqualizeLayers, MaskWeights
from sqcompile.testing import CheckedPass, check_pass


def uneven(*modules: nn.Module) -> nn.Sequential:
    """A chain whose first layer makes channels of ranges 1 to 100 in equal ratios."""
    model = settled(*modules)
    weight, bias = model[0].weight, model[0].bias
    transposed = isinstance(model[0], nn.ConvTranspose2d)
    scales = torch.logspace(0, 2, bias.numel())
    shape = [1] * weight.dim()
    shape[1 if transposed else 0] = -1
    weight.data *= scales[: weight.shape[1 if transposed else 0]].reshape(shape)
    bias.data *= scales
    return model


def test_makes_the_ranges_of_both_weights_equal() -> None:
    model = uneven(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    checked = check_pass(EqualizeLayers(), model, (values(5, 6),), unchanged=False)
    first, second = checked.after.tensor("0.weight"), checked.after.tensor("2.weight")
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    # Equal up to a common factor: only ratios between channels matter.
    assert torch.allclose(r1 / r2, (r1 / r2).mean().expand(4), rtol=1e-3)
    assert checked.before.text() == checked.after.text()
    assert checked.record.facts == {"pairs": 1}


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv": lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)],
    "depthwise": lambda: [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)],
    "grouped": lambda: [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)],
    "transposed": lambda: [nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)],
    "grouped transposed": lambda: [nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)],
    "into grouped transposed": lambda: [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2)],
    "pooling": lambda: [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)],
    "padding": lambda: [nn.Conv2d(3, 4, 1), nn.ZeroPad2d(1), nn.Conv2d(4, 2, 1)],
    "flatten": lambda: [nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(256, 2)],
    "linear": lambda: [nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2)],
}


@pytest.mark.parametrize("by", ["weights", "values"])
@pytest.mark.parametrize("name", CHAINS)
def test_keeps_the_function_of_every_chain(name: str, by: str) -> None:
    modules = CHAINS[name]()
    model = settled(*modules) if name == "linear" else uneven(*modules)
    x = values(2, 4 if name == "grouped transposed" else 3, 8, 8)
    checked = check_pass(EqualizeLayers(by=by), model, (x,), calibration=[x])  # type: ignore[arg-type]
    assert checked.record.changes > 0 and checked.record.facts["pairs"] >= 1
    # Scales are powers of nothing in particular: each weight rounds once, at 2**-24.
    assert torch.allclose(checked.before(x), checked.after(x), rtol=1e-4, atol=1e-5)


def largest(checked: CheckedPass, x: Tensor) -> Tensor:
    weight, bias = checked.after.tensor("0.weight"), checked.after.tensor("0.bias")
    return torch.relu(torch.nn.functional.conv2d(x, weight, bias)).amax((0, 2, 3)).detach()


def test_by_values_evens_the_values_out_before_a_depthwise_convolution() -> None:
    model = uneven(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    x = values(8, 3, 8, 8)
    checked = check_pass(EqualizeLayers(by="values"), model, (x,), calibration=[x])
    after = largest(checked, x)
    assert float(after.max() / after.min()) < 1.01  # was about 100; within the 0.1 % at which it stops


def test_by_values_shares_the_unevenness_with_a_dense_layer() -> None:
    """With t = 1/2: the largest of a channel's values equals its range in the second weight."""
    model = uneven(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = values(8, 3, 8, 8)
    checked = check_pass(EqualizeLayers(by="values"), model, (x,), calibration=[x])
    ratio = largest(checked, x) / checked.after.tensor("2.weight").abs().amax((0, 2, 3))
    assert torch.allclose(ratio, ratio.mean().expand(4), rtol=1e-2)
    whole = check_pass(EqualizeLayers(by="values", strength=1.0), model, (x,), calibration=[x])
    assert float(largest(whole, x).max() / largest(whole, x).min()) < 1.01


def test_leaves_equal_layers_alone() -> None:
    model = settled(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for layer in (model[0], model[2]):
        layer.weight.data = torch.eye(4)
    check_pass(EqualizeLayers(), model, (values(2, 4),), unchanged=True)


def test_channels_that_are_zero_stay() -> None:
    model = uneven(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    model[0].weight.data[1] = 0
    model[2].weight.data[:, 2] = 0
    checked = check_pass(EqualizeLayers(), model, (values(5, 6),))
    assert torch.equal(checked.after.tensor("0.bias")[1], model[0].bias[1])
    assert torch.equal(checked.after.tensor("0.weight")[2], model[0].weight[2])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(x)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x).relu())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Residual(), "its result goes to several operators"),
        (lambda: Residual(), "its result goes to add"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)), "its result goes to gelu"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU6(), nn.Linear(3, 3)), "its result goes to hardtanh"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)),
            "its result goes to batch_norm",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "its result goes to an output"),
        (lambda: Shared(), "is computed, or used elsewhere too"),
    ],
)
def test_says_why_a_layer_is_not_equalized(model: Callable[[], nn.Module], reason: str) -> None:
    check_pass(EqualizeLayers(), settle(model()), (values(2, 3),), unchanged=True, remarks=[reason])


def test_pads_that_add_channels_are_no_move() -> None:
    model = uneven(nn.Conv2d(3, 4, 1), nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), nn.Conv2d(6, 2, 1))
    check_pass(
        EqualizeLayers(), model, (values(1, 3, 4, 4),), unchanged=True, remarks=["its result goes to pad"]
    )


def test_masks_stay() -> None:
    model = uneven(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    checked = check_pass(EqualizeLayers(), model, (values(5, 6),), prepare=[MaskWeights(sparsity=0.5)])
    assert checked.record.changes > 0
    zeros = torch.ops.sqcompile.mask.default
    assert sum(node.target is zeros for node in checked.after.compute_nodes()) == 2


def test_dynamic_sizes_stay_dynamic() -> None:
    model = uneven(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    shapes = {"input": {0: Dim("batch"), 2: Dim("height")}}
    checked = check_pass(EqualizeLayers(), model, (values(2, 3, 8, 8),), dynamic_shapes=shapes)
    assert checked.record.facts == {"pairs": 1}
    assert checked.after(values(5, 3, 9, 8)).shape == (5, 2)


def test_weights_that_are_not_finite_are_named() -> None:
    """Their scale would turn every weight of the layer before into NaN, and that one would be blamed."""
    model = settled(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight.data[1, 2] = torch.inf
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '2'.*1 of 12"):
        run([EqualizeLayers()], trace(model, (values(5, 6),)))


def test_options() -> None:
    model = uneven(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = values(5, 6)
    assert check_pass(EqualizeLayers(layers=("2",)), model, (x,)).record.facts == {"pairs": 1}
    assert check_pass(EqualizeLayers(exclude=("2", "4")), model, (x,)).record.facts == {"pairs": 1}
    program = trace(model, (x,))
    run([EqualizeLayers(iterations=1)], program)
    (again,) = run([EqualizeLayers()], program)
    assert again.changes > 0  # one visit does not settle a chain of two pairs
    with pytest.raises(PassOptionError, match="at least 1"):
        EqualizeLayers(iterations=0)
    with pytest.raises(PassOptionError, match="a share t"):
        EqualizeLayers(strength=0.0)


def test_by_values_asks_for_data() -> None:
    program = trace(uneven(nn.Linear(6, 4), nn.Linear(4, 3)), (values(5, 6),))
    with pytest.raises(CalibrationError, match="equalize-layers needs calibration data"):
        run([EqualizeLayers(by="values")], program)


def test_refuses_programs_past_its_level() -> None:
    refuse_other_levels(EqualizeLayers())
