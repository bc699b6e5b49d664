from typing import TypedDict

class _CpuInfo(TypedDict):
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
    flags: dict[str, bool]

def cpu_info() -> _CpuInfo: ...
