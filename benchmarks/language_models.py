"""Perplexity of language models by method, bits and sparsity, beside rounding to nearest and magnitude.

    SQCOMPILE_DATA=… python benchmarks/language_models.py [--only stories260K] [--rows 80] [--json out.json]

Each row is one way to compress all linear layers but the one that makes the outputs; embeddings and that
one are dense where weights are pruned only, and have 8 bits where they are rounded. `share` is the rise of
the perplexity as a part of the baseline's: of rounding to nearest (affine, groups of 32) at equal bits, of
magnitude pruning at equal sparsity, and of one after the other for both. Held-out tokens are those of
`tokens.npz`; calibration sees others.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table

import sqcompile
from sqcompile.evaluation import perplexity
from sqcompile.mixed_precision import Candidate
from sqcompile.passes import (
    AWQ,
    GPTQ,
    AdaRound,
    ApplyMasks,
    Calibrate,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    MaskWeights,
    MixedPrecision,
    QuantizeWeights,
    RotateWeights,
    SmoothQuant,
    SparseGPT,
    SplitInputs,
    Wanda,
    pipelines,
)
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.sparsity import Pattern

CANDIDATES = tuple(
    Candidate(Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(32)))
    for bits in (2, 3, 4, 8)
)
EXAMPLES = Path(__file__).parents[1] / "examples"
Passes = list[sqcompile.Pass]
HEAD = ("lm_head",)
MAPPINGS = ("tanh", "mu-law", "log2", "nf", "codebook")
EIGHT_BITS = (("kind:embedding", pipelines.INT8_WEIGHT), ("kind:head", pipelines.INT8_WEIGHT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names of models, separated by commas")
    parser.add_argument(
        "--targets", default="", help="only targets with this in their name, beside the dense"
    )
    parser.add_argument(
        "--methods",
        default="",
        help="only methods with one of these words in their name, beside each baseline",
    )
    parser.add_argument("--rows", type=int, default=80, help="rows of calibration tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    folders = {"pycode-llama-5m": EXAMPLES / "pycode_llama_5m"}
    if data := os.environ.get("SQCOMPILE_DATA"):
        folders["stories260K"] = Path(data) / "stories260K"
    wanted = [name for name in options.only.split(",") if name] or list(folders)
    rows: list[dict[str, Any]] = []
    for name in wanted:
        words = options.methods.split(",")
        rows += [
            {"model": name, **row} for row in measure(folders[name], options.rows, options.targets, words)
        ]
    table = Table("model", "compressed to", "method", "perplexity", "share of the baseline's rise", "seconds")
    for row in rows:
        share = "" if row["share"] is None else f"{row['share']:.3f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.add_row(row["model"], row["target"], row["method"], f"{row['perplexity']:.3f}", share, seconds)
    Console(width=130).print(table)
    write_json(options.json, "language_models", rows, calibration_rows=options.rows)


def measure(
    folder: Path, count: int, only: str = "", words: Sequence[str] = ("",)
) -> Iterator[dict[str, Any]]:
    """Yield a row for each method; the first of each target is its baseline."""
    stored = {
        key: torch.from_numpy(value.astype(np.int64)) for key, value in np.load(folder / "tokens.npz").items()
    }
    calibration = [{"input_ids": rows} for rows in stored["calib"][:count].split(8)]
    shapes = {"input_ids": {0: torch.export.Dim("batch")}}
    dense = 0.0
    for target, methods in jobs():
        if only not in target and target != "dense":
            continue
        baseline = 0.0
        for method, passes in methods.items():
            if baseline and not any(word in method for word in words):
                continue
            print(f"{folder.name}, {target}: {method} …", file=sys.stderr, flush=True)
            started = time.perf_counter()
            compiled = sqcompile.compile(
                folder, passes=passes, calibration=calibration, dynamic_shapes=shapes, backend="reference"
            )
            assert isinstance(compiled, sqcompile.Compiled)
            seconds = time.perf_counter() - started
            value = perplexity(compiled, stored["eval"])
            dense, baseline = dense or value, baseline or value
            print(f"{value:.3f}", file=sys.stderr, flush=True)
            rise = baseline - dense
            yield {
                "target": target,
                "method": method,
                "perplexity": value,
                "share": (value - dense) / rise if rise else None,
                "seconds": seconds if passes else None,
            }


def jobs() -> Iterator[tuple[str, dict[str, Passes]]]:
    """Yield targets and the ways to reach them, the baseline first."""
    yield "dense", {"dense": []}
    for bits in (4, 3):
        weight = Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(32))
        tables = {word: Format.parse(f"int{bits}:group=32:mapping={word}") for word in MAPPINGS}
        yield (
            f"{bits} bits",
            {
                "round to nearest": pipelines.weight_only(bits=bits),
                "round to nearest, ranges by MSE": pipelines.weight_only(bits=bits, search="mse"),
                "round to nearest, HQQ's ranges": rounded(
                    QuantizeWeights(weight=weight, search="half-quadratic", formats=EIGHT_BITS)
                ),
                "AWQ, ranges by MSE": rounded(
                    AWQ(weight=weight), QuantizeWeights(weight=weight, search="mse", formats=EIGHT_BITS)
                ),
                "AWQ, GPTQ, dense targets": rounded(
                    AWQ(weight=weight), GPTQ(weight=weight, formats=EIGHT_BITS)
                ),
                "AdaRound, dense targets": rounded(AdaRound(weight=weight, formats=EIGHT_BITS)),
                "GPTQ": rounded(GPTQ(weight=weight, formats=EIGHT_BITS, dense_targets=False)),
                "GPTQ, dense targets": rounded(GPTQ(weight=weight, formats=EIGHT_BITS)),
                "rotated, round to nearest, ranges by MSE": rounded(
                    RotateWeights(), QuantizeWeights(weight=weight, search="mse", formats=EIGHT_BITS)
                ),
                "rotated, GPTQ, dense targets": rounded(
                    RotateWeights(), GPTQ(weight=weight, formats=EIGHT_BITS)
                ),
                **{
                    f"round to nearest, {word}": rounded(
                        QuantizeWeights(weight=table, search="mse", formats=EIGHT_BITS)
                    )
                    for word, table in tables.items()
                },
                **{
                    f"GPTQ, dense targets, {word}": rounded(GPTQ(weight=table, formats=EIGHT_BITS))
                    for word, table in tables.items()
                },
            },
        )
    three, four = (
        Format(bits=bits, signed=False, symmetric=False, granularity=PerGroup(32)) for bits in (3, 4)
    )
    sparse = SparseGPT(sparsity=0.5, refit=True, exclude=HEAD)
    halves: Any = {"quantize": GPTQ(weight=four, formats=EIGHT_BITS), "exclude": HEAD, "bits": 4.61}
    also_sparse = (*CANDIDATES, *(Candidate(item.format, 0.5) for item in CANDIDATES[1:]))
    yield (
        "mixed, 4.61 bits with scales",
        {
            "GPTQ, 3 and 4 bits in turn": rounded(
                GPTQ(weight=four, formats=(("re:[.][0-9]*[13579][.]", three), *EIGHT_BITS))
            ),
            "chosen by the Fisher estimate": rounded(MixedPrecision(**halves)),
            "chosen by divergence": rounded(MixedPrecision(**halves, measure="divergence")),
            "bits and density, by the Fisher estimate": rounded(
                MixedPrecision(**halves, candidates=also_sparse, prune=sparse)
            ),
        },
    )
    for sparsity, pattern in ((0.5, Pattern()), (None, Pattern.parse("2:4")), (0.7, Pattern())):
        options: dict[str, Any] = {"sparsity": sparsity, "pattern": pattern, "exclude": HEAD}
        yield (
            str(pattern) if sparsity is None else f"{sparsity:.0%} zeros",
            {
                "magnitude": pruned(MaskWeights(**options)),
                "Wanda": pruned(Wanda(**options)),
                "Wanda, refit": pruned(Wanda(**options, refit=True)),
                "SparseGPT": pruned(SparseGPT(**options)),
                "SparseGPT, refit": pruned(SparseGPT(**options, refit=True)),
                **{
                    f"SparseGPT, refit, shared by {by}": pruned(
                        SparseGPT(**options, refit=True, allocation=by)
                    )
                    for by in ("outliers", "sensitivity")
                    if sparsity is not None
                },
            },
        )
    values = {"activation": pipelines.INT8_DYNAMIC, "formats": EIGHT_BITS}
    yield (
        "8 bits, values too",
        {
            "round to nearest": rounded(QuantizeWeights(**values)),
            **{
                f"SmoothQuant, {strength}": rounded(SmoothQuant(strength=strength), QuantizeWeights(**values))
                for strength in (0.3, 0.5, 0.7)
            },
        },
    )
    values = {
        "activation": Format.parse("uint4:affine:token:dynamic"),
        "activation_formats": (("kind:head", pipelines.INT8_DYNAMIC),),
        "search": "mse",
        "formats": EIGHT_BITS,
    }
    tables = {
        word: Format.parse(f"int4:mapping={word}") for word in ("tanh", "mu-law", "log2", "nf", "codebook")
    }
    yield (
        "8-bit weights, static values",
        {
            "4 bits, even": static(Format.parse("int4")),
            "4 bits, even, affine": static(Format.parse("uint4:affine")),
            **{f"4 bits, {word}": static(table) for word, table in tables.items()},
            "8 bits": static(Format.parse("uint8:affine")),
            "8 bits, SmoothQuant": static(Format.parse("uint8:affine"), SmoothQuant()),
        },
    )
    known = ("tanh@2", "mu-law@10", "log2", "nf")
    token = {word: Format.parse(f"int4:token:dynamic:mapping={word}") for word in known}
    yield (
        "8-bit weights, values by token",
        {
            "4 bits, even": by_token(Format.parse("int4:token:dynamic")),
            "4 bits, even, affine": by_token(Format.parse("uint4:affine:token:dynamic")),
            **{f"4 bits, {word}": by_token(table) for word, table in token.items()},
            "4 bits, even, affine, rotated": by_token(
                Format.parse("uint4:affine:token:dynamic"), RotateWeights()
            ),
            "4 bits, nf, rotated": by_token(token["nf"], RotateWeights()),
            "8 bits": by_token(Format.parse("uint8:affine:token:dynamic")),
        },
    )
    yield (
        "4 bits, values too",
        {
            "round to nearest": rounded(QuantizeWeights(weight=four, **values)),
            "SmoothQuant": rounded(SmoothQuant(), QuantizeWeights(weight=four, **values)),
            "rotated": rounded(RotateWeights(), QuantizeWeights(weight=four, **values)),
        },
    )
    eight = Format(bits=8, signed=False, symmetric=False, granularity=PerGroup(32))
    parts = (("*.inputs_0", eight), *EIGHT_BITS)
    yield (
        "4 bits, or 3 and 8 by inputs",
        {
            "round to nearest, ranges by MSE": rounded(
                QuantizeWeights(weight=four, search="mse", formats=EIGHT_BITS)
            ),
            "an eighth of the inputs at 8 bits": rounded(
                SplitInputs(), QuantizeWeights(weight=three, search="mse", formats=parts)
            ),
            "GPTQ": rounded(GPTQ(weight=four, formats=EIGHT_BITS)),
            "GPTQ, an eighth of the inputs at 8 bits": rounded(
                SplitInputs(), GPTQ(weight=three, formats=parts)
            ),
        },
    )
    gptq = GPTQ(weight=four, formats=EIGHT_BITS)
    half: dict[str, Any] = {"sparsity": 0.5, "exclude": HEAD}
    yield (
        "4 bits, 50% zeros",
        {
            "magnitude, round to nearest": [
                *pruned(MaskWeights(**half)),
                *pipelines.weight_only(bits=4)[len(pipelines.canonical()) :],
            ],
            "SparseGPT, then GPTQ": [*pruned(SparseGPT(**half)), gptq, FoldQDQ()],
            "SparseGPT with refit, then GPTQ": [*pruned(SparseGPT(**half, refit=True)), gptq, FoldQDQ()],
            "both in one sweep": rounded(
                GPTQ(weight=four, formats=EIGHT_BITS, sparsity=0.5, unpruned=("kind:head",))
            ),
        },
    )


def static(values: Format, *before: sqcompile.Pass) -> Passes:
    """Weights of 8 bits; the data of layers in a format with static scales, but for what makes the outputs."""
    observe = InsertObservers(
        activation=values,
        kinds=("linear",),
        activation_formats=(("kind:head", Format.parse("uint8:affine")),),
    )
    return [*pipelines.canonical(), *before, observe, Calibrate(), FreezeObservers(search="mse"), FoldQDQ()]


def by_token(values: Format, *before: sqcompile.Pass) -> Passes:
    """Weights of 8 bits; the data of layers with a scale a token, but for what makes the outputs."""
    return rounded(
        *before,
        QuantizeWeights(
            activation=values, activation_formats=(("kind:head", pipelines.INT8_DYNAMIC),), search="mse"
        ),
    )


def rounded(*items: sqcompile.Pass) -> Passes:
    """Passes that round, with what goes before and after them."""
    return [*pipelines.canonical(), *items, FoldQDQ()]


def pruned(item: sqcompile.Pass) -> Passes:
    """A pass that prunes, with what goes before and after it."""
    return [*pipelines.canonical(), item, ApplyMasks()]


if __name__ == "__main__":
    main()
