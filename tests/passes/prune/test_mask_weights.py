from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.errors import InputError, PassOptionError, SelectionError
from sqcompile.layers import layers_of
from sqcompile.passes import ApplyMasks, MaskWeights
from sqcompile.pipeline import parse_pass
from sqcompile.rewrite import Rewriter
from sqcompile.testing import check_pass


class Net(nn.Module):
    """A convolution, an embedding-free head of two linear layers, all weights distinct."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.conv(x).mean((2, 3))).relu())


IMAGE = (torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(scope="module")
def net() -> Program:
    torch.manual_seed(0)
    return trace(Net().eval(), IMAGE)


def linear(weight: Tensor, name: str = "fc") -> nn.Module:
    """A module with one linear layer of that weight."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            setattr(self, name, layer)

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(x)

    return One()


def one(weight: Tensor) -> Program:
    return trace(linear(weight), (torch.ones(1, weight.shape[1]),))


def mask_of(item: MaskWeights, weight: Tensor) -> list[list[int]]:
    """The mask that a pass gives to the weight of one linear layer."""
    after = check_pass(item, one(weight), (torch.ones(1, weight.shape[1]),)).after
    if not after.has_tensor("fc.weight_mask"):
        return torch.ones_like(weight, dtype=torch.int).tolist()
    return after.tensor("fc.weight_mask").int().tolist()


WEIGHT = torch.tensor([[1.0, -8.0, 3.0, -4.0], [5.0, 6.0, -7.0, 2.0]])


# --- what it does ---------------------------------------------------------------------------------------


