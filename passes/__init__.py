"""Passes: one rewrite a file, grouped by job."""

from sqcompile.passes.canonicalize import RemoveNoops

__all__ = ["RemoveNoops"]
