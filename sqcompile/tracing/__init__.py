"""From a model to a program, and from a program back to torch.export."""

from sqcompile.tracing.export import trace
from sqcompile.tracing.lift import lift

__all__ = ["lift", "trace"]
