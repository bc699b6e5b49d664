from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.data import DataFile
from sqcompile.errors import Error, FileError, InputError, PassOptionError, RecipeError
from sqcompile.input_spec import InputSpec
from sqcompile.pipeline import Pass, PassContext, PassResult, parse_pipeline
from sqcompile.sparsity import Pattern


class RecipeProbe(Pass):
    """Takes options of every kind, and does nothing.

    Attributes:
        share: A number.
        pattern: A pattern.
        names: Texts.
        table: Numbers by name.
        note: A text.
        on: A truth value.
    """

    share: float = 0.0
    pattern: Pattern = Pattern()
    names: tuple[str, ...] = ()
    table: tuple[tuple[str, float], ...] = ()
    note: str = ""
    on: bool = False
    limit: int | None = None

    def run(self, program: sqcompile.Program, context: PassContext) -> PassResult:
        return PassResult()


FULL = """
model: nets/net.py:make
passes:
  - remove-noops
  - recipe-probe:
      share: 5e-1
      pattern: 2:4
      names: [layers.*, fc]
      table: {conv*: 0.25}
      note: "2:4"
      on: true
      limit: none
  - recipe-probe{share=0.25}
backend: reference
data: {path: x.npz:image, batch: 16, samples: 100}
inputs:
  image: f32[batch, 3, height=64, 64]
dynamic_shapes:
  mask: {0: batch, -1: width}
seed: 7
threads: 2
verify: ends
max_memory: 8GB
work_dir: work
output: out/net.onnx
"""


def test_every_key_is_read() -> None:
    recipe = Recipe.parse(FULL)
    assert recipe.model == "nets/net.py:make"
    assert [str(item) for item in recipe.passes] == [
        "remove-noops",
        "recipe-probe{share=0.5,pattern=2:4,names=[layers.*,fc],table={conv*:0.25},note=2:4,on=true}",
        "recipe-probe{share=0.25}",
    ]
    assert recipe.backend == "reference"
    assert recipe.data == DataFile("x.npz:image", batch=16, samples=100)
    assert recipe.inputs == (InputSpec.parse("image: f32[batch, 3, height=64, 64]"),)
    assert recipe.dynamic_shapes == {"mask": {0: "batch", -1: "width"}}
    assert (recipe.seed, recipe.threads, recipe.verify, recipe.max_memory) == (7, 2, "ends", "8GB")
    assert (recipe.work_dir, recipe.output) == ("work", "out/net.onnx")


def test_every_field_is_in_the_example() -> None:
    recipe = Recipe.parse(FULL)
    default = Recipe()
    left = [
        item.name
        for item in dataclasses.fields(Recipe)
        if getattr(recipe, item.name) == getattr(default, item.name)
    ]
    assert left == ["imports"]  # tested below


def test_goes_to_yaml_and_back() -> None:
    recipe = Recipe.parse(FULL)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.parse(Recipe().to_yaml()) == Recipe()


def test_values_are_read_as_in_pipelines_not_as_yaml_reads_them() -> None:
    # YAML 1.1 reads these as 124, False, text and text.
    (probe,) = Recipe.parse(
        "passes: [{recipe-probe: {pattern: 2:4, note: no, share: 1e-3, table: {on: 5e-1}}}]"
    ).passes
    assert probe == RecipeProbe(pattern=Pattern(n=2, m=4), note="no", share=1e-3, table=(("on", 0.5),))


