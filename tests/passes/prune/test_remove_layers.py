from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels, zoo_program
from support.programs import data, seeded
from support.removal import TOLERANCE, distance, outputs, remove
from support.zoo import ZOO
from torch import Tensor, nn

from sqcompile import Program
from sqcompile.blocks import find_blocks
from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.passes import RemoveLayers
from sqcompile.testing import check_pass
from sqcompile.tracing import trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.fc(x))


class Deep(nn.Module):
    """Four blocks; the third adds least."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


def deep() -> nn.Module:
    model = seeded(Deep)
    with torch.no_grad():
        model.layers[2].fc.weight *= 0.01  # type: ignore[index,union-attr]
        model.layers[2].fc.bias.zero_()  # type: ignore[index,union-attr]
    return model


X = data(3, 4)


def test_removes_the_blocks_that_are_named() -> None:
    check_pass(
        RemoveLayers(blocks=("layers.1", "layers.2", "layers.3")),
        deep(),
        (X,),
        idempotent=False,  # a second run finds nothing of that name
        expected="""
            program (level aten)
              input  %x: f32[3, 4]
              tensor @layers.0.fc.weight: f32[4, 4]
              tensor @layers.0.fc.bias: f32[4]
              tensor @head.weight: f32[2, 4]
              tensor @head.bias: f32[2]
              %linear: f32[3, 4] = linear(%x, @layers.0.fc.weight, @layers.0.fc.bias)
              %add: f32[3, 4] = add(%x, %linear)
              %relu: f32[3, 4] = relu(%add)
              %relu_1: f32[3, 4] = relu(%relu)
              %relu_2: f32[3, 4] = relu(%relu_1)
              %relu_3: f32[3, 4] = relu(%relu_2)
              %linear_4: f32[3, 2] = linear(%relu_3, @head.weight, @head.bias)
              return output=%linear_4
        """,
    )


def test_influence_finds_the_block_that_adds_least() -> None:
    checked = check_pass(
        RemoveLayers(ratio=0.25), deep(), (X,), calibration=[(X,), (data(3, 4, seed=2),)], idempotent=False
    )
    assert checked.record.facts["removed"] == ["layers.2"]


def test_influence_needs_data() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        remove(RemoveLayers(ratio=0.5), trace(deep(), (X,)))


def removed(item: RemoveLayers) -> list[str]:
    _, result = remove(item, trace(deep(), (X,)))
    names: list[str] = result.facts["removed"]
    return names


def test_the_last_ones_go_but_the_very_last() -> None:
    assert removed(RemoveLayers(ratio=0.5, importance="last")) == ["layers.1", "layers.2"]
    assert removed(RemoveLayers(ratio=0.5, importance="last", exclude=("layers.2",))) == ["layers.1"]


@pytest.mark.parametrize(
    ("budget", "count"),
    [({"macs": 0.8}, 1), ({"macs": 0.5}, 3), ({"parameters": 0.62}, 2), ({"parameters": 1.0}, 0)],
    ids=["macs 0.8", "macs 0.5", "parameters 0.62", "parameters 1"],
)
def test_a_budget_takes_as_few_as_meet_it(budget: dict[str, float], count: int) -> None:
    # Of 72 multiply-accumulates a row each block has 16, of 90 parameters 20.
    assert len(removed(RemoveLayers(**budget, importance="last"))) == count  # type: ignore[arg-type]


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(PassOptionError, match=r"0\.333 or more: so much is left without 3 blocks"):
        removed(RemoveLayers(macs=0.3, importance="last"))


def test_a_latency_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        time_ns = 1e6

        def __init__(self, *_: object) -> None: ...

        def share(self, candidate: Program) -> float:
            return 0.4 + 0.15 * len(find_blocks(candidate))

    monkeypatch.setattr("sqcompile.channels.budget.Stopwatch", Clock)
    _, result = remove(RemoveLayers(latency=0.75, importance="last"), trace(deep(), (X,)))
    assert result.facts["removed"] == ["layers.1", "layers.2"]
    assert result.facts["latency"]["after_ns"] == pytest.approx(0.7e6)
    with pytest.raises(PassOptionError, match=r"0\.55 ms or more"):
        removed(RemoveLayers(latency_ms=0.5, importance="last"))


def test_one_block_stays() -> None:
    assert len(removed(RemoveLayers(ratio=0.99, importance="random"))) == 3


def test_random_blocks_are_those_of_the_seed() -> None:
    item = RemoveLayers(ratio=0.5, importance="random")
    assert removed(item) == removed(item)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit"])
def test_nothing_of_a_removed_block_is_left_but_norms_on_the_way(name: str) -> None:
    shrunk, result = remove(RemoveLayers(ratio=0.5, importance="last"), zoo_program(name))
    (block,) = result.facts["removed"]
    left = [key for key, _ in shrunk.tensors() if key.startswith(f"{block}.")]
    assert all("norm" in key.lower() for key in left)
    assert name == "bert" or not left


def test_a_pattern_without_a_block_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"layers\.9"):
        removed(RemoveLayers(blocks=("layers.9",)))


def test_a_model_without_blocks_says_so() -> None:
    check_pass(
        RemoveLayers(ratio=0.5), nn.Linear(4, 2), (X,), unchanged=True, remarks=["has no block that could go"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "resnet_basic",
        "mobilenet_v2",
        "mlp_mixer",
        "llama",
        "gemma2",
        "gpt2",
        "opt",
        "gpt_neox",
        "bert",
        "vit",
        "t5_encoder",
    ],
)
def test_a_removed_block_adds_nothing(name: str) -> None:
    """The rest computes what the model does when all that has gone is zero."""
    program = zoo_program(name)
    last = find_blocks(program)[-1].name
    shrunk, result = remove(RemoveLayers(blocks=(last,)), program)
    assert result.facts["removed"] == [last]
    model, inputs = ZOO[name].make(), ZOO[name].inputs(seed=3)
    dense = outputs(model, inputs)
    left = {tensor for tensor, _ in shrunk.tensors()}
    gone = [tensor for tensor, _ in program.tensors() if tensor not in left]
    assert gone and all(tensor.startswith(last) for tensor in gone)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for tensor in gone:
        if tensor in parameters:
            parameters[tensor].data.zero_()
    masked = outputs(model, inputs)
    assert distance(masked, outputs(shrunk, inputs)) < TOLERANCE
    assert distance(dense, masked) > 100 * TOLERANCE


@pytest.mark.parametrize("options", [{}, {"ratio": 1.0}, {"ratio": -1.0}])
def test_refuses_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(PassOptionError, match="Option 'ratio'"):
        RemoveLayers(**options)  # type: ignore[arg-type]


def test_refuses_quantized_programs() -> None:
    refuse_other_levels(RemoveLayers(blocks=("a",)))
