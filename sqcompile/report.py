"""The report: what every pass did, what every layer became, and what it cost."""

from __future__ import annotations

import io
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from sqcompile.backend import LayerChoice
from sqcompile.compare import LayerDistance
from sqcompile.errors import FileError
from sqcompile.files import atomic_file
from sqcompile.layers import Layer, layers_of
from sqcompile.metrics import Distance
from sqcompile.operators.table import argument
from sqcompile.pipeline.manager import PassRecord
from sqcompile.program import Program
from sqcompile.statistics import Size, stored_bits, weight_zeros

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.report_pictures import ActivationRange, GraphTexts

_ROUNDING = 1e-10
"""Noise (as a share of the signal: -100 dB) that is the rounding of float32, for which nobody is to blame."""

_UNCOMPRESSED = frozenset({"float64", "float32", "float16", "bfloat16"})

_NEGLIGIBLE = 0.97
"""A compiled layer that needs more than this share of the dense time does not pay."""


@dataclass
class LayerRow:
    """One layer of the compiled program.

    Attributes:
        name: Name of the layer.
        node: Name of its node in the program.
        kind: `linear`, `conv2d`, ….
        place: The model's own line.
        shape: Shape of the weight.
        weight: Format of the weight, such as `int8:channel` or `float32`.
        activation: Format of the data, such as `uint8 static`, or `float32`.
        parameters: Number of weights.
        sparsity: Fraction of zeros.
        size_bytes: Bytes of the weight with scales and zero points.
        distance: Distance of the layer's output from the original's, or None if not measured.
        loss: Noise that the layer adds to what reaches it, as a share of its output's power, or None.
        dense_ns: Time of the layer in the dense model on this machine, or None if not measured.
        compiled_ns: Time of the layer in the compiled model, or None if not measured.
        predicted_ns: Time that the backend's cost model says, for the inputs that were measured or checked.
        multiply_adds: Of the call that was measured, those with zeros included, or None if not measured.
        peak_share: Of an integer layer, its multiply-adds as a part of those that the machine could do in its time, or
            None if not measured. Where zeros are skipped it may exceed 1.
        form: How the backend stores and multiplies the weight, where it had a choice.
        remark: What that choice costs, or why zeros do not pay.
    """

    name: str
    node: str
    kind: str
    place: str
    shape: tuple[int, ...]
    weight: str
    activation: str
    parameters: int
    sparsity: float
    size_bytes: int
    distance: Distance | None = None
    loss: float | None = None
    dense_ns: float | None = None
    compiled_ns: float | None = None
    predicted_ns: float | None = None
    multiply_adds: int | None = None
    peak_share: float | None = None
    form: str = ""
    remark: str = ""

    @property
    def kept_share(self) -> float | None:
        """`peak_share` of the multiply-adds with weights that are not zero alone."""
        return None if self.peak_share is None else self.peak_share * (1 - self.sparsity)

    @property
    def has_codes(self) -> bool:
        """Whether the weight is stored as codes."""
        return self.weight.startswith(("int", "uint", "table"))

    @property
    def verdict(self) -> str:
        """Say plainly whether the compression of this layer pays in time, where that was measured."""
        if self.dense_ns is None or self.compiled_ns is None:
            return ""
        if self.weight in _UNCOMPRESSED and self.sparsity == 0:
            return ""
        ratio = self.dense_ns / max(self.compiled_ns, 1.0)
        if self.compiled_ns > _NEGLIGIBLE * self.dense_ns:
            return f"does not pay here ({ratio:.2f}x)"
        return f"{ratio:.2f}x faster"


@dataclass(frozen=True)
class Latency:
    """Median time of one call, dense against compiled, alternating in one run on this machine.

    Attributes:
        dense_ns: Median of the dense model in the same backend, in ns.
        compiled_ns: Median of the compiled model, in ns.
        runs: Calls of each.
        threads: Threads within an operator.
    """

    dense_ns: float
    compiled_ns: float
    runs: int
    threads: int

    @property
    def speedup(self) -> float:
        """How many times faster the compiled model is."""
        return self.dense_ns / self.compiled_ns


