from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.compare import compare_layers
from sqcompile.errors import PassOptionError
from sqcompile.layers import layers_of
from sqcompile.passes import FoldBatchNorm, MaskWeights
from sqcompile.rewrite import Rewriter
from sqcompile.testing import check_pass


def unsettled(*modules: nn.Module) -> nn.Sequential:
    """A chain of modules in eval mode whose batch norms scale and shift every channel differently."""
    source = torch.Generator().manual_seed(0)
    model = nn.Sequential(*modules)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=source))
            norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=source))
            if norm.affine:
                norm.weight.data.copy_(torch.randn(norm.num_features, generator=source))
                norm.bias.data.copy_(torch.randn(norm.num_features, generator=source))
    return model.eval()


def image(*shape: int) -> tuple[Tensor]:
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)),)


def targets(program: Program) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.compute_nodes()]


def test_folds_into_the_convolution_before_it() -> None:
    checked = check_pass(
        FoldBatchNorm(),
        unsettled(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        image(3, 6, 6),
        expected="""
            program (level aten)
              input  %input_1: f32[2, 3, 6, 6]
              tensor @0.bias: f32[4]
              tensor @0.weight: f32[4, 3, 3, 3]
              %conv2d: f32[2, 4, 4, 4] = conv2d(%input_1, @0.weight, @0.bias)
              %relu: f32[2, 4, 4, 4] = relu(%conv2d)
              return output=%relu
        """,
    )
    assert not any("running" in name for name, _ in checked.after.graph_module.named_buffers())
    assert isinstance(checked.after.tensor("0.bias"), nn.Parameter)


def test_folds_into_the_convolution_after_it() -> None:
    check_pass(
        FoldBatchNorm(),
        unsettled(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        image(3, 6, 6),
        expected="""
            program (level aten)
              input  %input_1: f32[2, 3, 6, 6]
              tensor @2.weight: f32[4, 3, 3, 3]
              tensor @2.bias: f32[4]
              %relu: f32[2, 3, 6, 6] = relu(%input_1)
              %conv2d: f32[2, 4, 4, 4] = conv2d(%relu, @2.weight, @2.bias)
              return output=%conv2d
        """,
    )


def test_computes_the_weights_of_the_definition() -> None:
    """Against w · γ / √(σ² + ε) and (b − µ) · γ / √(σ² + ε) + β, written out."""
    model = unsettled(nn.Linear(3, 2), nn.BatchNorm1d(2, eps=0.1))
    linear, norm = model[0], model[1]
    scale = norm.weight.double() / (norm.running_var.double() + 0.1).sqrt()
    after = check_pass(FoldBatchNorm(), model, image(3)).after
    assert torch.equal(after.tensor("0.weight"), (linear.weight.double() * scale[:, None]).float())
    expected = (linear.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    assert torch.equal(after.tensor("0.bias"), expected.float())


BEFORE: dict[str, tuple[Callable[[], list[nn.Module]], tuple[Tensor]]] = {
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)], image(4, 8)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], image(2, 4, 4, 4)),
    "grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], image(4, 6, 6)),
    "depthwise": (lambda: [nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)], image(4, 6, 6)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)], image(4, 5, 5)),
    "transposed 1d": (lambda: [nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)], image(4, 5)),
    "transposed, grouped": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6)],
        image(4, 5, 5),
    ),
    "linear": (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], image(4)),
    "without affine": (lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], image(4, 6, 6)),
}
AFTER: dict[str, tuple[Callable[[], list[nn.Module]], tuple[Tensor]]] = {
    "conv1d": (lambda: [nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, bias=False)], image(4, 8)),
    "conv3d": (lambda: [nn.BatchNorm3d(2), nn.Conv3d(2, 3, 2)], image(2, 4, 4, 4)),
    "grouped": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], image(4, 6, 6)),
    "depthwise": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)], image(4, 6, 6)),
    "linear": (lambda: [nn.BatchNorm1d(4), nn.Linear(4, 6)], image(4)),
    "a chain": (
        lambda: [
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 2, 3),
            nn.BatchNorm2d(2),
        ],
        image(4, 6, 6),
    ),
}


@pytest.mark.parametrize(
    "case", [*BEFORE.values(), *AFTER.values()], ids=[*BEFORE, *(f"after: {k}" for k in AFTER)]
)
def test_folds(case: tuple[Callable[[], list[nn.Module]], tuple[Tensor]]) -> None:
    make, inputs = case
    after = check_pass(FoldBatchNorm(), unsettled(*make()), inputs).after
    assert "batch_norm" not in targets(after)
    assert all(len(list(layer.node.args)) >= 3 for layer in layers_of(after))


