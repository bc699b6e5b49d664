from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels, zoo_program
from support.programs import Mlp, data, seeded
from support.removal import remove
from torch import nn
from torch.export import Dim

from sqcompile.errors import PassOptionError
from sqcompile.passes import RemoveNeurons
from sqcompile.testing import check_pass


def mlp() -> nn.Module:
    model = seeded(Mlp)
    with torch.no_grad():
        model.second.weight[:, ::2] *= 9  # type: ignore[index,union-attr]
    return model


X = data(2, 8)


def test_removes_the_neurons_of_least_norm() -> None:
    model = mlp()
    checked = check_pass(
        RemoveNeurons(ratio=0.5),
        model,
        (X,),
        idempotent=False,  # a second run removes half of what is left
        dynamic_shapes=({0: Dim("batch", max=64)},),
        expected="""
            program (level aten)
              input  %x: f32[batch, 8]
              tensor @first.weight: f32[8, 8]
              tensor @first.bias: f32[8]
              tensor @second.weight: f32[4, 8]
              tensor @second.bias: f32[4]
              %linear: f32[batch, 8] = linear(%x, @first.weight, @first.bias)
              %relu: f32[batch, 8] = relu(%linear)
              %linear_1: f32[batch, 4] = linear(%relu, @second.weight, @second.bias)
              return output=%linear_1
        """,
    )
    assert torch.equal(checked.after.tensor("first.bias"), model.first.bias[::2])  # type: ignore[index,union-attr]


def test_gate_value_and_output_shrink_together() -> None:
    shrunk, result = remove(RemoveNeurons(ratio=0.5), zoo_program("llama"))
    block = "model.layers.0.mlp"
    shapes = [tuple(shrunk.tensor(f"{block}.{name}_proj.weight").shape) for name in ("gate", "up", "down")]
    assert shapes == [(32, 32), (32, 32), (32, 32)]
    assert list(result.facts["kept"]) == [f"model.layers.{index}.mlp.gate_proj" for index in (0, 1)]


def test_a_fused_gate_loses_the_same_neurons_in_both_halves() -> None:
    program = zoo_program("phi3")
    shrunk, result = remove(RemoveNeurons(ratio=0.75), program)
    kept = result.facts["kept"]["model.layers.0.mlp.gate_up_proj"]
    rows = [*kept, *(64 + index for index in kept)]
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert torch.equal(shrunk.tensor(name), program.tensor(name)[rows])


def test_all_layers_and_directions_of_an_lstm_lose_the_same_units() -> None:
    program = zoo_program("lstm")
    shrunk, result = remove(RemoveNeurons(ratio=0.5), program)
    kept = result.facts["kept"]["lstm"]
    gates = [16 * gate + unit for gate in range(4) for unit in kept]
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert torch.equal(
            shrunk.tensor(f"lstm.bias_hh_{suffix}"), program.tensor(f"lstm.bias_hh_{suffix}")[gates]
        )
    assert "%zeros: f32[4, batch, 8]" in shrunk.text()


def test_what_the_model_returns_stays() -> None:
    check_pass(
        RemoveNeurons(ratio=0.5),
        nn.Linear(8, 4),
        (X,),
        unchanged=True,
        remarks=["keeps its 4 neurons: it is an output of the model", "has no neurons that could go"],
    )


def test_compensation_is_worth_its_run() -> None:
    batches = [(data(2, 8, seed=seed),) for seed in range(40)]
    errors = []
    for compensate in (False, True):
        checked = check_pass(
            RemoveNeurons(ratio=0.5, compensate=compensate),
            mlp(),
            (X,),
            calibration=batches,
            idempotent=False,
        )
        assert checked.record.distance is not None
        errors.append(checked.record.distance.noise)
    assert errors[1] < 0.5 * errors[0]


def test_refuses_options_out_of_range() -> None:
    with pytest.raises(PassOptionError, match="Option 'parameters'"):
        RemoveNeurons(ratio=0.5, parameters=0.5)


def test_refuses_quantized_programs() -> None:
    refuse_other_levels(RemoveNeurons(ratio=0.5))
