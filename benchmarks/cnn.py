"""CNNs in 8 bits: the native engine, dense, sparse and with half the channels, beside other runtimes.

    python benchmarks/cnn.py [--models resnet50,mobilenet_v2,ds_cnn,resnet20] [--batch 1] [--threads 2] [--rounds 20]
        [--forms dense,…] [--openvino PYTHON] [--deepsparse PYTHON] [--work FOLDER] [--prepare] [--profile]
        [--json out.json]

Random weights: speed does not depend on values, but for how many are zero. ONNX Runtime runs the very program that
our dense one runs, as an ONNX file with explicit quantization (u8 values, s8 weights a channel). OpenVINO runs the
same file and, if its environment has NNCF, what that makes of the model in floats. DeepSparse runs what ONNX Runtime's
quantizer makes of the model with operators of opset 13, dense and with 85 % of the weights zero. Both have environments
of their own (`pip install openvino nncf`, `pip install deepsparse==1.8.0`), whose Python is given. All take turns, each
times itself, and ratios are medians of the turns' ratios. `--prepare` only compiles, into the work folder, where
a later run finds the files.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cnn_models import MODELS, make_model
from common import median_ratio, spread, write_json
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.table import Table
from torch import nn

from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.session import NativeSession
from sqcompile.backends.onnxruntime import OnnxRuntimeBackend
from sqcompile.calibration import Calibration
from sqcompile.passes import ApplyMasks, MaskWeights, pipelines
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.tracing import trace


@dataclass(frozen=True)
class Form:
    """A form of a model of ours: which weights are zero together, and how many channels it has."""

    pattern: str = ""
    width: float = 1.0

    def make(self, name: str) -> nn.Module:
        """Return the model, dense."""
        return make_model(name, **({} if self.width == 1 else {"width": self.width}))


SPARSITY = 0.85
WORKERS = Path(__file__).parent
# Of each turn. ONNX Runtime's threads spin for some 50 ms after a call.
SETTLE_SECONDS, CALLS = 0.25, 5
FORMS = {
    "dense": Form(),
    "85 % 1x4 blocks": Form(pattern="1x4"),
    "85 % anywhere": Form(pattern="unstructured"),
    "half the channels": Form(width=0.5),
}
HALVED = ("resnet50", "mobilenet_v2")
ORT, OPENVINO, NNCF = "onnxruntime", "openvino", "openvino, NNCF"
DEEPSPARSE = {"deepsparse": "dense", "deepsparse, 85 % anywhere": "85 % anywhere"}
Run = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--forms", default=",".join(FORMS), help="of our models")
    parser.add_argument("--openvino", type=Path, help="the Python of an environment with OpenVINO, and NNCF")
    parser.add_argument("--deepsparse", type=Path, help="the Python of an environment with DeepSparse")
    parser.add_argument("--work", type=Path, default=Path("build/cnn"), help="folder of compiled models")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--profile", action="store_true", help="say where our time goes, by layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    console = Console(width=130)
    for name in options.models.split(","):
        files = prepare(name, options)
        if options.prepare:
            continue
        shape = (options.batch, *MODELS[name][1])
        times = measure(files, shape, options)
        rows += show(console, name, times, options)
        if options.profile:
            for form, path in files.items():
                if path.suffix == ".sqm":
                    profile(console, name, form, path, shape, options)
    write_json(options.json, "cnn", rows, batch=options.batch, threads=options.threads, rounds=options.rounds)


def prepare(name: str, options: argparse.Namespace) -> dict[str, Path]:
    """Compile a model in all its forms; those that are in the work folder already are taken from there."""
    files: dict[str, Path] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    for label in dict.fromkeys(["dense", *options.forms.split(",")]):
        form = FORMS[label]
        if form.width != 1 and name not in HALVED:
            continue
        stem = f"{name}-{options.batch}-{label.replace(' ', '_').replace('%', 'percent')}"
        files[label] = options.work / f"{stem}.sqm"
        wanted = {label: files[label]}
        if label == "dense":
            files[ORT] = wanted[ORT] = options.work / f"{stem}.onnx"
        if all(path.exists() for path in wanted.values()):
            continue
        program = quantized(name, form, options.batch)
        for path in wanted.values():
            backend = BACKEND if path.suffix == ".sqm" else OnnxRuntimeBackend()
            backend.lower(program).save(path)
    if options.openvino is not None:
        plain = options.work / f"{name}-{options.batch}-float.onnx"
        files[NNCF] = plain.with_name(f"{name}-{options.batch}-nncf.xml")
        if not files[NNCF].exists():
            export(name, options.batch, plain)
            command = [str(options.openvino), str(WORKERS / "openvino_worker.py"), "--quantize"]
            if subprocess.run([*command, str(plain), str(files[NNCF])]).returncode != 0:
                del files[NNCF]
    for peer, label in DEEPSPARSE.items() if options.deepsparse is not None else ():
        files[peer] = (
            options.work / f"{name}-{options.batch}-{peer.replace(' ', '_').replace('%', 'percent')}.onnx"
        )
        if not files[peer].exists():
            plain = options.work / f"{name}-{options.batch}-float.onnx"
            export(name, options.batch, plain, FORMS[label].pattern)
            quantize_by_onnxruntime(plain, files[peer], (options.batch, *MODELS[name][1]))
    return files


def quantized(name: str, form: Form, batch: int) -> Program:
    """Return a model with its weights pruned and everything in 8 bits."""
    model = form.make(name)
    data = example((batch, *MODELS[name][1]))
    program = trace(model, (data,))
    passes: list[Pass] = list(
        pipelines.int8_static(
            observer="min-max", equalize=False, correct_bias=False
        )  # fast, and as good for speed
    )
    if form.pattern:
        masks: list[Pass] = [
            MaskWeights(sparsity=SPARSITY, pattern=form.pattern, layers=prunable(model)),
            ApplyMasks(),
        ]
        place = len(pipelines.canonical())
        passes = [*passes[:place], *masks, *passes[place:]]
    PassManager(passes).run(program, PassContext(calibration=Calibration([data], program.signature)))
    return program


def example(shape: tuple[int, ...]) -> torch.Tensor:
    """Return random images."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def export(name: str, batch: int, path: Path, pattern: str = "") -> None:
    """Write a model in floats as ONNX with operators of opset 13, which every peer reads."""
    model = make_model(name)
    for layer in prunable(model) if pattern else ():
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            weight[weight.abs() < weight.abs().flatten().quantile(SPARSITY)] = 0
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model, (example((batch, *MODELS[name][1])),), str(path), dynamo=False, opset_version=13, **names
    )


