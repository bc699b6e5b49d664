"""`sqcompile inspect`: what is in a model, a program or an ONNX file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from sqcompile.cli.subjects import Subject

_MAX_LAYERS = 400


@command
def inspect_model(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_ARTIFACT", help=f"{options.MODEL_HELP} Or an .onnx or .sqm file."),
    ],
    graph: Annotated[bool, typer.Option("--graph", "-g", help="Print the whole graph.")] = False,
    source: Annotated[
        bool,
        typer.Option("--source", "-s", help="Print the graph with module paths and the model's own lines."),
    ] = False,
    data: options.Data = None,
    batch: options.Batch = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    inputs: options.Inputs = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Show inputs and outputs, sizes, operators and layers; with --graph or --source also the graph.

    **Examples**

        sqcompile inspect models/llama

        sqcompile inspect nets.py:resnet -i "x: f32[batch, 3, 32, 32]" --source

        sqcompile inspect build/net.onnx
    """
    from sqcompile.cli.subjects import Feed, artifact_file, open_model

    path = artifact_file(target)
    if path is not None and path.suffix != ".onnx":
        about = _describe_artifact(target, path)
        return Answer(lambda console: _show_artifact(console, about), about)
    if path is not None:
        from sqcompile.cli.onnx_file import describe_onnx, show_onnx

        about = describe_onnx(path, graph=graph or source)
        return Answer(lambda console: show_onnx(console, about), about)
    subject = open_model(target, Feed.of(locals()))
    about = _describe(subject, graph=graph, source=source)
    return Answer(lambda console: _show(console, about), about)


def _describe_artifact(name: str, path: Path) -> dict[str, Any]:
    """Return what an artifact says of itself: its interface, and how it was made."""
    from sqcompile.cli.made import describe_made
    from sqcompile.cli.subjects import open_session

    signature = open_session(path, None).signature
    return {
        "name": name,
        "file_bytes": path.stat().st_size,
        "inputs": [str(value) for value in signature.inputs],
        "outputs": [str(value) for value in signature.outputs],
        "dimensions": {
            dim: {"smallest": low, "largest": high} for dim, (low, high) in signature.dims.items()
        },
        **describe_made(signature.provenance),
    }


def _show_artifact(target: Console, about: dict[str, Any]) -> None:
    from sqcompile.cli.made import show_made
    from sqcompile.report_tables import size_text

    target.print(f"{about['name']}, {size_text(about['file_bytes'])}", markup=False)
    for kind in ("inputs", "outputs"):
        target.print(f"{kind}: {', '.join(about[kind])}", markup=False, soft_wrap=True)
    show_made(target, about)


def _describe(subject: Subject, *, graph: bool, source: bool) -> dict[str, Any]:
    from sqcompile.cli.made import describe_made
    from sqcompile.layers import layers_of
    from sqcompile.report import layer_rows
    from sqcompile.statistics import program_size
    from sqcompile.text import operator_name, program_text

    program = subject.program
    assert program is not None
    size = program_size(program)
    uses = {layer.node.name for layer in layers_of(program)}
    about: dict[str, Any] = {
        "name": subject.name,
        "level": str(program.level),
        "inputs": [str(value) for value in program.signature.inputs],
        "outputs": [str(value) for value in program.signature.outputs],
        "dimensions": {
            name: {"smallest": low, "largest": high} for name, (low, high) in program.signature.dims.items()
        },
        "parameters": size.parameters,
        "size_bytes": size.size_bytes,
        "bits_per_parameter": size.bits_per_parameter,
        "sparsity": size.sparsity,
        "operators": dict(Counter(operator_name(node) for node in program.compute_nodes()).most_common()),
        "layers": [
            {
                "name": row.name,
                "node": row.node,
                "kind": row.kind,
                "shape": list(row.shape),
                "weight": row.weight,
                "data": row.activation,
                "sparsity": row.sparsity,
                "size_bytes": row.size_bytes,
                "place": row.place,
            }
            for row in layer_rows(program)
            if row.node in uses
        ],
        **describe_made(program.signature.provenance),
    }
    if graph or source:
        about["graph"] = program_text(program, source=source)
    return about


def _show(target: Console, about: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sqcompile.cli.made import show_made
    from sqcompile.report_tables import size_text

    target.print(Text(about["name"], style="bold"))
    facts = Table.grid(padding=(0, 2))
    for index, text in enumerate(about["inputs"]):
        facts.add_row("inputs" if index == 0 else "", Text(text))
    for index, text in enumerate(about["outputs"]):
        facts.add_row("outputs" if index == 0 else "", Text(text))
    for index, (name, bounds) in enumerate(about["dimensions"].items()):
        largest = bounds["largest"] if bounds["largest"] is not None else "any size"
        facts.add_row("dimensions" if index == 0 else "", Text(f"{name}: {bounds['smallest']} to {largest}"))
    facts.add_row("level", about["level"])
    facts.add_row(
        "size",
        f"{size_text(about['size_bytes'])}: {about['parameters']:,} parameters of "
        f"{about['bits_per_parameter']:.2f} bits, {100 * about['sparsity']:.1f} % zeros",
    )
    facts.add_row(
        "operators", Text(", ".join(f"{count} {name}" for name, count in about["operators"].items()))
    )
    target.print(facts)
    table = Table()
    for column in ("layer", "kind", "shape", "weight", "data", "zeros", "size", "source"):
        table.add_column(column, justify="right" if column in ("zeros", "size") else "left", overflow="fold")
    for row in about["layers"][:_MAX_LAYERS]:
        table.add_row(
            row["name"],
            row["kind"],
            "x".join(str(size) for size in row["shape"]),
            row["weight"],
            row["data"],
            f"{100 * row['sparsity']:.1f} %",
            size_text(row["size_bytes"]),
            row["place"],
        )
    target.print(table)
    if len(about["layers"]) > _MAX_LAYERS:
        target.print(f"… and {len(about['layers']) - _MAX_LAYERS} layers more: --json lists all")
    if about["recipe"] is not None:  # a model has none, and no need of one
        show_made(target, about)
    if "graph" in about:
        target.print(about["graph"], soft_wrap=True, markup=False)
    else:
        target.print(Text("--graph shows the whole graph, --source with the model's own lines.", style="dim"))
