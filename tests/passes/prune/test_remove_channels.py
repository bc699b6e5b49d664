from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels, zoo_program
from support.programs import data, seeded
from support.removal import remove
from support.zoo import ZOO
from torch import Tensor, nn

from sqcompile import Program
from sqcompile.calibration import Calibration
from sqcompile.channels import find_groups
from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.passes import MaskWeights, RemoveChannels
from sqcompile.pipeline import Pass, PassContext
from sqcompile.testing import check_pass
from sqcompile.tracing import trace


class Net(nn.Module):
    """Two convolutions with a norm between them, and a map that is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm(self.conv1(x))))
        result: Tensor = self.fc(x.reshape(x.shape[0], 16))
        return result


def net() -> nn.Module:
    model = seeded(Net)
    with torch.no_grad():
        for index in (1, 3):  # the first and the third channel of each convolution matter least
            model.conv1.weight[index] *= 9  # type: ignore[index,union-attr]
            model.conv2.weight[index] *= 9  # type: ignore[index,union-attr]
            model.norm.weight[index] *= 0.1  # type: ignore[index,union-attr]
    return model


X = data(2, 2, 2, 2)


def test_removes_the_channels_of_least_norm() -> None:
    model = net()
    norm = (
        "@norm.running_mean, @norm.running_var, training=False, momentum=0.1, eps=1e-05, cudnn_enabled=False"
    )
    checked = check_pass(
        RemoveChannels(ratio=0.5),
        model,
        (X,),
        idempotent=False,  # a second run removes half of what is left
        expected=f"""
            program (level aten)
              input  %x: f32[2, 2, 2, 2]
              tensor @conv1.weight: f32[2, 2, 1, 1]
              tensor @conv1.bias: f32[2]
              tensor @norm.weight: f32[2]
              tensor @norm.bias: f32[2]
              tensor @conv2.weight: f32[2, 2, 1, 1]
              tensor @conv2.bias: f32[2]
              tensor @fc.weight: f32[3, 8]
              tensor @fc.bias: f32[3]
              tensor @norm.running_mean: f32[2]
              tensor @norm.running_var: f32[2]
              %conv2d: f32[2, 2, 2, 2] = conv2d(%x, @conv1.weight, @conv1.bias)
              %batch_norm: f32[2, 2, 2, 2] = batch_norm(%conv2d, @norm.weight, @norm.bias, {norm})
              %relu: f32[2, 2, 2, 2] = relu(%batch_norm)
              %conv2d_1: f32[2, 2, 2, 2] = conv2d(%relu, @conv2.weight, @conv2.bias)
              %reshape: f32[2, 8] = reshape(%conv2d_1, shape=[2, 8])
              %linear: f32[2, 3] = linear(%reshape, @fc.weight, @fc.bias)
              return output=%linear
        """,
    )
    assert torch.equal(checked.after.tensor("conv1.weight"), model.conv1.weight[[1, 3]])  # type: ignore[index,union-attr]
    assert torch.equal(
        checked.after.tensor("fc.weight"),
        model.fc.weight[:, [*range(4, 8), *range(12, 16)]],  # type: ignore[index,union-attr]
    )
    assert checked.record.facts["kept"] == {"conv1": [1, 3], "conv2": [1, 3]}
    # 4 places: 2·4 + 4·4 before, 2·2 + 2·2 after; and the linear layer of a batch of 2
    assert checked.record.facts["macs"] == {"before": 2 * (4 * 24 + 48), "after": 2 * (4 * 8 + 24)}


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.conv(x), normed


def test_channels_that_are_returned_stay() -> None:
    check_pass(
        RemoveChannels(ratio=0.5),
        seeded(lambda: nn.Conv2d(2, 4, 1)),
        (X,),
        unchanged=True,
        remarks=["keeps its 4 channels: it is an output of the model", "has no channels that could go"],
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 1), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return result


def test_channels_under_a_layer_norm_stay() -> None:
    check_pass(
        RemoveChannels(ratio=0.5),
        seeded(Normed),
        (X,),
        unchanged=True,
        remarks=["layer_norm takes its statistics over it", "(node %layer_norm (norm"],
    )


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(2, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cdist(self.conv(x), self.conv(x)).sum(-1)
        result: Tensor = self.fc(x)
        return result


def test_an_operator_without_a_rule_blocks_what_enters_it() -> None:
    check_pass(
        RemoveChannels(ratio=0.5),
        seeded(Strange),
        (data(2, 2, 3),),
        unchanged=True,
        remarks=["nothing is known about the dimensions of"],
    )


class Shared(nn.Module):
    """One weight for two convolutions, whose channels therefore go together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.stem = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.conv(torch.relu(self.conv(self.stem(x)))))
        return result


