"""Perplexity against bytes: fewer bits, more zeros, both, and bits chosen by layer, on one trained language model.

    python benchmarks/trade_offs.py [--rows 16] [--json benchmarks/results/trade_offs.json] [--only mixed,orders]

The model is examples/pycode_llama_5m. Methods are the best ones: GPTQ in groups of 32, SparseGPT with a refit, bits
chosen by `mixed-precision`; rounding to nearest and magnitude beside them. Embeddings and the head have 8 bits
throughout.

`bits` are those that a weight of the other layers takes: codes, scales and zero points in 4 bytes and b bits, and where
weights were pruned only the codes of those that are left, with one bit a weight that says which.
tools/make_figures.py draws the JSON file.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table

import sqcompile
from sqcompile.evaluation import perplexity
from sqcompile.passes import GPTQ, ApplyMasks, FoldQDQ, MaskWeights, SparseGPT, pipelines
from sqcompile.progress import BarProgress
from sqcompile.quantization.format import Format, PerGroup

FOLDER = Path(__file__).parents[1] / "examples" / "pycode_llama_5m"
EIGHT_BITS = (("kind:embedding", pipelines.INT8_WEIGHT), ("kind:head", pipelines.INT8_WEIGHT))
HEAD = ("kind:head",)
Passes = list[sqcompile.Pass]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16, help="rows of 256 calibration tokens")
    parser.add_argument(
        "--only", default="", help="series with one of these words in their name, beside the dense"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for row in measure(options.rows, options.only):
        rows.append(row)  # written at once: the whole takes half an hour
        write_json(options.json, "trade_offs", rows, calibration_rows=options.rows)
    table = Table("series", "asked for", "bits a weight", "zeros", "perplexity", "seconds")
    for row in rows:
        table.add_row(
            row["series"],
            row["point"],
            f"{row['bits']:.2f}",
            f"{row['zeros']:.0%}",
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=110).print(table)


def measure(count: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Yield a row for each way to compress the model, the dense model first."""
    stored = np.load(FOLDER / "tokens.npz")
    held_out = torch.from_numpy(stored["eval"].astype(np.int64))
    tokens = torch.from_numpy(stored["calib"].astype(np.int64))[:count]
    calibration = [{"input_ids": rows} for rows in tokens.split(8)]
    words = only.split(",")
    wanted = [job for job in jobs() if job[0] == "dense" or any(word in job[0] for word in words)]
    for series, point, passes in BarProgress().track(wanted, "compressing"):
        started = time.perf_counter()
        compiled = sqcompile.compile(
            FOLDER,
            passes=passes,
            calibration=calibration,
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch")}},
            backend="reference",
            verify="off",
        )
        assert isinstance(compiled, sqcompile.Compiled)
        seconds = time.perf_counter() - started
        bits, zeros = stored_bits(compiled)
        yield {
            "series": series,
            "point": point,
            "bits": bits,
            "zeros": zeros,
            "perplexity": perplexity(compiled, held_out),
            "seconds": seconds,
        }


def jobs() -> Iterator[tuple[str, str, Passes]]:
    """Yield series, what a point of it asks for, and the passes."""
    yield "dense", "float32", []
    for bits in (2, 3, 4):
        yield "rounded to nearest", f"{bits} bits", pipelines.weight_only(bits=bits)
    for bits in (2, 3, 4):
        yield "GPTQ", f"{bits} bits", pipelines.llm(bits=bits)
    for bits in (3, 4):
        yield "half zero, then GPTQ", f"{bits} bits", pipelines.llm(bits=bits, sparsity=0.5)
    for budget in (3.5, 4.0, 4.5):
        yield "mixed, chosen by layer", f"{budget} bits", pipelines.llm(budget=f"{budget} bits")
    four = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))
    prune = SparseGPT(sparsity=0.5, refit=True, exclude=HEAD)
    gptq = GPTQ(weight=four, formats=EIGHT_BITS)
    sweep = GPTQ(weight=four, formats=EIGHT_BITS, sparsity=0.5, unpruned=HEAD)
    canonical = pipelines.canonical()
    magnitude = MaskWeights(sparsity=0.5, exclude=HEAD)
    nearest = pipelines.weight_only(bits=4)[len(canonical) :]
    for point, passes in {
        "prune by size, round to nearest": [*canonical, magnitude, ApplyMasks(), *nearest],
        "prune by SparseGPT, round to nearest": [*canonical, prune, ApplyMasks(), *nearest],
        "prune by SparseGPT, then GPTQ": [*canonical, prune, ApplyMasks(), gptq, FoldQDQ()],
        "prune and round in one sweep of GPTQ": [*canonical, sweep, FoldQDQ()],
    }.items():
        yield "orders", point, passes


def stored_bits(compiled: sqcompile.Compiled) -> tuple[float, float]:
    """Return bits a weight and the share of pruned weights, of all linear layers but the head."""
    layers = [row for row in compiled.report.layers if row.name.startswith("model.layers.")]
    weights = sum(row.parameters for row in layers)
    bits = 8 * sum(row.size_bytes for row in layers)
    pruned = 0
    for name, promise in compiled.program.sparsity.items():
        if not name.startswith("model.layers."):  # the head
            continue
        row = next(row for row in layers if name.startswith(row.name))
        found = re.match(r"u?int(\d+)", row.weight)
        zeros = int((~promise.mask).sum())
        bits += promise.mask.numel() - zeros * (int(found[1]) if found else 32)
        pruned += zeros
    return bits / weights, pruned / weights


if __name__ == "__main__":
    main()
