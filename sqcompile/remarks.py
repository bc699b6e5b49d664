"""Remarks: why a rewrite did, or did not, happen somewhere."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sqcompile.text import module_path, source_line


@dataclass(frozen=True)
class Remark:
    """One observation of a pass about one place.

    Attributes:
        origin: Name of the pass.
        node: Name of the node.
        reason: What was (not) done, and why.
        module: Path of the module that the node comes from.
        source: The model's own line, as `file.py:41`.
    """

    origin: str
    node: str
    reason: str
    module: str = ""
    source: str = ""

    @classmethod
    def at(cls, origin: str, node: fx.Node | str, reason: str) -> Remark:
        """Make a remark about a node, or about a place that has only a name."""
        if isinstance(node, str):
            return cls(origin, node, reason)
        return cls(origin, node.name, reason, module_path(node), source_line(node))

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.module, self.source) if part)
        return f"{self.origin}: {self.node}{f' ({place})' if place else ''}: {self.reason}"
