"""Each dimension rule by itself: a layer before, a function, a layer behind; half of the units go, exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.programs import data, seeded
from support.removal import TOLERANCE, distance, outputs, remove, zero_removed
from torch import Tensor, nn
from torch.nn import functional as F

from sqcompile.channels import find_groups
from sqcompile.passes import RemoveChannels
from sqcompile.tracing import trace

Inner = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """x [2, 5, 6] through a layer of 12, a function, and a layer of what the function leaves."""

    def __init__(self, function: Inner, inputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(inputs, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.function(self.first(x)))
        return result


# Functions of [2, 5, 12], the last size of their values, and how many of 12 units are left when half of each
# group goes, rounded down: pieces of a cut dimension are groups of their own.
FUNCTIONS: dict[str, tuple[Inner, int, int]] = {
    "same": (F.gelu, 12, 6),
    "to_and_fro": (lambda x: x.double().float().contiguous().clone(), 12, 6),
    "half": (lambda x: x[..., :6], 6, 6),
    "negative_range": (lambda x: x[..., -5:-1], 4, 6),
    "every_second": (lambda x: x[..., ::2], 6, 6),
    "every_third_of_a_range": (lambda x: x[..., 1:11:3], 4, 6),
    "halves_added": (lambda x: x[..., :6] + x[..., 6:], 6, 6),
    "rotated": (lambda x: torch.cat([-x[..., 6:], x[..., :6]], -1) * x, 12, 6),
    "chunks": (lambda x: torch.cat([part.sin() for part in x.chunk(3, -1)][::-1], -1), 12, 6),
    "uneven_split": (lambda x: torch.cat([p.relu() for p in x.split([2, 7, 3], -1)], -1), 12, 7),
    "split_by_size": (lambda x: torch.cat([p.relu() for p in x.split(5, -1)], -1), 12, 7),
    "gated": (lambda x: F.glu(x, -1), 6, 6),
    "padded": (lambda x: F.pad(x, (2, 3)), 17, 6),
    "cropped": (lambda x: F.pad(x, (-2, -3)), 7, 7),
    "cropped_and_padded": (lambda x: F.pad(x, (-2, 1)), 11, 6),
    "flipped": (lambda x: x.flip(-1), 12, 6),
    "repeated": (lambda x: x.repeat(1, 1, 2), 24, 6),
    "interleaved": (lambda x: x.repeat_interleave(2, dim=-1), 24, 6),
    "flattened": (lambda x: x.flatten(1).unflatten(1, (5, 12)), 12, 6),
    "split_view": (lambda x: x.view(2, 5, 3, 4).transpose(2, 3).reshape(2, 5, 12), 12, 6),
    "split_in_three": (lambda x: x.view(2, 5, 3, 2, 2).permute(0, 1, 4, 2, 3).flatten(2), 12, 6),
    "unbound": (lambda x: torch.cat(x.view(2, 5, 2, 6).unbind(2), -1), 12, 6),
    "squeezed": (lambda x: x.unsqueeze(0).squeeze(), 12, 6),
    "moved": (lambda x: x.movedim(-1, 0).movedim(0, 2), 12, 6),
    "stacked": (lambda x: torch.stack([x, x * 2], -1).flatten(-2), 24, 6),
    "expanded": (lambda x: x[..., None].expand(2, 5, 12, 2).flatten(2), 24, 6),
    "summed": (lambda x: x * x.sum(-1, keepdim=True), 12, 6),
    "mean": (lambda x: x / (x.square().mean(-1, keepdim=True) + 1).sqrt(), 12, 6),
    "normalized": (lambda x: F.normalize(x, dim=-1), 12, 6),
    "mean_of_two": (lambda x: x * x.mean((1, 2), keepdim=True), 12, 6),
    "outer": (lambda x: torch.einsum("bts,bsj->btj", torch.einsum("bti,bsi->bts", x, x), x), 12, 6),
    "product": (lambda x: x @ (x.transpose(1, 2) @ x), 12, 6),
    "softmax_over_steps": (lambda x: x.softmax(1) * x.amax(1, keepdim=True), 12, 6),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x) * (x < 1), 12, 6),
    "constant": (lambda x: x * torch.ones(12) + torch.zeros_like(x), 12, 6),
    "group_norm": (lambda x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), 12, 6),
    "pooled": (lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2), 12, 6),
    "resized": (lambda x: F.interpolate(x.transpose(1, 2), scale_factor=2.0).transpose(1, 2), 12, 6),
    "shuffled": (lambda x: F.channel_shuffle(x.reshape(10, 12, 1), 3).view(2, 5, 12), 12, 6),
    "unshuffled": (
        lambda x: F.pixel_unshuffle(x.transpose(1, 2)[..., :4].reshape(2, 12, 2, 2), 2)[..., 0, 0],
        48,
        6,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_rule_is_exact(name: str) -> None:
    function, size, left = FUNCTIONS[name]
    model = seeded(lambda: Between(function, size))
    x = data(2, 5, 6)
    program = trace(model, (x,))
    groups = find_groups(program)
    dense = outputs(model, ((x,), {}))
    shrunk, result = remove(
        RemoveChannels(ratio=0.5, kinds=("neurons", "heads", "head-width", "embedding")), program
    )
    assert shrunk.tensor("first.weight").shape[0] == left
    masked = outputs(zero_removed(model, groups, result.facts["kept"]), ((x,), {}))
    assert distance(masked, outputs(shrunk, ((x,), {}))) < TOLERANCE
    assert distance(dense, masked) > 100 * TOLERANCE


BLOCKED: dict[str, tuple[Inner, int, str]] = {
    "softmax": (lambda x: x.softmax(-1), 12, "softmax over it depends on every part"),
    "greatest": (lambda x: x * x.amax(-1, keepdim=True), 12, "amax over it depends on every part"),
    "cumulative": (lambda x: x.cumsum(-1), 12, "cumsum over it depends on every part"),
    "rolled": (lambda x: x.roll(1, -1), 12, "roll moves its positions by a number"),
    "looked_up": (lambda x: x[..., torch.tensor([3, 1, 2])], 3, "looked up by number"),
    "sorted": (lambda x: x.sort(-1).values, 12, "sort over it depends on every part"),
    "layer_norm": (lambda x: F.layer_norm(x, (12,)), 12, "layer_norm takes its statistics over it"),
    "reflected": (lambda x: F.pad(x, (1, 1), mode="reflect"), 14, ""),
    "convolved": (lambda x: F.conv1d(x, torch.ones(5, 5, 3)), 10, "it is a place in an image or a sequence"),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_depends_on_every_part_is_blocked(name: str) -> None:
    function, size, reason = BLOCKED[name]
    groups = find_groups(trace(seeded(lambda: Between(function, size)), (data(2, 5, 6),)))
    assert "first" not in {layer for group in groups for layer in group.layers}
    (blocked,) = {str(group.blocked) for group in groups.blocked if "first" in group.layers}
    assert reason in blocked
