from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.passes import Function, refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.layers import layers_of
from sqcompile.passes import ApplyMasks, CanonicalizeLayers, MaskWeights, RemoveNoops
from sqcompile.rewrite import Rewriter
from sqcompile.testing import check_pass


class Stored(nn.Module):
    """A matrix [K, O], a bias and a function of both and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Any], *, rows: int = 4, columns: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.bias = nn.Parameter(torch.randn(columns))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def targets(program: Program) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.compute_nodes()]


ROWS = (torch.randn(3, 4),)
LINEAR = """
    program (level aten)
      input  %x: f32[3, 4]
      tensor @weight_transposed: f32[6, 4]
      tensor @bias: f32[6]
      %linear: f32[3, 6] = linear(%x, @weight_transposed, @bias)
      return output=%linear
"""


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.addmm(m.bias, x, m.weight),
        lambda m, x: x @ m.weight + m.bias,
        lambda m, x: m.bias + torch.mm(x, m.weight),
    ],
    ids=["addmm", "matmul and add", "mm and add"],
)
def test_writes_products_with_a_stored_matrix_as_linear(function: Callable[[Any, Tensor], Tensor]) -> None:
    model = Stored(function)
    after = check_pass(CanonicalizeLayers(), model, ROWS).after
    assert targets(after)[-1] == "linear"
    linear = list(after.compute_nodes())[-1]
    assert torch.equal(after.tensor(linear.args[1]), model.weight.t())
    assert isinstance(after.tensor(linear.args[1]), nn.Parameter)


def test_names_what_it_stores() -> None:
    checked = check_pass(
        CanonicalizeLayers(), Stored(lambda m, x: x @ m.weight + m.bias), ROWS, expected=LINEAR
    )
    assert not checked.after.has_tensor("weight")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.weight.t(),
        lambda m, x: x @ m.weight.transpose(0, 1),
        lambda m, x: torch.mm(x, m.weight.permute(1, 0)),
        lambda m, x: x @ m.weight.transpose(-1, -2),
    ],
    ids=["t", "transpose", "permute", "negative axes"],
)
def test_takes_a_transposed_matrix_as_it_is_stored(function: Callable[[Any, Tensor], Tensor]) -> None:
    check_pass(
        CanonicalizeLayers(),
        Stored(function, rows=6, columns=4),
        ROWS,
        expected="""
            program (level aten)
              input  %x: f32[3, 4]
              tensor @weight: f32[6, 4]
              %linear: f32[3, 6] = linear(%x, @weight)
              return output=%linear
        """,
    )


def test_lets_linear_work_on_all_axes() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        flat = torch.addmm(m.bias, x.view(-1, 4), m.weight)
        return flat.view(x.shape[0], x.shape[1], 6)

    check_pass(
        CanonicalizeLayers(),
        Stored(function),
        (torch.randn(2, 3, 4),),
        dynamic_shapes={"x": {0: Dim("batch", max=8), 1: Dim("length", max=8)}},
        expected="""
            program (level aten)
              input  %x: f32[batch, length, 4]
              tensor @weight_transposed: f32[6, 4]
              tensor @bias: f32[6]
              %linear_1: f32[batch, length, 6] = linear(%x, @weight_transposed, @bias)
              return output=%linear_1
        """,
    )


def test_reshapes_before_linear_what_was_reshaped_after_it() -> None:
    """As GPT-2's attention: heads and their width are merged with the rows in one step."""

    def function(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.bias, x.reshape(-1, 4), m.weight).view(2, 3, 6)

    check_pass(
        CanonicalizeLayers(),
        Stored(function),
        (torch.randn(2, 3, 2, 2),),
        expected="""
            program (level aten)
              input  %x: f32[2, 3, 2, 2]
              tensor @weight_transposed: f32[6, 4]
              tensor @bias: f32[6]
              %reshape_1: f32[2, 3, 4] = reshape(%x, shape=[2, 3, 4])
              %linear_1: f32[2, 3, 6] = linear(%reshape_1, @weight_transposed, @bias)
              return output=%linear_1
        """,
    )


def test_keeps_a_reshape_that_splits_the_outputs() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return F.linear(x.view(-1, 4), m.weight.t()).view(2, 3, 2, 3)

    model = Stored(function)
    after = check_pass(CanonicalizeLayers(), model, (torch.randn(2, 3, 4),)).after
    assert targets(after)[-1] in ("view", "reshape")


def test_keeps_a_matrix_that_is_used_as_it_lies() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return x @ m.weight @ m.weight.t() * m.weight.sum()

    checked = check_pass(CanonicalizeLayers(), Stored(function), ROWS)
    assert targets(checked.after).count("linear") == 1
    assert any("@weight would be stored twice: %t uses it as it lies" in reason for reason in checked.reasons)
    assert checked.after.has_tensor("weight") and not checked.after.has_tensor("weight_transposed")