def test_a_shared_weight_shrinks_once() -> None:
    checked = check_pass(RemoveChannels(ratio=0.5), seeded(Shared), (X,), idempotent=False)
    assert checked.after.tensor("conv.weight").shape == (2, 2, 1, 1)
    assert list(checked.record.facts["kept"]) == ["stem"]


def test_a_dynamic_batch_stays_dynamic() -> None:
    program = zoo_program("shufflenet_v2").snapshot()
    check_pass(RemoveChannels(ratio=0.5), program, ZOO["shufflenet_v2"].inputs(batch=5), idempotent=False)
    shrunk, _ = remove(RemoveChannels(ratio=0.5), program)
    assert "view: f32[batch, 2, 4, 8, 8]" in shrunk.text()
    args, kwargs = ZOO["shufflenet_v2"].inputs(batch=3)
    assert shrunk(*args, **kwargs).shape == (3, 10)


def test_masks_shrink_with_their_weights() -> None:
    checked = check_pass(
        RemoveChannels(ratio=0.5),
        net(),
        (X,),
        prepare=[MaskWeights(sparsity=0.5, layers=("conv2",))],
        idempotent=False,
    )
    assert checked.after.tensor("conv2.weight_mask").shape == (2, 2, 1, 1)
    promise = checked.after.sparsity["conv2.weight"]
    assert torch.equal(promise.mask, checked.after.tensor("conv2.weight_mask"))


def kept(
    item: Pass, program: Program | None = None, context: PassContext | None = None
) -> dict[str, list[int]]:
    _, result = remove(item, program or trace(net(), (X,)), context)
    found: dict[str, list[int]] = result.facts.get("kept", {})
    return found


def test_a_ratio_is_rounded_down() -> None:
    assert {name: len(left) for name, left in kept(RemoveChannels(ratio=0.49)).items()} == {
        "conv1": 3,
        "conv2": 3,
    }
    assert kept(RemoveChannels(ratio=0.2)) == {}
    _, result = remove(RemoveChannels(ratio=0), trace(net(), (X,)))
    assert result.changes == 0


def test_never_empties_a_layer() -> None:
    assert {name: len(left) for name, left in kept(RemoveChannels(ratio=0.999)).items()} == {
        "conv1": 1,
        "conv2": 1,
    }


@pytest.mark.parametrize("importance", ["l1", "l2", "batch-norm", "geometric-median"])
def test_importance_by_weights(importance: str) -> None:
    found = kept(RemoveChannels(ratio=0.5, importance=importance, layers=("conv1",)))  # type: ignore[arg-type]
    # The scales of the norm say the opposite of the weights.
    assert found["conv1"] == ([0, 2] if importance == "batch-norm" else [1, 3])


def test_importance_without_what_it_is_measured_on_is_by_l2() -> None:
    context = PassContext()
    found = kept(RemoveChannels(ratio=0.5, importance="batch-norm", layers=("conv2",)), context=context)
    assert found["conv2"] == [1, 3]
    assert "has nothing that 'batch-norm' is measured on; ranked by l2" in str(context.remarks[0])


@pytest.mark.parametrize("importance", ["activation", "taylor", "hessian"])
def test_importance_by_data_sees_channels_that_are_never_active(importance: str) -> None:
    model = net()
    with torch.no_grad():
        model.norm.bias[1] = -99.0  # type: ignore[index,union-attr]
    batches = [(data(2, 2, 2, 2, seed=seed),) for seed in range(4)]
    checked = check_pass(
        RemoveChannels(ratio=0.25, importance=importance, layers=("conv1",)),  # type: ignore[arg-type]
        model,
        (X,),
        calibration=batches,
        idempotent=False,
    )
    assert checked.record.facts["kept"] == {"conv1": [0, 2, 3]}


def test_hessian_importance_counts_what_others_take_over() -> None:
    """Of two channels that are alike one can go, however large they are; of small ones none can."""
    model = net()
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, model.norm.weight, model.norm.bias):  # type: ignore[union-attr]
            tensor[3] = tensor[1]  # type: ignore[index]
        for tensor in (model.norm.running_mean, model.norm.running_var):  # type: ignore[union-attr]
            tensor[3] = tensor[1]  # type: ignore[index]
    program = trace(model, (X,))
    batches = [(data(2, 2, 2, 2, seed=seed),) for seed in range(4)]
    found = {}
    for importance in ("l2", "hessian"):
        context = PassContext(Calibration(batches, program.signature))
        item = RemoveChannels(ratio=0.25, importance=importance, layers=("conv1",))  # type: ignore[arg-type]
        found[importance] = kept(item, program, context)["conv1"]
    assert {1, 3} <= set(found["l2"])
    assert len({1, 3} & set(found["hessian"])) == 1


