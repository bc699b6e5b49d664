from __future__ import annotations

import pytest
import torch
from support.passes import zoo_program
from support.zoo import ZOO

from sqcompile.layers import layers_of
from sqcompile.mixed_precision.rerun import Rerun


@pytest.mark.parametrize("name", ["llama", "resnet_basic"])
def test_equals_the_changed_program(name: str) -> None:
    """Each layer's weight doubled by itself: forwards, and once back to the first."""
    program = zoo_program(name)
    flat = program.signature.bind(*ZOO[name].inputs())
    run = Rerun(program, flat)
    with torch.no_grad():
        dense = program.graph_module(*flat)[0]
        assert torch.equal(run.outputs()[0], dense)
        layers = layers_of(program)
        for layer in [*layers[::5], layers[0]]:
            stored = program.tensor(layer.weight)
            copy = program.snapshot()
            copy.set_tensor(layer.weight_name, 2 * stored.detach())
            (same, *_) = run.outputs(layer.node, {layer.weight_value: 2 * stored.detach()})
            assert torch.equal(same, copy.graph_module(*flat)[0])
            assert not torch.equal(same, dense)
