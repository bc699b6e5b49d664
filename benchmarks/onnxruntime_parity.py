"""How far results of ONNX Runtime are from the reference: nothing left out, for every traced model.

    python benchmarks/onnxruntime_parity.py [--models bert,vit] [--pipelines static] [--weights 5]
        [--calls 20] [--json out.json]

Each model of the zoo is quantized with several draws of its random weights and called with new inputs.
A quantization step of an output is 1/255 of the range that its values have over all calls, as calibration
would choose it. Counted are outputs more than one step away (1.01, for the rounding of float32).

    static, dynamic   against the reference: the program, run by PyTorch
    weight-only       against the program in ONNX Runtime's forms, run by PyTorch: `MatMulNBits` with
                      accuracy_level 4 rounds activations to 8 bits, which the program does not ask for

What is left are rounding ties: values that lie between two codes to the last bit of float32, which two
implementations of a sum or an exponential round apart, and what follows from them. The last column is how
many there would be between two references: the same comparison, of the reference with itself where every
result of float32 is changed by one rounding (normally distributed, a standard deviation of half a last bit).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from sqcompile.backends.onnxruntime import OnnxRuntimeBackend
from sqcompile.backends.onnxruntime.selection import select
from sqcompile.calibration import Calibration
from sqcompile.passes import pipelines
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.tracing import trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.zoo import ZOO, ZooModel
from support.zoo.model import other_weights

PIPELINES = ("static", "dynamic", "weight-only")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="all", help="names of the zoo, or 'all'")
    parser.add_argument("--pipelines", default=",".join(PIPELINES))
    parser.add_argument("--weights", type=int, default=5, help="draws of the random weights")
    parser.add_argument("--calls", type=int, default=20, help="calls with each draw")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    names = list(ZOO) if options.models == "all" else options.models.split(",")
    console = Console()
    rows = []
    for name in names:
        for pipeline in options.pipelines.split(","):
            row = measure(ZOO[name], pipeline, options.weights, options.calls)
            rows.append(row)
            console.print("{model} {pipeline}: {outside} of {outputs}".format(**row), highlight=False)
    console.print(table(rows))
    write_json(options.json, "onnxruntime_parity", rows, weights=options.weights, calls=options.calls)


def table(rows: list[dict[str, Any]]) -> Table:
    columns = ("model", "pipeline", "outputs", "away", "share", "furthest, steps", "away by rounding alone")
    result = Table(*columns, title="ONNX Runtime against the reference")
    for row in rows:
        result.add_row(
            row["model"],
            row["pipeline"],
            str(row["outputs"]),
            str(row["outside"]),
            f"{row['outside'] / row['outputs']:.3%}",
            f"{row['furthest']:.2f}",
            str(row["by_rounding"]),
        )
    good = sum(row["outside"] <= 0.001 * row["outputs"] for row in rows)
    result.caption = f"99.9 % within a step: {good} of {len(rows)}"
    return result


def measure(zoo: ZooModel, pipeline: str, weights: int, calls: int) -> dict[str, Any]:
    outside = outputs = by_rounding = 0
    furthest = 0.0
    for draw in range(weights):
        with other_weights(draw):
            pairs = results(zoo, pipeline, draw, calls)
        for calls_of_output in pairs:
            got, wanted, rounded = (
                torch.cat([item.flatten() for item in column])
                for column in zip(*calls_of_output, strict=True)
            )
            step = float(wanted.max() - wanted.min()) / 255
            away = (got - wanted).abs() / step
            outside += int((away > 1.01).sum())
            by_rounding += int(((rounded - wanted).abs() > 1.01 * step).sum())
            outputs += away.numel()
            furthest = max(furthest, float(away.max()))
    return {
        "model": zoo.name,
        "pipeline": pipeline,
        "outputs": outputs,
        "outside": outside,
        "furthest": furthest,
        "by_rounding": by_rounding,
    }


def results(zoo: ZooModel, pipeline: str, draw: int, calls: int) -> list[list[tuple[Tensor, ...]]]:
    """Return, for each output, (ONNX Runtime, reference, reference with other rounding) of all calls."""
    program = trace(zoo.make(), zoo.inputs(), dynamic_shapes=zoo.dynamic_shapes)
    calibration = Calibration([zoo.inputs(seed) for seed in range(3)], program.signature)
    PassManager(passes_of(pipeline)).run(program, PassContext(calibration=calibration))
    backend = OnnxRuntimeBackend()
    session = backend.load(backend.lower(program), threads=1)
    reference = select(program)[0] if pipeline == "weight-only" else program
    sizes = [(2, 12), (3, 9)] if zoo.dynamic_shapes is not None else [(2, 12)]
    triples: list[list[tuple[Tensor, ...]]] = []
    for call in range(calls):
        inputs = program.signature.bind(*zoo.inputs(100 + 1000 * draw + call, *sizes[call % len(sizes)]))
        with torch.no_grad():
            wanted = reference.run(inputs)
            rounded = OtherRounding(reference, call).run(*inputs)
        triples.append(list(zip(session.run(inputs), wanted, rounded, strict=True)))
    return [list(column) for column in zip(*triples, strict=True)]


class OtherRounding(fx.Interpreter):
    """Runs a program whose float32 results are each changed by about one rounding."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__(program.graph_module)
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        half = torch.finfo(torch.float32).eps / 2
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return (value.double() * (1 + half * noise)).float()


def passes_of(pipeline: str) -> list[Pass]:
    if pipeline == "static":
        return pipelines.int8_static()
    if pipeline == "dynamic":
        return pipelines.int8_dynamic()
    return pipelines.weight_only(bits=4, group_size=32)


if __name__ == "__main__":
    main()
