"""Shrunk programs in files, and the models that they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.passes import zoo_program
from support.removal import TOLERANCE, distance, outputs, remove
from support.zoo import ZOO

import sqcompile
from sqcompile import Program
from sqcompile.passes import RemoveChannels, RemoveHeads, RemoveNeurons
from sqcompile.pipeline import Pass
from sqcompile.training import Trainable

EVERYTHING = RemoveChannels(ratio=0.5, kinds=("channels", "neurons", "heads", "embedding"))


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet_v2", "lstm", "llama", "bert"])
def test_a_shrunk_program_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    shrunk, _ = remove(EVERYTHING, zoo_program(name))
    shrunk.save(tmp_path / "small.pt2")
    loaded = Program.load(tmp_path / "small.pt2")
    assert loaded.text() == shrunk.text()
    inputs = ZOO[name].inputs(batch=3)  # the batch was dynamic, and still is
    assert distance(outputs(shrunk, inputs), outputs(loaded, inputs)) == 0
    # PyTorch reads it without us.
    plain = torch.export.load(tmp_path / "small.pt2").module()
    assert distance(outputs(shrunk, inputs), outputs(plain, inputs)) < TOLERANCE
    # What was loaded trains, and shrinks further.
    assert any(parameter.requires_grad for parameter in Trainable(loaded).parameters())
    _, result = remove(EVERYTHING, loaded)
    assert result.changes > 0


def test_a_compiled_model_saves_it(tmp_path: Path) -> None:
    model, inputs = ZOO["vgg"].make(), ZOO["vgg"].inputs()
    compiled = sqcompile.compile(model, [RemoveChannels(ratio=0.5)], inputs, backend="reference")
    compiled.save(tmp_path / "small.pt2")
    session = sqcompile.load(tmp_path / "small.pt2")
    assert distance(outputs(compiled, inputs), outputs(session, inputs)) == 0


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("resnet_basic", RemoveChannels(ratio=0.5, compensate=True, importance="hessian")),
        ("llama", RemoveHeads(ratio=0.5, compensate=True, importance="taylor")),
        ("bert", RemoveNeurons(macs=0.9, importance="activation")),
    ],
    ids=["channels", "heads", "neurons"],
)
def test_the_model_is_as_it_was(name: str, item: Pass) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure, dense = repr(model), outputs(model, inputs)
    compiled = sqcompile.compile(model, [item], inputs, calibration=[inputs], backend="reference")
    assert compiled.report.passes[0].changes > 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert repr(model) == structure
    assert all(map(torch.equal, outputs(model, inputs), dense))
