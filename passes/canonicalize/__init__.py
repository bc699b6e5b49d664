"""Canonicalization: one form for each computation, so that later passes need to know only that one."""

from sqcompile.passes.canonicalize.remove_noops import RemoveNoops

__all__ = ["RemoveNoops"]
