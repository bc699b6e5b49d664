"""What the pass manager compares before and after a pass: stored tensors, and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sqcompile.compare import first_jump
from sqcompile.errors import Error, NumericError, PassContractError, VerifyError
from sqcompile.fingerprint import checksum, tensor_identity
from sqcompile.metrics import Distance, output_distance
from sqcompile.pipeline.contract import Pass
from sqcompile.program import Program

Outputs = list[list[Any]]
"""Flat outputs, one list a check batch."""


class TensorGuard:
    """Sees whether a pass wrote into stored tensors, which are immutable.

    Args:
        content: Read every tensor once a pass. Without it, writes past PyTorch's version counter
            (through `.data` or NumPy) stay unseen.
    """

    def __init__(self, *, content: bool) -> None:
        self._content = content
        self._watched: dict[str, tuple[torch.Tensor, str, int]] = {}

    def watch(self, program: Program) -> None:
        """Remember the tensors of a program; those that were watched before are not read again."""
        known = self._watched
        self._watched = {}
        for name, tensor in program.tensors():
            if name in known and known[name][0] is tensor:
                self._watched[name] = known[name]
            else:
                total = checksum(tensor) if self._content else 0
                self._watched[name] = (tensor, tensor_identity(tensor), total)

    def check(self, item: Pass) -> None:
        """Check that no watched tensor has been written to.

        Raises:
            PassContractError: If one has.
        """
        name = self.written()
        if name is None:
            return
        raise PassContractError(
            f"Pass {item.name} wrote into the tensor '{name}'.",
            where=f"tensor @{name}",
            seen="its storage was modified, and with it the weights of the model",
            expected="tensors are immutable: a pass replaces a tensor",
            next_step="make a new tensor and call Rewriter.replace_tensor; load the model again",
        )

    def written(self) -> str | None:
        """Return the name of a watched tensor that has been written to, or None."""
        for name, (tensor, identity, total) in self._watched.items():
            if tensor_identity(tensor) != identity or (self._content and checksum(tensor) != total):
                return name
        return None


class NumberGuard:
    """Runs the program on the check batches after each pass, and holds the pass to what it keeps.

    Args:
        program: The program before the first pass.
        batches: Flat inputs; may be empty, then nothing is compared.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = list(batches)
        self._original: Outputs | None = self._run(program) if batches else None
        self._current = self._original

    def unchanged(self) -> Distance | None:
        """Return the distance from the original after a pass that changed nothing."""
        if self._original is None or self._current is None:
            return None
        return output_distance(self._original, self._current)

    def check(self, item: Pass, before: Program, after: Program) -> Distance | None:
        """Compare the outputs after a pass with those before it.

        Where a pass has changed the interface, as it declared, there is nothing to compare with: from
        then on outputs are compared with its own, and no distance from the original is known.

        Returns:
            The distance from the original program.

        Raises:
            VerifyError: If the program does not run any more.
            NumericError: If the outputs moved further than the pass promises, or are not finite.
        """
        if before.signature.inputs != after.signature.inputs:
            self._batches, self._original, self._current = [], None, None
        if not self._batches:
            return None
        try:
            outputs = self._run(after)
        except Error as error:
            raise VerifyError(
                f"The program no longer runs after pass {item.name}.",
                where=error.where,
                seen=error.seen or error.what,
                expected="a program that runs on the inputs it ran on before",
                next_step="check the arguments that the pass gave to this operator",
            ) from error
        if before.signature.outputs != after.signature.outputs:
            self._original, self._current = None, outputs
            return None
        assert self._current is not None
        self._compare(item, before, after, self._current, outputs)
        self._current = outputs
        return self.unchanged()

    def final(self, after: Program) -> Distance | None:
        """Return the distance of a last program from the original, without holding it to a promise."""
        if self._original is None:
            return None
        return output_distance(self._original, self._run(after))

    def _run(self, program: Program) -> Outputs:
        with torch.no_grad():
            return [program.run(batch) for batch in self._batches]

    def _compare(self, item: Pass, before: Program, after: Program, old: Outputs, new: Outputs) -> None:
        for batch, reference, value in zip(self._batches, old, new, strict=True):
            for declared, ref, val in zip(before.signature.outputs, reference, value, strict=True):
                if not isinstance(ref, torch.Tensor):
                    continue
                lost = output_distance([[ref]], [[val]]) if ref.shape == val.shape else None
                if item.keeps.allows(ref, val) and (lost is None or lost.finite):
                    continue

                def parted(ref: torch.Tensor, val: torch.Tensor) -> bool:
                    far = item.keeps.kind == "interface" and output_distance([[ref]], [[val]]).sqnr_db < 20
                    return far or not item.keeps.allows(ref, val)

                place = first_jump(before, after, batch, parted)
                raise NumericError(
                    f"Pass {item.name} changed the numbers more than it promises.",
                    where=f"output '{declared.name}'" + (f", first at {place}" if place else ""),
                    seen=str(lost) if lost is not None else f"shape {tuple(val.shape)}",
                    expected=f"finite outputs, {item.keeps}",
                    next_step="leave this layer out of the pass, or compare with: sqcompile compare; in a pass of your "
                    "own, promise with `keeps` what holds",
                )
