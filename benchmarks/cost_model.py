"""What the cost model predicts for a layer, beside what the layer takes in a session.

    python benchmarks/cost_model.py [--threads 2] [--runs 30] [--json out.json]

A layer of a 1.1B-parameter Llama (5632 outputs, 2048 inputs; with `--width`, others), pruned and quantized in several
ways, for 1 and for 128 rows. It is called among five others of its size, so that weights come from memory as in a
model. The session times its steps; the product's own counts. Predictions are of the times that compiling uses: this
machine's after `sqcompile bench --kernels`, else the package's.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.kernel_times import kernel_times
from sqcompile.passes import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

INT8, INT4 = "int8:channel=0:narrow", "int4:group=128"
CASES: list[tuple[str, float, str | None]] = [
    (INT8, 0.0, None),
    (INT8, 0.5, None),
    (INT8, 0.7, None),
    (INT8, 0.75, "1x4"),
    (INT4, 0.0, None),
    (INT4, 0.5, None),
    ("int2:group=128", 0.0, None),
]
LAYERS = 6


class Layers(nn.Module):
    """Layers of one size, each of which multiplies the same rows."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        # Each quantizes rows of its own, so that they do not become one product.
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x + number) for number, layer in enumerate(self.layers)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--width", type=int, nargs=2, default=(5632, 2048), metavar=("OUTPUTS", "INPUTS"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times, remark = kernel_times()
    table = Table("weight", "zeros", "rows", "runs as", "predicted µs", "measured µs", "ratio")
    rows: list[dict[str, Any]] = []
    for text, sparsity, pattern in CASES:
        for count in (1, 128):
            rows.append(_measure(text, sparsity, pattern, count, options))
            row = rows[-1]
            name = text.partition(":")[0]
            zeros = f"{sparsity:.0%}" + (f" in {pattern}" if pattern else "")
            figures = (f"{row[key] / 1e3:.0f}" for key in ("predicted_ns", "measured_ns"))
            table.add_row(name, zeros, str(count), row["form"], *figures, f"{row['ratio']:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"times of {times.cpu}, {times.isa}, {times.threads} threads. {remark}")
    write_json(options.json, "cost_model", rows, threads=options.threads, runs=options.runs)


def _measure(
    text: str, sparsity: float, pattern: str | None, count: int, options: argparse.Namespace
) -> dict[str, Any]:
    x = torch.randn(count, options.width[1])
    program = trace(Layers(*options.width).eval(), (x,))
    mask = (
        MaskWeights(sparsity=sparsity) if pattern is None else MaskWeights(sparsity=sparsity, pattern=pattern)
    )
    masks: list[Pass] = [mask, ApplyMasks()] if sparsity else []
    passes = [*masks, QuantizeWeights(weight=Format.parse(text))]
    PassManager(passes, verify="off").run(program, PassContext())
    artifact: Any = BACKEND.lower(program)
    session: Any = BACKEND.load(artifact, threads=options.threads)
    runs = [session.inner.profile([x.numpy()]) for _ in range(options.runs)]
    products = [place for place, (name, _) in enumerate(session.model.steps) if name.startswith("linear")]
    assert len(products) == LAYERS
    measured = statistics.median(np.median([run[place] for run in runs]) for place in products)
    predicted = artifact.predict([x])["layers.0"]
    return {
        "weight": text,
        "zeros": sparsity,
        "pattern": pattern,
        "rows": count,
        "form": artifact.choices["layers.0"].form,
        "remark": artifact.choices["layers.0"].remark,
        "predicted_ns": predicted,
        "measured_ns": float(measured),
        "ratio": float(measured) / predicted,
    }


if __name__ == "__main__":
    main()
