"""Checkpoints of long training: what a program's tensors and masks are after a round, in one file.

A checkpoint belongs to one program, one pass and one seed: its name holds a hash of all three, so that work
on another program, or with other options, never resumes from it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.errors import FileError
from sqcompile.files import atomic_file
from sqcompile.layers import layers_of
from sqcompile.program import Program
from sqcompile.pruning import prunable_weights, set_mask
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern

_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a program after some rounds.

    Attributes:
        rounds: Rounds that are done.
        tensors: Every tensor that the program uses, by name.
        masks: Name of the weight -> mask and pattern, in the order in which they were made.
        facts: Figures of the rounds.
    """

    rounds: int
    tensors: dict[str, Tensor]
    masks: dict[str, tuple[Tensor, str]]
    facts: dict[str, Any]

    @classmethod
    def of(cls, program: Program, rounds: int, facts: Mapping[str, Any]) -> Checkpoint:
        """Return the state that a program is in."""
        masks = {name: (promise.mask, str(promise.pattern)) for name, promise in program.sparsity.items()}
        tensors = {name: tensor.detach() for name, tensor in program.tensors()}
        return cls(rounds, tensors, masks, dict(facts))

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            FileError: If the path cannot be written.
        """
        content = {
            "version": _VERSION,
            "rounds": self.rounds,
            "tensors": self.tensors,
            "masks": {name: [mask, pattern] for name, (mask, pattern) in self.masks.items()},
            "facts": self.facts,
        }
        buffer = io.BytesIO()  # PyTorch's own writer ends the process on a full disk
        torch.save(content, buffer)
        with atomic_file(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            FileError: If the file is damaged, or of another version.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']}")
            masks = {name: (mask, pattern) for name, (mask, pattern) in content["masks"].items()}
            return cls(int(content["rounds"]), dict(content["tensors"]), masks, dict(content["facts"]))
        except (
            OSError,
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            EOFError,
            pickle.PickleError,
        ) as error:
            raise _unfit(path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error

    def apply(self, program: Program, path: Path) -> int:
        """Bring the program that the work began with to this state.

        Returns:
            How many changes that were.

        Raises:
            FileError: If the state is another program's.
        """
        edit = Rewriter(program)
        layers = layers_of(program)
        for name, (mask, pattern) in self.masks.items():
            users = [layer for layer in layers if layer.weight_name == name]
            for weight in prunable_weights(program, users, Pattern.parse(pattern), lambda *_: None):
                if weight.tensor.shape != mask.shape:
                    raise _unfit(path, f"the mask of @{name} has shape {tuple(mask.shape)}")
                set_mask(edit, weight, mask, Pattern.parse(pattern))
        edit.finish()
        readers = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
        now = {name: tuple(tensor.shape) for name, tensor in program.tensors()}
        if now != {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}:
            raise _unfit(path, "tensors of other names or shapes than the program's")
        for name, value in self.tensors.items():
            old = program.tensor(name)
            if not torch.equal(old.detach(), value):
                trained = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
                edit.replace_tensor(readers[name], trained)
        edit.finish()
        return edit.changes


def checkpoint_path(folder: Path, name: str, *parts: object) -> Path:
    """Return where the checkpoint of a piece of work lies, of which `parts` say all that decides its result."""
    key = hashlib.sha256(repr([str(part) for part in parts]).encode()).hexdigest()[:16]
    return folder / f"{name}-{key}.pt"


def _unfit(path: Path, seen: str) -> FileError:
    return FileError(
        "A checkpoint cannot be resumed from.",
        where=str(path),
        seen=seen,
        expected="a file that the same version of sqcompile wrote for the same program",
        next_step="remove the file to start anew",
    )