@pytest.mark.parametrize(
    "text",
    [
        "passes: remove-noops,recipe-probe{share=0.5}",
        "passes: [remove-noops, recipe-probe: {share: 0.5}]",
        "passes:\n- remove-noops\n- recipe-probe{share=0.5}\n",
        "passes:\n- remove-noops:\n- RecipeProbe: {share: 0.5}\n",
        "passes:\n- remove-noops,recipe-probe{share=0.5}\n",
    ],
)
def test_passes_in_every_form(text: str) -> None:
    assert list(Recipe.parse(text).passes) == parse_pipeline("remove-noops,recipe-probe{share=0.5}")


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("passes: []\nbakend: reference\n", 2, ["no key 'bakend'", "did you mean 'backend'"]),
        ("data:\n  path: x.npz\n  bacth: 3\n", 3, ["no key 'bacth' in 'data'", "did you mean 'batch'"]),
        ("data: {batch: 3}\n", 1, ["The data has no path"]),
        ("backend: onnx\n", 1, ["'backend'", "did you mean 'onnxruntime'"]),
        ("seed: soon\n", 1, ["'seed'", "the text 'soon'", "a whole number, 0 or more"]),
        ("seed: -1\n", 1, ["'seed'", "the number -1"]),
        ("threads: 0\n", 1, ["'threads'", "1 or more"]),
        ("seed: true\n", 1, ["the truth value true"]),
        ("model: [a]\n", 1, ["'model'", "a list of 1", "text"]),
        ("\n\nverify: always\n", 3, ["'verify'", "each, ends, off"]),
        ("max_memory: lots\n", 1, ["'lots' is no size"]),
        ("passes:\n- remove-noops\n- remove-nops\n", 3, ["no pass 'remove-nops'", "'remove-noops'"]),
        ("passes:\n- recipe-probe:\n    share: 0.5\n    shaer: 0.5\n", 4, ["no option 'shaer'", "'share'"]),
        ("passes:\n- recipe-probe:\n    share: 0.5\n    limit: some\n", 4, ["'limit'", "int or none"]),
        ("passes:\n- recipe-probe:\n    pattern: 4:2\n", 3, ["'pattern'", "N:M"]),
        ("passes:\n- recipe-probe:\n  share: 0.5\n", 2, ["names one pass", "indent the options"]),
        ("passes:\n- recipe-probe{share=0.5\n", 2, ["leaves a bracket or quote open"]),
        ("passes:\n- recipe-probe: [share]\n", 2, ["'recipe-probe'", "a table"]),
        ("passes:\n- 3: {}\n", 2, ["no pass '3'"]),
        ("inputs:\n- 'x: f32[2]'\n- 'y f32'\n", 3, ["'y f32' describes no input"]),
        ("dynamic_shapes:\n  x: {first: batch}\n", 2, ["'first' is no axis"]),
        ("dynamic_shapes:\n  x: {0: 3}\n", 2, ["a name, such as batch"]),
        ("dynamic_shapes:\n  x: batch\n", 2, ["'dynamic_shapes.x'", "a table"]),
        ("seed: 1\nseed: 2\n", 2, ["'seed' is given twice", "line 1"]),
        ("passes: [a\n", 2, ["is no YAML"]),
        ("passes: {a: b: c}\n", 1, ["is no YAML"]),
        ("? [a]\n: b\n", 1, ["A key is not a word"]),
        ("- passes\n", 1, ["'recipe'", "a table"]),
        ("just text\n", 1, ["'recipe'", "a table"]),
    ],
)
def test_a_mistake_is_named_with_its_line_and_repair(text: str, line: int, parts: list[str]) -> None:
    with pytest.raises(Error) as caught:
        Recipe.parse(text, file="job.yaml")
    assert f"job.yaml, line {line}" in str(caught.value)
    assert caught.value.exit_code == (1 if "size" in parts[0] else 2)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n# nothing\n"])
def test_an_empty_recipe_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError, match="is empty"):
        Recipe.parse(text)


def test_an_endless_recipe_is_an_error() -> None:
    with pytest.raises(RecipeError):
        Recipe.parse("passes: &a [*a]")


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "model: net.py:make\ndata: {path: x.npz:image, tokenizer: tok}\noutput: out.onnx\nwork_dir: /tmp/work\n"
    )
    recipe = Recipe.load(tmp_path / "job.yaml")
    assert recipe.model == f"{tmp_path}/net.py:make"
    assert recipe.data == DataFile(f"{tmp_path}/x.npz:image", tokenizer=f"{tmp_path}/tok")
    assert recipe.output == f"{tmp_path}/out.onnx"
    assert recipe.work_dir == "/tmp/work"


