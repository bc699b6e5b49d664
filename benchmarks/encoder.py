"""BERT-base: the native engine, dense and in blocks, beside ONNX Runtime's int8.

    python benchmarks/encoder.py [--layers 12] [--batch 1] [--sequence 128] [--rounds 15] [--quick]
        [--work FOLDER] [--prepare] [--json out.json]

Random weights: speed does not depend on values, but for how many are zero, which magnitude pruning decides.
The contenders take turns; ratios are medians of the turns' ratios. ONNX Runtime gets its own quantizers, dynamic
and static (QDQ, activations u8, weights s8 a channel), after its `quant_pre_process` (shapes, graph optimization);
the best of them counts. `--prepare` only compiles, into the work folder, where a later run finds the files.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import alternate, median_ratio, spread, write_json
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.kernels import default_isa
from sqcompile.calibration import Calibration
from sqcompile.passes import ApplyMasks, MaskWeights, pipelines
from sqcompile.passes.quantize import (
    Calibrate,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    QuantizeWeights,
)
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

TOKEN = Format.parse("uint8:affine:token:dynamic")
BLOCKS: dict[float, list[Pass]] = {
    sparsity: [MaskWeights(sparsity=sparsity, pattern="1x4"), ApplyMasks()] for sparsity in (0.8, 0.85)
}
DYNAMIC: list[Pass] = [QuantizeWeights(activation=TOKEN)]
STATIC: list[Pass] = [InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ()]
OURS: dict[str, list[Pass]] = {
    "native int8, a scale a token": DYNAMIC,
    "native int8, static": STATIC,
    "native int8, 80 % 1x4 blocks": [*BLOCKS[0.8], *DYNAMIC],
    "native int8, 85 % 1x4 blocks": [*BLOCKS[0.85], *DYNAMIC],
}
TARGETS = {
    "native int8, a scale a token": 1.4,
    "native int8, static": 1.4,
    "native int8, 80 % 1x4 blocks": 2.5,
    "native int8, 85 % 1x4 blocks": 3.0,
}
VOCABULARY = 30522


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="three rounds, without the static contenders")
    parser.add_argument("--profile", action="store_true", help="say where our time goes, by operator")
    parser.add_argument("--work", type=Path, default=Path("build/encoder"), help="folder of compiled models")
    parser.add_argument("--prepare", action="store_true", help="compile only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.quick:
        options.rounds = 3
    ids = torch.randint(
        0, VOCABULARY, (options.batch, options.sequence), generator=torch.Generator().manual_seed(0)
    )
    files = _prepare(ids, options)
    if options.prepare:
        return
    calls: dict[str, Callable[[], Any]] = {}
    sessions = {}
    for name, path in files.items():
        if path.suffix == ".sqm":
            sessions[name] = session = BACKEND.load(path, threads=options.threads)
            calls[name] = lambda session=session: session.inner.run([ids.numpy()])
        else:
            calls[name] = _onnxruntime(path, ids, options.threads)
    times = alternate(calls, runs=options.rounds, settle=True)
    _print(times, options)
    if options.profile:
        for name, session in sessions.items():
            _print_profile(name, session, [ids.numpy()])


def _model(layers: int) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers)).eval()


def _prepare(ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Path]:
    """Compile all contenders; those that are in the work folder already are taken from there."""
    folder = options.work / f"{options.layers}-layers-{options.batch}x{options.sequence}"
    folder.mkdir(parents=True, exist_ok=True)
    ours = {
        name: folder / f"{name.replace(' ', '_').replace('%', 'percent').replace(',', '')}.sqm"
        for name, passes in OURS.items()
        if not (options.quick and passes is STATIC)
    }
    peers = {
        "ONNX Runtime float32": folder / "float.onnx",
        "ONNX Runtime int8, dynamic": folder / "dynamic.onnx",
        "ONNX Runtime int8, static": folder / "static.onnx",
    }
    if options.quick:
        del peers["ONNX Runtime int8, static"]
    missing = [name for name, path in ours.items() if not path.exists()]
    incomplete = not all(path.exists() for path in peers.values())
    model = _model(options.layers) if missing or incomplete else None
    for name in missing:
        _compile(model, ids, OURS[name], ours[name])
    if incomplete:
        _export(model, ids, peers)
    return ours | peers


def _compile(model: Any, ids: torch.Tensor, passes: list[Pass], path: Path) -> None:
    program = trace(model, {"input_ids": ids})
    calibration = Calibration([{"input_ids": ids}], program.signature)
    manager = PassManager([*pipelines.canonical(), *passes], verify="off")
    manager.run(program, PassContext(calibration=calibration))
    BACKEND.lower(program).save(path)


class _Calls(CalibrationDataReader):
    def __init__(self, ids: torch.Tensor) -> None:
        self.left = [{"input_ids": ids.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None


def _export(model: Any, ids: torch.Tensor, files: dict[str, Path]) -> None:
    """Export to ONNX and quantize by ONNX Runtime's own tools."""
    plain = files["ONNX Runtime float32"]
    ready = plain.with_name("ready.onnx")

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            result = self.model(input_ids)
            return result.last_hidden_state, result.pooler_output

    torch.onnx.export(
        Outputs(), (ids,), plain, input_names=["input_ids"], dynamo=True, verbose=False, external_data=False
    )
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    quantize_dynamic(
        ready, files["ONNX Runtime int8, dynamic"], weight_type=QuantType.QInt8, per_channel=True
    )
    if static := files.get("ONNX Runtime int8, static"):
        quantize_static(
            ready,
            static,
            _Calls(ids),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _onnxruntime(path: Path, ids: torch.Tensor, threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids.numpy()}
    return lambda: session.run(None, inputs)


def _print(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    best = min(
        (name for name in times if name.startswith("ONNX Runtime int8")),
        key=lambda name: statistics.median(times[name]),
    )
    table = Table("", "time", f"over {best}", "target")
    rows = []
    for name, values in times.items():
        ratio = median_ratio(times[best], values)
        target = TARGETS.get(name)
        table.add_row(name, spread(values), f"{ratio:.2f}", "" if target is None else f"{target}")
        rows.append({"contender": name, "times_ns": values, "over_best_peer": ratio, "target": target})
    Console(width=120).print(table)
    settings = {key: str(value) for key, value in vars(options).items()}
    write_json(options.json, "encoder", rows, isa=default_isa(), best_peer=best, **settings)


def _print_profile(name: str, session: Any, inputs: list[Any]) -> None:
    times = np.median([session.inner.profile(inputs) for _ in range(7)], axis=0)
    parts: dict[str, float] = {}
    for (operator, _), time_ns in zip(session.model.steps, times, strict=True):
        parts[operator] = parts.get(operator, 0.0) + float(time_ns)
    total = sum(parts.values())
    table = Table(name, "ms", "share")
    for operator, time_ns in sorted(parts.items(), key=lambda item: -item[1])[:12]:
        table.add_row(operator, f"{time_ns / 1e6:.2f}", f"{time_ns / total:.0%}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
