"""What a program returns: the model's own structure and classes."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from support.zoo import BATCH, SEQUENCE, ZOO
from torch import Tensor, nn

import sqcompile
from sqcompile.errors import TraceError

Pair = namedtuple("Pair", "low high")


@dataclass
class Result:
    mean: Tensor
    rest: dict[str, Tensor]
    count: int = 0


class Returns(nn.Module):
    """Calls a function in forward: what it returns is what this test is about."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def test_dicts_lists_and_constants() -> None:
    model = Returns(lambda x: {"a": x, "b": (x * 2, [x + 1, None], 7)})
    x = torch.ones(2)
    result = sqcompile.trace(model, (x,))(x)
    assert list(result) == ["a", "b"]
    assert torch.equal(result["b"][0], x * 2)
    assert torch.equal(result["b"][1][0], x + 1)
    assert result["b"][1][1] is None
    assert result["b"][2] == 7


def test_names_of_outputs_follow_the_structure() -> None:
    program = sqcompile.trace(Returns(lambda x: {"a": x + 1, "b": (x * 2, [x + 3])}), (torch.ones(2),))
    assert [value.name for value in program.signature.outputs] == ["a", "b.0", "b.1.0"]
    program = sqcompile.trace(Returns(lambda x: (x + 1, x + 2)), (torch.ones(2),))
    assert [value.name for value in program.signature.outputs] == ["output_0", "output_1"]
    program = sqcompile.trace(Returns(lambda x: x + 1), (torch.ones(2),))
    assert [value.name for value in program.signature.outputs] == ["output"]


def test_named_tuples() -> None:
    program = sqcompile.trace(Returns(lambda x: Pair(x - 1, x + 1)), (torch.ones(2),))
    result = program(torch.ones(2))
    assert isinstance(result, Pair)
    assert torch.equal(result.high, torch.full((2,), 2.0))
    assert [value.name for value in program.signature.outputs] == ["low", "high"]


def test_dataclasses() -> None:
    program = sqcompile.trace(Returns(lambda x: Result(x.mean(), {"x": x * 2}, 3)), (torch.ones(2),))
    result = program(torch.ones(2))
    assert isinstance(result, Result)
    assert result.count == 3
    assert torch.equal(result.rest["x"], torch.full((2,), 2.0))
    assert [value.name for value in program.signature.outputs] == ["mean", "rest.x", "count"]


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_other_classes_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"returns a '.*Opaque', whose tensors cannot be found"):
        sqcompile.trace(Returns(Opaque), (torch.ones(2),))


def test_an_output_may_be_an_input_or_a_parameter() -> None:
    model = Returns(lambda x: (x, x))
    model.weight = nn.Parameter(torch.ones(3))
    model.function = lambda x: (x, x, model.weight)
    x = torch.ones(2)
    first, second, weight = sqcompile.trace(model, (x,))(x)
    assert torch.equal(first, x)
    assert torch.equal(second, x)
    assert torch.equal(weight, model.weight)


def test_a_language_model_returns_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    zoo = ZOO["llama"]
    model = zoo.make()
    model.config.use_cache = True
    program = sqcompile.trace(model, zoo.inputs(), dynamic_shapes=zoo.dynamic_shapes)
    _, kwargs = zoo.inputs(seed=3, batch=3, sequence=17)
    with torch.no_grad():
        result, expected = program(**kwargs), model(**kwargs)
    assert isinstance(result, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert isinstance(result.past_key_values, transformers.DynamicCache)
    for layer, other in zip(result.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert [value.name for value in program.signature.outputs] == [
        "logits",
        "past_key_values.key_cache.0",
        "past_key_values.key_cache.1",
        "past_key_values.value_cache.0",
        "past_key_values.value_cache.1",
    ]


def test_a_language_model_takes_its_cache() -> None:
    pytest.importorskip("transformers")
    model = ZOO["llama"].make()
    model.config.use_cache = True
    past_length = torch.export.Dim("past", max=40)
    past_shapes = [[{0: BATCH, 2: past_length}] * 2] * 2
    shapes = {"input_ids": {0: BATCH, 1: SEQUENCE}, "past_key_values": past_shapes}

    def inputs(batch: int, past: int, new: int) -> dict[str, object]:
        _, first = ZOO["llama"].inputs(seed=1, batch=batch, sequence=past)
        _, second = ZOO["llama"].inputs(seed=2, batch=batch, sequence=new)
        with torch.no_grad():
            return {**second, "past_key_values": model(**first).past_key_values}

    program = sqcompile.trace(model, inputs(2, 6, 4), dynamic_shapes=shapes)
    with torch.no_grad():
        result, expected = program(**inputs(3, 9, 2)), model(**inputs(3, 9, 2))
    assert torch.equal(result.logits, expected.logits)
    assert result.past_key_values.layers[1].keys.shape[2] == 11


def test_a_cache_of_another_kind_is_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    tokens = torch.ones(2, 3, dtype=torch.int64)
    model, inputs = (
        transformers.T5ForConditionalGeneration(config),
        {"input_ids": tokens, "decoder_input_ids": tokens},
    )
    with pytest.raises(TraceError, match="EncoderDecoderCache") as caught:
        sqcompile.trace(model, inputs)
    assert "use_cache=False" in str(caught.value.next_step)
    sqcompile.trace(model, {**inputs, "use_cache": False})
