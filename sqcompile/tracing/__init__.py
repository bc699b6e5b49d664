"""From a model to a program, and from a program back to torch.export."""

from sqcompile.tracing.export import from_exported_program, trace
from sqcompile.tracing.inputs import Inputs, argument_names, normalize_inputs
from sqcompile.tracing.lift import lift

__all__ = ["Inputs", "argument_names", "from_exported_program", "lift", "normalize_inputs", "trace"]