def quantize_by_onnxruntime(plain: Path, path: Path, shape: tuple[int, ...]) -> None:
    """Quantize an ONNX file by ONNX Runtime's own quantizer: explicit, u8 values, s8 weights a channel."""

    class Batch(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": example(shape).numpy()}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    quantize_static(
        str(plain),
        str(path),
        Batch(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def prunable(model: nn.Module) -> tuple[str, ...]:
    """Return the layers to prune: those with blocks of inputs, neither depthwise nor the first."""
    return tuple(
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= 8
    )


def measure(
    files: dict[str, Path], shape: tuple[int, ...], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Let everybody take turns; each call returns its own ns."""
    calls: dict[str, Run] = {}
    workers = []
    for form, path in files.items():
        if path.suffix == ".sqm":
            calls[form] = native_run(path, shape, options.threads)
            continue
        if form == ORT:
            calls[form] = onnxruntime_run(path, shape, options.threads)
        if form in (ORT, NNCF) and options.openvino is not None:
            worker = start(options.openvino, "openvino_worker.py", path, options.threads)
            workers.append(worker)
            calls[NNCF if form == NNCF else OPENVINO] = worker_run(worker)
        if form in DEEPSPARSE:
            worker = start(options.deepsparse, "deepsparse_worker.py", path, options.threads)
            workers.append(worker)
            calls[form] = worker_run(worker)
    times: dict[str, list[float]] = {form: [] for form in calls}
    for turn in range(-2, options.rounds):
        for form, call in calls.items():
            # Untimed first: threads of the one before spin for a while, on cores that this one wants.
            settled = time.perf_counter() + SETTLE_SECONDS
            while time.perf_counter() < settled:
                call()
            elapsed = statistics.median(call() for _ in range(CALLS))
            if turn >= 0:
                times[form].append(elapsed)
    for worker in workers:
        worker.terminate()
    return times


def start(python: Path, script: str, path: Path, threads: int) -> subprocess.Popen[str]:
    """Start a peer in its own environment; it says its version when it is ready."""
    command = [str(python), str(WORKERS / script), str(path), str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("ready"):
            print(script.removesuffix("_worker.py"), line.removeprefix("ready").strip())
            return worker
    raise SystemExit(f"{' '.join(command)} ended before it was ready")


def native_run(path: Path, shape: tuple[int, ...], threads: int) -> Run:
    session = BACKEND.load(path, threads=threads)
    data = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def run() -> float:
        started = time.perf_counter_ns()
        session.inner.run([data])  # type: ignore[attr-defined]
        return float(time.perf_counter_ns() - started)

    return run


def onnxruntime_run(path: Path, shape: tuple[int, ...], threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [port] = session.get_inputs()
    data = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def run() -> float:
        started = time.perf_counter_ns()
        session.run(None, {port.name: data})
        return float(time.perf_counter_ns() - started)

    return run


def worker_run(worker: subprocess.Popen[str]) -> Run:
    def run() -> float:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    return run


def show(
    console: Console, name: str, times: dict[str, list[float]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print who took how long, and how many times faster than the dense peers that is."""
    peers = [peer for peer in (ORT, OPENVINO, NNCF, next(iter(DEEPSPARSE))) if peer in times]
    best = min(peers, key=lambda peer: statistics.median(times[peer]))
    table = Table(title=f"{name}, batch {options.batch}, {options.threads} threads", title_justify="left")
    for column in ("", "time", "ONNX Runtime's time / its own", f"best peer's ({best}) / its own"):
        table.add_column(column)
    rows = []
    for form, own in times.items():
        ratios = [median_ratio(times[peer], own) for peer in (ORT, best)]
        table.add_row(form, spread(own), *(f"{ratio:.2f}" for ratio in ratios))
        rows.append(
            {
                "model": name,
                "form": form,
                "ns": own,
                "onnxruntime": ratios[0],
                "best_peer": ratios[1],
                "peer": best,
            }
        )
    console.print(table)
    return rows


def profile(
    console: Console, name: str, form: str, path: Path, shape: tuple[int, ...], options: argparse.Namespace
) -> None:
    """Print where the time goes, and which share of the dot products that the CPU could do in it was done.

    The first share counts what is zero, too; the second one only what is left.
    """
    session = BACKEND.load(path, threads=options.threads)
    assert isinstance(session, NativeSession)
    data = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    runs = [session.inner.profile([data]) for _ in range(15)]
    model = FORMS[form].make(name)
    counts, pruned, peak = multiply_adds(model, shape), set(prunable(model)), session.peak()
    table = Table(title=f"{name}, {form}", title_justify="left")
    for column in ("layer", "step", "µs", "share", "of peak", "without zeros"):
        table.add_column(column, justify="left" if column in ("layer", "step") else "right")
    times = np.median(runs, axis=0)
    for (step, layer), elapsed in zip(session.model.steps, times, strict=True):
        if elapsed <= 0:
            continue
        cells = [layer, step, f"{elapsed / 1e3:.1f}", f"{elapsed / times.sum():.1%}"]
        if layer in counts and step.startswith(("conv", "linear")):
            kept = 1 - SPARSITY if FORMS[form].pattern and layer in pruned else 1.0
            part = counts[layer] / elapsed / peak
            cells += [f"{part:.0%}", f"{part * kept:.0%}"]
        table.add_row(*cells)
    console.print(table)
    console.print(f"dot products on registers: {2 * peak:.0f} GOPS")


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Count the multiply-adds of a model's convolutions and linear layers, by name."""
    found: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, _: Any, output: torch.Tensor) -> None:
            found[name] = output.numel() * layer.weight[0].numel()

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count(name))
    with torch.no_grad():
        model(torch.zeros(shape))
    return found


if __name__ == "__main__":
    main()
