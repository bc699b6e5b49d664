"""Passes: one rewrite a file, grouped by job."""

from sqcompile.passes.canonicalize import *  # noqa: F403
from sqcompile.passes.prune import *  # noqa: F403
from sqcompile.passes.quantize import *  # noqa: F403
