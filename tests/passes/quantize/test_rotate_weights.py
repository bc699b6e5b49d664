"""Rotating what passes between layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels, zoo_program
from support.programs import data, seeded
from support.quantize import run
from support.zoo import ZOO
from torch import Tensor, nn

from sqcompile.compare import compare_layers
from sqcompile.errors import PassOptionError
from sqcompile.evaluate import run_watched
from sqcompile.layers import layers_of
from sqcompile.passes import (
    DistillBlocks,
    MaskWeights,
    QuantizeWeights,
    RotateWeights,
    SmoothQuant,
    pipelines,
)
from sqcompile.program import Program
from sqcompile.rotation import has_hadamard
from sqcompile.testing import CheckedPass, check_pass
from sqcompile.tracing import trace


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Attention(nn.Module):
    """Attention with fewer heads of keys and values than of queries."""

    def __init__(self, width: int, heads: int, shared: int, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain  # written out, or one operator
        self.size, self.shared = width // heads, shared
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.k = nn.Linear(width, width // shared, bias=False)
        self.v = nn.Linear(width, width // shared)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = (
            layer(x).view(rows, tokens, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        if self.plain:
            found = torch.softmax(q @ k.transpose(2, 3) / self.size**0.5, -1) @ v
        else:
            found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o(found.transpose(1, 2).reshape(rows, tokens, width))
        return result


class Decoder(nn.Module):
    """A language model of one layer, some channels of whose embedding are large."""

    def __init__(
        self, norm: type[nn.Module] = RMSNorm, width: int = 16, tied: bool = False, plain: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        with torch.no_grad():
            self.embed.weight[:, 3] *= 30
            self.embed.weight[:, 7] += 20
        self.first, self.second, self.last = norm(width), norm(width), norm(width)
        self.attention = Attention(width, 4, 2, plain)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.head = nn.Linear(width, 20, bias=False)
        for norm_ in (self.first, self.second, self.last):
            if isinstance(norm_, nn.LayerNorm):
                nn.init.uniform_(norm_.weight, 0.5, 1.5)
                nn.init.uniform_(norm_.bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.first(x))
        x = x + self.down(torch.relu(self.up(self.second(x))))
        result: Tensor = self.head(self.last(x))
        return result


IDS = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))


def decoder(**options: Any) -> Program:
    return trace(seeded(lambda: Decoder(**options)), (IDS,))


def check(program: Program, **options: Any) -> CheckedPass:
    """A second run finds everything rotated already, and other checks of `check_pass`."""
    return check_pass(RotateWeights(**options), program, (IDS,))


def kurtosis(x: Tensor) -> float:
    """Of all values, 3 for normal ones: what a few large channels raise."""
    x = x.double() - x.double().mean()
    return float(x.pow(4).mean() / x.square().mean() ** 2)


def inputs_of(program: Program, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What layers read."""
    places = {layer.data: layer.name for layer in layers_of(program) if layer.name in names}
    found: dict[str, Tensor] = {}
    run_watched(program, [IDS], list(places), lambda node, value: found.update({places[node]: value}))
    return found


def test_rotates_stream_and_values_and_keeps_the_function() -> None:
    checked = check(decoder())
    assert checked.record.facts == {"residual": 1, "values": 1}
    assert not checked.reasons
    before, after = dict(checked.before.tensors()), dict(checked.after.tensors())
    assert before.keys() == after.keys()
    inner = {"up.bias"}  # all other tensors write or read the stream, or the values of attention
    assert {name for name in before if torch.equal(before[name], after[name])} == inner
    for name in ("first", "second", "last"):
        assert bool((after[f"{name}.weight"] == 1).all())
    nodes = [str(node.target) for node in checked.before.compute_nodes()]
    assert nodes == [str(node.target) for node in checked.after.compute_nodes()]


def test_attention_that_is_written_out() -> None:
    checked = check(decoder(plain=True))
    assert checked.record.facts == {"residual": 1, "values": 1} and not checked.reasons
    assert not torch.equal(
        checked.before.tensor("attention.v.bias"), checked.after.tensor("attention.v.bias")
    )


