"""What a pass may use beside the program: data, seed, limits, progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sqcompile.errors import CalibrationError, PassContractError
from sqcompile.executor import Executor, InProcess
from sqcompile.fingerprint import tensor_identity
from sqcompile.progress import Progress, SilentProgress
from sqcompile.remarks import Remark

if TYPE_CHECKING:
    from sqcompile.calibration import Calibration
    from sqcompile.program import Program


@dataclass
class PassContext:
    """The surroundings of one run of a pipeline.

    Attributes:
        calibration: Calibration batches, or None.
        seed: Seed for everything random.
        max_memory: Cap on the resident memory that a pass may use, in bytes, or None.
        work_dir: Folder for intermediate results of long passes, or None.
        dense_calibration: What the dense program gets where this one gets `calibration`: a part of a model comes
            behind parts that have changed. None: the same.
        progress: Where long work reports how far it is.
        original: The program as it was before the first pass, to compare with or to learn from; the manager sets it.
        executor: Does pieces of work that do not depend on each other, such as the layers that read one value.
    """

    calibration: Calibration | None = None
    seed: int = 0
    max_memory: int | None = None
    work_dir: Path | None = None
    progress: Progress = field(default_factory=SilentProgress)
    origin: str = ""
    remarks: list[Remark] = field(default_factory=list)
    dense_calibration: Calibration | None = None
    original: Program | None = None
    executor: Executor = field(default_factory=InProcess)

    def remark(self, node: fx.Node | str, reason: str) -> None:
        """Say why a rewrite did or did not happen at a node."""
        self.remarks.append(Remark.at(self.origin, node, reason))

    def batches(self, purpose: str) -> Iterator[Sequence[Any]]:
        """Yield calibration batches as flat inputs, reporting progress.

        Raises:
            CalibrationError: If there is no calibration data.
            PassContractError: If a batch has been written into: it is the caller's, and later passes read it, too.
        """
        if self.calibration is None:
            raise CalibrationError(
                f"{self.origin or 'The pass'} needs calibration data, and there is none.",
                where=f"pass {self.origin}",
                seen="calibration=None",
                expected="an iterable of batches: tensors, tuples of inputs, or dicts of named inputs",
                next_step="pass calibration=[batch, …] to sqcompile.compile, or --data FILE on the command line "
                "(100 to 500 samples are usual)",
            )
        for index, batch in enumerate(self.progress.track(self.calibration, purpose)):
            tensors = [leaf for leaf in batch if isinstance(leaf, torch.Tensor)]
            before = [tensor_identity(tensor) for tensor in tensors]
            yield batch
            if [tensor_identity(tensor) for tensor in tensors] != before:
                raise PassContractError(
                    f"{self.origin or 'The pass'} wrote into calibration batch {index}.",
                    where=f"pass {self.origin}",
                    seen="a tensor of the batch was modified, and with it the caller's data",
                    expected="batches are only read: later passes read them, too",
                    next_step="work on a copy: x = x.clone()",
                )
