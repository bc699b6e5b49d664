"""The values inside an ONNX file, which the file itself is asked for: it is loaded once more, with them as outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch

from sqcompile.cli.onnx_file import metadata_of, read_onnx
from sqcompile.compare import NamedLayer
from sqcompile.errors import BackendError
from sqcompile.layer_values import LAYERS, layers_from_json
from sqcompile.metrics import Distance, DistanceMeter
from sqcompile.signature import SIGNATURE, Signature

_LAYERS = re.compile(
    r"(Fused|QLinear|Quantized)?(Conv(Transpose|Integer)?|Q?Gemm|MatMul\w*|DynamicQuantizeMatMul)"
)
"""Operators with a weight, ONNX's own and those of ONNX Runtime's and its quantizer's."""

_FOLDER = "session.model_external_initializers_file_folder_path"
"""Option of the runtime: where the tensors lie that a model in memory has beside it."""


_Value = tuple[str, torch.Tensor | None]
"""Name of a value in the file, and what its channels were multiplied with."""


class Fed(Protocol):
    """A session of the file that knows how the file is fed."""

    signature: Signature

    def feeds(self, inputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return flat inputs as the runtime takes them."""
        ...

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat inputs."""
        ...


class FileValues:
    """The values of an ONNX file by name: in files of ours by those of the model's nodes, else by their own.

    Values within the bodies of `If`, `Loop` and `Scan` are not seen.

    Args:
        path: The file.
        session: The file, loaded: as its outputs are without further ones.
        threads: Threads within an operator; None leaves the choice to the runtime.

    Raises:
        FileError: If the file cannot be read.
    """

    def __init__(self, path: Path, session: Fed, threads: int | None) -> None:
        self._path, self._session, self._threads = path, session, threads
        self._model = read_onnx(path)  # without tensors that lie beside it
        metadata = metadata_of(self._model)
        self.ours = SIGNATURE in metadata
        self.layers_are_known = not self.ours or LAYERS in metadata
        self._stated = layers_from_json(metadata.get(LAYERS, "[]"), str(path))
        self._values = self._stated_values() if self.ours else _own_values(self._model.graph)
        self._inner: onnxruntime.InferenceSession | None = None
        self._shown: list[str] = []
        self._meter = DistanceMeter()

    @property
    def apart(self) -> Distance:
        """Distance of the outputs, on all that it ran on, from those of the file when nobody watches."""
        return self._meter.result()

    def names(self) -> Collection[str]:
        """Return the names of the values that it can show; some of them may be no floating-point numbers."""
        return self._values.keys()

    def layers(self) -> list[NamedLayer]:
        """Return its layers, in order: as the file states them, else the operators with a weight."""
        if not self.ours:
            return _own_layers(self._model.graph)
        return [
            NamedLayer(layer.name, layer.name, "", tuple(layer.values))
            for layer in self._stated
            if layer.values
        ]

    def show(
        self, inputs: Sequence[Any], names: Collection[str], on_value: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Run on flat inputs, and hand over the floating-point values of these names; the same at each call.

        Raises:
            BackendError: If the runtime does not take the file with these outputs.
        """
        if self._inner is None:
            self._shown = sorted(names)
            self._inner = self._open([self._values[name][0] for name in self._shown])
        expected = [value for value in self._session.run(inputs) if isinstance(value, torch.Tensor)]
        wanted = [self._values[name] for name in self._shown]
        own = [item.name for item in self._inner.get_outputs()][: len(expected)]
        try:
            results = self._inner.run([*own, *(value for value, _ in wanted)], self._session.feeds(inputs))
        except Exception as error:  # the runtime's exceptions have no common class
            raise self._refused(error) from error
        values = [torch.from_numpy(np.asarray(item)) for item in results]
        for right, seen in zip(expected, values, strict=False):
            self._meter.add(right, seen)
        for name, (_, factor), value in zip(self._shown, wanted, values[len(own) :], strict=True):
            if value.is_floating_point():
                on_value(name, value if factor is None else value / factor)

    def _open(self, values: Sequence[str]) -> onnxruntime.InferenceSession:
        """Load the file with further outputs; what they are the runtime derives itself."""
        from onnx import ValueInfoProto

        outputs = self._model.graph.output
        known = {item.name for item in outputs}
        outputs.extend(ValueInfoProto(name=name) for name in dict.fromkeys(values) if name not in known)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        # The model goes in as it is in memory, which is below 2 GB: large tensors lie in files beside it.
        options.add_session_config_entry(_FOLDER, str(self._path.resolve().parent))
        try:
            return onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> BackendError:
        return BackendError(
            "ONNX Runtime does not show values of the file.",
            where=str(self._path),
            seen=(str(error).splitlines() or [type(error).__name__])[0],
            next_step="compile to .pt2 too, and compare with that",
        )

    def _stated_values(self) -> dict[str, _Value]:
        found: dict[str, _Value] = {}
        for layer in self._stated:
            for name, value in layer.values.items():
                found.setdefault(name, (value, layer.factor))
        return found


def _own_values(graph: Any) -> dict[str, _Value]:
    """Return the values of another tool's file by their own names."""
    readers = _readers(graph)
    return {name: (_settled(name, readers), None) for node in graph.node for name in node.output if name}


def _own_layers(graph: Any) -> list[NamedLayer]:
    readers, computed = _readers(graph), _computed(graph)
    return [
        NamedLayer(_layer_name(node), node.output[0], "", tuple(_behind(node, readers, computed)))
        for node in graph.node
        if _LAYERS.fullmatch(node.op_type)
    ]


def _behind(node: Any, readers: Mapping[str, list[Any]], computed: Collection[str]) -> Iterator[str]:
    """Yield the name of an operator's value, and of those that are made from it alone, up to the next layer."""
    while True:
        yield node.output[0]
        after = readers.get(node.output[0], [])
        if len(after) != 1 or _LAYERS.fullmatch(after[0].op_type):
            return
        node = after[0]
        if sum(name in computed for name in node.input) > 1 or not node.output:
            return


def _readers(graph: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _computed(graph: Any) -> set[str]:
    """Return the values that depend on inputs."""
    found = {item.name for item in graph.input} - {item.name for item in graph.initializer}
    for node in graph.node:
        if any(name in found for name in node.input):
            found.update(node.output)
    return found


def _settled(value: str, readers: Mapping[str, list[Any]]) -> str:
    """Return the value that the readers of a value see: in files of quantizers, what comes back from its codes.

    Such tools drop an activation whose range the codes have, and give its name to what was before it.
    """
    found = value
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        after = readers.get(found, [])
        if not after or any(node.op_type != kind for node in after) or after[0].input[0] != found:
            return value
        found = after[0].output[0]
    return found


def _layer_name(node: Any) -> str:
    """Return the module path that exporters put into the names of operators, ours and torch's older one."""
    name = str(node.name).strip("/")
    path, slash, _ = name.rpartition("/")
    return path.replace("/", ".") if slash and path else name or str(node.output[0])
