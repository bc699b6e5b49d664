"""Models that torch.nn.utils.prune has pruned."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sqcompile
from sqcompile import Program
from sqcompile.layers import layers_of


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[3], "weight", 0.4, n=2, dim=0)
    prune.random_unstructured(model[3], "bias", 0.4)
    return model


X = torch.randn(2, 3, 8, 8)


def masks(program: Program) -> dict[str, str]:
    """Mask nodes: name of the weight -> name of the mask."""
    found = {}
    for node in program.compute_nodes():
        if node.target is torch.ops.sqcompile.mask.default:
            weight, mask = node.args
            found[str(weight.target)] = str(mask.target)  # type: ignore[union-attr]
    return found


def test_masks_are_ours() -> None:
    model = pruned()
    program = sqcompile.trace(model, (X,))
    assert masks(program) == {
        "0.weight_orig": "0.weight_mask",
        "3.weight_orig": "3.weight_mask",
        "3.bias_orig": "3.bias_mask",
    }
    assert not [node for node in program.compute_nodes() if node.name.startswith(("mul", "to"))]
    assert torch.equal(program(X), model(X))


def test_masks_are_boolean_and_recorded_so() -> None:
    program = sqcompile.trace(pruned(), (X,))
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith("_mask"):
            assert node.meta["val"].dtype is torch.bool
            assert program.tensor(node).dtype is torch.bool
    assert program.tensor("0.weight_mask").float().mean() == 0.5


def test_the_pruned_model_is_left_alone() -> None:
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    sqcompile.trace(model, (X,))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(after[name], before[name]) and after[name].dtype is before[name].dtype for name in before
    )
    assert type(model[0].weight) is Tensor
    assert torch.equal(model[0].weight, before["0.weight_orig"] * before["0.weight_mask"])
    assert prune.is_pruned(model)


def test_masked_layers_keep_their_names() -> None:
    program = sqcompile.trace(pruned(), (X,))
    assert [layer.name for layer in layers_of(program)] == ["0", "3"]


def test_masks_on_masks_are_one_mask() -> None:
    model = pruned()
    prune.l1_unstructured(model[0], "weight", 0.5)  # half of what was left
    program = sqcompile.trace(model, (X,))
    assert masks(program)["0.weight_orig"] == "0.weight_mask"
    assert program.tensor("0.weight_mask").float().mean() == 0.25
    assert torch.equal(program(X), model(X))


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs_of_pruned_models(decomposed: bool) -> None:
    model = pruned()
    exported = torch.export.export(model, (X,))
    program = sqcompile.trace(exported.run_decompositions({}) if decomposed else exported)
    assert len(masks(program)) == 3
    assert torch.equal(program(X), model(X))


def test_a_mask_of_other_numbers_stays_a_product() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    prune.custom_from_mask(model[0], "weight", torch.full((4, 4), 0.5))
    x = torch.ones(1, 4)
    program = sqcompile.trace(model, (x,))
    assert masks(program) == {}
    assert torch.equal(program(x), model(x))


class Reads(nn.Module):
    """Uses its mask as a number, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        prune.l1_unstructured(self.linear, "weight", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.linear.weight_mask.mean()


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_mask_that_is_read_elsewhere_keeps_its_numbers_there(decomposed: bool) -> None:
    model = Reads().eval()
    x = torch.randn(1, 4)
    given: object = model
    if decomposed:  # without the conversion of type, through which both would read the boolean mask
        given = torch.export.export(model, (x,)).run_decompositions({})
    program = sqcompile.trace(given, (x,))
    suffix = "_bool" if decomposed else ""
    assert masks(program) == {"linear.weight_orig": f"linear.weight_mask{suffix}"}
    assert torch.equal(program(x), model(x))


def test_names_alone_do_not_make_a_mask() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_orig = nn.Parameter(torch.randn(4))
            self.other_mask = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight_orig * self.other_mask)

    assert masks(sqcompile.trace(Named(), (torch.ones(4),))) == {}


def test_a_masked_weight_still_trains() -> None:
    model = pruned()
    program = sqcompile.trace(model, (X,))
    program(X).sum().backward()
    gradient = model[0].weight_orig.grad
    assert gradient is not None
    assert not gradient[model[0].weight_mask == 0].any()
    assert gradient[model[0].weight_mask == 1].any()


def test_parametrizations_are_traced_as_they_compute() -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).T

    model = nn.Sequential(nn.Linear(4, 4)).eval()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    x = torch.randn(1, 4)
    program = sqcompile.trace(model, (x,))
    assert "0.parametrizations.weight.original" in [name for name, _ in program.tensors()]
    assert torch.equal(program(x), model(x))
