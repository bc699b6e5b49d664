"""A lowered program as a `.sqm` file: in memory, or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import sympy
import torch

from sqcompile.backend import Artifact, LayerChoice
from sqcompile.backends.native.file import PlanFile
from sqcompile.backends.native.plan import Plan
from sqcompile.files import atomic_file

if TYPE_CHECKING:
    from sqcompile.backends.native.lower.choice import Product


class NativeArtifact(Artifact):
    """A plan with its packed weights.

    Attributes:
        plan: What the engine executes.
        notes: What the report should say about the choices made.
        products: Products with stored weights, by layer.
    """

    suffix: ClassVar[str] = ".sqm"

    def __init__(
        self, plan: Plan, notes: Sequence[str] = (), products: Mapping[str, Product] | None = None
    ) -> None:
        self.plan = plan
        self.notes = tuple(notes)
        self.products = dict(products or {})
        self.choices = {name: LayerChoice(item.form, item.remark) for name, item in self.products.items()}
        self._file = PlanFile(plan)

    def predict(self, inputs: Sequence[Any]) -> dict[str, float]:
        """Return what the products of a call will take in ns, by layer: of each the product alone."""
        from sqcompile.backends.native.kernel_times import kernel_times

        times, _ = kernel_times()
        tensors = [item for item in inputs if isinstance(item, torch.Tensor)]
        sizes = {
            symbol: size
            for (_, value), tensor in zip(self.plan.inputs, tensors, strict=True)
            for symbol, size in zip(value.shape, tensor.shape, strict=True)
            if isinstance(symbol, sympy.Symbol)
        }
        return {name: item.ns(times, sizes) for name, item in self.products.items()}

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self._file.size_bytes

    def save(self, path: Path) -> list[Path]:
        """Write the file."""
        path = Path(path)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            self._file.write(file)
        return [path]

    def to_bytes(self) -> bytes:
        """Return the bytes of the file; large models had better be saved."""
        file = BytesIO()
        self._file.write(file)
        return file.getvalue()
