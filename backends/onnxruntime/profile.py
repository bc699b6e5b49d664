"""Time of every layer, from ONNX Runtime's own profile.

The runtime fuses operators and renames them, so a profile does not speak of layers. Three traces lead
back: the name of a node (`layer1.0.conv1/Conv…`), the value that it makes (the model that we wrote says
which node made it, and a convolution that was fused with what follows it is found upstream), and the
name of a stored tensor that it reads.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from sqcompile.errors import BackendError

_SUFFIX = "_kernel_time"
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"})
_WARMUP = 2

Open = Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession]


def layer_times(
    open_session: Open,
    options: onnxruntime.SessionOptions,
    model: onnx.ModelProto,
    feeds: Mapping[str, Any],
    layers: Collection[str],
    runs: int,
) -> dict[str, float]:
    """Return the median time of each layer in ns, summed over the nodes that it became.

    Args:
        open_session: Opens the model with given options.
        options: Options of a session to profile; files of this call are added to them.
        model: The model as it was written, without its tensors' data.
        feeds: Inputs by name.
        layers: Names of the layers.
        runs: Calls to take the median of.

    Raises:
        BackendError: If the runtime cannot profile.
    """
    with tempfile.TemporaryDirectory(prefix="sqcompile.") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            session = open_session(options)
            for _ in range(_WARMUP + runs):
                session.run(None, dict(feeds))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            fused = onnx.load(options.optimized_model_filepath, load_external_data=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise BackendError("ONNX Runtime cannot profile the model.", seen=str(error)) from error
    owners = _owners(fused.graph, model.graph, set(layers))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            times[event["name"].removesuffix(_SUFFIX)].append(1e3 * event["dur"])
    found: dict[str, float] = defaultdict(float)
    for node, durations in times.items():
        layer = owners.get(node)
        if layer is not None:
            found[layer] += statistics.median(durations[_WARMUP:] or durations)
    return dict(found)


def _owners(fused: onnx.GraphProto, written: onnx.GraphProto, layers: set[str]) -> dict[str, str]:
    """Map the names of the nodes that run to the layers that they belong to."""
    makers = {name: node for node in written.node for name in node.output}
    stored = {tensor.name for tensor in fused.initializer}
    owners: dict[str, str] = {}
    for node in fused.node:
        layer = (
            _named(node.name, layers)
            or _made(node, makers, layers)
            or _reads([name for name in node.input if name in stored], layers)
        )
        if layer is not None:
            owners[node.name] = layer
    return owners


def _named(name: str, layers: set[str]) -> str | None:
    """Return the layer whose module path a node's name begins with."""
    path = name.rpartition("/")[0]
    return path if path in layers else None


def _made(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], layers: set[str]) -> str | None:
    """Return the layer that made the node's value in the model as it was written."""
    for name in (*node.output, node.name.removesuffix("_nchwc")):
        maker = makers.get(name)
        # A convolution has taken in what follows it (batch norm, ReLU, a sum): it is found upstream.
        while maker is not None and node.op_type in _LAYERS and maker.op_type not in _LAYERS:
            made = [value for value in maker.input if value in makers]
            maker = makers[made[-1]] if made else None
        if maker is not None:
            layer = _named(maker.name, layers) or _reads(list(maker.input), layers)
            if layer is not None:
                return layer
    return None


def _reads(names: list[str], layers: set[str]) -> str | None:
    """Return the layer that a stored tensor belongs to: `conv1` for `conv1.weight_codes`."""
    for name in names:
        owner = name.rpartition(".")[0]
        if owner in layers:
            return owner
    return None
