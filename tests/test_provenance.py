"""Artifacts carry what made them, and are made again to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sqcompile
from sqcompile import Pass, PassContext, PassResult, Program, Recipe
from sqcompile.api import Compiled
from sqcompile.data import DataFile
from sqcompile.errors import FileError, RecipeError
from sqcompile.input_spec import InputSpec
from sqcompile.models import load_model
from sqcompile.passes import FineTune, QuantizeWeights
from sqcompile.provenance import batches_hash, read_provenance, recipe_of, recipe_text

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
    given: dict[str, object] = {"passes": "int8-static", "calibration": "x.npz", "seed": 3, **options}
    made = sqcompile.compile("net.py:make", **given)  # type: ignore[arg-type]
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


class Known(Pass):
    """A pass of one's own, in a module."""

    level: int = 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult()


class Opaque:
    """A value of a user's type: each of its texts differs, and none is read back."""

    def __str__(self) -> str:
        return object.__repr__(self)


class Boxed(Pass):
    """A pass with an option that no text can hold."""

    box: Opaque | None = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult()


@pytest.mark.parametrize(
    ("backend", "name"), [("native", "a.sqm"), ("onnxruntime", "a.onnx"), ("reference", "a.pt2")]
)
def test_models_in_memory_have_a_recipe_without_a_model(folder: Path, backend: str, name: str) -> None:
    batch = torch.from_numpy(np.load("x.npz")["input"])
    made = sqcompile.compile(
        load_model("net.py:make"),
        "int8-static",
        (batch,),
        calibration=[batch],
        dynamic_shapes={"input": {0: "rows"}},
        backend=backend,
        seed=5,
    )
    assert isinstance(made, Compiled)
    made.save(name)
    found = read_provenance(name)
    assert found["object"] == "torch.nn.modules.container.Sequential"
    assert found["versions"]["torch"] == torch.__version__ and "left_out" not in found
    recipe = Recipe.parse(found["recipe"])
    assert (recipe.model, recipe.seed, recipe.backend) == (None, 5, backend)
    assert recipe.inputs == (InputSpec.parse("input: f32[rows, 16]"),)
    assert [str(item) for item in recipe.passes] == [record.text for record in made.report.passes]
    with pytest.raises(RecipeError, match="an object in memory") as caught:
        recipe_of(name)
    assert f"recipe print {name} > job.yaml" in str(caught.value.next_step)
    assert "`model:`, `data:`" in str(caught.value.next_step)
    # The way that the message shows leads to the same program.
    Path("job.yaml").write_text(f"model: net.py:make\ndata: x.npz\n{recipe_text(found)}")
    again = Recipe.load("job.yaml").compile()
    assert isinstance(again, Compiled)
    assert again.program.text() == made.program.text()


def test_batches_in_memory_have_a_hash(folder: Path) -> None:
    batch = torch.from_numpy(np.load("x.npz")["input"])

    def said(calibration: object) -> str:
        compiled(calibration=calibration, backend="native").save("a.sqm")
        with pytest.raises(RecipeError, match="data that was in memory"):
            recipe_of("a.sqm")
        return str(read_provenance("a.sqm")["data"])

    listed = said([batch])
    assert listed.startswith("in memory, sha256:")
    assert said([batch.numpy()]) == listed
    assert said([batch + 1]) != listed and said([batch[:4], batch[4:]]) != listed
    # What may give other batches the next time is not asked for them.
    assert said(iter([batch])) == "in memory"
    assert said(torch.utils.data.DataLoader(batch, batch_size=4)) == "in memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_batches_of_any_type_are_hashed(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    seen = {batches_hash([item]) for item in (values, values.T, values[:, :1], values.reshape(4))}
    # A matrix that is its own transpose is the same, however it lies in memory.
    assert len(seen) == 3 and all(text.startswith("in memory, sha256:") for text in seen)
    assert batches_hash([values[0, 0]]) != batches_hash([{"x": values[0, 0]}])
    assert batches_hash(["text"]) == batches_hash([3]) == "in memory"


def test_passes_of_ones_own_name_their_module(folder: Path) -> None:
    made = compiled(passes=[Known(level=2)], calibration=None, example_inputs=(torch.ones(4, 16),))
    assert made.program.signature.provenance is not None
    recipe = Recipe.parse(made.program.signature.provenance["recipe"])
    assert recipe.passes == (Known(level=2),) and recipe.imports == (Known.__module__,)


def test_what_has_no_text_is_left_out_and_named(folder: Path) -> None:
    class Local(Pass):
        def run(self, program: Program, context: PassContext) -> PassResult:
            return PassResult()

    passes = [
        Boxed(box=Opaque()),
        Local(),
        FineTune(train=lambda model: [item.data.mul_(0.5) for item in model.parameters()] and None),
        QuantizeWeights(),
    ]
    texts = set()
    for name in ("a.sqm", "b.sqm"):
        made = compiled(
            passes=passes, calibration=None, example_inputs=(torch.ones(4, 16),), backend="native"
        )
        made.save(name)
        texts.add(Path(name).read_bytes())
        passes[0] = Boxed(box=Opaque())
    assert len(texts) == 1  # no address of an object is in them
    found = read_provenance("a.sqm")
    assert Recipe.parse(found["recipe"]).passes == (QuantizeWeights(),)
    boxed, local, trained = found["left_out"]
    assert boxed == "pass 1 of 4, boxed: what it was given for 'box' cannot be written as text"
    assert local.startswith("pass 2 of 4, local: recipes do not know its class") and "Local" in local
    assert trained == "pass 3 of 4, fine-tune: what it was given for 'train' cannot be written as text"
    with pytest.raises(RecipeError, match="a pass that has no text") as caught:
        recipe_of("a.sqm")
    assert boxed in str(caught.value.seen)
    assert f"# {local}\n# {trained}\n" in recipe_text(found)


def test_the_signature_without_it_is_as_before(folder: Path) -> None:
    program = compiled(backend="reference").program
    assert "provenance" in json.loads(program.signature.to_json())
    from sqcompile.signature import Signature

    text = json.loads(program.signature.to_json())
    del text["provenance"]
    bare = Signature.from_json(json.dumps(text))
    assert bare.provenance is None and json.loads(bare.to_json()) == text
    assert bare == program.signature  # how it was made is no part of the interface
