"""The main job on real models: a language model and a CNN, each dense and through every pipeline.

    python examples/demo.py [--output build/demo] [--runs 20] [--rows 40]

Needs no network: the language model lies in examples/pycode_llama_5m, and the CNN is trained here, in
seconds, on the handwritten digits that ship with scikit-learn.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digits_cnn import train_digits_cnn
from rich.console import Console
from rich.table import Table

import sqcompile
from sqcompile.evaluation import accuracy, perplexity
from sqcompile.passes import pipelines
from sqcompile.progress import BarProgress
from sqcompile.report_tables import size_text, time_text

HERE = Path(__file__).parent


@dataclass
class Row:
    """One line of the table."""

    pipeline: str
    quality: float
    size_bytes: int
    dense_ns: float
    latency_ns: float
    speedup: float
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder of the compiled models"
    )
    parser.add_argument("--runs", type=int, default=20, help="timed calls of each model")
    parser.add_argument("--rows", type=int, default=40, help="rows of 256 held-out tokens to evaluate on")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    language_model(console, options)
    digits(console, options)


def language_model(console: Console, options: argparse.Namespace) -> None:
    folder = HERE / "pycode_llama_5m"
    stored = np.load(folder / "tokens.npz")
    held_out = torch.from_numpy(stored["eval"].astype(np.int64))[: options.rows]
    calibration = [
        {"input_ids": rows} for rows in torch.from_numpy(stored["calib"].astype(np.int64))[:32].split(8)
    ]
    rows = run(
        console,
        model=folder,
        calibration=calibration,
        jobs={
            "dense fp32": [],
            "int8 dynamic": pipelines.int8_dynamic(),
            "8-bit weights, groups of 32": pipelines.weight_only(bits=8, group_size=32),
            "4-bit weights, groups of 32": pipelines.weight_only(bits=4, group_size=32),
            "4-bit weights, 30 % pruned": pipelines.weight_only(bits=4, group_size=32, sparsity=0.3),
        },
        quality=lambda model: perplexity(model, held_out),
        latency_inputs={"input_ids": held_out[:1]},
        options=options,
        name="llama",
    )
    title = "Language model: 5.5M-parameter Llama, trained on Python code, 256 tokens a call, ONNX Runtime"
    console.print(table(title, "perplexity", "{:.2f}", rows))


def digits(console: Console, options: argparse.Namespace) -> None:
    console.print("Training a small CNN on scikit-learn's handwritten digits …")
    model, data = train_digits_cnn()
    batch = torch.export.Dim("batch")
    rows = run(
        console,
        model=model,
        calibration=list(data.train_images[:512].split(64)),
        jobs={
            "dense fp32": [],
            "int8 static": pipelines.int8_static(),
            "int8 static, 20 % pruned": pipelines.int8_static(sparsity=0.2),
            "int8 dynamic": pipelines.int8_dynamic(),
        },
        quality=lambda compiled: 100 * accuracy(compiled, data.test_images, data.test_labels),
        latency_inputs={"x": data.test_images[:64]},
        options=options,
        name="digits",
        dynamic_shapes={"x": {0: batch}},
    )
    title = "CNN: handwritten digits, 450 test images, 64 images a call, ONNX Runtime"
    console.print(table(title, "accuracy %", "{:.2f}", rows))


def run(
    console: Console,
    *,
    model: object,
    calibration: list[object],
    jobs: dict[str, list[sqcompile.Pass]],
    quality: Callable[[object], float],
    latency_inputs: dict[str, torch.Tensor],
    options: argparse.Namespace,
    name: str,
    dynamic_shapes: object = None,
) -> list[Row]:
    rows: list[Row] = []
    progress = BarProgress() if sys.stderr.isatty() else None
    for title, passes in jobs.items():
        console.print(f"Compiling {name}: {title} …", style="dim")
        compiled = sqcompile.compile(
            model,
            passes=passes,
            calibration=calibration,
            dynamic_shapes=dynamic_shapes,
            backend="onnxruntime",
            progress=progress,
        )
        latency = compiled.measure(runs=options.runs, **latency_inputs).latency
        target = options.output / name / title.replace(" %", "").replace(",", "").replace(" ", "-")
        file = compiled.save(target / "model.onnx")[0]
        (target / "report.json").write_text(compiled.report.to_json(), encoding="utf-8")
        rows.append(
            Row(
                title,
                quality(compiled),
                file.stat().st_size,
                latency.dense_ns,
                latency.compiled_ns,
                latency.speedup,
                target,
            )
        )
    return rows


def table(title: str, quality: str, shown: str, rows: list[Row]) -> Table:
    folders = ", ".join(row.folder.name for row in rows)
    view = Table(
        title=title,
        title_justify="left",
        caption=f"In {rows[0].folder.parent}, each with model.onnx and report.json: {folders}",
        caption_justify="left",
    )
    for column in ("pipeline", quality, "file", "smaller", "dense", "latency", "faster"):
        view.add_column(column, justify="left" if column == "pipeline" else "right", no_wrap=True)
    dense = rows[0]
    for row in rows:
        view.add_row(
            row.pipeline,
            shown.format(row.quality),
            size_text(row.size_bytes),
            f"{dense.size_bytes / row.size_bytes:.2f}x",
            time_text(row.dense_ns),
            time_text(row.latency_ns) if row is not dense else "",
            f"{row.speedup:.2f}x" if row is not dense else "",
        )
    return view


if __name__ == "__main__":
    main()
