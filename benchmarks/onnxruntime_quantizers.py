"""Our int8 ONNX files against those of ONNX Runtime's own quantizers, on the same models, in one run.

    SQCOMPILE_DATA=… python benchmarks/onnxruntime_quantizers.py [--threads 2] [--runs 50] [--json out.json]

Static int8 (CNNs): `sqcompile.passes.pipelines.int8_static` against `quantize_static` (QDQ, per channel,
uint8 activations, preprocessed with `quant_pre_process`, which folds batch norms). Dynamic int8
(transformers): `int8_dynamic` against `quantize_dynamic` (per channel, and its default per tensor; the
faster one is the peer). All files start from the same dense model; sessions have the same options, and
calls alternate. Speed is the median of the ratios turn by turn; above 1.0 ours is faster.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
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
from torch import nn

import sqcompile
from sqcompile.passes import pipelines

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Case:
    """One model and the inputs that it is timed and calibrated on, by input name."""

    name: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    static: bool
    dynamic_shapes: Any = None


class Reader(CalibrationDataReader):
    """Feeds the batches once."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--only", default="", help="names of cases, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    ort.set_default_logger_severity(3)
    wanted = [name for name in options.only.split(",") if name]
    rows = []
    for case in cases():
        if not wanted or case.name in wanted:
            print(f"{case.name} …", file=sys.stderr, flush=True)
            rows.append(measure(case, options.threads, options.runs))
    table = Table(
        "model", "dense fp32", "ONNX Runtime's quantizer", "ours", "ours vs quantizer", "ours vs dense"
    )
    for row in rows:
        table.add_row(
            row["model"],
            row["dense"],
            row["peer"],
            row["ours"],
            f"{row['ratio']:.2f}x",
            f"{row['dense_ratio']:.2f}x",
        )
    console = Console(width=150)
    console.print(table)
    console.print(
        f"onnxruntime {ort.__version__}, {options.threads} threads, median (min to max) of {options.runs} calls"
    )
    write_json(options.json, "onnxruntime_quantizers", rows, threads=options.threads, runs=options.runs)


def cases() -> Iterator[Case]:
    """The trained models where they can be had, and shapes of usual size with random weights."""
    data = os.environ.get("SQCOMPILE_DATA")
    if data:
        sys.path.insert(0, data)
        from models import CifarResNet, KeywordDSCNN
        from safetensors.torch import load_file

        for name, model, shape in (
            ("resnet20_cifar10", CifarResNet(3), (1, 3, 32, 32)),
            ("dscnn_kws", KeywordDSCNN(), (1, 1, 49, 10)),
        ):
            model.load_state_dict(load_file(f"{data}/{name}/model.safetensors"))
            yield Case(name, model.eval(), {"x": torch.randn(shape)}, static=True)
    from transformers import (
        AutoModelForCausalLM,
        BertConfig,
        BertModel,
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(1, 3, 224, 224)}
    yield Case("ResNet-50, 224²", ResNetForImageClassification(ResNetConfig()).eval(), image, static=True)
    mobilenet = MobileNetV2ForImageClassification(MobileNetV2Config()).eval()
    yield Case("MobileNetV2, 224²", mobilenet, image, static=True)
    llama = AutoModelForCausalLM.from_pretrained(EXAMPLES / "pycode_llama_5m", dtype=torch.float32).eval()
    llama.config.use_cache = False
    tokens = torch.from_numpy(np.load(EXAMPLES / "pycode_llama_5m/tokens.npz")["eval"][:1].astype(np.int64))
    yield Case("pycode-llama-5m, 256 tokens", llama, {"input_ids": tokens}, static=False)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False).eval()
    ids = torch.randint(0, 30000, (1, 128))
    yield Case("bert-base, 4 layers, 128 tokens", bert, {"input_ids": ids}, static=False)


def measure(case: Case, threads: int, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        dense, ours, peers = files(case, Path(folder))
        feed = {name: value.numpy() for name, value in case.inputs.items()}
        sessions = {"dense": session(dense, threads), "ours": session(ours, threads)}
        sessions |= {name: session(path, threads) for name, path in peers.items()}
        times = alternate({name: (lambda s=s: s.run(None, feed)) for name, s in sessions.items()}, runs=runs)
    best = min(peers, key=lambda name: sum(times[name]))
    return {
        "model": case.name,
        "dense": spread(times["dense"]),
        "peer": f"{best}: {spread(times[best])}",
        "ours": spread(times["ours"]),
        "ratio": median_ratio(times[best], times["ours"]),
        "dense_ratio": median_ratio(times["dense"], times["ours"]),
    }


def files(case: Case, folder: Path) -> tuple[Path, Path, dict[str, Path]]:
    """Write the dense model, ours, and the peers' files."""
    dense = sqcompile.compile(case.model, example_inputs=case.inputs, backend="onnxruntime")
    dense.save(folder / "dense.onnx")
    batches = [{name: perturbed(value, seed) for name, value in case.inputs.items()} for seed in range(4)]
    passes = pipelines.int8_static() if case.static else pipelines.int8_dynamic()
    compiled = sqcompile.compile(
        case.model, passes=passes, example_inputs=case.inputs, calibration=batches, backend="onnxruntime"
    )
    compiled.save(folder / "ours.onnx")
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(folder / "dense.onnx"), str(prepared), skip_symbolic_shape=True)
    peers: dict[str, Path] = {}
    if case.static:
        reader = Reader([{name: value.numpy() for name, value in batch.items()} for batch in batches])
        peers["quantize_static"] = folder / "static.onnx"
        quantize_static(
            str(prepared),
            str(peers["quantize_static"]),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    else:
        for per_channel in (False, True):
            name = "quantize_dynamic" + (" per channel" if per_channel else "")
            peers[name] = folder / f"dynamic{int(per_channel)}.onnx"
            quantize_dynamic(
                str(prepared), str(peers[name]), per_channel=per_channel, weight_type=QuantType.QInt8
            )
    return folder / "dense.onnx", folder / "ours.onnx", peers


def perturbed(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Another batch of the same kind: fresh noise for real inputs, the same tokens for ids."""
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
