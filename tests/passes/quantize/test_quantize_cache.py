from __future__ import annotations

from typing import Any

import pytest
import torch
from support.quantize import DEQUANTIZE, QUANTIZE, calls, run, settle, values
from torch import Tensor, nn

from sqcompile import Program, trace
from sqcompile.attention import attentions
from sqcompile.errors import CalibrationError, LevelError, PassOptionError
from sqcompile.levels import Level
from sqcompile.passes.quantize import QuantizeCache
from sqcompile.pipeline import PassContext, PassManager, parse_pass
from sqcompile.quantization import Format


class Attend(nn.Module):
    """Attention of grouped heads, whose keys and values are projected."""

    def __init__(self, repeated: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.repeated = repeated

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.repeated:
            k, v = (
                item[:, :, None].expand(-1, -1, 2, -1, -1).reshape(item.shape[0], 4, -1, 8) for item in (k, v)
            )
        result: Tensor = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=not self.repeated
        )
        return result


def program(**options: Any) -> Program:
    traced = trace(settle(Attend(**options)), (values(2, 5, 16),))
    traced.level = Level.QDQ
    return traced


def rounded(x: Tensor, bound: Tensor) -> Tensor:
    scale = bound / 127
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("text", ["int8:channel=1", "int8"])
def test_rounds_by_the_greatest_of_each_head(text: str, repeated: bool) -> None:
    compiled = program(repeated=repeated)
    batches = [(values(2, 5, 16, seed=seed),) for seed in (3, 4)]
    (record,) = run([QuantizeCache(format=Format.parse(text))], compiled, batches)
    assert record.changes and len(calls(compiled, QUANTIZE)) == len(calls(compiled, DEQUANTIZE)) == 2
    (found,) = attentions(compiled)
    assert found.key.target is DEQUANTIZE and found.value.target is DEQUANTIZE
    model = settle(Attend(repeated=repeated))
    x = values(2, 5, 16, seed=3)
    heads = []
    for layer in (model.q, model.k, model.v):
        every = torch.stack([layer(batch[0]).unflatten(-1, (-1, 8)).transpose(1, 2) for batch in batches])
        bound = every.abs().amax((0, 1, 3, 4), keepdim=True)[0] if "channel" in text else every.abs().max()
        item = layer(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        heads.append(item if layer is model.q else rounded(item, bound))
    expected = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    # A product that ends in other bits may be rounded to the next code: half a step of some value at most.
    assert torch.allclose(compiled(x), expected, atol=2e-2)
    assert (compiled(x) - expected).abs().median() < 1e-6


def test_changes_nothing_the_second_time() -> None:
    compiled = program()
    batches = [(values(2, 5, 16),)]
    run([QuantizeCache()], compiled, batches)
    before = compiled.text()
    (record,) = run([QuantizeCache()], compiled, batches)
    assert not record.changes and compiled.text() == before
    assert any("codes already" in remark.reason for remark in record.remarks)


def test_a_model_without_attention_stays() -> None:
    compiled = trace(settle(nn.Linear(4, 4)), (values(2, 4),))
    compiled.level = Level.QDQ
    (record,) = run([QuantizeCache()], compiled)
    assert not record.changes and "no attention" in record.remarks[0].reason


def test_needs_data_and_its_level() -> None:
    with pytest.raises(CalibrationError):
        run([QuantizeCache()], program())
    with pytest.raises(LevelError, match="needs a program of level qdq"):
        PassManager([QuantizeCache()]).run(trace(settle(Attend()), (values(2, 5, 16),)), PassContext())


@pytest.mark.parametrize("text", ["uint8:affine", "int8:group=8", "int8:channel=0", "int8:dynamic"])
def test_refuses_what_no_cache_has(text: str) -> None:
    with pytest.raises(PassOptionError, match="static and symmetric"):
        QuantizeCache(format=Format.parse(text))


def test_text_parses_back() -> None:
    item = QuantizeCache(format=Format.parse("int8"))
    assert parse_pass(str(item)) == item
    assert parse_pass(str(QuantizeCache())) == QuantizeCache()
