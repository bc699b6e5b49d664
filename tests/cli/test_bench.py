from __future__ import annotations

from pathlib import Path


def test_measures_models_and_artifacts_against_the_first(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    result = run("bench", "net.py:make", "net.onnx", "-d", "x.npz", "--runs", "3", "--threads", "1", "--json")
    assert result.code == 0, result.err
    data = result.json
    assert [timing["name"] for timing in data["timings"]] == ["net.py:make", "net.onnx"]
    first, second = data["timings"]
    assert first["ratio"] == 1.0
    assert second["ratio"] == first["median_ns"] / second["median_ns"]
    for timing in data["timings"]:
        assert 0 < timing["low_ns"] <= timing["median_ns"] <= timing["high_ns"]
        assert timing["size_bytes"] > 1000
    assert data["inputs"] == ["image: f32[8, 3, 8, 8]"]
    assert data["environment"]["threads"] == "1"


def test_prints_a_table(run, folder: Path) -> None:
    result = run("bench", "net.py:make", "-d", "x.npz", "--runs", "2", "--backend", "reference")
    assert result.code == 0, result.err
    assert "1.00x (the first)" in result.out
    assert "2 alternating calls" in result.out
    assert "reference" in result.out


def test_an_artifact_needs_no_data(run, folder: Path) -> None:
    run("compile", "net.py:make", "-d", "x.npz", "-o", "net.onnx")
    data = run("bench", "net.onnx", "--runs", "1", "--json").json
    assert data["inputs"] == ["image: f32[2, 3, 8, 8]"]
    assert data["notes"] == ["there is no data: the inputs are made up"]


def test_a_missing_artifact_is_named(run, folder: Path) -> None:
    result = run("bench", "net.onx")
    assert result.code == 1
    assert "'net.onx' cannot be read" in result.err
