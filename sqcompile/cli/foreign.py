"""ONNX files of other tools, so that ours can be compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch.utils import _pytree as pytree

from sqcompile.backend import Session
from sqcompile.errors import BackendError, FileError
from sqcompile.signature import SIGNATURE, Signature, Value

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class ForeignSession(Session):
    """A bare ONNX Runtime session, called with keyword inputs by their names in the file.

    Args:
        path: The file.
        threads: Threads within an operator; None leaves the choice to the runtime.

    Raises:
        FileError: If the runtime cannot load it, or an input is no tensor of numbers.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self._inner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions have no common class
            raise FileError(
                f"'{path}' cannot be loaded.",
                where=str(path),
                seen=str(error).splitlines()[0],
                expected="an ONNX model that ONNX Runtime can run",
                next_step="check the file with: sqcompile inspect",
            ) from error
        inputs = tuple(_value(item, path) for item in self._inner.get_inputs())
        outputs = tuple(_value(item, path) for item in self._inner.get_outputs())
        call = ((), {value.name: 0 for value in inputs})
        self.signature = Signature(
            inputs=inputs,
            outputs=outputs,
            in_spec=pytree.tree_structure(call),
            out_spec=pytree.tree_structure([0] * len(outputs)),
            arg_names=tuple(value.name for value in inputs),
        )

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat inputs."""
        try:
            return [torch.from_numpy(value) for value in self._inner.run(None, self.feeds(inputs))]
        except Exception as error:
            raise BackendError(
                "ONNX Runtime failed while running the model.",
                seen=str(error).splitlines()[0],
                next_step="check that the inputs are those that the file takes",
            ) from error

    def feeds(self, inputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return flat inputs as the runtime takes them, by the names in the file."""
        names = [value.name for value in self.signature.inputs]
        return {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}


def is_ours(path: Path) -> bool:
    """Whether a file carries the signature that sqcompile writes."""
    from sqcompile.cli.onnx_file import metadata_of, read_onnx

    return SIGNATURE in metadata_of(read_onnx(path))


def _value(item: Any, path: Path) -> Value:
    if item.type not in _TYPES:
        raise FileError(
            f"'{item.name}' is no tensor of numbers.",
            where=str(path),
            seen=item.type,
            expected=", ".join(_TYPES),
            next_step="compare models whose inputs and outputs are tensors",
        )
    shape = tuple(
        size if isinstance(size, int) else str(size) if size else f"{item.name}_{axis}"
        for axis, size in enumerate(item.shape)
    )
    return Value(item.name, shape, _TYPES[item.type])
