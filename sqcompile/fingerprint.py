"""A structural hash: two programs with the same hash are the same graph over the same tensors."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from sqcompile.program import Program


def fingerprint(program: Program, *, content: bool = False) -> str:
    """Hash everything that a program is: graph, types, tensors, signature, level, observers, promises.

    Names of computed values do not count; order, operators, arguments and tensors do.

    Args:
        program: The program.
        content: Hash the bytes of the tensors, so that equal programs of two processes get the same
            hash. Without it tensors count by storage and version: they are immutable, so identity is
            enough to see a change, and weights are never read.
    """
    tensor_text = _content if content else tensor_identity
    parts: list[object] = [str(program.level), _signature(program)]
    index = {node: position for position, node in enumerate(program.graph.nodes)}

    def describe(argument: Any) -> object:
        if isinstance(argument, fx.Node):  # one of another graph has no place: the verifier finds it
            return "node", index.get(argument, argument.name)
        if isinstance(argument, (list, tuple)):
            return "list", *map(describe, argument)
        if isinstance(argument, dict):
            return "dict", *((key, describe(item)) for key, item in sorted(argument.items()))
        if isinstance(argument, slice):
            return "slice", *map(describe, (argument.start, argument.stop, argument.step))
        return repr(argument)

    for node in program.graph.nodes:
        # The names of inputs are the interface; other placeholders' targets are.
        target = node.name if node.op == "placeholder" else str(node.target)
        parts.append((node.op, target, describe(node.args), describe(node.kwargs)))
        if node.op != "output":  # its values have types of their own
            parts.append(_describe_value(node.meta.get("val")))
        if node.op == "get_attr" and program.has_tensor(str(node.target)):
            parts.append(tensor_text(program.tensor(node)))
    for name, state in sorted(program.observers.items()):
        parts.append((name, _describe_state(state)))
    for name, promise in sorted(program.sparsity.items()):
        parts.append((name, str(promise.pattern), tensor_text(promise.mask)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def tensor_identity(tensor: torch.Tensor) -> str:
    """Return storage, layout and version of a tensor; writing into it changes the version."""
    version = 0 if tensor.is_inference() else tensor._version
    return f"{tensor.data_ptr()}:{version}:{tuple(tensor.shape)}:{tensor.stride()}:{tensor.dtype}"


def checksum(tensor: torch.Tensor) -> int:
    """Return a number that changes when values of a tensor change or change places.

    Unlike the version, it sees what is written through `.data` or NumPy. Sums of rows and of columns
    read memory at its full speed (7 GB/s on one core of a server CPU; CRC-32 alone: 2 GB/s).
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # tensors of a mapped file may start anywhere
        flat = flat.clone()
    columns = 1 << max(3, (flat.numel().bit_length() + 1) // 2)  # near a square
    whole = flat.numel() // columns * columns
    words = flat[:whole].view(torch.int64).reshape(-1, columns // 8)
    value = 0
    for part in (words.sum(0), words.sum(1), flat[whole:]):
        value = zlib.crc32(part.cpu().numpy().data, value)
    return value


def _content(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{hashlib.sha256(data.data).hexdigest()}:{tuple(tensor.shape)}:{tensor.dtype}"


def _signature(program: Program) -> object:
    signature = program.signature
    return (
        signature.inputs,
        signature.outputs,
        str(signature.in_spec),
        str(signature.out_spec),
        signature.arg_names,
        sorted(signature.dims.items()),
    )


def _describe_value(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(map(str, value.shape)), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_describe_value, value))
    return str(value)


def _describe_state(state: Any) -> object:
    """Describe what an observer has seen, by its content: states are small, and may be mutable."""
    if isinstance(state, torch.Tensor):
        return _content(state)
    if hasattr(state, "__dict__"):
        return type(state).__qualname__, *(
            (key, _describe_state(item)) for key, item in sorted(vars(state).items())
        )
    return repr(state)
