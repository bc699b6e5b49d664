from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

INPUT = ("-i", "image: f32[batch, 3, 8, 8]")


def test_shows_interface_size_operators_and_layers(run, folder: Path) -> None:
    result = run("inspect", "net.py:make", *INPUT)
    assert result.code == 0, result.err
    assert "image: f32[batch, 3, 8, 8]" in result.out
    assert "output: f32[batch, 10]" in result.out
    assert "1 conv2d" in result.out
    assert "8x3x3x3" in result.out
    assert "program (level" not in result.out


def test_prints_the_graph_on_demand(run, folder: Path) -> None:
    plain = run("inspect", "net.py:make", *INPUT, "--graph").out
    assert "%conv2d: f32[batch, 8, 8, 8] = conv2d(%image, @conv.weight" in plain
    assert "net.py:14)" not in plain
    assert "(conv, net.py:14)" in run("inspect", "net.py:make", *INPUT, "--source").out


def test_json_has_the_same(run, folder: Path) -> None:
    about = run("inspect", "net.py:make", *INPUT, "--json", "--graph").json
    assert about["level"] == "aten"
    assert [layer["name"] for layer in about["layers"]] == ["conv", "fc"]
    assert about["operators"]["conv2d"] == 1
    assert about["graph"].startswith("program (level aten)")


def test_takes_programs_and_onnx_files(run, folder: Path) -> None:
    for name in ("net.pt2", "net.onnx"):
        assert run("compile", "net.py:make", "-d", "x.npz", "-p", "quantize-weights", "-o", name).code == 0
    program = run("inspect", "net.pt2", "--json").json
    assert program["level"] == "qdq"
    assert program["layers"][0]["weight"].startswith("int8")
    onnx = run("inspect", "net.onnx", "--json").json
    assert {item["name"]: item["type"] for item in onnx["largest"]}["conv.weight_codes"] == "int8"
    assert onnx["operators"]["Conv"] == 1
    shown = run("inspect", "net.onnx", "--graph").out
    assert "Conv[" in shown
    assert "int8" in shown


def test_onnx_sizes_count_what_is_stored(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    about = run("inspect", "net.onnx", "--json").json
    largest = about["largest"][0]
    assert (largest["shape"], largest["size_bytes"]) == ([8, 3, 3, 3], 8 * 3 * 3 * 3 * 4)


def test_what_is_no_model_is_named(run, folder: Path) -> None:
    (folder / "junk.onnx").write_bytes(b"not a model")
    result = run("inspect", "junk.onnx")
    assert result.code == 1
    assert "'junk.onnx'" in result.err
    assert "Traceback" not in result.err
    result = run("inspect", "x.npz")
    assert result.code == 1
    assert "'x.npz' is no model" in result.err


def test_an_artifact_of_our_own_engine_says_what_it_is(run, folder: Path) -> None:
    made = run("compile", "net.py:make", "-d", "x.npz", "-p", "quantize-weights", "-o", "net.sqm")
    assert made.code == 0, made.err
    about = run("inspect", "net.sqm", "--json").json
    assert about["inputs"] == ["image: f32[batch, 3, 8, 8]"]
    assert about["file_bytes"] == (folder / "net.sqm").stat().st_size
    result = run("inspect", "net.sqm")
    assert result.code == 0, result.err
    assert "image: f32[batch, 3, 8, 8]" in result.out and "quantize-weights" in result.out


@pytest.mark.parametrize("kind", ["onnx", "sqm", "pt2"])
def test_shows_how_an_object_was_compiled(run, folder: Path, kind: str) -> None:
    import sqcompile
    from sqcompile.models import load_model

    net = load_model("net.py:make")
    batch = torch.from_numpy(np.load("x.npz")["image"])
    sqcompile.compile(net, "int8-static", (batch,), calibration=[batch], seed=4).save(f"net.{kind}")
    result = run("inspect", f"net.{kind}")
    assert result.code == 0, result.err
    # Files that tests have imported before under this name have taken it.
    kind_of_net = f"{type(net).__module__}.Net"
    assert f"# the model was an object in memory, of the class {kind_of_net}: add `model:`" in result.out
    assert "seed: 4" in result.out and "- insert-observers" in result.out
    about = run("inspect", f"net.{kind}", "--json").json
    assert about["object"] == kind_of_net and about["seed"] == 4
    assert about["data"].startswith("in memory, sha256:") and about["left_out"] == []
    printed = run("recipe", "print", f"net.{kind}").out
    assert printed.strip() in result.out
    refused = run("compile", "--from", f"net.{kind}", "-o", "again.onnx")
    assert refused.code == 2 and "an object in memory" in refused.err
