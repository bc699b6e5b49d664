from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sqcompile.cli.compare import find_jump
from sqcompile.compare import LayerDistance
from sqcompile.errors import BackendError
from sqcompile.metrics import EQUAL, Distance


@pytest.fixture
def compiled(run, folder: Path):
    def make(passes: str, name: str) -> None:
        result = run(
            "compile", "net.py:make", "-d", "x.npz", "-p", passes, "-o", name, "--backend", "reference"
        )
        assert result.code == 0, result.err

    return make


def test_a_folded_program_agrees_layer_by_layer(run, folder: Path, compiled) -> None:
    compiled("fold-batch-norm", "folded.pt2")
    about = run("compare", "net.py:make", "folded.pt2", "-d", "x.npz", "--json").json
    # The folded convolution stands for the batch norm, in the file too; compared with the convolution
    # before the batch norm it would be far off.
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]
    assert all(layer["sqnr_db"] > 100 for layer in about["layers"])
    assert about["jump"] is None
    # The other way round, too: the convolution is judged by its batch norm, which the folded one stands for.
    about = run("compare", "folded.pt2", "net.py:make", "-d", "x.npz", "--json").json
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]
    assert all(layer["sqnr_db"] > 100 for layer in about["layers"])


def test_names_the_layer_where_the_error_jumps(run, folder: Path, compiled) -> None:
    compiled("quantize-weights{weight=int2:channel=0,layers=[fc]}", "coarse.pt2")
    result = run("compare", "net.py:make", "coarse.pt2", "-d", "x.npz")
    assert result.code == 0, result.err
    assert "jumps at layer 'fc'" in result.out
    (row,) = [line for line in result.out.splitlines() if "◀" in line]
    assert "fc" in row


def test_rescaled_channels_are_no_error(run, folder: Path, compiled) -> None:
    (folder / "deep.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)\n"
        "    with torch.no_grad():\n        first.weight.mul_(torch.tensor([1e-2, 1, 10, 1e2]).view(4, 1, 1, 1))\n"
        "    return nn.Sequential(first, nn.ReLU(), second)\n"
    )
    np.savez(folder / "deep.npz", input=np.load(folder / "x.npz")["image"])
    arguments = (
        "deep.py:make",
        "-d",
        "deep.npz",
        "-p",
        "equalize-layers",
        "-o",
        "even.pt2",
        "--backend",
        "reference",
    )
    result = run("compile", *arguments, "--json")
    assert result.json["report"]["passes"][0]["changes"] > 0
    assert all(layer["distance"]["sqnr_db"] > 100 for layer in result.json["report"]["layers"])
    about = run("compare", "deep.py:make", "even.pt2", "-d", "deep.npz", "--json").json
    # From the file, too. Only float32's rounding is left of factors up to a hundred.
    assert [layer["name"] for layer in about["layers"]] == ["0", "2"]
    assert all(layer["sqnr_db"] > 100 for layer in about["layers"])
    # On both sides: two programs whose channels were rescaled alike are equal.
    same = run("compare", "even.pt2", "even.pt2", "-d", "deep.npz", "--json").json
    assert [layer["max_error"] for layer in same["layers"]] == [0, 0]


def test_equal_programs_are_equal(run, folder: Path) -> None:
    result = run("compare", "net.py:make", "net.py:make", "-d", "x.npz")
    assert result.code == 0
    assert "All layers are equal." in result.out