def test_shares_the_transposed_matrix_of_several_products() -> None:
    check_pass(
        CanonicalizeLayers(),
        Stored(lambda m, x: x @ m.weight + (x + 1) @ m.weight),
        ROWS,
        expected="""
            program (level aten)
              input  %x: f32[3, 4]
              tensor @weight_transposed: f32[6, 4]
              %linear: f32[3, 6] = linear(%x, @weight_transposed)
              %add: f32[3, 4] = add(%x, other=1)
              %linear_1: f32[3, 6] = linear(%add, @weight_transposed)
              %add_1: f32[3, 6] = add(%linear, %linear_1)
              return output=%add_1
        """,
    )


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (lambda m, x: torch.addmm(m.bias, x, m.weight, alpha=2), "it scales its summands"),
        (lambda m, x: torch.addmm(x[:, :1] * m.bias, x, m.weight), "not one value a column"),
        (lambda m, x: x @ (x.t() @ x), None),
        (lambda m, x: m.weight.t() @ x.t(), None),
        (lambda m, x: x[:1].expand(2, 1, 4) @ m.weight.expand(2, 4, 6), None),
    ],
    ids=["alpha", "bias a row", "two computed values", "matrix on the left", "three axes"],
)
def test_keeps_other_products(function: Callable[[Any, Tensor], Tensor], remark: str | None) -> None:
    remarks = [remark] if remark else []
    checked = check_pass(CanonicalizeLayers(), Stored(function), ROWS, unchanged=True, remarks=remarks)
    assert bool(checked.reasons) == bool(remark)


def test_takes_the_mask_and_the_promise_along() -> None:
    program = trace(Stored(lambda m, x: torch.addmm(m.bias, x, m.weight)), ROWS)
    masked = check_pass(MaskWeights(pattern="2:4"), program).after
    checked = check_pass(
        CanonicalizeLayers(),
        masked,
        ROWS,
        expected="""
            program (level aten)
              input  %x: f32[3, 4]
              tensor @weight_transposed_mask: bool[6, 4]
              tensor @weight_transposed: f32[6, 4]
              tensor @bias: f32[6]
              %mask_1: f32[6, 4] = mask(@weight_transposed, @weight_transposed_mask)
              %linear: f32[3, 6] = linear(%x, %mask_1, @bias)
              return output=%linear
        """,
    )
    promise = checked.after.sparsity["weight_transposed"]
    assert "weight" not in checked.after.sparsity and str(promise.pattern) == "2:4"
    assert torch.equal(promise.mask, masked.tensor("weight_mask").t())


def test_takes_the_promise_of_zeros_along() -> None:
    program = trace(Stored(lambda m, x: x @ m.weight), ROWS)
    baked = check_pass(ApplyMasks(), check_pass(MaskWeights(sparsity=0.5), program).after).after
    after = check_pass(CanonicalizeLayers(), baked, ROWS).after
    assert list(after.sparsity) == ["weight_transposed"]
    assert after.tensor("weight_transposed").count_nonzero() == 12


def test_keeps_the_name_of_a_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = Stored(lambda m, x: torch.addmm(m.bias, x, m.weight))

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x)

    checked = check_pass(CanonicalizeLayers(), Block(), ROWS)
    assert [layer.name for layer in layers_of(checked.before)] == ["project"]
    assert [layer.name for layer in layers_of(checked.after)] == ["project"]