def test_outliers_go() -> None:
    program = decoder()
    names = ("attention.q", "up", "head")
    before = inputs_of(program, names)
    after = inputs_of(check(program).after, names)
    for name in names:
        # Two of sixteen channels hold nearly everything: 8 if they hold it alike, 3 is what normal values have.
        assert kurtosis(before[name]) > 5 and kurtosis(after[name]) < 3.5, name


def test_rounding_values_to_four_bits_hurts_less() -> None:
    """With large channels, one scale a token leaves the others no digits; rotated, all have some."""
    program = decoder()
    expected = program(IDS)
    rotated = check(program).after
    errors = []
    for item in (program.snapshot(), rotated):
        run([QuantizeWeights(weight="int8:channel=0", activation="uint4:affine:token:dynamic")], item)  # type: ignore[arg-type]
        errors.append(float((item(IDS) - expected).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_layer_norms_keep_their_mean() -> None:
    checked = check(decoder(norm=nn.LayerNorm))
    assert checked.record.facts == {"residual": 1, "values": 1}
    after = dict(checked.after.tensors())
    assert bool((after["first.weight"] == 1).all()) and not bool(after["first.bias"].any())
    assert "attention.q.bias" in after and "head.bias" in after  # made of the norms' biases


def test_a_tied_weight_is_stored_twice_or_all_stays() -> None:
    checked = check(decoder(tied=True))
    assert any(
        "stored once more for 'head'" in reason and "1,280 bytes" in reason for reason in checked.reasons
    )
    after = dict(checked.after.tensors())
    assert after["head.weight"].shape == after["embed.weight"].shape
    left = check(decoder(tied=True), untie=False, values=False)
    assert left.record.changes == 0
    assert left.reasons == ["is not rotated: @head.weight would have to be stored twice (untie=false)"]


def test_a_tied_weight_stays_tied_behind_a_norm_without_weight() -> None:
    class Plain(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    checked = check(decoder(norm=Plain, tied=True), untie=False)
    assert checked.record.facts["residual"] == 1 and not checked.reasons
    assert {"embed.weight", "head.weight"} - dict(checked.after.tensors()).keys()


def test_options() -> None:
    assert check(decoder(), values=False).record.facts == {"residual": 1, "values": 0}
    checked = check(decoder(), residual=False)
    assert checked.record.facts == {"residual": 0, "values": 1}
    assert torch.equal(checked.before.tensor("embed.weight"), checked.after.tensor("embed.weight"))
    with pytest.raises(PassOptionError, match="residual"):
        RotateWeights(residual=False, values=False)
    refuse_other_levels(RotateWeights())


def test_seeds() -> None:
    one, other = (
        check_pass(RotateWeights(), decoder(), (IDS,), seed=seed).after.tensor("head.weight")
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_sizes_without_a_hadamard_matrix() -> None:
    assert not has_hadamard(44 * 4 + 8)  # 184 = 8 · 23
    program = decoder(width=184)
    checked = check(program, values=False)
    assert checked.record.facts["residual"] == 1
    assert any("no Hadamard matrix of 184" in reason for reason in checked.reasons)


def test_masked_weights_keep_a_stream_from_being_rotated() -> None:
    program = decoder()
    run([MaskWeights(sparsity=0.5, layers=("down",))], program)
    checked = check(program, values=False)
    assert checked.record.changes == 0
    assert checked.reasons == ["keeps %embedding from being rotated: the weight of 'down' is masked"]


class Odd(nn.Module):
    """Streams that cannot be rotated, each for a reason of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.norm, self.last = nn.Embedding(20, 8), RMSNorm(8), RMSNorm(8)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        y = self.layer(self.norm(x))
        if self.kind == "post-norm":
            return self.head(self.last(x + y) + x)
        if self.kind == "activation":
            return self.head(self.last(x + torch.tanh(y)))
        if self.kind == "output":
            return self.head(self.last(x + y)), x
        if self.kind == "scaled":
            return self.head(self.last(x + self.scale * y))
        if self.kind == "part":
            return self.head(self.last(x + y)), x[..., :3]
        if self.kind == "shared norm":
            return self.head(self.norm(x + y))
        return self.head(nn.functional.rms_norm(x + y, (8,))) + self.layer.weight.sum()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("post-norm", "values that a norm has scaled go to add"),
        ("activation", "%tanh is made by tanh"),
        ("output", "is an output of the model"),
        ("scaled", "values that a norm has scaled go to add"),
        ("part", "%embedding goes to slice"),
        ("shared norm", "@norm.weight is used elsewhere too"),
        ("weight", "@layer.weight is used elsewhere too"),
    ],
)
def test_says_why_a_stream_stays_as_it_is(kind: str, reason: str) -> None:
    checked = check(trace(seeded(lambda: Odd(kind)), (IDS,)))
    assert checked.record.changes == 0
    assert any(reason in item for item in checked.reasons), checked.reasons


def test_a_model_without_streams() -> None:
    program = trace(seeded(lambda: nn.Linear(4, 4)), (data(2, 4),))
    checked = check_pass(RotateWeights(), program, (data(2, 4),))
    assert checked.record.changes == 0 and len(checked.reasons) == 2


def test_a_second_run_finds_it_rotated() -> None:
    program = decoder()
    run([RotateWeights()], program)
    (record,) = run([RotateWeights()], program)
    assert record.changes == 0 and [remark.reason for remark in record.remarks] == ["is rotated already"] * 2


@pytest.mark.parametrize("norm", [RMSNorm, nn.LayerNorm])
def test_comparisons_see_through_it(norm: type[nn.Module], tmp_path: Path) -> None:
    original = decoder(norm=norm)
    program = original.snapshot()
    run([SmoothQuant(), RotateWeights(), SmoothQuant()], program, [IDS])
    program.save(tmp_path / "rotated.pt2")
    for item in (program, Program.load(tmp_path / "rotated.pt2")):
        found = compare_layers(original, item, [[IDS]])
        assert len(found) == len(layers_of(original))
        for entry in found:
            # float32 after three changes of its weights: 1e-6 of the largest; a wrong basis has no 10 dB.
            assert entry.distance.sqnr_db > 90, entry
            assert entry.before is None or entry.before.sqnr_db > 90, entry


def test_blocks_learn_in_their_new_channels() -> None:
    """What the dense model made of them is rotated first: else they would be far from it, and learn nonsense."""
    program = decoder()
    *_, record = run([RotateWeights(), DistillBlocks(blocks=("attention",), epochs=1)], program, [IDS])
    # The error as a share of the block's output: float32 in another basis has 1e-12, another basis 1.
    assert record.facts["attention"]["error before"] < 1e-8


ROTATED = {
    "llama": (1, 2),
    "qwen2": (1, 2),
    "qwen3": (1, 2),
    "mistral": (1, 2),
    "gemma": (1, 2),
    "gpt2": (1, 0),
}


@pytest.mark.parametrize("name", ROTATED)
def test_decoders_of_transformers(name: str) -> None:
    program = zoo_program(name).snapshot()
    flat = [program.signature.bind(*ZOO[name].inputs())]
    *_, record = run([*pipelines.canonical(), RotateWeights()], program)
    facts = record.facts
    assert (facts["residual"], facts["values"]) == ROTATED[name], record.remarks
    for one, other in zip(zoo_program(name).run(flat[0]), program.run(flat[0]), strict=True):
        # Two layers of float32 products in another basis: 1e-5 of the largest.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("name", ["bert", "gemma2", "gemma3"])
def test_norms_behind_layers_are_left_alone(name: str) -> None:
    program = zoo_program(name).snapshot()
    *_, record = run([*pipelines.canonical(), RotateWeights(values=False)], program)
    assert record.changes == 0
    assert any("go to add" in remark.reason for remark in record.remarks), record.remarks
