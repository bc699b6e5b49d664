"""What the CPU under this process can do, as the native engine sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from sqcompile.backends.native import _native


@dataclass(frozen=True, kw_only=True)
class CpuFeatures:
    """The CPU that runs this process; what could not be read is False, empty or zero.

    Attributes:
        architecture: `x86_64`, `aarch64` or `unknown`.
        vendor: CPUID vendor string on x86, the implementer's name on Arm.
        brand: CPUID brand string on x86, empty elsewhere.
        family: x86 family, 0 elsewhere.
        model: x86 model or Arm part number.
        logical_cores: Hardware threads that this process may run on (its affinity mask).
        physical_cores: Cores behind them; the threads of one core count once.
        l1_bytes: Size of the L1 data cache that one core sees.
        l2_bytes: Size of the L2 cache that one core sees.
        l3_bytes: Size of the L3 cache that one core sees, shared with others as a rule.
        flags: Instruction sets by name, such as `avx2`, `avx512_vnni` or `dotprod`. True means that
            the CPU has it and that the operating system saves its registers. Every name is present
            on every architecture, so a lookup with a name that does not exist is a KeyError.
    """

    architecture: str
    vendor: str
    brand: str
    family: int
    model: int
    logical_cores: int
    physical_cores: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    flags: Mapping[str, bool]

    def __str__(self) -> str:
        present = " ".join(name for name, is_set in self.flags.items() if is_set)
        return f"{self.brand or self.vendor or 'CPU'} ({self.architecture}): {present or 'no known flags'}"


@cache
def cpu_features() -> CpuFeatures:
    """Describe the CPU that runs this process; detected once.

    Example:
        >>> cpu_features().flags["avx512_vnni"]  # doctest: +SKIP
        True
    """
    info = _native.cpu_info()
    features = CpuFeatures(**info)
    return replace(features, flags=MappingProxyType(features.flags))
