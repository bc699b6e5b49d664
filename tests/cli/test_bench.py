from __future__ import annotations

from pathlib import Path

import pytest


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


def test_a_command_line_without_a_subject_or_with_too_many(run, folder: Path) -> None:
    result = run("bench")
    assert result.code == 2 and "name models or artifacts to measure" in result.err
    result = run("bench", "net.sqm", "--kernels")
    assert result.code == 2 and "leave out net.sqm" in result.err


def test_artifacts_of_the_engine_are_called_so(run, folder: Path) -> None:
    (folder / "mlp.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()\n"
    )
    run("compile", "mlp.py:make", "-i", "input: f32[2, 3]", "-o", "mlp.sqm")
    data = run("bench", "mlp.sqm", "--runs", "1", "--json").json
    assert [timing["backend"] for timing in data["timings"]] == ["native"]


def test_kernels_are_measured_and_kept(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqcompile.backends.native import kernel_times, measure_kernels
    from sqcompile.backends.native.kernel_times import SHIPPED, KernelTimes

    monkeypatch.setenv(kernel_times.CACHE_VARIABLE, str(folder / "cache"))
    measured = []

    def measure(**options: object) -> KernelTimes:
        measured.append(options["threads"])
        return KernelTimes.load(SHIPPED)

    monkeypatch.setattr(measure_kernels, "measure_kernels", measure)
    result = run("bench", "--kernels", "--threads", "3", "--json")
    assert result.code == 0, result.err
    assert measured == [3] and result.json["path"] == str(kernel_times.cache_file(3))
    assert KernelTimes.load(kernel_times.cache_file(3)).forms == KernelTimes.load(SHIPPED).forms
    shown = run("bench", "--kernels", "--threads", "3").out
    assert "4-bit, bitmask" in shown and "Written to" in shown
    dense = KernelTimes.load(SHIPPED).forms["int8"]
    line = next(line for line in shown.splitlines() if "int8 " in line and "100%" in line)
    assert f" {1e6 / dense.memory[0][0]:.1f} " in line and f" {128e6 / dense.memory[-1][0]:.1f} " in line
    refused = run("bench", "--kernels", "--backend", "onnxruntime")
    assert refused.code == 1 and "chooses no kernels by measured times" in refused.err