def test_compares_outputs_with_an_artifact(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    about = run("compare", "net.py:make", "net.onnx", "-d", "x.npz", "--json").json
    assert about["outputs"]["output"]["sqnr_db"] > 100
    assert about["batches"] == 2


def test_limits_the_samples(run, folder: Path) -> None:
    arguments = (
        "compare",
        "net.py:make",
        "net.py:make",
        "-d",
        "x.npz",
        "--batch",
        "2",
        "--samples",
        "6",
        "--json",
    )
    assert run(*arguments).json["batches"] == 3


def test_models_with_other_outputs_cannot_be_compared(run, folder: Path) -> None:
    (folder / "other.py").write_text(
        "from torch import nn\n\n\nclass Other(nn.Module):\n"
        "    def forward(self, image):\n        return image, image + 1\n\n\ndef make():\n    return Other()\n"
    )
    result = run("compare", "net.py:make", "other.py:make", "-d", "x.npz")
    assert result.code == 1
    assert "different outputs" in result.err


def _rows(*levels: float) -> list[LayerDistance]:
    distances = [EQUAL if math.isinf(level) and level > 0 else Distance(level, 1.0, 0.1) for level in levels]
    return [LayerDistance(f"layer{index}", "", "", distance) for index, distance in enumerate(distances)]


@pytest.mark.parametrize(
    ("levels", "jump"),
    [
        ([], None),
        ([math.inf, math.inf], None),
        ([math.inf, 41.0, 38.0, 35.0], None),  # a first rounding, and even growth
        ([45.0, 42.0, 25.0, 10.0], 2),  # the first one, not the deepest
        ([39.0, 45.0, 30.0], 0),  # below 40 at once
        ([45.0, 60.0, 38.0], None),  # against the least before, not the last
    ],
)
def test_a_jump_is_a_fall_of_ten_decibels(levels: list[float], jump: int | None) -> None:
    assert find_jump(_rows(*levels)) == jump


def test_a_layer_that_is_not_finite_is_a_jump() -> None:
    rows = [*_rows(60.0), LayerDistance("bad", "", "", Distance(-math.inf, 0.0, math.inf, finite=False))]
    assert find_jump(rows) == 1


def test_the_second_gets_the_data_of_the_first(run, folder: Path) -> None:
    (folder / "renamed.py").write_text((folder / "net.py").read_text().replace("image", "picture"))
    result = run("compare", "net.py:make", "renamed.py:make", "-d", "x.npz")
    assert result.code == 1
    assert "picture" in result.err
    run(
        "compile",
        "net.py:make",
        "-d",
        "x.npz",
        "-p",
        "fold-batch-norm",
        "-o",
        "net.pt2",
        "--backend",
        "reference",
    )
    assert run("compare", "net.pt2", "net.pt2").code == 0  # made up once, for both


def test_takes_onnx_files_of_other_tools(run, folder: Path) -> None:
    import onnx

    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    model = onnx.load(folder / "net.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "foreign.onnx")
    about = run("compare", "net.py:make", "foreign.onnx", "-d", "x.npz", "--json").json
    assert about["outputs"]["output"]["sqnr_db"] > 100
    data = run("bench", "net.onnx", "foreign.onnx", "--runs", "1", "--json").json
    assert [timing["name"] for timing in data["timings"]] == ["net.onnx", "foreign.onnx"]
    (folder / "damaged.onnx").write_bytes((folder / "foreign.onnx").read_bytes()[:-200])
    result = run("bench", "damaged.onnx")
    assert result.code == 1
    assert "damaged.onnx" in result.err


def test_layers_of_an_artifact_are_its_runtimes_own(run, folder: Path) -> None:
    coarse = "fold-batch-norm,quantize-weights{weight=int8:channel=0,formats=[[fc,int2:channel=0]]}"
    for name, backend in (("net.onnx", "onnxruntime"), ("net.sqm", "native")):
        made = run("compile", "net.py:make", "-d", "x.npz", "-p", coarse, "-o", name, "--backend", backend)
        assert made.code == 0, made.err
        about = run("compare", "net.py:make", name, "-d", "x.npz", "--json").json
        assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"] and about["jump"] == "fc"
        assert any("runtime's own" in note for note in about["notes"])
    both = run("compare", "net.onnx", "net.sqm", "-d", "x.npz", "--json").json
    assert both["outputs"]["output"]["sqnr_db"] > 40  # 8-bit data in the one, float in the other
    assert [layer["name"] for layer in both["layers"]] == ["conv", "fc"]
    # The recipes' programs are one: what differs is how the runtimes compute the second layer.
    assert all(40 < layer["sqnr_db"] < 100 for layer in both["layers"][1:])


def test_a_runtime_that_cannot_hand_layers_over_is_told_of(
    run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")

    def refuse(self, inputs, watched, on_value):
        raise BackendError("No layers today.")

    monkeypatch.setattr("sqcompile.watched.WatchedSession.__call__", refuse)
    about = run("compare", "net.py:make", "net.onnx", "-d", "x.npz", "--json").json
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]
    assert any("run in PyTorch: No layers today." in note for note in about["notes"])


def test_bisect_prints_what_to_paste(run, folder: Path) -> None:
    coarse = "fold-batch-norm,quantize-weights{weight=int8:channel=0,formats=[[fc,int2:channel=0]]}"
    run("compile", "net.py:make", "-d", "x.npz", "-p", coarse, "-o", "net.onnx")
    result = run("compare", "net.py:make", "net.onnx", "-d", "x.npz", "--bisect")
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("  - quantize-weights")]
    assert "{fc:float}" in line
    (folder / "mended.yaml").write_text(
        f"model: net.py:make\ndata: x.npz\npasses:\n  - fold-batch-norm\n{line}\n"
    )
    assert run("recipe", "validate", "mended.yaml").code == 0
    about = run("compare", "net.py:make", "net.onnx", "-d", "x.npz", "--bisect", "--json").json
    assert [trial["left"] for trial in about["bisect"]] == [[], ["fc"]]
    # The pass that did it: folding keeps the numbers, and two bits of one layer do not.
    folded, rounded = about["passes"]
    assert folded["pass"] == "fold-batch-norm" and folded["sqnr_db"] > 100
    assert about["pass_jump"] == rounded["pass"] and rounded["pass"].startswith("quantize-weights")
    assert rounded["sqnr_db"] == pytest.approx(about["bisect"][0]["sqnr_db"])
    (blamed,) = [line for line in result.out.splitlines() if "◀" in line and "quantize-weights" in line]
    assert "dB" in blamed
    refused = run("compare", "net.py:make", "net.py:make", "-d", "x.npz", "--bisect")
    assert refused.code == 1 and "no recipe to change" in refused.err


@pytest.fixture
def from_python(folder: Path):
    """Compiles net.py's net as an object, so that the file's recipe names no model."""
    import torch

    import sqcompile
    from sqcompile.models import load_model

    def make(passes: str, *names: str, backend: str = "onnxruntime") -> None:
        batch = torch.from_numpy(np.load("x.npz")["image"])
        compiled = sqcompile.compile(
            load_model("net.py:make"),
            passes,
            calibration=[batch],
            dynamic_shapes={"image": {0: "batch"}},
            backend=backend,
        )
        for name in names:
            compiled.save(name)

    return make


def test_files_without_a_recipe_to_run_are_asked_for_their_values(run, folder: Path, from_python) -> None:
    coarse = "fold-batch-norm,quantize-weights{weight=int8:channel=0,formats=[[fc,int2:channel=0]]}"
    from_python(coarse, "net.onnx", "net.pt2")
    about = run("compare", "net.py:make", "net.onnx", "-d", "x.npz", "--json").json
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"] and about["jump"] == "fc"
    assert about["notes"] == [
        "the layers of 'net.onnx' are the file's own values, each as a further output of it"
    ]
    for pair in (("net.onnx", "net.pt2"), ("net.pt2", "net.onnx"), ("net.onnx", "net.onnx")):
        about = run("compare", *pair, "-d", "x.npz", "--json").json
        assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"], pair
        # MatMulNBits rounds activations, which the program does not; convolutions are float's rounding apart.
        assert all(layer["sqnr_db"] is None or layer["sqnr_db"] > 30 for layer in about["layers"]), pair
    # With a file that carries a recipe, whose layers are its runtime's own.
    run("compile", "net.py:make", "-d", "x.npz", "-p", "fold-batch-norm", "-o", "named.sqm")
    about = run("compare", "named.sqm", "net.onnx", "-d", "x.npz", "--json").json
    assert about["jump"] == "fc" and len(about["notes"]) == 2
    assert "'named.sqm' are its runtime's own" in about["notes"][0]


def test_an_engine_file_without_a_recipe_says_what_to_save(run, folder: Path, from_python) -> None:
    from_python("fold-batch-norm", "net.sqm", "net.onnx", "net.pt2", backend="native")
    about = run("compare", "net.py:make", "net.sqm", "-d", "x.npz", "--json").json
    assert about["outputs"]["output"]["sqnr_db"] > 100 and about["layers"] == []
    (note,) = about["notes"]
    assert "an object in memory" in note and "compiled.save('model.onnx')" in note
    # What the note says works with the same object.
    for name in ("net.onnx", "net.pt2"):
        about = run("compare", "net.py:make", name, "-d", "x.npz", "--json").json
        assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]


