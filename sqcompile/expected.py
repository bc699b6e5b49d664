"""What inputs a model expects, as far as it can be known before or after tracing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from sqcompile.errors import CalibrationError, did_you_mean
from sqcompile.signature import Signature, Value, describe_type


@dataclass(frozen=True)
class ExpectedInputs:
    """Names of a model's inputs, and their types where they are known.

    Attributes:
        names: Names in order; those that data may have.
        required: Names that data must have.
        values: What a traced model says about each, by name; empty before tracing.
        vocabulary: Tokens that `input_ids` may be, if the model says how many it has embeddings for.
    """

    names: tuple[str, ...]
    required: frozenset[str]
    values: Mapping[str, Value] = field(default_factory=dict)
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: Any) -> ExpectedInputs:
        """Return what a module, program, session or signature expects."""
        if isinstance(model, ExportedProgram):
            from sqcompile.tracing import trace

            model = trace(model)
        signature = model if isinstance(model, Signature) else getattr(model, "signature", None)
        if isinstance(signature, Signature):
            return cls._of_signature(signature)
        assert isinstance(model, nn.Module)
        parameters = [
            parameter
            for parameter in inspect.signature(model.forward).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        names = tuple(parameter.name for parameter in parameters)
        required = frozenset(p.name for p in parameters if p.default is p.empty)
        return cls(names, required, vocabulary=_vocabulary(model))

    @classmethod
    def _of_signature(cls, signature: Signature) -> ExpectedInputs:
        values = {value.name: value for value in signature.tensor_inputs}
        return cls(tuple(values), frozenset(values), values)

    @property
    def traced_batch(self) -> int | None:
        """The first dimension that all inputs were traced with, or None if it is dynamic or unknown."""
        sizes = {value.shape[0] for value in self.values.values() if value.shape}
        fixed = [size for size in sizes if isinstance(size, int)]
        return fixed[0] if len(sizes) == 1 and fixed else None

    def traced_size(self, name: str, axis: int) -> int | None:
        """Return the fixed size of one dimension, or None if it is dynamic or unknown."""
        shape = self.values[name].shape if name in self.values else None
        size = shape[axis] if shape and axis < len(shape) else None
        return size if isinstance(size, int) else None

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the element type of an input, or None if it is not known yet."""
        return self.values[name].dtype if name in self.values else None

    def check_tokens(self, samples: Mapping[str, Any], where: str) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            CalibrationError: If there are any: they are another tokenizer's.
        """
        tokens = samples.get("input_ids")
        if self.vocabulary is None or tokens is None or tokens.size == 0 or tokens.dtype.kind not in "iu":
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise CalibrationError(
                "Tokens are not those of the model's vocabulary.",
                where=where,
                seen=f"ids from {low} to {high}",
                expected=f"ids from 0 to {self.vocabulary - 1}, which the model has embeddings for",
                next_step="tokenize with the model's own tokenizer (--tokenizer names its folder)",
            )

    def _instead_of(self, name: str, arrays: Mapping[str, Any]) -> str:
        """Return what to do about an array that is no input."""
        needed = [item for item in self.names if item in self.required]
        if needed == list(self.names[:1]) and needed[0] in arrays:
            return f"take only the input's array, without labels or what else there is: FILE.npz:{needed[0]}"
        if needed and all(item in arrays for item in needed):
            return f"write the file without '{name}'"
        hint = did_you_mean(name, [item for item in self.names if item not in arrays]).rstrip("?")
        return f"{hint}; otherwise drop the array, or take it for the first input with FILE.npz:{name}"

    def assign(self, arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Give every array the name of an input: its own, or by order for unnamed ones.

        Raises:
            CalibrationError: If a name is no input's, or an input gets no array.
        """
        if not self.names:
            raise CalibrationError(
                "The model takes no named inputs.",
                where=where,
                expected="a forward method with named parameters",
                next_step="name the inputs in forward, or call sqcompile.compile with batches of your own",
            )
        if all(re.fullmatch(r"(arr_\d+)?", name) for name in arrays):
            arrays = dict(zip(self.names, arrays.values(), strict=False))
        for name in arrays:
            if name not in self.names:
                raise CalibrationError(
                    f"The model has no input '{name}'.",
                    where=where,
                    seen=", ".join(arrays),
                    expected=", ".join(self.names[:12]),
                    next_step=self._instead_of(name, arrays),
                )
        missing = [name for name in self.names if name in self.required and name not in arrays]
        if missing:
            raise CalibrationError(
                f"The data holds nothing for input '{missing[0]}'.",
                where=where,
                seen=", ".join(arrays),
                expected=", ".join(name for name in self.names if name in self.required),
                next_step=f"add an array named '{missing[0]}'",
            )
        return dict(arrays)

    def check_shapes(self, arrays: Mapping[str, Any], where: str) -> None:
        """Check every array's shape, but for its first axis, against the traced one.

        Raises:
            CalibrationError: If one does not fit.
        """
        for name, array in arrays.items():
            value = self.values.get(name)
            if value is None or value.shape is None:
                continue
            sizes = tuple(array.shape)
            fits = len(sizes) == len(value.shape) and all(
                isinstance(wanted, str) or wanted == size
                for wanted, size in zip(value.shape[1:], sizes[1:], strict=True)
            )
            if not fits:
                raise CalibrationError(
                    f"The samples for input '{name}' have the wrong shape.",
                    where=where,
                    seen=f"{tuple(sizes[1:])}, {sizes[0]} times",
                    expected=f"{describe_type(value.dtype, ['samples', *value.shape[1:]])}",
                    next_step="prepare the data as the model takes it; the first axis counts samples",
                )


def _vocabulary(model: nn.Module) -> int | None:
    """Return for how many tokens a model of transformers has embeddings; None if it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    if not callable(find):
        return None
    try:
        count = getattr(find(), "num_embeddings", None)
    except NotImplementedError:  # as models without tokens answer
        return None
    return count if isinstance(count, int) else None