@pytest.mark.parametrize(
    "layer", [lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_folds_a_pure_scale_into_what_pads(layer: Callable[[], nn.Module]) -> None:
    """Zeros stay zeros under a scale, so padding and partial kernels do no harm."""
    model = unsettled(nn.BatchNorm2d(4), layer())
    norm = model[0]
    norm.running_mean.zero_()
    norm.bias.data.zero_()
    after = check_pass(FoldBatchNorm(), model, image(4, 6, 6)).after
    assert targets(after) == [targets(after)[0]] and "conv" in targets(after)[0]


def test_keeps_a_shift_before_padding() -> None:
    check_pass(
        FoldBatchNorm(),
        unsettled(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
        image(3, 6, 6),
        unchanged=True,
        remarks=["it shifts the input of conv2d %conv2d, which then pads with zeros"],
    )


def test_keeps_a_shift_before_a_transposed_convolution() -> None:
    check_pass(
        FoldBatchNorm(),
        unsettled(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)),
        image(3, 6, 6),
        unchanged=True,
        remarks=["whose outputs see different parts of the kernel"],
    )


class Branches(nn.Module):
    """A convolution, its batch norm, and something beside."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        chain = unsettled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        self.conv, self.norm, self.next = chain[0], chain[1], chain[2]
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def both(model: Any, x: Tensor) -> Tensor:
    y = model.conv(x)
    return model.norm(y) + y


def returned(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.conv(x)
    return model.norm(y), y


def shared(model: Any, x: Tensor) -> Tensor:
    return model.norm(model.conv(x)) + model.conv(x + 1)


def shared_after(model: Any, x: Tensor) -> Tensor:
    return model.next(model.norm(x)) + model.next(x)


def used_twice(model: Any, x: Tensor) -> Tensor:
    y = model.norm(x)
    return model.next(y) + y


def alone(model: Any, x: Tensor) -> Tensor:
    return model.norm(x.relu()).relu()


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (both, "the value of conv2d %conv2d has 2 users"),
        (returned, "the value of conv2d %conv2d is an output of the program"),
        (shared, "the weight @conv.weight of conv2d %conv2d is shared"),
        (shared_after, "the weight @next.weight of conv2d %conv2d is shared"),
        (used_twice, "before it is an input, after it its value has 2 users"),
        (alone, "there is no convolution or linear beside it: before it is relu, after it relu"),
        (
            lambda model, x: model.norm(x),
            "before it is an input, after it its value is an output of the program",
        ),
    ],
)
def test_keeps(function: Callable[[Any, Tensor], Any], remark: str) -> None:
    check_pass(FoldBatchNorm(), Branches(function), image(3, 4, 4), unchanged=True, remarks=[remark])


def test_folds_where_the_value_is_an_output_and_its_input_is_not() -> None:
    checked = check_pass(
        FoldBatchNorm(), Branches(lambda model, x: model.norm(model.conv(x))), image(3, 4, 4)
    )
    assert targets(checked.after) == ["conv2d"] and not checked.record.remarks


def test_folds_into_the_layer_after_it_where_the_one_before_cannot() -> None:
    def function(model: Any, x: Tensor) -> Tensor:
        y = model.conv(x)
        return model.next(model.norm(y)) + y

    checked = check_pass(FoldBatchNorm(), Branches(function), image(3, 4, 4))
    assert targets(checked.after) == ["conv2d", "conv2d", "add"] and not checked.record.remarks


class SharedBias(nn.Module):
    """Two convolutions with one bias, the first with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        chain = unsettled(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        self.conv, self.norm, self.next = chain[0], chain[1], chain[2]
        self.next.bias = self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.norm(self.conv(x)))


def test_gives_a_layer_that_shares_its_bias_one_of_its_own() -> None:
    checked = check_pass(
        FoldBatchNorm(),
        SharedBias(),
        image(3, 4, 4),
        expected="""
            program (level aten)
              input  %x: f32[2, 3, 4, 4]
              tensor @conv.bias: f32[3]
              tensor @conv.weight: f32[3, 3, 1, 1]
              tensor @next.weight: f32[3, 3, 1, 1]
              tensor @next.bias: f32[3]
              %conv2d: f32[2, 3, 4, 4] = conv2d(%x, @conv.weight, @conv.bias)
              %conv2d_1: f32[2, 3, 4, 4] = conv2d(%conv2d, @next.weight, @next.bias)
              return output=%conv2d_1
        """,
    )
    assert torch.equal(checked.after.tensor("next.bias"), checked.before.tensor("next.bias"))


def test_keeps_a_batch_norm_along_another_axis() -> None:
    """Batch norm works on axis 1, which of a linear layer on three axes is not its outputs'."""
    model = unsettled(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    check_pass(
        FoldBatchNorm(),
        model,
        image(4, 5),
        unchanged=True,
        remarks=[
            "not the axis of the channels of linear %linear; axis 1, which it scales, is not the axis that "
            "linear %linear_1 sums over"
        ],
    )


def test_keeps_a_batch_norm_of_images_without_a_batch_axis() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm1d(5)  # over the rows of the image

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    x = torch.randn(3, 5, 6)
    check_pass(
        FoldBatchNorm(), Unbatched(), (x,), unchanged=True, remarks=["is not the axis of the channels"]
    )


def test_keeps_a_batch_norm_in_training_mode() -> None:
    program = trace(unsettled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), image(3, 4, 4))
    norm = next(node for node in program.compute_nodes() if "batch_norm" in node.name)
    Rewriter(program).set_argument(norm, 5, True)
    check_pass(FoldBatchNorm(), program, unchanged=True, remarks=["it is in training mode"])


@pytest.mark.parametrize(
    ("name", "value", "remark"),
    [
        ("running_var", -1.0, "a scale or shift that is not finite"),
        ("running_mean", torch.nan, "a scale or shift that is not finite"),
        ("weight", 3e38, "the weight or bias of conv2d %conv2d would not be finite in torch.float32"),
    ],
)
def test_keeps_what_would_not_be_finite(name: str, value: float, remark: str) -> None:
    model = unsettled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight.data.mul_(100)
    getattr(model[1], name).data.fill_(value)
    checked = check_pass(FoldBatchNorm(), trace(model, image(3, 4, 4)), unchanged=True)
    assert any(remark in reason for reason in checked.reasons)


def test_keeps_a_batch_norm_with_computed_statistics() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return nn.functional.batch_norm(y, x.mean().expand(4), torch.ones(4))

    check_pass(FoldBatchNorm(), Computed(), image(3, 4, 4), unchanged=True, remarks=["computed, not stored"])


def test_folds_under_a_mask() -> None:
    program = trace(unsettled(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)), image(4, 6, 6))
    masked = check_pass(MaskWeights(sparsity=0.5), program).after
    checked = check_pass(
        FoldBatchNorm(),
        masked,
        image(4, 6, 6),
        expected="""
            program (level aten)
              input  %input_1: f32[2, 4, 6, 6]
              tensor @0.bias: f32[4]
              tensor @0.weight_mask: bool[4, 4, 3, 3]
              tensor @0.weight: f32[4, 4, 3, 3]
              %mask: f32[4, 4, 3, 3] = mask(@0.weight, @0.weight_mask)
              %conv2d: f32[2, 4, 4, 4] = conv2d(%input_1, %mask, @0.bias)
              return output=%conv2d
        """,
    )
    assert torch.equal(checked.after.tensor("0.weight_mask"), masked.tensor("0.weight_mask"))
    assert checked.after.sparsity["0.weight"].sparsity == 0.5


def test_sums_shifts_of_the_masked_weight_alone() -> None:
    program = trace(unsettled(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), image(4, 6, 6))
    masked = check_pass(MaskWeights(sparsity=0.75), program).after
    assert "batch_norm" not in targets(check_pass(FoldBatchNorm(), masked, image(4, 6, 6)).after)


def test_folds_with_dynamic_dimensions() -> None:
    model = unsettled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    dims = {"input": {0: Dim("batch", max=8), 2: Dim("height", min=4, max=64)}}
    check_pass(
        FoldBatchNorm(),
        model,
        image(3, 6, 6),
        dynamic_shapes=dims,
        expected="""
            program (level aten)
              input  %input_1: f32[batch, 3, height, 6]
              tensor @0.weight: f32[4, 3, 3, 3]
              tensor @0.bias: f32[4]
              %conv2d: f32[batch, 4, height - 2, 4] = conv2d(%input_1, @0.weight, @0.bias)
              return output=%conv2d
        """,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stores_weights_in_their_own_type(dtype: torch.dtype) -> None:
    model = unsettled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    after = check_pass(FoldBatchNorm(), model, (image(3, 6, 6)[0].to(dtype),)).after
    assert targets(after) == ["conv2d"]
    assert after.tensor("0.weight").dtype is after.tensor("0.bias").dtype is dtype


def test_keeps_the_layout_of_weights() -> None:
    model = unsettled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    after = check_pass(FoldBatchNorm(), model, image(3, 6, 6)).after
    assert after.tensor("0.weight").is_contiguous(memory_format=torch.channels_last)


def test_leaves_batch_norms_that_grow_weights_beyond_max_growth() -> None:
    model = unsettled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].weight.data.copy_(torch.tensor([1.0, -8.0, 2.0, 1.0]))
    model[1].running_var.fill_(1.0)
    program = trace(model, image(3, 4, 4))
    remark = "it scales a channel by 8, and max-growth is 7.9"
    check_pass(FoldBatchNorm(max_growth=7.9), program, unchanged=True, remarks=[remark])
    assert targets(check_pass(FoldBatchNorm(max_growth=8.0), program, image(3, 4, 4)).after) == ["conv2d"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rejects_a_growth_that_is_no_factor(value: float) -> None:
    program = trace(nn.Linear(3, 2), image(3))
    with pytest.raises(PassOptionError, match="max_growth"):
        check_pass(FoldBatchNorm(max_growth=value), program)


def test_compares_the_convolution_with_the_batch_norm_it_stands_for() -> None:
    model = unsettled(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    checked = check_pass(FoldBatchNorm(), model, image(3, 4, 4))
    (row,) = compare_layers(checked.before, checked.after, [list(image(3, 4, 4))])
    assert row.name == "0" and row.distance.sqnr_db > 120  # without the batch norm's part: below 10


def test_refuses_other_levels() -> None:
    refuse_other_levels(FoldBatchNorm())