def test_random_importance_is_that_of_the_seed() -> None:
    program = zoo_program("vgg")
    item = RemoveChannels(ratio=0.5, importance="random")
    assert kept(item, program) == kept(item, program)
    assert kept(item, program) != kept(item, program, PassContext(seed=1))


def test_importance_by_data_needs_data() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        remove(RemoveChannels(ratio=0.5, importance="activation"), trace(net(), (X,)))


def test_a_global_ranking_takes_more_where_channels_matter_less() -> None:
    program = zoo_program("vgg")
    alike = kept(RemoveChannels(ratio=0.5), program)
    ranked = kept(RemoveChannels(ratio=0.5, scope="global"), program)
    assert sum(map(len, alike.values())) == sum(map(len, ranked.values()))
    assert {name: len(left) for name, left in alike.items()} != {
        name: len(left) for name, left in ranked.items()
    }
    everything = kept(RemoveChannels(ratio=0.99, scope="global"), program)
    assert min(map(len, everything.values())) >= 1


class Stages(nn.Module):
    """Two pairs of convolutions of one shape, of which the first runs at 16 times as many places."""

    def __init__(self) -> None:
        super().__init__()
        self.large1, self.large2 = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)
        self.small1, self.small2 = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.large2(torch.relu(self.large1(x)))
        x = nn.functional.avg_pool2d(x, 4)
        result: Tensor = x + self.small2(torch.relu(self.small1(x)))
        return result


def widths(item: Pass, model: nn.Module) -> dict[str, int]:
    program = trace(model, (data(2, 2, 8, 8),))
    context = PassContext(
        Calibration([(data(2, 2, 8, 8, seed=seed),) for seed in range(3)], program.signature)
    )
    found = {"large1": 8, "small1": 8}
    return found | {name: len(left) for name, left in kept(item, program, context).items()}


@pytest.mark.parametrize(("importance", "compensate"), [("l2", False), ("l2", True), ("hessian", False)])
def test_a_ranking_by_cost_takes_what_saves_more(importance: str, compensate: bool) -> None:
    item = RemoveChannels(macs=0.5, scope="cost", importance=importance, compensate=compensate)  # type: ignore[arg-type]
    found = widths(item, seeded(Stages))
    assert found == {"large1": 3, "small1": 8}  # of 17 parts the small pair has one


def test_a_ranking_by_cost_spares_what_the_outputs_need() -> None:
    """Scores relative to a group's mean do not know that the outputs hardly see one of two groups."""
    model = seeded(Stages)
    with torch.no_grad():
        model.large2.weight *= 1000  # type: ignore[operator]
        model.small2.weight *= 0.001  # type: ignore[operator]
    for scope, alike in (("global", True), ("cost", False)):
        found = widths(RemoveChannels(parameters=0.6, scope=scope), model)  # type: ignore[arg-type]
        assert (found["large1"] < 8) == alike
        assert found["small1"] < 8


def test_a_ranking_by_cost_keeps_groups_of_one_and_needs_data() -> None:
    program = trace(net(), (X,))
    context = PassContext(Calibration([(X,)], program.signature))
    assert min(map(len, kept(RemoveChannels(ratio=0.99, scope="cost"), program, context).values())) == 1
    with pytest.raises(CalibrationError, match="needs calibration data"):
        remove(RemoveChannels(ratio=0.5, scope="cost"), program)


def test_round_to_leaves_multiples() -> None:
    found = kept(RemoveChannels(ratio=0.3, round_to=4), zoo_program("vgg"))
    # 8 channels would become 6, and stay; 16 would become 12
    assert {name: len(left) for name, left in found.items()} == {"features.3": 12, "features.6": 12}