def test_masks_every_layer() -> None:
    checked = check_pass(
        MaskWeights(sparsity=0.5),
        Net(),
        IMAGE,
        expected="""
            program (level aten)
              input  %x: f32[2, 4, 6, 6]
              tensor @head.weight_mask: bool[4, 16]
              tensor @hidden.weight_mask: bool[16, 8]
              tensor @conv.weight_mask: bool[8, 4, 3, 3]
              tensor @conv.weight: f32[8, 4, 3, 3]
              tensor @conv.bias: f32[8]
              tensor @hidden.weight: f32[16, 8]
              tensor @hidden.bias: f32[16]
              tensor @head.weight: f32[4, 16]
              tensor @head.bias: f32[4]
              %mask: f32[8, 4, 3, 3] = mask(@conv.weight, @conv.weight_mask)
              %conv2d: f32[2, 8, 4, 4] = conv2d(%x, %mask, @conv.bias)
              %mean: f32[2, 8] = mean.dim(%conv2d, dim=[2, 3])
              %mask_1: f32[16, 8] = mask(@hidden.weight, @hidden.weight_mask)
              %linear: f32[2, 16] = linear(%mean, %mask_1, @hidden.bias)
              %relu: f32[2, 16] = relu(%linear)
              %mask_2: f32[4, 16] = mask(@head.weight, @head.weight_mask)
              %linear_1: f32[2, 4] = linear(%relu, %mask_2, @head.bias)
              return output=%linear_1
        """,
    )
    assert checked.record.facts == {"sparsity": {"conv": 0.5, "hidden": 0.5, "head": 0.5}}
    assert {name: promise.sparsity for name, promise in checked.after.sparsity.items()} == {
        "conv.weight": 0.5,
        "hidden.weight": 0.5,
        "head.weight": 0.5,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sparsity": 0.5}, [[0, 1, 0, 0], [1, 1, 1, 0]]),
        ({"sparsity": 0.3}, [[0, 1, 1, 1], [1, 1, 1, 0]]),  # 2.4 of 8 weights: two
        ({"sparsity": 0.0}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"threshold": 3.0}, [[0, 1, 0, 1], [1, 1, 1, 0]]),  # kept is what is larger
        ({"threshold": 0.0}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"pattern": "2:4"}, [[0, 1, 0, 1], [0, 1, 1, 0]]),
        ({"pattern": "1:2"}, [[0, 1, 0, 1], [0, 1, 1, 0]]),
        ({"pattern": "3:4"}, [[0, 1, 1, 1], [1, 1, 1, 0]]),
        ({"pattern": "1x2", "sparsity": 0.5}, [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ({"pattern": "2x1", "sparsity": 0.5}, [[0, 1, 1, 0], [0, 1, 1, 0]]),
        ({"pattern": "2x2", "sparsity": 0.5}, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ({"pattern": "2x2", "threshold": 4.5}, [[1, 1, 0, 0], [1, 1, 0, 0]]),  # means 5 and 4
    ],
    ids=str,
)
def test_masks_what_is_least(options: dict[str, Any], expected: list[list[int]]) -> None:
    assert mask_of(MaskWeights(**options), WEIGHT) == expected


def test_scores_blocks_by_either_norm() -> None:
    weight = torch.tensor([[3.0, 3.0, 0.0, 5.0]])  # sums 6 and 5, squares 18 and 25; means 3 and 2.5
    assert mask_of(MaskWeights(pattern="1x2", sparsity=0.5), weight) == [[1, 1, 0, 0]]
    assert mask_of(MaskWeights(pattern="1x2", sparsity=0.5, norm="l2"), weight) == [[0, 0, 1, 1]]
    assert mask_of(MaskWeights(pattern="1x2", threshold=2.8), weight) == [[1, 1, 0, 0]]
    # The root of the mean square: 3 and 3.54.
    assert mask_of(MaskWeights(pattern="1x2", threshold=3.1, norm="l2"), weight) == [[0, 0, 1, 1]]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ranks_weights_whose_squares_vanish(norm: str) -> None:
    weight = torch.tensor([[4e-30, 3e-30, 2e-30, 1e-30]])
    assert mask_of(MaskWeights(sparsity=0.5, norm=norm), weight) == [[1, 1, 0, 0]]


def test_breaks_ties_by_position() -> None:
    assert mask_of(MaskWeights(sparsity=0.5), torch.ones(2, 4)) == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert mask_of(MaskWeights(pattern="2:4"), torch.ones(2, 4)) == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_lays_patterns_along_input_channels_at_one_place_of_the_kernel(net: Program) -> None:
    after = check_pass(MaskWeights(pattern="2:4", layers="conv"), net, IMAGE).after
    mask = after.tensor("conv.weight_mask")  # [8, 4, 3, 3]
    assert torch.equal(mask.sum(1), torch.full((8, 3, 3), 2))


def test_lays_blocks_over_outputs_at_one_place_of_the_kernel(net: Program) -> None:
    after = check_pass(MaskWeights(pattern="4x2", sparsity=0.5, layers="conv"), net, IMAGE).after
    blocks = after.tensor("conv.weight_mask").reshape(2, 4, 2, 2, 3, 3).sum((1, 3))
    assert set(blocks.flatten().tolist()) == {0, 8} and (blocks == 0).float().mean() == 0.5


def test_prunes_by_one_threshold_for_all(net: Program) -> None:
    checked = check_pass(MaskWeights(sparsity=0.5, scope="global"), net, IMAGE)
    weights = [checked.after.tensor(f"{name}.weight") for name in ("conv", "hidden", "head")]
    masks = [checked.after.tensor(f"{name}.weight_mask") for name in ("conv", "hidden", "head")]
    kept = torch.cat([weight.abs()[mask] for weight, mask in zip(weights, masks, strict=True)])
    gone = torch.cat([weight.abs()[~mask] for weight, mask in zip(weights, masks, strict=True)])
    assert gone.numel() == kept.numel() and gone.max() <= kept.min()
    assert len(set(checked.record.facts["sparsity"].values())) == 3


def test_prunes_blocks_by_one_threshold_for_all(net: Program) -> None:
    checked = check_pass(MaskWeights(sparsity=0.6, scope="global", pattern="1x4", norm="l2"), net, IMAGE)
    masks = [checked.after.tensor(f"{name}.weight_mask") for name in ("hidden", "head")]
    assert all(set(mask.reshape(-1, 4).sum(1).tolist()) <= {0, 4} for mask in masks)
    total = sum(int((~checked.after.sparsity[name].mask).sum()) for name in checked.after.sparsity)
    assert total == 4 * int(0.6 * (288 + 128 + 64) / 4)


def test_removes_ties_of_all_layers_no_more_than_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.ones_(layer.weight)
    program = trace(model, (torch.ones(1, 4),))
    facts = check_pass(MaskWeights(sparsity=0.75, scope="global"), program).record.facts["sparsity"]
    assert facts == {"0": 1.0, "1": 0.5}


# --- which layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": "hidden"}, ["hidden"]),
        ({"layers": ["h*"]}, ["hidden", "head"]),
        ({"exclude": "conv"}, ["hidden", "head"]),
        ({"kinds": "conv2d"}, ["conv"]),
        ({"layers": "re:^h", "exclude": "head", "kinds": ["linear"]}, ["hidden"]),
    ],
)
def test_prunes_chosen_layers(net: Program, options: dict[str, Any], expected: list[str]) -> None:
    checked = check_pass(MaskWeights(sparsity=0.5, **options), net, IMAGE)
    assert list(checked.record.facts["sparsity"]) == expected
    assert sorted(checked.after.sparsity) == sorted(f"{name}.weight" for name in expected)


