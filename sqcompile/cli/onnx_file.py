"""ONNX files for people: what is in one, ours or another tool's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqcompile.errors import FileError
from sqcompile.files import require_file

if TYPE_CHECKING:
    from rich.console import Console

_LARGEST = 20


def describe_onnx(path: Path, *, graph: bool = False) -> dict[str, Any]:
    """Return what an ONNX file holds: interface, operators, stored tensors by type, the largest of them.

    Args:
        path: The file.
        graph: Add the text of the graph.

    Raises:
        FileError: If it cannot be read.
    """
    from onnx import helper

    from sqcompile.cli.made import describe_made

    model = read_onnx(path)
    inner = model.graph
    stored = [_tensor(item) for item in inner.initializer]
    by_type: dict[str, dict[str, int]] = {}
    for item in stored:
        sums = by_type.setdefault(item["type"], {"tensors": 0, "size_bytes": 0})
        sums["tensors"] += 1
        sums["size_bytes"] += item["size_bytes"]
    about: dict[str, Any] = {
        "name": str(path),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "file_bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
        "inputs": [_value_text(item) for item in inner.input],
        "outputs": [_value_text(item) for item in inner.output],
        "operators": dict(Counter(_operator(node) for node in inner.node).most_common()),
        "stored": by_type,
        "largest": sorted(stored, key=lambda item: -item["size_bytes"])[:_LARGEST],
        "metadata": {key: len(text) for key, text in metadata_of(model).items()},
        **describe_made(_provenance(model)),
    }
    if graph:
        about["graph"] = helper.printable_graph(inner)
    return about


def read_onnx(path: Path) -> Any:
    """Return an ONNX model without its external data.

    Raises:
        FileError: If it cannot be read.
    """
    import onnx

    require_file(path, "ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors are not documented
        raise FileError(
            f"'{path}' is no ONNX model.",
            where=str(path),
            seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="a file that compiled.save or another tool's exporter wrote",
            next_step="save the model again",
        ) from error
    if not model.graph.node and not model.graph.output:
        raise FileError(
            f"'{path}' holds no graph.",
            where=str(path),
            seen="no operators and no outputs",
            expected="an ONNX model",
            next_step="save the model again",
        )
    return model


def show_onnx(target: Console, about: dict[str, Any]) -> None:
    """Print what `describe_onnx` found."""
    from rich.table import Table
    from rich.text import Text

    from sqcompile.cli.made import show_made
    from sqcompile.report_tables import size_text

    target.print(Text(about["name"], style="bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("made by", about["producer"] or "unknown")
    facts.add_row("opsets", ", ".join(f"{domain} {version}" for domain, version in about["opsets"].items()))
    facts.add_row("size", size_text(about["file_bytes"]))
    for index, text in enumerate(about["inputs"]):
        facts.add_row("inputs" if index == 0 else "", Text(text))
    for index, text in enumerate(about["outputs"]):
        facts.add_row("outputs" if index == 0 else "", Text(text))
    facts.add_row(
        "operators", Text(", ".join(f"{count} {name}" for name, count in about["operators"].items()))
    )
    facts.add_row(
        "stored",
        ", ".join(
            f"{sums['tensors']} {kind}, {size_text(sums['size_bytes'])}"
            for kind, sums in about["stored"].items()
        ),
    )
    target.print(facts)
    table = Table(title="Largest tensors", title_justify="left")
    for column in ("tensor", "type", "shape", "size"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for item in about["largest"]:
        table.add_row(
            item["name"], item["type"], "x".join(map(str, item["shape"])), size_text(item["size_bytes"])
        )
    target.print(table)
    if about["recipe"] is not None:  # another tool's file says nothing of the kind
        show_made(target, about)
    if "graph" in about:
        target.print(about["graph"], soft_wrap=True, markup=False)


def metadata_of(model: Any) -> dict[str, str]:
    """Return the texts that an ONNX model carries, by key."""
    return {item.key: item.value for item in model.metadata_props}


def _provenance(model: Any) -> Any:
    """Return how a model of ours was made. The signature is not built: that may need its output's class."""
    import json

    from sqcompile.signature import SIGNATURE

    found = metadata_of(model).get(SIGNATURE)
    try:
        return None if found is None else json.loads(found).get("provenance")
    except (ValueError, AttributeError):  # damaged: there is still the rest of the file to look at
        return None


def _tensor(item: Any) -> dict[str, Any]:
    from math import ceil, prod

    from onnx import TensorProto

    kind = TensorProto.DataType.Name(item.data_type).lower()
    bits = _BITS.get(kind, 32)
    return {
        "name": item.name,
        "type": kind,
        "shape": list(item.dims),
        "size_bytes": ceil(prod(item.dims) * bits / 8),
    }


_BITS = {
    **dict.fromkeys(("int4", "uint4", "float4e2m1"), 4),
    **dict.fromkeys(("int2", "uint2"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8e4m3fn", "float8e5m2"), 8),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 16),
    **dict.fromkeys(("int64", "uint64", "double"), 64),
}


def _value_text(item: Any) -> str:
    from onnx import TensorProto

    tensor = item.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    sizes = [size.dim_param or str(size.dim_value) for size in tensor.shape.dim]
    return f"{item.name}: {kind}[{', '.join(sizes)}]"


def _operator(node: Any) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)
