"""What an int8 cache of keys and values costs in perplexity: a scale a position and head, or static ones.

    SQCOMPILE_DATA=… python benchmarks/kv_cache.py [--bits 8,4] [--rows 16] [--json out.json]

Keys and values of two trained Llamas are rounded as a cache would: with a scale for each position and head that is
found when they are written (the native engine's int8 cache), and with static scales from calibration data
(`quantize-cache`, ONNX Runtime's). All else is float32; the context is the row length of the held-out tokens.
"""

from __future__ import annotations

import argparse
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from sqcompile import Program, trace
from sqcompile.attention import attentions
from sqcompile.calibration import Calibration
from sqcompile.evaluation import perplexity
from sqcompile.levels import Level
from sqcompile.passes.quantize import QuantizeCache
from sqcompile.pipeline import PassContext, PassManager
from sqcompile.quantization import Format
from sqcompile.rewrite import Rewriter

MODELS = ("stories260K", "pycode-llama-5m")
sq = torch.ops.sqcompile


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", default="8,4", help="bits of the codes, separated by commas")
    parser.add_argument("--rows", type=int, help="only the first so many rows of held-out tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = os.environ.get("SQCOMPILE_DATA")
    if not data:
        parser.error("set SQCOMPILE_DATA to the folder of the trained models")
    table = Table("model", "cache", "perplexity", "rise")
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        for cache, value in measure(Path(data) / name, options.bits.split(","), options.rows):
            rows.append({"model": name, "cache": cache, "perplexity": value})
            dense = next(row["perplexity"] for row in rows if row["model"] == name)
            table.add_row(name, cache, f"{value:.4f}", f"{100 * (value / dense - 1):+.3f} %")
    Console().print(table)
    write_json(options.json, "kv_cache", rows, rows_of_tokens=options.rows)


def measure(folder: Path, widths: list[str], rows: int | None) -> Iterator[tuple[str, float]]:
    """Yield each cache with its perplexity, float32 first."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    stored = np.load(folder / "tokens.npz")
    held_out, seen = (torch.from_numpy(stored[key].astype(np.int64)) for key in ("eval", "calib"))
    held_out = held_out[:rows]
    program = trace(
        model, {"input_ids": held_out[:2]}, dynamic_shapes={"input_ids": {0: torch.export.Dim("batch")}}
    )
    program.level = Level.QDQ
    calibration = Calibration([{"input_ids": batch} for batch in seen[:32].split(8)], program.signature)
    yield "float32", perplexity(program, held_out)
    for bits in widths:
        dynamic = program.snapshot()
        round_at_run_time(dynamic, Format.parse(f"int{bits}:token:dynamic"))
        yield f"int{bits}, a scale a position and head", perplexity(dynamic, held_out)
        for text, granularity in ((f"int{bits}:channel=1", "head"), (f"int{bits}", "layer")):
            static = program.snapshot()
            item = QuantizeCache(format=Format.parse(text))
            PassManager([item], verify="off").run(static, PassContext(calibration=calibration))
            yield f"int{bits}, a static scale a {granularity}", perplexity(static, held_out)


def round_at_run_time(program: Program, format: Format) -> None:
    """Round keys and values with a scale for each position and head."""
    edit = Rewriter(program)
    options = (*format.granularity.pair, format.qmin, format.qmax)
    for node in dict.fromkeys(item for found in attentions(program) for item in (found.key, found.value)):
        with edit.after(node):
            pair = edit.call(sq.dynamic_scale.default, node, *options, format.symmetric, like=node)
            parameters = [edit.call(operator.getitem, pair, index, like=node) for index in range(2)]
            codes = edit.call(sq.quantize.default, node, *parameters, *options, like=node)
            values = edit.call(sq.dequantize.default, codes, *parameters, *options, like=node)
        made = (pair, codes)
        edit.replace(node, values, only=lambda user, made=made: user not in made)
    edit.finish()


if __name__ == "__main__":
    main()
