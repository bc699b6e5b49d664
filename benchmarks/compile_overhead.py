"""How long sqcompile takes beyond torch.export and torch's ONNX exporter themselves.

    python benchmarks/compile_overhead.py [--models resnet,llama] [--repeats 3] [--json out.json]

For each model of the zoo: A = torch.export.export + torch.onnx.export (dynamo) of the dense model;
B = sqcompile.compile with a whole pipeline, default checks, backend onnxruntime. The overhead is
(B - A) / A. A and B alternate in one process; the first turn, which imports and registers, is not
counted.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
from common import write_json
from rich.console import Console
from rich.table import Table

import sqcompile
from sqcompile.passes import pipelines

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.zoo import ZOO, ZooModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="resnet,mobilenet_v2,bert,llama", help="names of the zoo, or 'all'"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    names = list(ZOO) if options.models == "all" else options.models.split(",")
    rows = []
    for name in names:
        model = ZOO[name]
        for pipeline in ("none", "int8"):
            rows.append(measure(model, pipeline, options.repeats))
    table = Table("model", "pipeline", "export + ONNX s", "sqcompile s", "overhead", title="Compile overhead")
    for row in rows:
        table.add_row(
            row["model"],
            row["pipeline"],
            f"{row['plain_s']:.2f}",
            f"{row['ours_s']:.2f}",
            f"{row['overhead']:+.0%}",
        )
    console = Console()
    console.print(table)
    overall = sum(row["ours_s"] for row in rows) / sum(row["plain_s"] for row in rows) - 1
    console.print(f"overall: {overall:+.0%}")
    write_json(options.json, "compile_overhead", rows, repeats=options.repeats)


def measure(zoo: ZooModel, pipeline: str, repeats: int) -> dict[str, object]:
    model = zoo.make()
    args, kwargs = zoo.inputs(0)
    passes: list[sqcompile.Pass] = []
    calibration = None
    if pipeline == "int8":
        static = zoo.family == "cnn"
        passes = pipelines.int8_static() if static else pipelines.int8_dynamic()
        calibration = [(args, kwargs)] * 4 if static else None

    def plain() -> None:
        with torch.no_grad():
            exported = torch.export.export(
                model, args, kwargs, dynamic_shapes=zoo.dynamic_shapes, strict=False
            )
            torch.onnx.export(exported, dynamo=True, opset_version=21, verbose=False)

    def ours() -> None:
        sqcompile.compile(
            model,
            passes=passes,
            example_inputs=(args, kwargs),
            calibration=calibration,
            dynamic_shapes=zoo.dynamic_shapes,
            backend="onnxruntime",
        )

    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for turn in range(repeats + 1):
        for label, job in (("plain", plain), ("ours", ours)):
            started = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                job()
            if turn:
                times[label].append(time.perf_counter() - started)
    plain_s, ours_s = statistics.median(times["plain"]), statistics.median(times["ours"])
    return {
        "model": zoo.name,
        "pipeline": pipeline,
        "plain_s": plain_s,
        "ours_s": ours_s,
        "overhead": ours_s / plain_s - 1,
    }


if __name__ == "__main__":
    main()