def test_a_module_by_name_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: package.module:make\n")
    assert Recipe.load(tmp_path / "job.yaml").model == "package.module:make"


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="recipe"):
        Recipe.load(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is no text"):
        Recipe.load(tmp_path / "job.yaml")


def test_imports_define_passes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from sqcompile import Pass, PassResult\n\n\nclass OwnOfTheRecipe(Pass):\n"
        "    def run(self, program, context):\n        return PassResult()\n"
    )
    # Whatever the order of the keys.
    (tmp_path / "job.yaml").write_text("passes: [own-of-the-recipe]\nimports: own.py\n")
    recipe = Recipe.load(tmp_path / "job.yaml")
    assert [str(item) for item in recipe.passes] == ["own-of-the-recipe"]
    (tmp_path / "own.py").write_text("import no_such_package\n")
    (tmp_path / "job2.yaml").write_text("imports: [own2.py]\n")
    with pytest.raises(FileError, match=r"own2\.py") as caught:
        Recipe.load(tmp_path / "job2.yaml")
    assert "job2.yaml, line 1" in str(caught.value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_compile_takes_what_is_left_at_its_default_from_the_recipe(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.ones((6, 4), dtype=np.float32))
    (tmp_path / "job.yaml").write_text(
        "passes: [recipe-probe]\nbackend: reference\ndata: {path: x.npy, batch: 3}\nverify: 'off'\nseed: 3\n"
    )
    compiled = sqcompile.compile(Net(), passes=str(tmp_path / "job.yaml"))
    assert [record.text for record in compiled.report.passes] == ["recipe-probe"]
    assert compiled.report.backend == "reference"
    assert compiled.report.passes[0].distance is None  # verify: off
    assert str(compiled.program.signature.inputs[0]) == "x: f32[batch, 4]"
    given = sqcompile.compile(Net(), passes=Recipe.load(tmp_path / "job.yaml"), verify="ends")
    assert given.report.output_distance is not None


def test_a_recipe_with_its_model_compiles_by_itself(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def forward(self, x):\n        return x + 1\n\n\n"
        "def make():\n    return Net()\n"
    )
    (tmp_path / "job.yaml").write_text(
        "model: net.py:make\nbackend: reference\ninputs: {x: 'f32[batch, 4]'}\n"
    )
    compiled = Recipe.load(tmp_path / "job.yaml").compile()
    assert torch.equal(compiled(torch.zeros(5, 4)), torch.ones(5, 4))
    with pytest.raises(RecipeError, match="names no model"):
        Recipe(passes=()).compile()


def test_a_dynamic_dimension_of_an_unknown_input_is_named() -> None:
    with pytest.raises(Error, match="no input 'y'"):
        sqcompile.compile(
            Net(),
            example_inputs=(torch.zeros(2, 4),),
            dynamic_shapes={"y": {0: "batch"}},
            backend="reference",
        )


class Strided(nn.Module):
    """Any image of three pixels or more in each direction."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(self.up(self.down(x)), size=x.shape[2:], mode="bilinear")


class TestRangesOfNames:
    """Who names a dimension says nothing about its range: it is what the model takes."""

    NAMES: ClassVar = {"x": {0: "batch", 2: "height", 3: "width"}}

    def test_the_range_is_found(self) -> None:
        model = Strided()
        compiled = sqcompile.compile(
            model, example_inputs=(torch.zeros(2, 3, 32, 32),), dynamic_shapes=self.NAMES, backend="reference"
        )
        assert compiled.program.signature.dims == {
            "batch": (0, None),
            "height": (3, None),
            "width": (3, None),
        }
        x = torch.rand(1, 3, 5, 18)
        assert torch.equal(compiled(x), model(x))
        with pytest.raises(InputError, match="'height' is out of its range") as caught:
            compiled(torch.rand(1, 3, 2, 18))
        assert caught.value.expected == "3 to any size"

    def test_what_torch_suggests_is_taken(self) -> None:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Parameter(torch.zeros(64, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.table[: x.shape[1]]

        compiled = sqcompile.compile(
            Positions(),
            example_inputs=(torch.zeros(2, 8, 4),),
            dynamic_shapes=({0: "batch", 1: "length"},),
            backend="reference",
        )
        assert compiled.program.signature.dims["length"][1] == 64

    def test_a_range_that_is_given_is_not_changed(self) -> None:
        axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        with pytest.raises(InputError, match="does not take every size") as caught:
            sqcompile.compile(
                Strided(),
                example_inputs=(torch.zeros(2, 3, 32, 32),),
                dynamic_shapes={"x": axes},
                backend="reference",
            )
        assert "narrow" in str(caught.value.next_step)


class TestInputsBesideData:
    """What inputs are described with holds beside a data file, too, which alone makes the batch dynamic."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> str:
        np.savez(tmp_path / "x.npz", x=np.arange(24, dtype=np.float32).reshape(6, 4))
        return str(tmp_path / "x.npz")

    def compiled(self, data: str, spec: str, batch: int | None = None) -> sqcompile.Compiled:
        recipe = Recipe(
            backend="reference", data=DataFile(data, batch=batch), inputs=(InputSpec.parse(spec),)
        )
        return sqcompile.compile(Net(), passes=recipe)

    def test_without_a_description_the_batch_is_dynamic(self, data: str) -> None:
        compiled = sqcompile.compile(Net(), passes=Recipe(backend="reference", data=DataFile(data)))
        assert str(compiled.program.signature.inputs[0]) == "x: f32[batch, 4]"

    def test_a_number_is_the_fixed_batch(self, data: str) -> None:
        compiled = self.compiled(data, "x: f32[2, 4]")
        assert str(compiled.program.signature.inputs[0]) == "x: f32[2, 4]"
        assert compiled(torch.zeros(2, 4)).shape == (2, 2)

    def test_a_name_is_a_dynamic_batch(self, data: str) -> None:
        compiled = self.compiled(data, "x: f32[n, 4]")
        assert str(compiled.program.signature.inputs[0]) == "x: f32[n, 4]"

    def test_another_batch_of_the_data_is_refused(self, data: str) -> None:
        with pytest.raises(RecipeError, match="another batch size") as caught:
            self.compiled(data, "x: f32[2, 4]", batch=3)
        assert "batches of 3" in str(caught.value.seen) and caught.value.expected == "batches of 2"

    @pytest.mark.parametrize("spec", ["x: f32[2, 5]", "x: f32[2, 4, 1]", "x: f32[7, 4]"])
    def test_other_sizes_than_the_data_has_are_refused(self, data: str, spec: str) -> None:
        with pytest.raises(RecipeError, match="other sizes than it is described with") as caught:
            self.compiled(data, spec)
        assert caught.value.expected == spec

    def test_an_input_that_is_none_is_refused(self, data: str) -> None:
        with pytest.raises(RecipeError, match="no input 'xs'") as caught:
            self.compiled(data, "xs: f32[2, 4]")
        assert "'x'" in str(caught.value.next_step)


def test_an_option_error_in_a_recipe_keeps_its_kind() -> None:
    with pytest.raises(PassOptionError):
        Recipe.parse("passes: [recipe-probe: {nope: 1}]")
