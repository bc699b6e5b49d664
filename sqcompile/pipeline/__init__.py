"""Passes: their contract, their text form, and the manager that runs and checks them."""

from sqcompile.pipeline.context import PassContext
from sqcompile.pipeline.contract import Keeps, Pass, PassResult
from sqcompile.pipeline.manager import PassManager, PassRecord, verify_program
from sqcompile.pipeline.text import make_pass, parse_pass, parse_pipeline, pipeline_text, registry

__all__ = [
    "Keeps",
    "Pass",
    "PassContext",
    "PassManager",
    "PassRecord",
    "PassResult",
    "make_pass",
    "parse_pass",
    "parse_pipeline",
    "pipeline_text",
    "registry",
    "verify_program",
]