def test_a_file_of_one_batch_size_says_which(run, folder: Path) -> None:
    import torch

    import sqcompile
    from sqcompile.models import load_model

    batch = torch.from_numpy(np.load("x.npz")["image"])[:5]
    compiled = sqcompile.compile(load_model("net.py:make"), (), (batch,), backend="onnxruntime")
    compiled.save("five.onnx")
    result = run("compare", "net.py:make", "five.onnx", "-d", "x.npz")
    assert result.code == 1 and "'five.onnx' takes 5 samples a call: --batch 5" in result.err
    about = run("compare", "net.py:make", "five.onnx", "-d", "x.npz", "--batch", "5", "--json").json
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]


def test_files_without_common_names_show_their_outputs(run, folder: Path, from_python) -> None:
    import onnx

    from_python("fold-batch-norm", "net.onnx")
    model = onnx.load(folder / "net.onnx")
    del model.metadata_props[:]
    inner = {name for node in model.graph.node for name in node.output} - {"output"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"value/{name}" if name in inner else name for name in names]
    onnx.save(model, folder / "other.onnx")
    about = run("compare", "net.py:make", "other.onnx", "-d", "x.npz", "--json").json
    assert about["outputs"]["output"]["sqnr_db"] > 100 and about["layers"] == []
    (note,) = about["notes"]
    assert "show their outputs only: no layer's value has the same name" in note