def test_takes_fractions_by_pattern(net: Program) -> None:
    item = MaskWeights(sparsity=0.5, sparsities={"kind:linear": 0.25, "head": 0.75})
    facts = check_pass(item, net, IMAGE).record.facts["sparsity"]
    assert facts == {"conv": 0.5, "hidden": 0.25, "head": 0.75}
    facts = check_pass(MaskWeights(sparsities={"head": 0.75}), net, IMAGE).record.facts["sparsity"]
    assert facts == {"head": 0.75}


def test_leaves_layers_with_a_fraction_of_their_own_out_of_the_common_threshold(net: Program) -> None:
    item = MaskWeights(sparsity=0.5, scope="global", sparsities={"conv": 0.0})
    checked = check_pass(item, net, IMAGE)
    assert checked.record.facts["sparsity"]["conv"] == 0.0
    assert sum(int((~promise.mask).sum()) for promise in checked.after.sparsity.values()) == (128 + 64) // 2
    assert not checked.reasons


class Language(nn.Module):
    """An embedding, a layer, and a head whose weight is the embedding's where they are tied."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)))


TOKENS = (torch.tensor([[1, 2, 3]]),)


def test_leaves_embeddings_that_nobody_asked_for() -> None:
    program = trace(Language(tied=False), TOKENS)
    layers = check_pass(MaskWeights(sparsity=0.5), program, TOKENS).record.facts["sparsity"]
    assert list(layers) == ["layer", "head"]
    layers = check_pass(MaskWeights(sparsity=0.5, layers=["*", "embed"]), program, TOKENS).record.facts[
        "sparsity"
    ]
    assert list(layers) == ["embed", "layer", "head"]
    layers = check_pass(MaskWeights(sparsity=0.5, kinds="embedding"), program, TOKENS).record.facts[
        "sparsity"
    ]
    assert list(layers) == ["embed"]


def test_leaves_a_weight_that_an_embedding_shares() -> None:
    checked = check_pass(
        MaskWeights(sparsity=0.5),
        Language(tied=True),
        TOKENS,
        remarks=["is not pruned: its weight is shared with 'embed', which is not selected"],
    )
    assert list(checked.record.facts["sparsity"]) == ["layer"]


def test_gives_a_shared_weight_one_mask_for_all() -> None:
    check_pass(
        MaskWeights(sparsity=0.5, kinds=["embedding", "linear"], exclude="layer"),
        Language(tied=True),
        TOKENS,
        expected="""
            program (level aten)
              input  %tokens: i64[1, 3]
              tensor @head.weight_mask: bool[8, 4]
              tensor @layer.weight: f32[4, 4]
              tensor @layer.bias: f32[4]
              tensor @head.weight: f32[8, 4]
              %mask: f32[8, 4] = mask(@head.weight, @head.weight_mask)
              %embedding: f32[1, 3, 4] = embedding(%mask, %tokens)
              %linear: f32[1, 3, 4] = linear(%embedding, @layer.weight, @layer.bias)
              %linear_1: f32[1, 3, 8] = linear(%linear, %mask)
              return output=%linear_1
        """,
    )


# --- again, and after training --------------------------------------------------------------------------


def test_adds_zeros_to_those_that_are_there(net: Program) -> None:
    first = check_pass(MaskWeights(sparsity=0.5), net, IMAGE).after
    checked = check_pass(MaskWeights(sparsity=0.75), first, IMAGE)
    assert checked.record.facts["sparsity"]["hidden"] == 0.75
    old, new = first.tensor("hidden.weight_mask"), checked.after.tensor("hidden.weight_mask")
    assert torch.equal(old & new, new)
    assert not checked.after.has_tensor("hidden.weight_mask_1")
    assert torch.equal(checked.after.sparsity["hidden.weight"].mask, new)


def test_takes_nothing_back(net: Program) -> None:
    first = check_pass(MaskWeights(sparsity=0.75), net, IMAGE).after
    check_pass(MaskWeights(sparsity=0.5), first, IMAGE, unchanged=True)
    check_pass(MaskWeights(sparsity=0.5, scope="global"), first, IMAGE, unchanged=True)
    check_pass(MaskWeights(threshold=0.0), first, IMAGE, unchanged=True)


def test_adds_zeros_to_those_that_are_baked_in(net: Program) -> None:
    masked = check_pass(MaskWeights(sparsity=0.5), net, IMAGE).after
    baked = check_pass(ApplyMasks(), masked, IMAGE).after
    check_pass(MaskWeights(sparsity=0.5), baked, IMAGE, unchanged=True)
    checked = check_pass(MaskWeights(sparsity=0.75), baked, IMAGE)
    assert set(checked.record.facts["sparsity"].values()) == {0.75}


def test_removes_the_least_blocks_first_of_those_that_are_left() -> None:
    program = one(torch.tensor([[9.0, 9.0, 1.0, 1.0, 0.0, 0.0, 5.0, 5.0]]))
    first = check_pass(MaskWeights(pattern="1x2", sparsity=0.25), program).after
    assert first.tensor("fc.weight_mask").int().tolist() == [[1, 1, 1, 1, 0, 0, 1, 1]]
    second = check_pass(MaskWeights(pattern="1x2", sparsity=0.5), first).after
    assert second.tensor("fc.weight_mask").int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


def test_promises_no_pattern_where_two_masks_have_none_together(net: Program) -> None:
    first = check_pass(MaskWeights(sparsity=0.5), net, IMAGE).after
    both = check_pass(MaskWeights(pattern="1x4", sparsity=0.5), first, IMAGE).after
    assert str(both.sparsity["hidden.weight"].pattern) == "unstructured"
    groups = check_pass(MaskWeights(pattern="2:4"), first, IMAGE).after  # at most 2 of 4 hold all the more
    assert str(groups.sparsity["hidden.weight"].pattern) == "2:4"


def test_masks_survive_training(net: Program) -> None:
    """Masked weights get no gradient, and have no effect even where weight decay moves them."""
    program = check_pass(MaskWeights(pattern="2:4"), net, IMAGE).after
    module = program.graph_module.train()
    before = {name: tensor.detach().clone() for name, tensor in program.tensors()}
    trained = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    source = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.randn(4, 4, 6, 6, generator=source)[:2]
        loss = program.run([x])[0].square().mean()
        loss.backward()
        for name in ("conv", "hidden", "head"):
            mask = program.tensor(f"{name}.weight_mask")
            gradient = trained[f"{name}.weight"].grad
            assert gradient is not None
            assert not gradient[~mask].any() and gradient[mask].any()
        optimizer.step()
    for name in ("conv", "hidden", "head"):
        mask, weight = program.tensor(f"{name}.weight_mask"), program.tensor(f"{name}.weight")
        assert torch.equal(mask, before[f"{name}.weight_mask"])
        assert not torch.equal(weight[mask], before[f"{name}.weight"][mask])
    moved = program.tensor("hidden.weight").detach().clone()
    expected = program.run([IMAGE[0]])[0]
    moved[~program.tensor("hidden.weight_mask")] = 1e3
    program.set_tensor("hidden.weight", moved)
    assert torch.equal(program.run([IMAGE[0]])[0], expected)


# --- what it leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "make", "inputs", "remark"),
    [
        (
            "2:4",
            lambda: nn.Linear(6, 8),
            (torch.randn(1, 6),),
            "its 6 input channels are not a multiple of 4",
        ),
        ("1x4", lambda: nn.Conv2d(3, 8, 3), (torch.randn(1, 3, 4, 4),), "its 3 input channels"),
        (
            "16x1",
            lambda: nn.Linear(8, 8),
            (torch.randn(1, 8),),
            "its 8 output channels are not a multiple of 16",
        ),
        (
            "2:4",
            lambda: nn.Conv2d(8, 8, 3, groups=4),
            (torch.randn(1, 8, 4, 4),),
            "its 2 input channels per group are not a multiple of 4",
        ),
        (
            "4x1",
            lambda: nn.Conv2d(8, 8, 3, groups=4),
            (torch.randn(1, 8, 4, 4),),
            "its 2 output channels per group are not a multiple of 4",
        ),
        (
            "2:4",
            lambda: nn.ConvTranspose2d(8, 8, 3, groups=4),
            (torch.randn(1, 8, 4, 4),),
            "its 2 input channels per group are not a multiple of 4",
        ),
    ],
)
def test_leaves_what_cannot_have_the_pattern(
    pattern: str, make: Callable[[], nn.Module], inputs: tuple[Tensor], remark: str
) -> None:
    sparsity = None if ":" in pattern else 0.5
    check_pass(
        MaskWeights(pattern=pattern, sparsity=sparsity), make(), inputs, unchanged=True, remarks=[remark]
    )


def test_says_that_a_layer_has_too_few_weights() -> None:
    remark = "keeps all its weights: they are too few for a part of them to go"
    check_pass(MaskWeights(sparsity=0.1), one(WEIGHT), unchanged=True, remarks=[remark])
    check_pass(
        MaskWeights(threshold=0.5),
        one(WEIGHT),
        unchanged=True,
        remarks=["keeps all its weights: none is below"],
    )


def test_says_that_a_layer_has_no_weight_left() -> None:
    check_pass(MaskWeights(threshold=9.0), one(WEIGHT), remarks=["has no weight left"])


def test_leaves_a_weight_that_something_else_uses() -> None:
    class Measured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) / self.fc.weight.norm()

    inputs = (torch.randn(1, 4),)
    remark = "is not pruned: %linalg_vector_norm uses its weight too"
    check_pass(MaskWeights(sparsity=0.5), Measured(), inputs, unchanged=True, remarks=[remark])


def test_leaves_a_mask_that_something_else_uses() -> None:
    program = check_pass(MaskWeights(sparsity=0.5), one(WEIGHT)).after
    edit = Rewriter(program)
    masked = next(node for node in program.compute_nodes() if "mask" in node.name)
    with edit.before(program.output):
        norm = edit.call(torch.ops.aten.sum.default, masked)
        total = edit.call(torch.ops.aten.add.Tensor, program.output.args[0][0], norm)
    program.output.args = ((total,),)
    edit.finish()
    remark = "is not pruned: %sum_1 uses its weight too"
    check_pass(MaskWeights(sparsity=0.75), program, unchanged=True, remarks=[remark])


def test_leaves_a_model_without_layers() -> None:
    remark = "has no layer to prune"
    check_pass(MaskWeights(sparsity=0.5), nn.ReLU(), (torch.randn(3),), unchanged=True, remarks=[remark])


def test_follows_dynamic_dimensions() -> None:
    model = nn.Linear(4, 2)
    dims = {"input": {0: Dim("batch", max=8)}}
    after = check_pass(MaskWeights(sparsity=0.5), model, (torch.randn(3, 4),), dynamic_shapes=dims).after
    assert "f32[batch, 2] = linear(%input_1, %mask, @bias)" in after.text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_weights_of_other_types(dtype: torch.dtype) -> None:
    program = trace(linear(WEIGHT.to(dtype)), (torch.ones(1, 4, dtype=dtype),))
    after = check_pass(MaskWeights(sparsity=0.5), program).after
    assert after.tensor("fc.weight_mask").int().tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]
    assert after.tensor("fc.weight").dtype is dtype


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rejects_weights_that_are_not_finite(value: float) -> None:
    weight = WEIGHT.clone()
    weight[1, 2] = value
    with pytest.raises(InputError) as caught:
        check_pass(MaskWeights(sparsity=0.5), one(weight))
    assert "layer 'fc', tensor @fc.weight" in str(caught.value)
    assert "1 of 8 weights are NaN or infinite" in str(caught.value)
    assert caught.value.expected == "finite weights" and "mend the model" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected: a sparsity, a threshold, or an N:M pattern"),
        ({"pattern": "1x4"}, "expected: a sparsity, a threshold, or an N:M pattern"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsities": {"fc": 1.5}}, "'sparsities'"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"sparsity": 0.5, "threshold": 1.0}, "either of both"),
        ({"pattern": "2:4", "sparsity": 0.75}, "0.5: the pattern 2:4 fixes it"),
        ({"pattern": "2:4", "sparsities": {"fc": 0.75}}, "'sparsities'"),
        ({"pattern": "2:4", "threshold": 1.0}, "the pattern 2:4 fixes the sparsity"),
        ({"pattern": "2:4", "scope": "global"}, "the pattern 2:4 is the same in every layer"),
        ({"pattern": "2/4"}, "no sparse pattern"),
        ({"sparsity": "half"}, "float or none"),
        ({"sparsity": 0.5, "norm": "l3"}, "l1"),
        ({"sparsity": 0.5, "scope": "model"}, "global"),
    ],
    ids=str,
)
def test_rejects_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PassOptionError) as caught:
        MaskWeights(**options)
    assert text in str(caught.value) and "mask-weights" in str(caught.value)


def test_takes_the_sparsity_that_a_pattern_has_anyway() -> None:
    assert mask_of(MaskWeights(pattern="2:4", sparsity=0.5), WEIGHT) == mask_of(
        MaskWeights(pattern="2:4"), WEIGHT
    )


@pytest.mark.parametrize(
    "options", [{"layers": "hiden"}, {"exclude": "hiden"}, {"sparsities": {"hiden": 0.5}}]
)
def test_rejects_patterns_that_match_nothing(net: Program, options: dict[str, Any]) -> None:
    with pytest.raises(SelectionError, match="nearest layers: hidden"):
        check_pass(MaskWeights(sparsity=0.5, **options), net)


@pytest.mark.parametrize("options", [{"kinds": "conv3d"}, {"sparsities": {"kind:conv3d": 0.5}}])
def test_rejects_kinds_that_the_model_lacks(net: Program, options: dict[str, Any]) -> None:
    with pytest.raises(SelectionError, match="no layer of kind 'conv3d'"):
        check_pass(MaskWeights(sparsity=0.5, **options), net)


def test_is_written_as_text_and_read_back() -> None:
    text = 'mask-weights{sparsity=0.5,pattern=16x4,norm=l2,scope=global,exclude=[fc],sparsities={"kind:linear":0.25}}'
    assert str(parse_pass(text)) == text
    assert parse_pass(text) == MaskWeights(
        sparsity=0.5,
        pattern="16x4",
        norm="l2",
        scope="global",
        exclude="fc",
        sparsities={"kind:linear": 0.25},
    )


def test_leaves_the_model_alone(net: Program) -> None:
    weights = {name: tensor.detach().clone() for name, tensor in net.tensors()}
    after = check_pass(MaskWeights(sparsity=0.5), net).after
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.tensors())
    assert torch.equal(after.tensor("conv.weight"), weights["conv.weight"])
    assert {layer.name for layer in layers_of(after)} == {"conv", "hidden", "head"}


def test_refuses_other_levels() -> None:
    refuse_other_levels(MaskWeights(sparsity=0.5))
