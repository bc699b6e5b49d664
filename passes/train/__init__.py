"""Training: winning back what compression cost, with the user's own training function."""

from sqcompile.passes.train.fine_tune import FineTune

__all__ = ["FineTune"]
