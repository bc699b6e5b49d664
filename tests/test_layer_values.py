from __future__ import annotations

import pytest
import torch

from sqcompile.errors import FileError
from sqcompile.layer_values import LayerValues, layers_from_json, layers_to_json


def test_layers_read_back() -> None:
    factor = torch.tensor([0.1, 3.0, 1e-7]).reshape(3, 1, 1)
    layers = [
        LayerValues("conv", {"batch_norm": "conv2d"}, factor),
        LayerValues("größe.fc", {"linear": "output", "relu": "relu_1"}),
        LayerValues("fused", {}),
    ]
    found = layers_from_json(layers_to_json(layers))
    assert [(item.name, item.values) for item in found] == [(item.name, item.values) for item in layers]
    assert found[0].factor is not None and torch.equal(found[0].factor, factor)
    assert found[1].factor is None
    assert layers_from_json(layers_to_json([])) == []


@pytest.mark.parametrize(
    "text",
    ["", "3", '{"a":1}', '[["conv"]]', '[["conv",3]]', '[["conv",{},[[2],"AAAA"]]]', '[["conv",{},["x"]]]'],
)
def test_damaged_text_is_refused(text: str) -> None:
    with pytest.raises(FileError, match="values of the file") as caught:
        layers_from_json(text, "net.onnx")
    assert caught.value.where == "net.onnx, sqcompile.layers"
