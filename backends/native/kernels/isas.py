"""Instruction sets: which this CPU has, and which kernels were built for them."""

from __future__ import annotations

from dataclasses import dataclass

from sqcompile.backends.native import _native
from sqcompile.errors import BackendError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class KernelInfo:
    """One line of a family's kernels.inc."""

    family: str
    name: str
    isa: str
    available: bool


def list_kernels() -> list[KernelInfo]:
    """List every kernel that was built, best first within a family."""
    return [
        KernelInfo(family=family, name=name, isa=isa, available=available)
        for family, lines in _native.kernels().items()
        for name, isa, available in lines
    ]


def available_isas() -> list[str]:
    """Return the instruction sets that this CPU and its operating system can run, weakest first."""
    return [name for name in _native.isa_levels() if _native.isa_available(name)]


def default_isa() -> str:
    """Return what SQCOMPILE_ISA asks for, else the best instruction set available.

    Raises:
        BackendError: The variable holds an unknown name, or one that this CPU lacks.
    """
    try:
        return _native.default_isa()
    except (ValueError, RuntimeError) as error:
        raise isa_error(error, "SQCOMPILE_ISA") from None


def isa_error(error: Exception, where: str | None) -> BackendError:
    """Return our error for an instruction set that C++ refuses."""
    name = str(error).split("'")[1] if "'" in str(error) else ""
    return BackendError(str(error), where=where, next_step=did_you_mean(name, available_isas()))
