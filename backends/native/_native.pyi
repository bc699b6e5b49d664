from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

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
def isa_levels() -> list[str]: ...
def isa_available(name: str) -> bool: ...
def default_isa() -> str: ...
def kernels() -> dict[str, list[tuple[str, str, bool]]]: ...

class ThreadPool:
    def __new__(cls, threads: int) -> ThreadPool: ...
    @property
    def threads(self) -> int: ...

def allocate(size_bytes: int) -> NDArray[np.uint8]: ...
def quantize(
    pool: ThreadPool,
    isa: str | None,
    mode: str,
    is_signed: bool,
    x: NDArray[np.float32],
    codes: NDArray[np.uint8],
    k_padded: int,
    scale_group: int,
    sum_group: int,
    scale: NDArray[np.float32],
    zero_point: NDArray[np.int32] | None,
    sum: NDArray[np.int32] | None,
) -> str: ...
def qgemm_packed_bytes(n: int, k: int) -> int: ...
def qgemm_pack(b: NDArray[np.int8], packed: NDArray[np.int8], sum: NDArray[np.int32]) -> None: ...
def qgemm(
    pool: ThreadPool,
    isa: str | None,
    k: int,
    a: NDArray[np.uint8],
    a_scale: NDArray[np.float32],
    a_zero: NDArray[np.int32],
    b: NDArray[np.int8],
    b_sum: NDArray[np.int32],
    b_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
    c: NDArray[np.float32],
    repeat: int = 1,
) -> str: ...
def q4gemm_packed_bytes(n: int, k: int, group: int, bits: int = 4) -> int: ...
def q4gemm_scratch_bytes(m: int, k: int, group: int) -> int: ...
def q4gemm_pack(codes: NDArray[np.uint8], group: int, packed: NDArray[np.uint8], bits: int = 4) -> None: ...
def q4gemm(
    pool: ThreadPool,
    isa: str | None,
    k: int,
    group: int,
    a: NDArray[np.int8],
    a_sum: NDArray[np.int32],
    a_scale: NDArray[np.float32],
    b: NDArray[np.uint8],
    table: NDArray[np.int8],
    b_scale: NDArray[Any],
    b_zero: NDArray[np.int8] | None,
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
    c: NDArray[np.float32],
    scratch: NDArray[np.uint8],
    repeat: int = 1,
    bits: int = 4,
) -> str: ...

VALUE_SLACK: int
QBLOCK_SUM_COUNT: int