@pytest.mark.parametrize("name", ["macs", "parameters"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_is_met_and_not_by_much(name: str, scope: str) -> None:
    program = zoo_program("resnet_bottleneck")
    shrunk, result = remove(RemoveChannels(**{name: 0.5}, scope=scope), program)  # type: ignore[arg-type]
    macs = result.facts["macs"]
    fraction = macs["after"] / macs["before"]
    if name == "parameters":
        counts = [sum(p.numel() for p in item.graph_module.parameters()) for item in (shrunk, program)]
        fraction = counts[0] / counts[1]
    assert 0.3 < fraction <= 0.5  # groups of 4 channels lose them a quarter at a time


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(PassOptionError, match=r"0\.\d+ or more"):
        remove(RemoveChannels(macs=0.001), zoo_program("resnet_basic"))


def test_layers_and_exclude_choose() -> None:
    assert list(kept(RemoveChannels(ratio=0.5, layers=("conv1",)))) == ["conv1"]
    assert list(kept(RemoveChannels(ratio=0.5, exclude=("conv1",)))) == ["conv2"]
    with pytest.raises(SelectionError, match="conv3"):
        kept(RemoveChannels(ratio=0.5, layers=("conv3",)))
    # A residual stage goes by all layers that make it.
    program = zoo_program("resnet_basic")
    assert "stem.0" not in kept(RemoveChannels(ratio=0.5, exclude=("layer1.0.conv2",)), program)


def test_kinds_choose_what_goes() -> None:
    program = zoo_program("llama")
    found = kept(RemoveChannels(ratio=0.5, kinds=("heads", "neurons")), program)
    kinds = {group.kind for group in find_groups(program) if group.name in found}
    assert kinds == {"heads", "neurons"}


def test_compensation_takes_over_what_went() -> None:
    """Channels that repeat others can go without harm, if the others take over."""
    model = net()
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.conv1.bias, model.norm.weight, model.norm.bias):  # type: ignore[union-attr]
            tensor[2] = tensor[0]  # type: ignore[index]
        model.norm.running_mean[2] = model.norm.running_mean[0]  # type: ignore[index,union-attr]
    batches = [(data(2, 2, 2, 2, seed=seed),) for seed in range(8)]
    errors = []
    for compensate in (False, True):
        checked = check_pass(
            RemoveChannels(ratio=0.25, layers=("conv1",), compensate=compensate, importance="l1"),
            model,
            (X,),
            calibration=batches,
            idempotent=False,
        )
        assert checked.record.distance is not None
        errors.append(checked.record.distance.max_error)
    assert errors[1] < 0.05 * errors[0]  # the ridge keeps it from being zero


def test_neighbours_stand_in_for_a_channel_that_went() -> None:
    """The channel that goes is the other one, seen one place further: other places of the kernel take over."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(2, 1, 3, bias=False)
    ).requires_grad_(False)
    first, second = model[0].weight, model[1].weight
    first.zero_()
    first[0, 0, 1, 1], first[1, 0, 1, 2] = 1.0, 0.5  # type: ignore[index]
    second[:, 1, :, 2] = 0.0  # type: ignore[index]
    batches = [(data(4, 1, 8, 8, seed=seed),) for seed in range(8)]
    errors = []
    for compensate in (False, True):
        checked = check_pass(
            RemoveChannels(ratio=0.5, compensate=compensate, importance="l1"),
            model,
            (batches[0][0],),
            calibration=batches,
            idempotent=False,
        )
        assert checked.record.distance is not None
        errors.append(checked.record.distance.max_error)
    assert errors[1] < 0.02 * errors[0]  # the ridge keeps it from being zero


def test_layers_behind_take_back_what_the_first_ones_could_not() -> None:
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        )
    )
    batches = [(data(8, 3, 12, 12, seed=seed),) for seed in range(12)]
    program = trace(model, batches[0])

    def error(**options: bool) -> tuple[float, set[str]]:
        item = RemoveChannels(ratio=0.5, layers=("0",), compensate=True, **options)  # type: ignore[arg-type]
        small, _ = remove(item, program, PassContext(Calibration(batches[:8], program.signature)))
        same = {
            name
            for name, value in small.tensors()
            if name.endswith("weight") and value is program.tensor(name)
        }
        with torch.no_grad():
            return sum(float((small(*x) - program(*x)).square().sum()) for x in batches[8:]), same

    first, all_of_them = error(), error(compensate_behind=True)
    assert first[1] == {"4.weight", "6.weight"} and not all_of_them[1]
    assert all_of_them[0] < 0.95 * first[0]


def test_compensation_sees_as_many_batches_as_fit_into_memory() -> None:
    program = trace(net(), (X,))
    batches = [(data(2, 2, 2, 2, seed=seed),) for seed in range(8)]
    item = RemoveChannels(ratio=0.5, compensate=True, max_bytes=20_000)
    for memory in (None, 1000):
        context = PassContext(Calibration(batches, program.signature), max_memory=memory)
        remove(item, program, context)
        # A batch of one value of either convolution has 128 bytes.
        left_out = [remark for remark in context.remarks if "more exceed max-bytes" in str(remark)]
        assert bool(left_out) == (memory is not None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "ratio"),
        ({"ratio": 0.5, "macs": 0.5}, "macs"),
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"macs": 0.0}, "macs"),
        ({"parameters": 1.5}, "parameters"),
        ({"ratio": 0.5, "round_to": 0}, "round_to"),
        ({"ratio": 0.5, "compensate_behind": True}, "compensate_behind"),
        ({"ratio": 0.5, "kinds": ("bones",)}, "kinds"),
        ({"ratio": 0.5, "kinds": ()}, "kinds"),
    ],
)
def test_refuses_options_out_of_range(options: dict[str, object], named: str) -> None:
    with pytest.raises(PassOptionError, match=f"Option '{named}'"):
        RemoveChannels(**options)  # type: ignore[arg-type]


def test_refuses_quantized_programs() -> None:
    refuse_other_levels(RemoveChannels(ratio=0.5))