@dataclass
class Report:
    """Everything that is known about one compilation.

    Attributes:
        model: Name of the model's class.
        backend: Name of the backend.
        backend_reason: Why it was chosen.
        original: Size of the program that was traced.
        size: Size of the compiled program.
        file_bytes: Size of the artifact as a file.
        dense_file_bytes: Size of the dense model as a file of the same backend, or None if not measured.
        passes: One record a pass.
        layers: One row a layer.
        output_distance: Distance of the compiled program's outputs from the original's, in the reference.
        backend_distance: Distance of the backend's outputs from the reference's.
        latency: Time dense against compiled, or None if not measured.
        peak: Multiply-adds of 8-bit codes that as many threads can do in a ns, or None if not measured.
        seconds: Time of each stage (`trace`, `passes`, `lower`, …), in s.
        notes: What the backend has to say about its choices.
        environment: CPU, threads and versions.
        quality: Figures of the user's own, dense and compiled, by name: see `add_quality`.
        weight_maps: Where weights are zero, by layer: `sqcompile.report_pictures.weight_maps`.
        activations: Values that become integers of a fixed scale, and the ranges that were chosen for them.
        graphs: The graph as traced and after each pass that changed it, or None if not kept.
    """

    model: str
    backend: str
    backend_reason: str
    original: Size
    size: Size
    file_bytes: int
    passes: list[PassRecord]
    layers: list[LayerRow]
    dense_file_bytes: int | None = None
    output_distance: Distance | None = None
    backend_distance: Distance | None = None
    latency: Latency | None = None
    peak: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    quality: dict[str, tuple[float, float]] = field(default_factory=dict)
    weight_maps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    activations: list[ActivationRange] = field(default_factory=list)
    graphs: GraphTexts | None = None

    def add_quality(self, name: str, dense: float, compiled: float) -> None:
        """Add a figure that only the user can measure, such as an accuracy or a perplexity.

        Args:
            name: What it is.
            dense: Of the dense model.
            compiled: Of the compiled one.
        """
        self.quality[name] = (float(dense), float(compiled))

    def worst_pass(self) -> PassRecord | None:
        """Return the pass that added most noise to the outputs, or None if none added any.

        Noise adds up where decibels do not: a fall from 40 dB to 5 dB is a hundred times the harm of the
        fall from infinity to 40 dB before it.
        """
        worst, most, before = None, _ROUNDING, 0.0
        for record in self.passes:
            if record.distance is None:
                continue
            added = record.distance.noise - before if math.isfinite(before) else 0.0
            if added > most:
                worst, most = record, added
            before = record.distance.noise
        return worst

    def worst_layer(self) -> LayerRow | None:
        """Return the layer that adds most noise to what reaches it, or None if none was measured."""
        rows = [row for row in self.layers if row.loss is not None and row.loss > _ROUNDING]
        return max(rows, key=lambda row: row.loss or 0.0) if rows else None

    def to_json(self) -> str:
        """Return the whole report as JSON text; infinite figures become null."""
        blamed = {"worst_pass": self.worst_pass(), "worst_layer": self.worst_layer()}
        names = {key: getattr(item, "text", getattr(item, "name", None)) for key, item in blamed.items()}
        return json.dumps({**_plain(self), **names}, indent=2)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML page that needs no network: tables that sort, pictures, the graph's changes.

        Raises:
            FileError: If the path cannot be written.
        """
        from sqcompile.report_page import report_page

        page = report_page(json.loads(self.to_json()))
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def save(self, path: str | Path) -> None:
        """Write the report: as a page where the path ends in `.html`, as JSON where in `.json`.

        Raises:
            FileError: If the suffix is another one, or the path cannot be written.
        """
        path = Path(path)
        if path.suffix == ".html":
            self.to_html(path)
            return
        if path.suffix != ".json":
            raise FileError(
                f"A report is no '{path.suffix}' file.",
                where=str(path),
                seen=f"suffix '{path.suffix}'",
                expected=".html or .json",
                next_step=f"save it as {path.with_suffix('.html').name}",
            )
        with atomic_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def print(self, console: Console | None = None) -> None:
        """Print the report with rich."""
        from sqcompile.report_tables import print_report

        print_report(self, console)

    def __repr__(self) -> str:
        from sqcompile.report_tables import size_text

        apart = "" if self.output_distance is None else f", {self.output_distance}"
        sizes = f"{size_text(self.original.size_bytes)} -> {size_text(self.size.size_bytes)}"
        return f"<Report on {self.model}: {self.backend}, weights {sizes}{apart}>"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140, force_terminal=False, color_system=None)
        self.print(console)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text


def layer_rows(
    program: Program,
    measured: Iterable[LayerDistance] = (),
    choices: Mapping[str, LayerChoice] | None = None,
    predicted: Mapping[str, float] | None = None,
) -> list[LayerRow]:
    """Describe every layer of a program.

    Args:
        program: The compiled program.
        measured: Distances of its layers from the original's.
        choices: What the backend made of layers, by name.
        predicted: What layers will take in ns, by name.
    """
    choices, predicted = choices or {}, predicted or {}
    bits = stored_bits(program)
    distances = {row.node: row for row in measured}
    rows = []
    for layer in layers_of(program):
        stored = program.tensor(layer.weight)
        found = distances.get(layer.node.name)
        choice = choices.get(layer.name)
        rows.append(
            LayerRow(
                name=layer.name,
                node=layer.node.name,
                kind=layer.kind,
                place=_place(layer),
                shape=tuple(stored.shape),
                weight=value_format(layer.weight_value),
                activation=value_format(layer.data) if layer.data is not None else "",
                parameters=stored.numel(),
                sparsity=weight_zeros(program, layer) / max(1, stored.numel()),
                size_bytes=_layer_bytes(program, layer, bits),
                distance=None if found is None else found.distance,
                loss=None if found is None else found.loss,
                predicted_ns=predicted.get(layer.name),
                form="" if choice is None else choice.form,
                remark="" if choice is None else choice.remark,
            )
        )
    return rows


def value_format(node: fx.Node) -> str:
    """Return the format in which a value reaches an operator: `int8:channel=0`, `uint8 dynamic`, `float32`."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name == "sqcompile::mask":
        assert isinstance(node.args[0], fx.Node)
        return value_format(node.args[0]) + " masked"
    if name not in ("sqcompile::dequantize", "sqcompile::fake_quantize"):
        value = node.meta.get("val")
        return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""
    qmin, qmax = argument(node, 5), argument(node, 6)
    assert isinstance(qmin, int) and isinstance(qmax, int)
    text = f"{'int' if qmin < 0 else 'uint'}{(qmax - qmin).bit_length()}"
    codes = node.args[0]
    if getattr(getattr(getattr(codes, "target", None), "_schema", None), "name", "") == "sqcompile::lookup":
        table = codes.args[1].meta["val"]  # type: ignore[union-attr]
        text = f"table of {table.numel()}"
    axis, group = argument(node, 3), argument(node, 4)
    if group == -1:
        text += ":token"
    elif group is not None:
        text += f":group={group}"
    elif axis is not None:
        text += ":channel"
    scale = node.args[1]
    dynamic = isinstance(scale, fx.Node) and scale.op != "get_attr"
    return f"{text}:dynamic" if dynamic else text


def environment() -> dict[str, str]:
    """Return CPU, threads and versions, which every figure in a report depends on."""
    import sqcompile

    return {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "sqcompile": sqcompile.__version__,
    }


def _layer_bytes(program: Program, layer: Layer, bits: Mapping[str, float]) -> int:
    """Bytes of the stored weight and of what decodes it: scales, zero points, masks."""
    total = 0.0
    pending: list[fx.Node] = [layer.weight_value]
    seen: set[str] = set()
    while pending:
        node = pending.pop()
        if node.op != "get_attr":
            pending += node.all_input_nodes
            continue
        name = str(node.target)
        if name in seen or not program.has_tensor(name):
            continue
        seen.add(name)
        tensor = program.tensor(name)
        total += math.ceil(tensor.numel() * bits.get(name, 8 * tensor.element_size()) / 8)
    return int(total)


def _place(layer: Layer) -> str:
    from sqcompile.text import source_line

    return source_line(layer.node)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _plain(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, LayerRow):
        return {**{key: _plain(item) for key, item in value.__dict__.items()}, "verdict": value.verdict}
    if isinstance(value, (Report, PassRecord, Latency)):
        return {key: _plain(item) for key, item in value.__dict__.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
