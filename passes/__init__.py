"""Passes: one rewrite a file, grouped by job; `pipelines` has whole jobs."""

from sqcompile.passes import pipelines as pipelines
from sqcompile.passes.canonicalize import *  # noqa: F403
from sqcompile.passes.prune import *  # noqa: F403
from sqcompile.passes.quantize import *  # noqa: F403
