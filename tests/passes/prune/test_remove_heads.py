from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels, zoo_program
from support.programs import data, seeded
from support.removal import remove
from torch import Tensor, nn
from torch.nn import functional as F

from sqcompile.errors import PassOptionError
from sqcompile.passes import RemoveHeads
from sqcompile.testing import check_pass
from sqcompile.tracing import trace


class Attention(nn.Module):
    """Four heads of queries over `keys` heads of keys and values, three wide."""

    def __init__(self, keys: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 3 * keys), nn.Linear(6, 3 * keys)
        self.o = nn.Linear(12, 6)
        self.repeated = 4 // keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(1, 5, -1, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.repeated > 1:
            k, v = (y[:, :, None].expand(-1, -1, self.repeated, -1, -1).reshape(1, 4, 5, 3) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.o(mixed.transpose(1, 2).reshape(1, 5, 12))
        return result


def attention(keys: int = 4) -> nn.Module:
    model = seeded(lambda: Attention(keys))
    with torch.no_grad():
        for head in (0, 2):
            model.o.weight[:, 3 * head : 3 * head + 3] *= 9  # type: ignore[index,union-attr]
    return model


X = data(1, 5, 6)


def test_removes_the_heads_of_least_norm() -> None:
    model = attention()
    attend = "scaled_dot_product_attention"
    checked = check_pass(
        RemoveHeads(ratio=0.5),
        model,
        (X,),
        idempotent=False,  # a second run removes half of what is left
        expected=f"""
            program (level aten)
              input  %x: f32[1, 5, 6]
              tensor @q.weight: f32[6, 6]
              tensor @q.bias: f32[6]
              tensor @k.weight: f32[6, 6]
              tensor @k.bias: f32[6]
              tensor @v.weight: f32[6, 6]
              tensor @v.bias: f32[6]
              tensor @o.weight: f32[6, 6]
              tensor @o.bias: f32[6]
              %linear: f32[1, 5, 6] = linear(%x, @q.weight, @q.bias)
              %view: f32[1, 5, 2, 3] = view(%linear, size=[1, 5, -1, 3])
              %transpose: f32[1, 2, 5, 3] = transpose.int(%view, dim0=1, dim1=2)
              %linear_1: f32[1, 5, 6] = linear(%x, @k.weight, @k.bias)
              %view_1: f32[1, 5, 2, 3] = view(%linear_1, size=[1, 5, -1, 3])
              %transpose_1: f32[1, 2, 5, 3] = transpose.int(%view_1, dim0=1, dim1=2)
              %linear_2: f32[1, 5, 6] = linear(%x, @v.weight, @v.bias)
              %view_2: f32[1, 5, 2, 3] = view(%linear_2, size=[1, 5, -1, 3])
              %transpose_2: f32[1, 2, 5, 3] = transpose.int(%view_2, dim0=1, dim1=2)
              %{attend}: f32[1, 2, 5, 3] = {attend}(%transpose, %transpose_1, %transpose_2)
              %transpose_3: f32[1, 5, 2, 3] = transpose.int(%{attend}, dim0=1, dim1=2)
              %reshape: f32[1, 5, 6] = reshape(%transpose_3, shape=[1, 5, 6])
              %linear_3: f32[1, 5, 6] = linear(%reshape, @o.weight, @o.bias)
              return output=%linear_3
        """,
    )
    heads = [0, 1, 2, 6, 7, 8]
    assert torch.equal(checked.after.tensor("v.weight"), model.v.weight[heads])  # type: ignore[index,union-attr]
    assert checked.record.facts["kept"] == {"q.heads": [0, 2]}


def shapes(keys: int, ratio: float) -> list[tuple[int, ...]]:
    shrunk, _ = remove(RemoveHeads(ratio=ratio), trace(attention(keys), (X,)))
    return [tuple(shrunk.tensor(f"{name}.weight").shape) for name in "qko"]


def test_queries_go_with_the_keys_that_they_share() -> None:
    assert shapes(keys=2, ratio=0.5) == [(6, 6), (3, 6), (6, 6)]
    text = remove(RemoveHeads(ratio=0.5), trace(attention(2), (X,)))[0].text()
    assert "expand(%unsqueeze, size=[-1, -1, 2, -1, -1])" in text
    assert "shape=[1, 2, 5, 3])" in text


def test_queries_go_alone_where_there_is_one_head_of_keys() -> None:
    assert shapes(keys=1, ratio=0.5) == [(6, 6), (3, 6), (6, 6)]
    assert shapes(keys=1, ratio=0.75) == [(3, 6), (3, 6), (6, 3)]


def test_too_few_heads_for_the_ratio_stay() -> None:
    check_pass(
        RemoveHeads(ratio=0.2),
        attention(),
        (X,),
        unchanged=True,
        remarks=["they are too few for a part of them"],
    )


def test_neurons_and_widths_stay() -> None:
    _, result = remove(RemoveHeads(ratio=0.5), zoo_program("gpt2"))
    assert list(result.facts["kept"]) == [f"transformer.h.{index}.attn.c_attn.heads" for index in (0, 1)]


def test_layers_choose_by_module() -> None:
    _, result = remove(RemoveHeads(ratio=0.5, layers=("model.layers.1",)), zoo_program("llama"))
    assert list(result.facts["kept"]) == ["model.layers.1.self_attn.q_proj.heads"]


def test_a_model_without_heads_says_so() -> None:
    check_pass(
        RemoveHeads(ratio=0.5),
        nn.Linear(3, 2),
        (data(2, 3),),
        unchanged=True,
        remarks=["has no heads that could go"],
    )


def test_compensation_refits_the_output_layer() -> None:
    batches = [(data(1, 5, 6, seed=seed),) for seed in range(30)]
    errors = []
    for compensate in (False, True):
        checked = check_pass(
            RemoveHeads(ratio=0.25, compensate=compensate),
            attention(),
            (X,),
            calibration=batches,
            idempotent=False,
        )
        assert checked.record.distance is not None
        errors.append(checked.record.distance.noise)
    assert errors[1] < 0.5 * errors[0]


def test_refuses_options_out_of_range() -> None:
    with pytest.raises(PassOptionError, match="Option 'ratio'"):
        RemoveHeads(ratio=1.0)


def test_refuses_quantized_programs() -> None:
    refuse_other_levels(RemoveHeads(ratio=0.5))
