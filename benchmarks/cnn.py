"""CNNs in 8 bits: the native engine, dense, in blocks and with half the channels, beside ONNX Runtime and OpenVINO.

    python benchmarks/cnn.py [--models resnet50,mobilenet_v2,ds_cnn,resnet20] [--batch 1] [--threads 2] [--rounds 20]
        [--openvino PYTHON] [--work FOLDER] [--prepare] [--profile] [--json out.json]

Random weights: speed does not depend on values, but for how many are zero. ONNX Runtime and OpenVINO run the very
program that our dense one runs, as an ONNX file with explicit quantization (u8 values, s8 weights a channel).
OpenVINO has an environment of its own (`pip install openvino`), whose Python is given. All take turns, each
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
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cnn_models import MODELS, make_model
from common import median_ratio, spread, write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from sqcompile.backends.native import _native
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.onnxruntime import OnnxRuntimeBackend
from sqcompile.calibration import Calibration
from sqcompile.passes import ApplyMasks, MaskWeights, pipelines
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.tracing import trace

SPARSITY = 0.85
SETTLE_SECONDS, CALLS = 0.04, 5  # of each turn
FORMS = {"dense": {}, "85 % 1x4 blocks": {}, "half the channels": {"width": 0.5}}
HALVED = ("resnet50", "mobilenet_v2")
ORT, OPENVINO = "onnxruntime", "openvino"
Run = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--openvino", type=Path, help="the Python of an environment with OpenVINO")
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
                    profile(console, f"{name}, {form}", path, shape, options)
    write_json(options.json, "cnn", rows, batch=options.batch, threads=options.threads, rounds=options.rounds)


def prepare(name: str, options: argparse.Namespace) -> dict[str, Path]:
    """Compile a model in all its forms; those that are in the work folder already are taken from there."""
    files: dict[str, Path] = {}
    options.work.mkdir(parents=True, exist_ok=True)
    for form, arguments in FORMS.items():
        if "width" in arguments and name not in HALVED:
            continue
        stem = f"{name}-{options.batch}-{form.replace(' ', '_').replace('%', 'percent')}"
        files[form] = options.work / f"{stem}.sqm"
        wanted = {form: files[form]}
        if form == "dense":
            files[ORT] = wanted[ORT] = options.work / f"{stem}.onnx"
        if all(path.exists() for path in wanted.values()):
            continue
        program = quantized(name, form, options.batch, arguments)
        for path in wanted.values():
            backend = BACKEND if path.suffix == ".sqm" else OnnxRuntimeBackend()
            backend.lower(program).save(path)
    return files


def quantized(name: str, form: str, batch: int, arguments: dict[str, float]) -> Program:
    """Return a model with its weights pruned and everything in 8 bits."""
    model = make_model(name, **arguments)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn((batch, *MODELS[name][1]), generator=generator)
    program = trace(model, (data,))
    passes: list[Pass] = list(
        pipelines.int8_static(
            observer="min-max", equalize=False, correct_bias=False
        )  # fast, and as good for speed
    )
    if form.startswith("85"):
        masks: list[Pass] = [
            MaskWeights(sparsity=SPARSITY, pattern="1x4", layers=prunable(model)),
            ApplyMasks(),
        ]
        place = len(pipelines.canonical())
        passes = [*passes[:place], *masks, *passes[place:]]
    PassManager(passes).run(program, PassContext(calibration=Calibration([data], program.signature)))
    return program


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
        else:
            calls[form] = onnxruntime_run(path, shape, options.threads)
            if options.openvino is not None:
                script = Path(__file__).with_name("openvino_worker.py")
                command = [str(options.openvino), str(script), str(path), str(options.threads)]
                worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                workers.append(worker)
                assert worker.stdout is not None
                print("OpenVINO", worker.stdout.readline().strip())
                calls[OPENVINO] = worker_run(worker)
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
    """Print who took how long, and how many times faster than the peers that is."""
    peers = [peer for peer in (ORT, OPENVINO) if peer in times]
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
    console: Console, title: str, path: Path, shape: tuple[int, ...], options: argparse.Namespace
) -> None:
    """Print where the time goes, and of convolutions which share of the dot products that the CPU could do."""
    session = BACKEND.load(path, threads=options.threads)
    data = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    runs = [session.inner.profile([data]) for _ in range(15)]  # type: ignore[attr-defined]
    table = Table(title=title, title_justify="left")
    for column in ("layer", "step", "µs", "share"):
        table.add_column(column, justify="left" if column in ("layer", "step") else "right")
    times = np.median(runs, axis=0)
    for (step, layer), elapsed in zip(session.model.steps, times, strict=True):  # type: ignore[attr-defined]
        if elapsed > 0:
            table.add_row(layer, step, f"{elapsed / 1e3:.1f}", f"{elapsed / times.sum():.1%}")
    console.print(table)
    pool = _native.ThreadPool(options.threads)
    started = time.perf_counter_ns()
    done = _native.multiply_registers(pool, None, 2_000_000)
    peak = done / (time.perf_counter_ns() - started)
    console.print(f"dot products on registers: {peak:.0f} GOPS")


if __name__ == "__main__":
    main()