def qsparse_mask_count(n: int, k: int) -> int: ...
def qsparse_scratch_bytes(m: int, k: int) -> int: ...
def qsparse_pack(
    b: NDArray[np.int8],
    masks: NDArray[np.uint64],
    values: NDArray[np.uint8],
    value_start: NDArray[np.uint64],
    sum: NDArray[np.int32],
) -> None: ...
def qsparse(
    pool: ThreadPool,
    isa: str | None,
    k: int,
    a: NDArray[np.uint8],
    a_scale: NDArray[np.float32],
    a_zero: NDArray[np.int32],
    masks: NDArray[np.uint64],
    values: NDArray[np.uint8],
    value_start: NDArray[np.uint64],
    b_sum: NDArray[np.int32],
    b_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
    c: NDArray[np.float32],
    scratch: NDArray[np.uint8],
    repeat: int = 1,
) -> str: ...
def q4sparse_mask_count(n: int, k: int, group: int) -> int: ...
def q4sparse_value_bytes(keep: NDArray[np.uint8], group: int) -> int: ...
def q4sparse_pack(
    codes: NDArray[np.uint8],
    keep: NDArray[np.uint8],
    group: int,
    masks: NDArray[np.uint64],
    values: NDArray[np.uint8],
    value_start: NDArray[np.uint64],
) -> None: ...
def q4sparse(
    pool: ThreadPool,
    isa: str | None,
    k: int,
    group: int,
    a: NDArray[np.int8],
    a_sum: NDArray[np.int32],
    a_scale: NDArray[np.float32],
    masks: NDArray[np.uint64],
    values: NDArray[np.uint8],
    value_start: NDArray[np.uint64],
    table: NDArray[np.int8],
    b_scale: NDArray[Any],
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
    c: NDArray[np.float32],
    scratch: NDArray[np.uint8],
    repeat: int = 1,
) -> str: ...
def qblock_start_count(n: int, k: int, block_outputs: int, chunk: int) -> int: ...
def qblock_interleaved_bytes(m: int, k: int) -> int: ...
def qblock_count(b: NDArray[np.int8], block_outputs: int) -> int: ...
def qblock_pack(
    b: NDArray[np.int8],
    block_outputs: int,
    chunk: int,
    index: NDArray[np.uint8],
    values: NDArray[np.int8],
    start: NDArray[np.uint64],
    blocks_before: NDArray[np.uint64],
    sum: NDArray[np.int32],
) -> None: ...
def qblock(
    pool: ThreadPool,
    isa: str | None,
    k: int,
    a: NDArray[np.uint8],
    a_scale: NDArray[np.float32],
    a_zero: NDArray[np.int32],
    block_outputs: int,
    chunk: int,
    index: NDArray[np.uint8],
    values: NDArray[np.int8],
    start: NDArray[np.uint64],
    blocks_before: NDArray[np.uint64],
    b_sum: NDArray[np.int32],
    b_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    low: float,
    high: float,
    c: NDArray[np.float32],
    interleaved: NDArray[np.uint8],
    sums: NDArray[np.int32],
) -> str: ...
def read_memory(pool: ThreadPool, isa: str | None, data: NDArray[np.uint8]) -> str: ...
def multiply_registers(pool: ThreadPool, isa: str | None, steps: int) -> int: ...
def norm(
    pool: ThreadPool,
    isa: str | None,
    kind: str,
    x: NDArray[np.float32],
    weight: NDArray[np.float32] | None,
    bias: NDArray[np.float32] | None,
    epsilon: float,
    y: NDArray[np.float32],
    repeat: int = 1,
) -> str: ...
def fgemm_packed_bytes(n: int, k: int, bf16: bool) -> int: ...
def fgemm_scratch_bytes(m: int, bf16: bool) -> int: ...
def fgemm_pack(b: NDArray[np.float32], bf16: bool, packed: NDArray[np.uint8]) -> None: ...
def fgemm(
    pool: ThreadPool,
    isa: str | None,
    a: NDArray[np.float32],
    b: NDArray[np.uint8],
    bf16: bool,
    bias: NDArray[np.float32] | None,
    c: NDArray[np.float32],
    scratch: NDArray[np.uint8],
    repeat: int = 1,
) -> str: ...
def kv_bytes(
    batch: int, heads: int, capacity: int, head_dim: int, quantized: bool
) -> tuple[int, int, int]: ...
def kvcache(
    pool: ThreadPool,
    isa: str | None,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    position: int,
    capacity: int,
    cache_k: NDArray[np.uint8],
    cache_v: NDArray[np.uint8],
    scale: NDArray[np.float32],
) -> str: ...
def attention_scratch_count(head_dim: int) -> int: ...
def attention(
    pool: ThreadPool,
    isa: str | None,
    q: NDArray[np.float32],
    kv_heads: int,
    length: int,
    position: int,
    causal: bool,
    scale: float,
    allowed: NDArray[np.uint8] | None,
    added: NDArray[np.float32] | None,
    capacity: int,
    cache_k: NDArray[np.uint8],
    cache_v: NDArray[np.uint8],
    cache_scale: NDArray[np.float32],
    out: NDArray[np.float32],
    scratch: NDArray[np.float32],
    repeat: int = 1,
) -> str: ...
def activation(
    pool: ThreadPool,
    isa: str | None,
    function: int,
    x: NDArray[np.float32],
    factor: NDArray[np.float32] | None,
    y: NDArray[np.float32],
    repeat: int = 1,
) -> str: ...

DTYPES: dict[str, int]
LAYOUTS: dict[str, int]
FORMAT_VERSION: int
FORMAT_VERSION_WITH_GENERATION: int

def operators() -> list[tuple[str, int]]: ...

class Model:
    @staticmethod
    def open(path: str) -> Model: ...
    @staticmethod
    def from_bytes(data: bytes) -> Model: ...
    @property
    def metadata(self) -> str: ...
    @property
    def steps(self) -> list[tuple[str, str]]: ...
    @property
    def generation_steps(self) -> list[tuple[str, str]]: ...
    @property
    def generates(self) -> bool: ...
    @property
    def limit(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...

class Generator:
    def __new__(
        cls, model: Model, threads: int, isa: str | None, rows: int, capacity: int, quantized: bool
    ) -> Generator: ...
    def feed(self, texts: list[tuple[int, NDArray[np.int64]]]) -> None: ...
    def logits(self, row: int) -> NDArray[np.float32]: ...
    def length(self, row: int) -> int: ...
    def rewind(self, row: int, length: int) -> None: ...
    def generate(
        self,
        prompts: list[tuple[int, NDArray[np.int64]]],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        stop: list[int],
        callback: Callable[[int, int], bool],
    ) -> None: ...
    def measure(self, on: bool) -> None: ...
    @property
    def times_ns(self) -> list[int]: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

class Session:
    def __new__(cls, model: Model, threads: int, isa: str | None) -> Session: ...
    def run(self, inputs: list[NDArray[Any]]) -> list[NDArray[Any]]: ...
    def profile(self, inputs: list[NDArray[Any]]) -> list[int]: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
