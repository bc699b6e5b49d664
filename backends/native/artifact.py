"""A lowered program as a `.sqm` file: in memory, or written."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import ClassVar

from sqcompile.backend import Artifact
from sqcompile.backends.native.file import PlanFile
from sqcompile.backends.native.plan import Plan
from sqcompile.files import atomic_file


class NativeArtifact(Artifact):
    """A plan with its packed weights.

    Attributes:
        plan: What the engine executes.
        notes: What the report should say about the choices made.
    """

    suffix: ClassVar[str] = ".sqm"

    def __init__(self, plan: Plan, notes: Sequence[str] = ()) -> None:
        self.plan = plan
        self.notes = tuple(notes)
        self._file = PlanFile(plan)

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
