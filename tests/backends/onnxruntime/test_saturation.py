"""The same answer on every CPU: int8 weights that choose their form at load."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sqcompile.backends.onnxruntime import saturation
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.program import Program
from sqcompile.tracing import trace

Lower = Callable[[Program], OnnxArtifact]

QEMU = shutil.which("qemu-x86_64")
needs_emulator = pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (package qemu-user) is not installed")

# Runs a model on a CPU that the emulator shows: a script, since nothing of ours is loaded there.
RUN = """
import sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
if sys.argv[4] == "plain":
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
(result,) = session.run(None, {"x": np.load(sys.argv[2])})
np.save(sys.argv[3], result)
"""


class Extreme(nn.Module):
    """Weights at the ends of int8 in pairs of equal sign, as saturation needs them."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)]
        if not convolution:
            layers = [nn.Linear(32, 16), nn.Linear(16, 8)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            shape = layer.weight.shape  # type: ignore[union-attr, operator]
            signs = torch.where(torch.rand(shape, generator=generator) < 0.7, 1.0, -1.0)
            layer.weight = nn.Parameter(signs * (0.9 + 0.1 * torch.rand(shape, generator=generator)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def _quantized(quantizer: Any, kind: str) -> tuple[Program, torch.Tensor]:
    convolution = kind == "convolution"
    x = torch.rand(1, 8, 8, 8) + 1 if convolution else torch.rand(6, 32) + 1
    program = quantizer.weights(trace(Extreme(convolution).eval(), (x,)), "int8:channel=0")
    activation = "uint8:affine:dynamic" if kind == "dynamic" else "uint8:affine"
    quantizer.activations(program, activation, [x], kinds=["linear", "conv2d"], outputs=kind == "convolution")
    return program, x


def _operators(artifact: OnnxArtifact) -> Counter[str]:
    return Counter(node.op_type for node in artifact.model.graph)


@pytest.mark.parametrize(
    ("kind", "choices", "kernels"),
    [
        ("convolution", 2, {"QLinearConv": 3}),  # the depthwise one cannot saturate
        ("linear", 2, {"QGemm": 2}),
        ("dynamic", 2, {"DynamicQuantizeMatMul": 2}),
    ],
)
def test_the_choice_is_gone_once_the_model_is_loaded(
    kind: str,
    choices: int,
    kernels: dict[str, int],
    quantizer: Any,
    lower: Lower,
    optimized: Callable[[OnnxArtifact], Counter[str]],
) -> None:
    program, _ = _quantized(quantizer, kind)
    artifact = lower(program)
    assert _operators(artifact)["If"] == choices
    assert any(f"{choices} int8 weights" in note for note in artifact.notes)
    found = optimized(artifact)
    assert not {"If", "Cast", "Equal", "ReduceMin", "MatMulInteger"} & set(found)
    assert {name: found[name] for name in kernels} == kernels


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("kind", ["convolution", "linear", "dynamic"])
def test_every_optimization_level_runs_it(kind: str, level: str, quantizer: Any, lower: Lower) -> None:
    program, x = _quantized(quantizer, kind)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(
        lower(program).to_bytes(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": x.numpy()})
    expected = program(x).detach()
    step = float(expected.max() - expected.min()) / 255
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1.01 * step)


@pytest.mark.parametrize("kind", ["convolution", "linear", "dynamic"])
def test_in_the_runtimes_own_format(kind: str, quantizer: Any, lower: Lower, tmp_path: Path) -> None:
    """As its converter for small builds writes it with the style `Fixed`, which docs/quantization.md names."""
    program, x = _quantized(quantizer, kind)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(lower(program).to_bytes(), options, providers=["CPUExecutionProvider"])
    session = onnxruntime.InferenceSession(tmp_path / "model.ort", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x.numpy()})
    expected = program(x).detach()
    step = float(expected.max() - expected.min()) / 255
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=0, atol=1.01 * step)


def test_each_weight_is_stored_once(quantizer: Any, lower: Lower) -> None:
    program, _ = _quantized(quantizer, "linear")
    large = [
        value for value in lower(program).model.graph.initializers.values() if value.const_value.size >= 128
    ]
    weights = [value for value in large if not str(value.name).startswith("sqcompile/")]
    assert [str(value.dtype) for value in weights] == ["INT8", "INT8"]


@pytest.mark.parametrize(
    ("text", "choices"), [("int7:channel=0", 0), ("int4:channel=0", 0), ("int8:channel=0", 2)]
)
def test_small_codes_need_no_choice(text: str, choices: int, quantizer: Any, lower: Lower) -> None:
    x = torch.rand(6, 32)
    program = quantizer.weights(trace(Extreme(False).eval(), (x,)), text)
    quantizer.activations(program, "uint8:affine", [x], kinds=["linear"])
    assert _operators(lower(program))["If"] == choices


def test_the_bound_is_what_sixteen_bits_hold() -> None:
    assert 2 * 255 * saturation.SAFE <= np.iinfo(np.int16).max < 2 * 255 * (saturation.SAFE + 1)


def _run_emulated(model: Path, x: torch.Tensor, cpu: str, level: str = "all") -> np.ndarray:
    assert QEMU is not None
    folder = model.parent
    script = folder / "run.py"
    script.write_text(RUN)
    np.save(folder / "x.npy", x.numpy())
    command = [QEMU, "-cpu", cpu, sys.executable, script, model, folder / "x.npy", folder / "y.npy", level]
    done = subprocess.run([str(item) for item in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "y.npy")


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Haswell", "Nehalem"])  # AVX2 without VNNI; SSE4.2
@pytest.mark.parametrize("kind", ["convolution", "linear", "dynamic"])
def test_a_cpu_without_vnni_gives_the_same_answer(
    kind: str, cpu: str, quantizer: Any, lower: Lower, tmp_path: Path
) -> None:
    program, x = _quantized(quantizer, kind)
    path = tmp_path / "model.onnx"
    lower(program).save(path)
    expected = program(x).detach().numpy()
    step = (expected.max() - expected.min()) / 255
    for level in ("all", "plain"):
        result = _run_emulated(path, x, cpu, level)
        assert np.abs(result - expected).max() <= 1.01 * step, level


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolution", "linear", "dynamic"])
def test_without_the_choice_it_would_not(
    kind: str, quantizer: Any, lower: Lower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: the same weights without the choice are far off on the emulated CPU."""
    monkeypatch.setattr(saturation, "guard", lambda model: 0)
    program, x = _quantized(quantizer, kind)
    path = tmp_path / "model.onnx"
    lower(program).save(path)
    assert "If" not in {node.op_type for node in onnx.load(path).graph.node}
    expected = program(x).detach().numpy()
    step = (expected.max() - expected.min()) / 255
    assert np.abs(_run_emulated(path, x, "Haswell") - expected).max() > 10 * step


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("weight", ["int4:group=32", "uint8:affine:group=32"])
def test_packed_weights_give_the_same_answer(
    weight: str, quantizer: Any, lower: Lower, tmp_path: Path
) -> None:
    x = torch.rand(6, 32) + 1
    program = quantizer.weights(trace(Extreme(False).eval(), (x,)), weight)
    artifact = lower(program)
    path = tmp_path / "model.onnx"
    artifact.save(path)
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (here,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(_run_emulated(path, x, "Haswell"), here, rtol=1e-5, atol=1e-4)
