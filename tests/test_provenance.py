"""Artifacts carry what made them, and are made again to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sqcompile
from sqcompile import Recipe
from sqcompile.api import Compiled
from sqcompile.data import DataFile
from sqcompile.errors import FileError, RecipeError
from sqcompile.input_spec import InputSpec
from sqcompile.provenance import read_provenance, recipe_of

NET = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    np.savez(tmp_path / "x.npz", input=np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32))
    return tmp_path


def compiled(**options: object) -> Compiled:
    given: dict[str, object] = {"calibration": "x.npz", "seed": 3, **options}
    made = sqcompile.compile("net.py:make", "int8-static", **given)  # type: ignore[arg-type]
    assert isinstance(made, Compiled)
    return made


@pytest.mark.parametrize(
    ("backend", "name"), [("native", "a.sqm"), ("onnxruntime", "a.onnx"), ("reference", "a.pt2")]
)
def test_an_artifact_carries_its_recipe(folder: Path, backend: str, name: str) -> None:
    compiled(backend=backend).save(name)
    found = read_provenance(name)
    assert found["seed"] == 3 and found["data"].startswith("sha256:")
    assert found["versions"]["sqcompile"] == sqcompile.__version__ and "torch" in found["versions"]
    recipe = recipe_of(name)
    assert (recipe.model, recipe.seed, recipe.backend) == ("net.py:make", 3, backend)
    assert recipe.data == DataFile("x.npz")
    assert [str(item) for item in recipe.passes] == [record.text for record in compiled().report.passes]


@pytest.mark.parametrize(("backend", "name"), [("native", "a.sqm"), ("onnxruntime", "a.onnx")])
def test_it_is_made_again_to_the_bit(folder: Path, backend: str, name: str) -> None:
    # What changes no result does not count: checks, memory, threads.
    compiled(backend=backend, verify="off", max_memory="8GB", threads=1).save(name)
    again = recipe_of(name).compile()
    assert isinstance(again, Compiled)
    again.save(f"again-{name}")
    assert Path(name).read_bytes() == Path(f"again-{name}").read_bytes()


def test_inputs_of_a_recipe_are_kept(folder: Path) -> None:
    recipe = Recipe.parse("model: net.py:make\npasses: [quantize-weights]\ninputs: {input: 'f32[batch, 16]'}")
    made = recipe.compile(backend="native")
    assert isinstance(made, Compiled)
    made.save("a.sqm")
    assert recipe_of("a.sqm").inputs == (InputSpec.parse("input: f32[batch, 16]"),)


def test_other_data_is_refused(folder: Path) -> None:
    compiled(backend="native").save("a.sqm")
    np.savez("x.npz", input=np.zeros((8, 16), np.float32))
    with pytest.raises(RecipeError, match="not what the artifact was compiled with") as caught:
        recipe_of("a.sqm")
    assert caught.value.where == "x.npz"
    Path("x.npz").unlink()
    with pytest.raises(FileError):
        recipe_of("a.sqm")


def test_models_and_data_in_memory_have_no_place(folder: Path) -> None:
    from sqcompile.models import load_model

    model = load_model("net.py:make")
    data = np.load("x.npz")["input"]
    import torch

    batch = torch.from_numpy(data)
    made = sqcompile.compile(model, "quantize-weights", (batch,), backend="native")
    assert isinstance(made, Compiled)
    made.save("a.sqm")
    with pytest.raises(RecipeError, match="carries no recipe"):
        read_provenance("a.sqm")
    compiled(calibration=[batch], backend="native").save("b.sqm")
    assert read_provenance("b.sqm")["data"] == "in memory"
    with pytest.raises(RecipeError, match="data that was in memory"):
        recipe_of("b.sqm")


def test_the_signature_without_it_is_as_before(folder: Path) -> None:
    program = compiled(backend="reference").program
    assert "provenance" in json.loads(program.signature.to_json())
    from sqcompile.signature import Signature

    text = json.loads(program.signature.to_json())
    del text["provenance"]
    bare = Signature.from_json(json.dumps(text))
    assert bare.provenance is None and json.loads(bare.to_json()) == text
    assert bare == program.signature  # how it was made is no part of the interface
