"""Operators one by one, as PyTorch computes them.

Floats may differ by 1e-6 of a result's largest value: sums in another order, and functions (exp, sin, erf)
whose last bit is each library's own. Everything else is equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.session import NativeSession
from sqcompile.program import Program
from sqcompile.tracing import trace

Compare = Callable[..., Any]
Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, low: int = -9, high: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 5, 16)
FLOATS: dict[str, Callable[..., Any]] = {
    "activations": lambda _, x: [
        torch.relu(x),
        functional.relu6(x * 5),
        functional.hardtanh(x, -0.5, 0.5),
        x.clamp(-0.5, 0.7),
        x.clamp(min=0.1),
        x.clamp(max=0.1),
        functional.gelu(x),
        functional.gelu(x, approximate="tanh"),
        functional.silu(x),
        functional.hardswish(x * 3),
        functional.hardsigmoid(x * 3),
        functional.leaky_relu(x, 0.1),
        torch.sigmoid(x),
        torch.tanh(x),
    ],
    "functions": lambda _, x: [
        x.abs(),
        -x,
        x.exp(),
        (x.abs() + 0.1).log(),
        x.abs().sqrt(),
        (x.abs() + 0.1).rsqrt(),
        x.sin(),
        x.cos(),
        x.erf(),
        (x * 3).floor(),
        (x * 3).ceil(),
        (x * 2).round(),
        1 / x,
        x.square(),
        x**2,
        x**3,
        x.abs() ** 0.5,
        (x.abs() + 0.1) ** -0.5,
        x.abs() ** 1.7,
        2.0**x,
    ],
    "arithmetic": lambda _, x: [
        x + x.transpose(0, 1).reshape(2, 5, 16),
        x - x[:, :1],
        x * x[0, 0],
        x / 3,
        3 / (x + 9),
        2 - x,
        torch.add(x, x, alpha=0.5),
        torch.sub(x, 1, alpha=2),
        torch.minimum(x, x[:, :, :1]),
        torch.maximum(x, x[0]),
    ],
    "views": lambda _, x: [
        x.reshape(10, 16),
        x.transpose(1, 2).reshape(2, 80),
        x.permute(2, 0, 1)[3:11:2],
        x[:, -2:],
        x[:, 1],
        x[..., -1],
        x.unsqueeze(1).expand(2, 3, 5, 16),
        x[:1].squeeze(0),
        x.flatten(1),
        x.unflatten(2, (4, 4)).transpose(1, 2).contiguous(),
        torch.cat([x, x[:, :2]], 1),
        torch.stack([x, -x], 1),
        x.mT,
        *x.chunk(3, 2),
        *x.split([1, 3, 1], 1),
        *x.unbind(1),
        x.transpose(0, 2)[1:5].transpose(0, 1).reshape(-1),
    ],
    "reductions": lambda _, x: [
        x.sum(),
        x.sum((0, 2)),
        x.mean(1, keepdim=True),
        x.mean((-1, 0)),
        x.amax(1),
        x.amin((0, 1), keepdim=True),
        x.argmax(-1),
        x.argmin(1, keepdim=True),
        x.argmax(),
        x.cumsum(1),
        x.diff(dim=1),
        x.softmax(-1),
        x.softmax(1),
        (x > 0).any(1),
        (x > 0).all(-1, keepdim=True),
        (x > 9).any(),
        *x.topk(3, -1),
        *x.topk(2, 1, largest=False),
    ],
    "comparisons": lambda _, x: [
        x > 0,
        x >= x[:, :1],
        x < 0.5,
        x <= x[0],
        x == x,
        x != 0,
        torch.where(x > 0, x, -1.0),
        torch.where(x > 0, 2.0, x),
        x.masked_fill(x > 0.3, float("-inf")),
        (x > 0) & (x < 1),
        (x > 1) | (x < -1),
        (x > 0) ^ (x > 1),
        ~(x > 0),
        torch.logical_and(x > 0, x < 1),
    ],
    "casts": lambda _, x: [
        (x * 9).to(torch.int64),
        (x * 9).to(torch.int32),
        (x > 0).to(torch.float32),
        (x > 0).to(torch.int64) * 3,
        (x * 9).to(torch.int64).to(torch.float32) / 2,
        x.to(torch.bool),
        (x * 0 + float("inf")).to(torch.int64) < 0,
    ],
    "made": lambda _, x: [
        torch.zeros(3) + x[0, 0, :3],
        x.new_ones(2, 1) * x[:, 0, :4],
        torch.full_like(x, 0.5) + x,
        torch.arange(5) * 2 + x[0, :, 0].to(torch.int64),
        x + torch.arange(16, dtype=torch.float32),
        torch.zeros_like(x) - x,
    ],
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str, compare: Compare) -> None:
    compare(FLOATS[name], [X])


def test_values_that_are_no_numbers(compare: Compare) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])

    def function(_: Any, x: Tensor) -> list[Tensor]:
        return [
            torch.relu(x),
            x.clamp(-1, 1),
            torch.minimum(x, x * 0),
            torch.maximum(x, x.new_zeros(6)),
            x.amax(0),
            x.argmax(0),
            x.softmax(0),
            x == x,
            x < 1,
            torch.where(x == x, x, 0.0),
        ]

    compare(function, [x])


def test_integers(compare: Compare) -> None:
    def function(_: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            x + y,
            x - 2 * y,
            x * y,
            -x,
            x.abs(),
            torch.minimum(x, y),
            x.clamp(-3, 4),
            x.sum(0),
            x.amax(1),
            x.cumsum(-1),
            (x > 0).cumsum(1),
            x.diff(prepend=x[:, :1] - 1),
            x == y,
            x >= 3,
            x & y,
            x | y,
            x / 4,
            x + 0.5,
            x.to(torch.float32).mean(),
            x.argmax(1),
        ]

    large = torch.tensor([[2**62, -(2**63), 5, -1, 0, 7]] * 4)
    compare(function, [integers(4, 6), integers(4, 6, seed=1)], [large, large.flip(1)])


def test_indices(compare: Compare) -> None:
    table = nn.Embedding(10, 6)

    def function(self: Any, ids: Tensor, x: Tensor) -> list[Tensor]:
        row = torch.arange(3)[:, None]
        return [
            self.table(ids),
            x[row, ids],
            x[:, ids[0]],
            x.transpose(0, 1)[ids[:, 0]],
            x.index_select(1, ids[0]),
            x.gather(1, ids),
            x.gather(1, ids[:2]),
            x.gather(0, ids[:2] - 4),
            x[:, -1][ids - 7],
        ]

    compare(function, [integers(3, 4, low=4, high=7), randn(3, 8)], table=table)


def test_an_index_out_of_range_is_an_error_of_the_call(compare: Compare) -> None:
    from sqcompile.errors import InputError

    session = compare(lambda self, ids: self.table(ids), [torch.tensor([1, 2])], table=nn.Embedding(10, 4))
    for wrong in (10, -11, 2**62, -(2**63)):
        with pytest.raises(InputError, match="out of range for a dimension of 10"):
            session.run([torch.tensor([1, wrong])])
    assert session.run([torch.tensor([0, 9])])[0].shape == (2, 4)


def test_products(compare: Compare) -> None:
    def function(self: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        return [
            x @ y,
            x.transpose(1, 2) @ y.transpose(1, 2),
            x @ y[:1],
            torch.bmm(x, y),
            x[0] @ y[1],
            self.plain(x),
            self.biased(x[0]),
            torch.relu(self.biased(x)),
            x @ self.plain.weight.t(),
            torch.addmm(self.biased.bias, x[1], self.biased.weight.t()),
            torch.addmm(x[0, :, :1], x[1], self.biased.weight.t()),
            functional.linear(x, y[0].t()),
            functional.linear(x, y[0].t(), y[1, 0]),
            functional.linear(x, self.biased.weight, x[0, 0, :1].expand(19)),
        ]

    # 19 outputs: one whole panel of 16 and a part of one
    layers = {"plain": nn.Linear(7, 19, bias=False), "biased": nn.Linear(7, 19)}
    compare(function, [randn(2, 7, 7), randn(2, 7, 7, seed=1)], **layers)


def test_norms(compare: Compare) -> None:
    def function(self: Any, x: Tensor) -> list[Tensor]:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return [
            self.norm(x),
            functional.layer_norm(x, (16,)),
            functional.layer_norm(x, (5, 16), eps=1e-3),
            functional.rms_norm(x, (16,), self.norm.weight, 1e-6),
            self.norm.weight * (x * root),
            (x * root) * (1 + self.norm.bias),
            root,  # used twice: no norm by itself
        ]

    norm = nn.LayerNorm(16)
    with torch.no_grad():
        norm.weight.copy_(randn(16, seed=2))
        norm.bias.copy_(randn(16, seed=3))
    compare(function, [X], norm=norm)


def test_a_norm_that_is_spelled_out_becomes_one_step(compare: Compare) -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm.weight * wide.to(x.dtype)

    session = compare(function, [X], norm=nn.LayerNorm(16))
    assert [name for name, _ in session.model.steps if name != "contiguous"] == ["rms_norm"]


def test_attention(compare: Compare) -> None:
    attend = functional.scaled_dot_product_attention

    def function(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor]:
        narrow = k[:, :2], v[:, :2]
        repeated = [item[:, :, None].expand(2, 2, 2, 9, 8).reshape(2, 4, 9, 8) for item in narrow]
        flat = [
            item.transpose(1, 2).transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2)
            for item in (q, k)
        ]
        return [
            attend(q, k, v),
            attend(q, k, v, scale=0.7),
            attend(q, k, v, is_causal=True),
            attend(q, k, v, mask),
            attend(q, k, v, mask[:, :1, :1] | mask[:, :1]),
            attend(q, k, v, torch.where(mask, 0.5, -2.0)),
            attend(q, k, v, mask[0, 0].to(torch.float32)),
            attend(q, *narrow, enable_gqa=True),
            attend(q, *repeated, mask),
            attend(q[:, 0], k[:, 0], v[:, 0]),
            attend(q[:, 0], k[:, 0], v[:, 0], mask[:, 0]),
            attend(*flat, v),
        ]

    mask = randn(2, 4, 5, 9, seed=4) > 0
    mask[0, 1, 2] = False  # a row that attends to nothing
    shapes = [(2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8)]
    compare(function, [*(randn(*shape, seed=seed) for seed, shape in enumerate(shapes)), mask], rtol=2e-6)


@pytest.mark.parametrize("kind", ["added", "boolean"])
def test_a_stored_mask_that_hides_nothing_is_left_out(compare: Compare, kind: str) -> None:
    """Models store one that was made of ones, where they were traced without a mask."""

    def operands(hidden: bool) -> int:
        seen = torch.ones(5, 9, dtype=torch.bool)
        seen[1, 2] = not hidden
        mask = torch.where(seen, 0.0, -1e9) if kind == "added" else seen

        def function(_: Any, q: Tensor, k: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, k, mask)

        session = compare(function, [randn(2, 4, 5, 8), randn(2, 4, 9, 8, seed=1)], rtol=2e-6)
        return [name for name, _ in session.model.steps].count("dense_rows")

    assert operands(hidden=False) == 3 and operands(hidden=True) == 4


def test_attention_is_the_same_with_any_number_of_threads(lower: Lower, load: Load) -> None:
    """With many heads for each thread, each takes whole heads; with few, they share what is arranged once."""

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> list[Tensor]:
            attend = functional.scaled_dot_product_attention
            return [
                attend(q, k, v, is_causal=True),
                attend(q, k, v, mask),
                attend(q, k, v, bias),
                attend(q, k[:, :2], v[:, :2], mask, enable_gqa=True),
            ]

    q, k, v = (randn(2, 4, length, 24, seed=length) for length in (30, 150, 150))
    mask, bias = randn(2, 4, 30, 150, seed=3) > 0, randn(4, 30, 150, seed=5)
    artifact = lower(trace(Attend(), (q, k, v, mask, bias)))
    first, *others = [load(artifact, threads=threads).run([q, k, v, mask, bias]) for threads in (1, 2, 8)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_repeated_heads_are_read_once(compare: Compare) -> None:
    """What grouped attention spells out as copies is left out."""

    def function(_: Any, q: Tensor, k: Tensor) -> Tensor:
        keys = k[:, :, None].expand(2, 2, 2, 9, 8).reshape(2, 4, 9, 8)
        return functional.scaled_dot_product_attention(q, keys, keys)

    session = compare(function, [randn(2, 4, 5, 8), randn(2, 2, 9, 8, seed=1)], rtol=2e-6)
    assert not {"expand", "reshape"} & {name for name, _ in session.model.steps}


def test_convolutions_without_groups(compare: Compare) -> None:
    layers = {
        "patches": nn.Conv2d(3, 20, 4, stride=4),
        "padded": nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        "line": nn.Conv1d(12, 6, 3, stride=2, padding=1),
    }

    def function(self: Any, x: Tensor) -> list[Tensor]:
        return [self.patches(x), self.padded(x), self.line(x[:, :, :4].reshape(2, 12, 12))]

    compare(function, [randn(2, 3, 12, 12)], **layers)


def test_sizes_that_a_call_decides(compare: Compare) -> None:
    def function(_: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        batch, length = x.shape[0], x.shape[1]
        return [
            x.reshape(batch * length, 4),
            torch.arange(length) + torch.arange(batch)[:, None],
            torch.cat([x, y], 1).sum(1),
            x.new_full((batch, 2 * length), 3.0),
            x[:, 1:],
            x[:, :-1].mean(1) * length,
            torch.ones(length, length).to(torch.bool).expand(batch, length, length),
            x[:, -1],
            x.transpose(0, 1).reshape(length, batch * 4),
        ]

    batch, length, more = (Dim(name, min=3, max=50) for name in ("batch", "length", "more"))
    calls = [
        [randn(b, n, 4), randn(b, m, 4, seed=1)] for b, n, m in [(4, 6, 3), (3, 7, 3), (5, 3, 9), (4, 6, 3)]
    ]
    dynamic = {"inputs": ({0: batch, 1: length}, {0: batch, 1: more})}
    compare(function, *calls, dynamic=dynamic)


def test_batches_of_nothing(compare: Compare) -> None:
    def function(self: Any, x: Tensor) -> list[Tensor]:
        return [self.layer(x), x.softmax(-1), x.sum(), x.sum(1), torch.cat([x, x], 1), (x > 0).any()]

    calls = [[randn(3, 5)], [randn(0, 5)], [randn(1, 5)]]
    compare(function, *calls, dynamic={"inputs": ({0: Dim("batch", min=0, max=9)},)}, layer=nn.Linear(5, 3))
