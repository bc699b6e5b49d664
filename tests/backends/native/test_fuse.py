"""Fused steps compute what the single ones do, bit for bit, and are where they are expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.zoo import ZOO, ZooModel
from torch import Tensor, nn

from sqcompile.backends.native import lower as lowering
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.session import NativeSession
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]

TOKENS = Format.parse("uint8:affine:token:dynamic")
GROUPS = Format.parse("int4:group=32")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(artifact: NativeArtifact) -> Counter[str]:
    return Counter(step.operator for step in artifact.plan.steps)


@pytest.fixture
def both(lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NativeArtifact]:
    """Runs a program with and without fusion, compares all bits, and returns the fused artifact."""

    def check(program: Program, *calls: list[Any]) -> NativeArtifact:
        fused = lower(program)
        with monkeypatch.context() as patch:
            patch.setattr(lowering, "fuse", lambda *_: None)
            single = lower(program)
        sessions = load(fused), load(single), load(fused, 1)
        for call in calls:
            results = [session.run(call) for session in sessions]
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        return fused

    return check


def quantized(program: Program, *passes: Pass) -> Program:
    PassManager(passes).run(program, PassContext())
    return program


def zoo(name: str, *passes: Pass) -> tuple[Program, list[list[Any]]]:
    entry: ZooModel = ZOO[name]
    program = trace(entry.make(), entry.inputs(), dynamic_shapes=entry.dynamic_shapes)
    calls = [
        program.signature.bind(*entry.inputs(seed, *size)) for seed, size in enumerate([(2, 12), (3, 9)])
    ]
    return quantized(program, *passes), calls


WEIGHTS: dict[str, tuple[Pass, ...]] = {
    "float": (),
    "int8": (QuantizeWeights(activation=TOKENS),),
    "int8-sparse": (MaskWeights(sparsity=0.5), ApplyMasks(), QuantizeWeights(activation=TOKENS)),
    "int4": (QuantizeWeights(weight=GROUPS),),
    "int4-sparse": (MaskWeights(sparsity=0.6), ApplyMasks(), QuantizeWeights(weight=GROUPS)),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_models_keep_every_bit(name: str, weights: str, both: Callable[..., NativeArtifact]) -> None:
    program, calls = zoo(name, *WEIGHTS[weights])
    steps = steps_of(both(program, *calls))
    layers = 2
    assert steps["norm_rows"] >= 2 * layers
    if name == "llama":
        assert steps["rope"] == 2 * layers
        assert steps["activation_rows"] == layers
        assert not steps["silu"] + steps["neg"] + steps["rms_norm"] * (weights != "float")
    else:
        assert steps["activation_rows"] == (0 if weights == "float" else layers + 1)
    products = sum(count for operator, count in steps.items() if operator.startswith("linear"))
    # q, k and v are one, so are gate and up; the head is by itself, and BERT's has two layers.
    assert products == 4 * layers + (2 if name == "bert" else 1)
    if weights != "float":
        # Of what attention leaves, and of the first token, for BERT's pooler.
        assert steps["quantize_rows"] == layers + (name == "bert")


class Heads(nn.Module):
    """Attention and its heads beside each other; `seen` by others as they were, too, or not."""

    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        heads = nn.functional.scaled_dot_product_attention(q, k, k)
        rows = heads.transpose(1, 2).reshape(q.shape[0], -1, 32) * 2
        return (rows, heads + 1) if self.seen else (rows,)


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_writes_heads_behind_tokens(
    seen: bool, batch: int, both: Callable[..., NativeArtifact]
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, 4, length, 8, generator=generator) for length in (5, 9))
    steps = steps_of(both(trace(Heads(seen), (q, k)), [q, k]))
    assert steps["attention"] == 1 and steps["permute"] == seen


class Block(nn.Module):
    """Sum, norm and two layers; what else uses the sum and the norm is up to `extra`."""

    def __init__(self, extra: str, norm: nn.Module) -> None:
        super().__init__()
        self.extra = extra
        self.norm = norm
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 20)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = x * 2 + y.sin() * 3
        normed = self.norm(total)
        hidden = nn.functional.gelu(self.first(normed), approximate="tanh")
        result = self.second(hidden)
        return {
            "none": (result,),
            "sum": (result, total * 2),
            "norm": (result, normed + 1),
            "activation": (result, hidden.exp()),
            "outputs": (result, total, normed, hidden),
        }[self.extra]


@pytest.mark.parametrize("extra", ["none", "sum", "norm", "activation", "outputs"])
@pytest.mark.parametrize("norm", ["layer", "layer_plain", "rms"])
def test_what_else_is_used_stays(extra: str, norm: str, both: Callable[..., NativeArtifact]) -> None:
    norms = {
        "layer": nn.LayerNorm(32),
        "layer_plain": nn.LayerNorm(32, elementwise_affine=False),
        "rms": nn.RMSNorm(32, eps=1e-5),
    }
    torch.manual_seed(0)
    program = trace(Block(extra, norms[norm]).eval(), (values(3, 5, 32), values(3, 5, 32, seed=1)))
    quantized(program, QuantizeWeights(activation=TOKENS))
    steps = steps_of(both(program, [values(3, 5, 32, seed=2), values(3, 5, 32, seed=3)]))
    assert steps["activation_rows"] == 1
    if norm != "rms":
        assert steps["norm_rows"] == 1
        assert steps["add"] == (extra == "norm")  # the one behind the norm


class Rotated(nn.Module):
    """x * cos + rotate_half(x) * sin with tables of the caller's, whose halves need not be alike."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        angles = torch.cat((angles, angles if self.repeat else angles + 1), -1)[:, None]
        a, b = x[..., :4], x[..., 4:]
        result: Tensor = x * angles.cos() + torch.cat((-b, a), -1) * angles.sin()
        return result


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("repeat", [True, False])
def test_rotations_whose_tables_repeat(repeat: bool, batch: int, both: Callable[..., NativeArtifact]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rotated = nn.Linear(16, 16), Rotated(repeat)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            heads = self.layer(x).view(x.shape[0], -1, 2, 8).transpose(1, 2)
            result: Tensor = self.rotated(heads, angles)
            return result

    torch.manual_seed(0)
    program = trace(Model().eval(), (values(3, 5, 16), values(batch, 5, 4, seed=1)))
    steps = steps_of(both(program, [values(3, 5, 16, seed=2), values(batch, 5, 4, seed=3)]))
    assert steps["rope"] == repeat


def test_only_outputs_of_whole_panels_become_one(both: Callable[..., NativeArtifact]) -> None:
    class Model(nn.Module):
        def __init__(self, widths: tuple[int, ...]) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(32, width, bias=False) for width in widths])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer(x).view(x.shape[0], 2, -1) + 1 for layer in self.layers)

    for widths, products in (((16, 32, 6), 1), ((6, 16), 2)):
        torch.manual_seed(0)
        program = trace(Model(widths).eval(), (values(4, 32),))
        quantized(program, QuantizeWeights(activation=TOKENS))
        artifact = both(program, [values(4, 32, seed=1)])
        assert steps_of(artifact)["linear_q8"] == products


def test_tensors_that_became_part_of_others_are_gone(lower: Lower) -> None:
    program, _ = zoo("llama", *WEIGHTS["int8"])
    plan = lower(program).plan
    assert plan.generation is not None
    steps = [*plan.steps, *plan.generation.plan.steps]
    used = {value.source for step in steps for value in step.inputs if value and value.kind == "constant"}
    assert used == set(range(len(plan.tensors)))


def test_texts_continue_as_without_fusion(lower: Lower, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = zoo("llama", *WEIGHTS["int4"])
    fused = lower(program)
    monkeypatch.setattr(lowering, "fuse", lambda *_: None)
    single = lower(program)
    assert fused.plan.generation is not None
    steps = Counter(step.operator for step in fused.plan.generation.plan.steps)
    assert (steps["rope"], steps["norm_rows"], steps["activation_rows"]) == (4, 5, 2)
    prompts = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    assert torch.equal(load(fused).generate(prompts, 12), load(single).generate(prompts, 12))
