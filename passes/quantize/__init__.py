"""Passes that turn floating-point programs into integer ones."""

from sqcompile.passes.quantize.calibrate import Calibrate
from sqcompile.passes.quantize.freeze_observers import FreezeObservers
from sqcompile.passes.quantize.insert_observers import InsertObservers

__all__ = ["Calibrate", "FreezeObservers", "InsertObservers"]
