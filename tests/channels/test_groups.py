"""What groups say: members, kinds, reasons."""

from __future__ import annotations

import pytest
import torch
from support.passes import zoo_program
from support.programs import conv_net, data, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from sqcompile.channels import Group, find_groups
from sqcompile.tracing import trace


def by_name(name: str) -> dict[str, Group]:
    return {group.name: group for group in find_groups(zoo_program(name))}


def test_a_group_lists_everything_that_shrinks_and_why() -> None:
    stem, up, *_ = find_groups(conv_net())
    assert str(stem) == "\n".join(
        [
            "stem: 8 units of channels",
            "  @stem.weight dimension 0: 1 of 8 a unit, output of stem",
            "  @depthwise.weight dimension 0: 1 of 8 a unit, output of depthwise",
            "  @up.weight dimension 0: 1 of 8 a unit, input of up",
            "  @stem.bias dimension 0: 1 of 8 a unit, follows",
            "  @depthwise.bias dimension 0: 1 of 8 a unit, follows",
        ]
    )
    assert (up.layers, up.consumers, len(up)) == (("up",), ("head",), 6)


def test_what_is_returned_is_blocked_with_its_place() -> None:
    (head,) = find_groups(conv_net()).blocked
    assert str(head).startswith(
        "head: 5 units of neurons, cannot shrink: it is an output of the model (node %linear"
    )
    assert "programs.py" in str(head)


def test_a_residual_stage_is_one_group() -> None:
    stem = by_name("resnet_basic")["stem.0"]
    assert stem.layers == ("stem.0", "layer1.0.conv2", "layer1.1.conv2")
    assert "layer2.0.downsample.0" in stem.consumers


def test_concatenated_channels_are_groups_of_their_own() -> None:
    groups = by_name("densenet")
    assert len(groups["block1.0.conv2"]) == len(groups["block1.1.conv2"]) == 4
    (norm,) = [
        member for member in groups["block1.1.conv2"].members if member.tensor == "transition.0.weight"
    ]
    assert norm.positions.tolist() == [12, 13, 14, 15]


def test_a_flattened_map_gives_each_channel_its_places() -> None:
    last = by_name("vgg")["features.6"]
    (read,) = [member for member in last.members if member.role == "reads"]
    assert (read.tensor, read.size, len(read.positions)) == ("classifier.0.weight", 256, 256)
    assert read.positions[read.unit == 1].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {"embedding": 1, "heads": 4, "head-width": 3, "neurons": 2}),
        ("gpt2", {"heads": 2, "head-width": 4, "neurons": 2}),
        ("convnext", {"neurons": 2}),
        ("gru", {"embedding": 1, "neurons": 1}),
        ("mobilenet_v3", {"channels": 6}),
    ],
)
def test_kinds(name: str, kinds: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for group in find_groups(zoo_program(name)):
        found[group.kind] = found.get(group.kind, 0) + 1
    assert found == kinds


def test_keys_that_queries_share_and_the_queries_of_each() -> None:
    groups = by_name("llama")
    shared, queries = (groups[f"model.layers.0.self_attn.q_proj.heads{end}"] for end in ("", "#2"))
    tensors = [{member.tensor.split(".")[-2] for member in group.members} for group in (shared, queries)]
    assert tensors == [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_proj", "o_proj"}]


def test_rotary_halves_are_tied() -> None:
    width = by_name("llama")["model.layers.0.self_attn.q_proj.head-width"]
    (frequencies,) = [member for member in width.members if member.tensor == "model.rotary_emb.inv_freq"]
    assert len(width) == len(frequencies.positions) == 4  # of 8: each frequency turns two
    (query,) = [m for m in width.members if m.tensor == "model.layers.0.self_attn.q_proj.weight"]
    assert sorted(query.positions[query.unit == 0].tolist()) == [0, 4, 8, 12, 16, 20, 24, 28]


def test_heads_that_share_a_bias_are_one_group() -> None:
    heads = [group for group in by_name("t5_encoder").values() if group.kind == "heads"]
    assert len(heads) == 1
    assert any("relative_attention_bias" in member.tensor for member in heads[0].members)


def test_groups_of_a_shuffle_cannot_go() -> None:
    reasons = [str(group.blocked) for group in find_groups(zoo_program("shufflenet_v2")).blocked]
    assert any("removing a part would leave nothing of @" in reason for reason in reasons)


class Cut(nn.Module):
    """A dimension from which one position is taken by number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        result: Tensor = self.out(x) * F.relu(x[:, 2:3])
        return result


def test_a_range_of_one_position_stays_and_the_others_may_go() -> None:
    groups = find_groups(trace(seeded(Cut), (data(5, 3),)))
    assert [len(group) for group in groups] == [3]
    (fixed,) = [group for group in groups.blocked if group.name.startswith("fc")]
    assert len(fixed) == 1


class Selected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        result: Tensor = self.out(x) + x[:, -2, None]
        return result


def test_a_position_that_is_selected_by_number_stays() -> None:
    groups = find_groups(trace(seeded(Selected), (data(5, 3),)))
    (group,) = groups
    (made,) = [member for member in group.members if member.tensor == "fc.weight"]
    assert made.positions.tolist() == [0, 1, 3]
    assert any("select takes one position of it by number" in str(item.blocked) for item in groups.blocked)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.fc(x).reshape(4, 9).relu().reshape(6, 6))
        return result


def test_views_that_mix_dimensions_block() -> None:
    groups = find_groups(trace(seeded(Opaque), (torch.ones(6, 6),)))
    assert not len(groups)
    assert any(
        "mixes dimensions in a way that is not understood" in str(item.blocked) for item in groups.blocked
    )
