"""Convolutions of 8-bit codes by weights most of which are zero, against the dense one: one layer at a time.

    python benchmarks/sparse_convolutions.py [--sparsity 0.8,0.85,0.9] [--threads 1] [--rounds 15] [--json out.json]

Zeros lie in 1x4 blocks, or anywhere. Layers are those of ResNet-50 at 224². Of each layer all forms take turns, each is
a plan of its own whose step is timed by the engine, and a ratio is the median of the turns' ratios of its time to the
dense one's. Beside it stands what lowering chose, and the ratio by which it did (`lower/convolution_forms.py`).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.session import NativeSession
from sqcompile.calibration import Calibration
from sqcompile.passes import ApplyMasks, MaskWeights, pipelines
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.tracing import trace

# Side of the image, inputs, outputs, side of the kernel.
LAYERS = (
    (56, 64, 64, 1),
    (56, 64, 256, 1),
    (28, 128, 128, 3),
    (14, 1024, 256, 1),
    (14, 256, 256, 3),
    (7, 512, 2048, 1),
    (7, 512, 512, 3),
)
PATTERNS = ("1x4", "unstructured")


class Layer(nn.Module):
    """A convolution between codes: what comes in is rounded before it, what goes out behind it."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", default="0.8,0.85,0.9")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    table = Table("layer", "zeros", "where", "runs as", "time / dense", "predicted")
    for side, inputs, outputs, kernel in LAYERS:
        name = f"{side}x{side}, {inputs} to {outputs}, {kernel}x{kernel}"
        model = Layer(inputs, outputs, kernel).eval()
        x = torch.randn((1, inputs, side, side), generator=torch.Generator().manual_seed(1))
        forms = {("dense", 0.0): lowered(model, x)}
        for sparsity in map(float, options.sparsity.split(",")):
            for pattern in PATTERNS:
                forms[pattern, sparsity] = lowered(model, x, pattern, sparsity)
        times = measure(forms, x.numpy(), options)
        for (pattern, sparsity), artifact in forms.items():
            own, dense = times[pattern, sparsity], times["dense", 0.0]
            ratio = statistics.median(a / b for a, b in zip(own, dense, strict=True))
            product = artifact.products["layer"]
            rows.append({"layer": name, "pattern": pattern, "sparsity": sparsity, "form": product.form})
            rows[-1] |= {"ratio": ratio, "predicted": product.share, "ns": own}
            table.add_row(
                name, f"{sparsity:.0%}", pattern, product.form, f"{ratio:.2f}", f"{product.share:.2f}"
            )
    Console(width=110).print(table)
    write_json(options.json, "sparse_convolutions", rows, threads=options.threads, rounds=options.rounds)


def lowered(model: nn.Module, x: torch.Tensor, pattern: str = "", sparsity: float = 0.0) -> NativeArtifact:
    """Lower a model, pruned and in 8 bits."""
    program = trace(model, (x,))
    masks: list[Pass] = [MaskWeights(sparsity=sparsity, pattern=pattern), ApplyMasks()] if pattern else []
    passes = [*masks, *pipelines.int8_static(observer="min-max", equalize=False, correct_bias=False)]
    context = PassContext(calibration=Calibration([x], program.signature))
    PassManager(passes, verify="off").run(program, context)
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, NativeArtifact)
    return artifact


def measure(
    forms: dict[tuple[str, float], NativeArtifact], x: np.ndarray, options: argparse.Namespace
) -> dict[tuple[str, float], list[float]]:
    """Return the times of the convolution's step in ns, of all forms in turns."""
    sessions: dict[tuple[str, float], NativeSession] = {}
    for key, artifact in forms.items():
        session = BACKEND.load(artifact, threads=options.threads)
        assert isinstance(session, NativeSession)
        sessions[key] = session
    times: dict[tuple[str, float], list[float]] = {key: [] for key in forms}
    for turn in range(-2, options.rounds):
        for key, session in sessions.items():
            place = next(i for i, (step, _) in enumerate(session.model.steps) if step.startswith("conv_q8"))
            elapsed = statistics.median(session.inner.profile([x])[place] for _ in range(3))
            if turn >= 0:
                times[key].append(elapsed)
    return times


if __name__ == "__main__":
    main()
