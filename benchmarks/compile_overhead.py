"""How long sqcompile takes beyond torch.export and torch's ONNX exporter themselves.

    python benchmarks/compile_overhead.py [--models resnet_basic,llama] [--repeats 3] [--json out.json]

For each model of the zoo, dense and through an int8 pipeline: the CPU time of one thread (which
neighbours do not change) of `sqcompile.compile` with default checks and backend onnxruntime, of the
calls of `torch.export.export` and `torch.onnx.export` inside it, and of the passes' own work. The
overhead is everything else (checks, selection, session, report) in proportion to the two exporters. The
first compilation of each model, which imports and registers, is not counted.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

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
        "--models", default="resnet_basic,mobilenet_v2,bert,llama", help="names of the zoo, or 'all'"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = list(ZOO) if options.models == "all" else options.models.split(",")
    rows = [measure(ZOO[name], pipeline, options.repeats) for name in names for pipeline in ("none", "int8")]
    columns = ("model", "pipeline", "export s", "onnx s", "passes s", "checks, rest s", "overhead")
    table = Table(*columns, title="Compile overhead")
    for row in rows:
        table.add_row(
            row["model"],
            row["pipeline"],
            f"{row['export_s']:.2f}",
            f"{row['onnx_s']:.2f}",
            f"{row['passes_s']:.2f}",
            f"{row['rest_s']:.2f}",
            f"{row['overhead']:.0%}",
        )
    console = Console()
    console.print(table)
    overall = sum(row["rest_s"] for row in rows) / sum(row["export_s"] + row["onnx_s"] for row in rows)
    console.print(f"overall: {overall:.0%}")
    write_json(options.json, "compile_overhead", rows, repeats=options.repeats)


def measure(zoo: ZooModel, pipeline: str, repeats: int) -> dict[str, Any]:
    model = zoo.make()
    args, kwargs = zoo.inputs(0)
    passes: list[sqcompile.Pass] = []
    calibration = None
    if pipeline == "int8":
        static = zoo.family == "cnn"
        passes = pipelines.int8_static() if static else pipelines.int8_dynamic()
        calibration = [(args, kwargs)] * 4 if static else None
    turns: list[tuple[float, ...]] = []
    for _ in range(repeats + 1):
        with (
            timed(torch.export, "export") as export_s,
            timed(torch.onnx, "export") as onnx_s,
            timed_passes(passes) as passes_s,
        ):
            started = time.process_time()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                sqcompile.compile(
                    model,
                    passes=passes,
                    example_inputs=(args, kwargs),
                    calibration=calibration,
                    dynamic_shapes=zoo.dynamic_shapes,
                    backend="onnxruntime",
                )
            total = time.process_time() - started
        parts = (sum(export_s), sum(onnx_s), sum(passes_s))
        turns.append((*parts, total - sum(parts)))
    export, onnx, own, rest = (statistics.median(turn[index] for turn in turns[1:]) for index in range(4))
    return {
        "model": zoo.name,
        "pipeline": pipeline,
        "export_s": export,
        "onnx_s": onnx,
        "passes_s": own,
        "rest_s": rest,
        "overhead": rest / (export + onnx),
    }


@contextmanager
def timed_passes(passes: list[sqcompile.Pass]) -> Iterator[list[float]]:
    """Collect the CPU time of every run of a pass made inside."""
    with ExitStack() as stack:
        yield Gathered([stack.enter_context(timed(kind, "run")) for kind in {type(item) for item in passes}])


class Gathered(list[float]):
    """The numbers of several lists that are still growing."""

    def __init__(self, parts: list[list[float]]) -> None:
        super().__init__()
        self.parts = parts

    def __iter__(self) -> Iterator[float]:
        return (number for part in self.parts for number in part)


@contextmanager
def timed(module: Any, name: str) -> Iterator[list[float]]:
    """Collect the CPU time of every call of `module.name` made inside."""
    function: Callable[..., Any] = getattr(module, name)
    times: list[float] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.process_time() - started)

    setattr(module, name, wrapped)
    try:
        yield times
    finally:
        setattr(module, name, function)


if __name__ == "__main__":
    main()
