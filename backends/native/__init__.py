"""The native backend: sqcompile's own C++ engine for sparse and integer models."""

from sqcompile.backends.native.cpu import CpuFeatures, cpu_features

__all__ = ["CpuFeatures", "cpu_features"]