# --- biases ---------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """A layer and a stored summand."""

    def __init__(
        self, layer: nn.Module, *shape: int, after: Callable[[Any, Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.summand = nn.Parameter(torch.randn(*shape))
        self.after = after or (lambda m, y: y + m.summand)

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.layer(x))


IMAGE = (torch.randn(2, 4, 5, 5),)
BIASED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor], list[str]]] = {
    "linear": (lambda: Biased(nn.Linear(4, 6, bias=False), 6), ROWS, ["linear"]),
    "linear with a bias": (lambda: Biased(nn.Linear(4, 6), 6), ROWS, ["linear"]),
    "linear on three axes": (lambda: Biased(nn.Linear(5, 6), 1, 1, 6), (torch.randn(2, 4, 5),), ["linear"]),
    "conv": (lambda: Biased(nn.Conv2d(4, 6, 3, bias=False), 1, 6, 1, 1), IMAGE, ["conv2d"]),
    "conv with a bias": (lambda: Biased(nn.Conv2d(4, 6, 3), 6, 1, 1), IMAGE, ["conv2d"]),
    "transposed": (
        lambda: Biased(nn.ConvTranspose2d(4, 6, 3, groups=2), 6, 1, 1),
        IMAGE,
        ["conv_transpose2d"],
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_takes_a_stored_summand_into_the_bias(name: str) -> None:
    make, inputs, expected = BIASED[name]
    checked = check_pass(CanonicalizeLayers(), make(), inputs)
    assert targets(checked.after) == expected
    (layer,) = layers_of(checked.after)
    assert layer.bias is not None and isinstance(checked.after.tensor(layer.bias), nn.Parameter)


@pytest.mark.parametrize(
    ("make", "remark"),
    [
        (lambda: Biased(nn.Conv2d(4, 6, 3), 6, 1, 1, after=lambda m, y: (y + m.summand) * y), "has 2 users"),
        (lambda: Biased(nn.Conv2d(4, 6, 3), 6, 1, 1, after=lambda m, y: (y + m.summand, y)), "is an output"),
        (lambda: Biased(nn.Conv2d(4, 3, 3), 3), None),  # along the width
        (lambda: Biased(nn.Conv2d(4, 3, 3), 3, 3), None),  # along height and width
        (lambda: Biased(nn.Conv2d(4, 6, 3), 1), None),  # the same for all channels
        (lambda: Biased(nn.Conv2d(4, 6, 3), 2, 6, 1, 1), None),  # another for each image
        (lambda: Biased(nn.Conv2d(4, 1, 3), 6, 1, 1), None),  # makes more channels
        (
            lambda: Biased(nn.Conv2d(4, 6, 3), 6, 1, 1, after=lambda m, y: torch.add(y, m.summand, alpha=2)),
            None,
        ),
        (
            lambda: Biased(
                nn.Conv2d(4, 6, 3), 6, 1, 1, after=lambda m, y: y + y.mean((0, 2, 3))[:, None, None]
            ),
            None,
        ),
    ],
)
def test_keeps_other_sums(make: Callable[[], nn.Module], remark: str | None) -> None:
    remarks = [remark] if remark else []
    checked = check_pass(CanonicalizeLayers(), make(), IMAGE, unchanged=True, remarks=remarks)
    assert bool(checked.reasons) == bool(remark)


def test_keeps_a_sum_that_changes_the_type() -> None:
    model = Biased(nn.Linear(4, 6), 6)
    model.summand.data = model.summand.data.double()
    check_pass(CanonicalizeLayers(), model, ROWS, unchanged=True, remarks=["it changes the type of linear"])


def test_keeps_a_summand_beside_a_computed_bias() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))
            self.summand = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, x.mean().expand(6)) + self.summand

    check_pass(CanonicalizeLayers(), Computed(), ROWS, unchanged=True, remarks=["is computed, not stored"])


# --- padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "inputs", "expected"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGE, ["conv2d"]),
        (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), IMAGE, ["conv2d"]),
        (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", groups=2), IMAGE, ["constant_pad_nd", "conv2d"]),
        (lambda: nn.Conv2d(4, 6, (4, 1), padding="same"), IMAGE, ["constant_pad_nd", "conv2d"]),
        (lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2), IMAGE, ["conv2d"]),
        (lambda: nn.Conv1d(4, 6, 5, padding="same"), (torch.randn(2, 4, 9),), ["conv1d"]),
        (lambda: nn.Conv3d(4, 6, 3, padding="same"), (torch.randn(2, 4, 5, 5, 5),), ["conv3d"]),
    ],
)
def test_writes_padding_as_numbers(
    layer: Callable[[], nn.Module], inputs: tuple[Tensor], expected: list[str]
) -> None:
    checked = check_pass(CanonicalizeLayers(), layer(), inputs)
    assert targets(checked.after) == expected
    assert str(list(checked.after.compute_nodes())[-1].target).endswith(".default")


def test_leaves_canonical_layers() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2))
    check_pass(CanonicalizeLayers(), model, IMAGE, unchanged=True)


def test_finds_the_matrix_behind_a_noop() -> None:
    """A contiguous transposed weight is two operators; RemoveNoops leaves the one that is known here."""
    program = trace(Stored(lambda m, x: x @ m.weight.t().contiguous(), rows=6, columns=4), ROWS)
    clean = check_pass(RemoveNoops(), program, ROWS).after
    assert targets(check_pass(CanonicalizeLayers(), clean, ROWS).after) == ["linear"]


def test_keeps_a_product_that_scales_by_a_known_beta() -> None:
    program = trace(Stored(lambda m, x: torch.addmm(m.bias, x, m.weight)), ROWS)
    node = next(program.compute_nodes())
    node.kwargs = {"beta": 0.5}
    Rewriter(program).infer(node)
    program.recompile()
    check_pass(CanonicalizeLayers(), program, ROWS, unchanged=True, remarks=["it scales its summands"])


def test_refuses_other_levels() -> None:
    refuse_other_levels(CanonicalizeLayers())


def test_keeps_functions_without_layers() -> None:
    check_pass(CanonicalizeLayers(), Function(lambda x: x.relu() + 1), ROWS, unchanged=True)
