"""Which values inside a lowered file are those of the model's layers, so that the file can be compared layer by layer.

A file's values have names of their own, and not always a layer's numbers: a convolution that a batch norm was folded
into has the batch norm's value, and channels may have been rescaled. Who wrote the file knows; it says so in an entry
of the file's metadata.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from sqcompile.errors import FileError

LAYERS = "sqcompile.layers"
"""Key of a file's metadata under which its layers' values stand, as JSON."""


@dataclass(frozen=True)
class LayerValues:
    """A layer's values in a file.

    Attributes:
        name: Name of the layer.
        values: Name of the traced model's node -> name of the file's value that has the node's value. The layer's own
            node is the first; others are made from its value alone.
        factor: What the channels of the values were multiplied with, of a shape that they broadcast with, or None.
    """

    name: str
    values: Mapping[str, str] = field(default_factory=dict)
    factor: torch.Tensor | None = None


def original_name(node: fx.Node) -> str:
    """Return the name of the traced node whose value a node has; its own may be another's there."""
    return str(node.meta.get("stands_for", node.name))


def layers_to_json(layers: Iterable[LayerValues]) -> str:
    """Return the layers of a file as JSON: [[name, {node: value}, [shape, factors in base64]], …]."""
    entries: list[list[object]] = []
    for layer in layers:
        entry: list[object] = [layer.name, dict(layer.values)]
        if layer.factor is not None:
            numbers = layer.factor.detach().cpu().contiguous().numpy().astype("<f4")
            entry.append([list(numbers.shape), base64.b64encode(numbers.tobytes()).decode()])
        entries.append(entry)
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False)


def layers_from_json(text: str, file: str = "") -> list[LayerValues]:
    """Read what `layers_to_json` wrote.

    Args:
        text: The JSON text.
        file: Name of the file that it comes from, for the error.

    Raises:
        FileError: If the text is damaged.
    """
    try:
        return [_read(*entry) for entry in json.loads(text)]
    except (AttributeError, TypeError, ValueError) as error:
        raise FileError(
            "Which values of the file are those of layers cannot be read.",
            where=", ".join(filter(None, (file, LAYERS))),
            seen=f"{type(error).__name__}: {error}",
            expected="the JSON text that sqcompile writes",
            next_step="compile the model again",
        ) from error


def _read(name: str, values: Mapping[str, str], packed: tuple[list[int], str] | None = None) -> LayerValues:
    factor = None
    if packed is not None:
        shape, text = packed
        numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape)
        factor = torch.from_numpy(numbers.astype(np.float32))
    return LayerValues(str(name), {str(node): str(value) for node, value in values.items()}, factor)
