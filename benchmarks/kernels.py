"""Measure the native engine's kernels beside what the machine can do.

    python benchmarks/kernels.py [--threads 2] [--isa avx2] [--peers] [--json kernels.json]

Decode is one row times weights that stream from memory (or, `in cache`, that stay in the L2 caches); its
limit is the read bandwidth. Prefill is 128 rows; its limit is the rate of dot products on registers. Both
limits are measured in the same rounds as the kernels: every round runs each contender once, in turn, so
that a slow moment of the machine meets all alike, and each figure is the median over the rounds. Ratios
are medians of the ratios within a round. Rates of sparse weights count the zeros: they are
dense-equivalent.

On a machine that has other work, `--clock cpu --threads 1` counts the time that the one thread had a core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native, cpu_features, kernels

DECODE_N, DECODE_K = 11264, 2048  # gate and up projections of a 1.1B-parameter Llama, as one product
PREFILL_N, PREFILL_K, PREFILL_M = 5632, 2048, 128
STREAM_BYTES = 256 << 20  # far more than any L3 cache
GROUP = 128
NF4 = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]


@dataclass
class Contender:
    """Something that is run once a round."""

    name: str
    run: Callable[[], object]
    work: float  # of one run, in `unit` without the "per second"
    unit: str
    limit: str | None = None  # the contender whose rate is the limit
    limit_work: float = 0.0  # of one run, in the limit's unit
    against: str | None = None  # the contender to compare the rate with
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [self.work / s for s in self.seconds]


@dataclass
class Result:
    name: str
    rate: float
    low: float
    high: float
    unit: str
    of_limit: float | None
    against: str | None
    ratio: float | None


Clock = Callable[[], float]


def measure(contenders: Sequence[Contender], rounds: int, clock: Clock) -> list[Result]:
    for contender in contenders:  # the first run touches pages and wakes threads
        contender.run()
    for _ in range(rounds):
        for contender in contenders:
            start = clock()
            contender.run()
            contender.seconds.append(clock() - start)
    by_name = {contender.name: contender for contender in contenders}
    results = []
    for c in contenders:
        of_limit = ratio = None
        if c.limit:
            pairs = zip(c.seconds, by_name[c.limit].rates, strict=True)
            of_limit = statistics.median(c.limit_work / s / rate for s, rate in pairs)
        if c.against:
            pairs = zip(c.rates, by_name[c.against].rates, strict=True)
            ratio = statistics.median(own / other for own, other in pairs)
        results.append(
            Result(
                name=c.name,
                rate=statistics.median(c.rates),
                low=min(c.rates),
                high=max(c.rates),
                unit=c.unit,
                of_limit=of_limit,
                against=c.against,
                ratio=ratio,
            )
        )
    return results


def show(title: str, results: Sequence[Result]) -> None:
    print(f"\n{title}")
    print(f"  {'':<34}{'median':>9}  {'lowest–highest':<17}{'unit':<14}{'of limit':>9}  ratio")
    for r in results:
        of_limit = "" if r.of_limit is None else f"{r.of_limit:.0%}"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}x {r.against}"
        spread = f"{r.low:.1f}–{r.high:.1f}"
        print(f"  {r.name:<34}{r.rate:>9.1f}  {spread:<17}{r.unit:<14}{of_limit:>9}  {ratio}")
    sys.stdout.flush()


def copies_of(arrays: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The same arrays several times over, each copy in memory of its own."""
    result = [arrays]
    for _ in range(count - 1):
        copy = dict(arrays)
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.nbytes > 4096:
                memory = _native.allocate(array.nbytes)
                memory[:] = array.view(np.uint8)
                copy[name] = memory.view(array.dtype)
        result.append(copy)
    return result


class Products:
    """The products of one shape, as calls without the checks and allocations of `kernels`."""

    def __init__(self, m: int, n: int, k: int, pool: kernels.ThreadPool, isa: str | None) -> None:
        self.m, self.n, self.k, self.pool, self.isa = m, n, k, pool, isa
        self.random = np.random.default_rng(1)
        x = self.random.normal(size=(m, k)).astype(np.float32)
        self.unsigned = kernels.quantize_rows(x, signed=False)
        self.signed = kernels.quantize_rows(x, sum_group_size=GROUP)
        self.c = _native.allocate(4 * m * n).view(np.float32).reshape(m, n)
        self.scale = np.full(n, 0.01, np.float32)
        self.group_scale = np.full((n, k // GROUP), 0.01, np.float32)
        self.infinity = float("inf")
        self.scratch4 = _native.allocate(max(1, pool.threads * _native.q4gemm_scratch_bytes(m, k, GROUP)))
        self.scratch8 = _native.allocate(max(1, pool.threads * _native.qsparse_scratch_bytes(m, k)))

    def zeros(self, sparsity: float, block_outputs: int = 1, block_k: int = 1) -> NDArray[np.bool_]:
        small = self.random.random((self.n // block_outputs, self.k // block_k)) < sparsity
        return small.repeat(block_outputs, axis=0).repeat(block_k, axis=1)

    def int8_matrix(self, zeros: NDArray[np.bool_] | None = None) -> NDArray[np.int8]:
        weight = self.random.integers(1, 128, (self.n, self.k), np.int8)
        if zeros is not None:
            weight[zeros] = 0
        return weight

    def repeated(
        self, call: Callable[..., object], arrays: dict[str, Any], in_cache: bool
    ) -> tuple[Callable[[], object], int]:
        """A function that reads about STREAM_BYTES of copies, or one copy often; and how many products."""
        size = sum(a.nbytes for a in arrays.values() if isinstance(a, np.ndarray))
        if in_cache:
            repeat = max(1, STREAM_BYTES // size)
            return lambda: call(**arrays, repeat=repeat), repeat
        copies = copies_of(arrays, max(1, STREAM_BYTES // size))

        def run() -> None:
            for copy in copies:
                call(**copy)

        return run, len(copies)

    def call8(self, function: Callable[..., object], **extra: Any) -> Callable[..., object]:
        u = self.unsigned

        def call(**arrays: Any) -> object:
            return function(
                pool=self.pool,
                isa=self.isa,
                k=self.k,
                a=u.codes,
                a_scale=u.scale,
                a_zero=u.zero_point,
                low=-self.infinity,
                high=self.infinity,
                c=self.c,
                bias=None,
                **arrays,
                **extra,
            )

        return call

    def call4(self, function: Callable[..., object], **extra: Any) -> Callable[..., object]:
        s = self.signed

        def call(**arrays: Any) -> object:
            return function(
                pool=self.pool,
                isa=self.isa,
                k=self.k,
                group=GROUP,
                a=s.codes,
                a_sum=s.sum,
                a_scale=s.scale,
                low=-self.infinity,
                high=self.infinity,
                c=self.c,
                bias=None,
                scratch=self.scratch4,
                **arrays,
                **extra,
            )

        return call

    def int8(self) -> tuple[Callable[..., object], dict[str, Any]]:
        w = kernels.pack_int8(self.int8_matrix(), self.scale)
        return self.call8(_native.qgemm), {"b": w.tiles, "b_sum": w.sum, "b_scale": w.scale}

    def int4(self, bits: int = 4) -> tuple[Callable[..., object], dict[str, Any]]:
        codes = self.random.integers(0, 2**bits, (self.n, self.k), np.uint8)
        w = kernels.pack_int4(codes, NF4[: 2**bits], self.group_scale, GROUP, bits=bits)
        arrays = {"b": w.codes, "table": w.table, "b_scale": w.scale.view(np.uint16)}
        return self.call4(_native.q4gemm, b_zero=None, bits=bits), arrays

    def grouped_int8(self) -> tuple[Callable[..., object], dict[str, Any]]:
        w = kernels.pack_grouped_int8(self.int8_matrix(), self.group_scale, GROUP)
        arrays = {"b": w.codes, "table": w.table, "b_scale": w.scale.view(np.uint16)}
        return self.call4(_native.q4gemm, b_zero=None, bits=8), arrays

    def sparse_int8(self, sparsity: float) -> tuple[Callable[..., object], dict[str, Any]]:
        w = kernels.pack_sparse_int8(self.int8_matrix(self.zeros(sparsity)), self.scale)
        arrays = {
            "masks": w.masks,
            "values": w.values,
            "value_start": w.value_start,
            "b_sum": w.sum,
            "b_scale": w.scale,
        }
        return self.call8(_native.qsparse, scratch=self.scratch8), arrays

    def sparse_int4(self, sparsity: float) -> tuple[Callable[..., object], dict[str, Any]]:
        codes = self.random.integers(0, 16, (self.n, self.k), np.uint8)
        w = kernels.pack_sparse_int4(codes, ~self.zeros(sparsity), NF4, self.group_scale, GROUP)
        arrays = {
            "masks": w.masks,
            "values": w.values,
            "value_start": w.value_start,
            "table": w.table,
            "b_scale": w.scale.view(np.uint16),
        }
        return self.call4(_native.q4sparse), arrays

    def blocks(self, outputs: int, sparsity: float) -> Callable[[], object]:
        w = kernels.pack_block_sparse_int8(
            self.int8_matrix(self.zeros(sparsity, outputs, 4)), self.scale, outputs
        )
        call = self.call8(
            _native.qblock,
            block_outputs=outputs,
            chunk=w.chunk,
            interleaved=_native.allocate(_native.qblock_interleaved_bytes(self.m, self.k)),
            sums=_native.allocate(4 * self.pool.threads * _native.QBLOCK_SUM_COUNT).view(np.int32),
        )
        return lambda: call(
            index=w.index,
            values=w.values,
            start=w.start,
            blocks_before=w.blocks_before,
            b_sum=w.sum,
            b_scale=w.scale,
        )


def read_contender(pool: kernels.ThreadPool, isa: str | None) -> Contender:
    data = _native.allocate(STREAM_BYTES)
    return Contender("read", lambda: _native.read_memory(pool, isa, data), STREAM_BYTES / 1e9, "GB/s")


def multiply_contender(pool: kernels.ThreadPool, isa: str | None) -> Contender:
    steps = 1 if isa == "scalar" else 400_000
    operations = _native.multiply_registers(pool, isa, steps)
    return Contender(
        "multiply", lambda: _native.multiply_registers(pool, isa, steps), operations / 1e9, "GOPS"
    )


def decode(pool: kernels.ThreadPool, isa: str | None, in_cache: bool, m: int = 1) -> list[Contender]:
    n = 64 * pool.threads if in_cache else DECODE_N
    products = Products(m, n, DECODE_K, pool, isa)
    makers: list[tuple[str, str | None, tuple[Callable[..., object], dict[str, Any]]]] = [
        ("int8", None, products.int8()),
        ("int8, groups of 128", "int8", products.grouped_int8()),
        ("int4", None, products.int4()),
        ("int3", "int4", products.int4(3)),
        ("int2", "int4", products.int4(2)),
        ("int8, 50 % bitmask", "int8", products.sparse_int8(0.5)),
        ("int8, 70 % bitmask", "int8", products.sparse_int8(0.7)),
        ("int8, 90 % bitmask", "int8", products.sparse_int8(0.9)),
        ("int4, 50 % bitmask", "int4", products.sparse_int4(0.5)),
        ("int4, 70 % bitmask", "int4", products.sparse_int4(0.7)),
    ]
    contenders = [] if in_cache else [read_contender(pool, isa)]
    for name, against, (call, arrays) in makers:
        run, count = products.repeated(call, arrays, in_cache)
        size = sum(a.nbytes for a in arrays.values())
        contenders.append(
            Contender(
                name,
                run,
                count * n * DECODE_K / 1e9,
                "G weights/s",
                limit=None if in_cache else "read",
                limit_work=count * size / 1e9,
                against=against,
            )
        )
    return contenders


def prefill(pool: kernels.ThreadPool, isa: str | None) -> list[Contender]:
    products = Products(PREFILL_M, PREFILL_N, PREFILL_K, pool, isa)
    operations = 2 * PREFILL_M * PREFILL_N * PREFILL_K / 1e9

    def bind(maker: tuple[Callable[..., object], dict[str, Any]]) -> Callable[[], object]:
        call, arrays = maker
        return lambda: call(**arrays)

    runs = [
        ("int8", bind(products.int8())),
        ("int8, groups of 128", bind(products.grouped_int8())),
        ("int4", bind(products.int4())),
        ("int3", bind(products.int4(3))),
        ("int2", bind(products.int4(2))),
        ("int8, 50 % bitmask", bind(products.sparse_int8(0.5))),
        ("int4, 50 % bitmask", bind(products.sparse_int4(0.5))),
    ]
    for outputs in (1, 4, 16):
        for sparsity in (0.5, 0.75, 0.85):
            name = f"int8, {sparsity:.0%} in {outputs}x4 blocks".replace("%", " %")
            runs.append((name, products.blocks(outputs, sparsity)))
    contenders = [multiply_contender(pool, isa)]
    for name, run in runs:
        dense = "blocks" not in name
        contenders.append(
            Contender(
                name,
                run,
                operations,
                "GOPS",
                limit="multiply" if dense else None,
                limit_work=operations,
                against=None if name == "int8" else "int8",
            )
        )
    return contenders


def quantize(pool: kernels.ThreadPool, isa: str | None) -> list[Contender]:
    x = np.random.default_rng(2).normal(size=(PREFILL_M, PREFILL_K)).astype(np.float32)
    runs: list[tuple[str, dict[str, Any]]] = [
        ("symmetric", {}),
        ("symmetric, groups of 32", {"group_size": 32}),
        ("affine", {"mode": "affine", "signed": False}),
    ]

    def bind(options: dict[str, Any]) -> Callable[[], object]:
        return lambda: kernels.quantize_rows(x, isa=isa, pool=pool, **options)

    return [
        Contender(f"quantize, {name}", bind(options), x.nbytes / 1e9, "GB/s of float32")
        for name, options in runs
    ]


def onnxruntime_contenders(m: int, threads: int) -> list[Contender]:
    """ONNX Runtime's products on the same shape: int4 blocks of 32 and 128 at accuracy level 4, and int8."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = (DECODE_N, DECODE_K) if m == 1 else (PREFILL_N, PREFILL_K)
    random = np.random.default_rng(3)

    def session(node_of: Callable[[int, list[Any]], Any], count: int) -> Any:
        constants: list[Any] = []
        nodes = [node_of(i, constants) for i in range(count)]
        graph = helper.make_graph(
            nodes,
            "peer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]) for i in range(count)],
            constants,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def constant(constants: list[Any], name: str, array: NDArray[Any]) -> str:
        constants.append(numpy_helper.from_array(array, name))
        return name

    def int4(block: int) -> Callable[[int, list[Any]], Any]:
        def node(i: int, constants: list[Any]) -> Any:
            codes = random.integers(0, 256, (n, k // block, block // 2), np.uint8)
            inputs = [
                "x",
                constant(constants, f"b{i}", codes),
                constant(constants, f"s{i}", np.full(n * k // block, 0.01, np.float32)),
            ]
            return helper.make_node(
                "MatMulNBits",
                inputs,
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=4,
                block_size=block,
                accuracy_level=4,
            )

        return node

    def int8(i: int, constants: list[Any]) -> Any:
        inputs = [
            "x",
            constant(constants, f"b{i}", random.integers(-127, 128, (k, n), np.int8)),
            constant(constants, f"s{i}", np.full(n, 0.01, np.float32)),
        ]
        return helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{i}"], domain="com.microsoft")

    x = random.normal(size=(m, k)).astype(np.float32)
    result = []
    peers = [("int4 block 32", int4(32)), ("int4 block 128", int4(128)), ("int8 DynamicQuantizeMatMul", int8)]
    for name, node_of in peers:
        count = 1 if m > 1 else 12
        peer = session(node_of, count)

        def run(peer: Any = peer) -> object:
            return peer.run(None, {"x": x})

        work = count * n * k / 1e9 * (2 * m if m > 1 else 1)
        result.append(Contender(f"onnxruntime {name}", run, work, "GOPS" if m > 1 else "G weights/s"))
    return result


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=cpu_features().physical_cores)
    parser.add_argument("--isa", default=None, choices=kernels.available_isas())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--peers", action="store_true", help="also measure ONNX Runtime, where installed")
    parser.add_argument("--only", help="one part: decode, decode_in_cache, decode_4_rows, prefill, quantize")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu sees the calling thread only: it needs --threads 1")
    clock = time.perf_counter if options.clock == "wall" else time.thread_time

    pool = kernels.ThreadPool(options.threads)
    isa = options.isa or kernels.default_isa()
    features = cpu_features()
    print(f"{features.brand or features.architecture}, {options.threads} threads, {isa}")
    peers = options.peers and version("onnxruntime") is not None
    parts: list[tuple[str, str, Callable[[], list[Contender]]]] = [
        ("decode", "Decode, 1 row, weights from memory", lambda: decode(pool, isa, in_cache=False)),
        ("decode_in_cache", "Decode, 1 row, weights in cache", lambda: decode(pool, isa, in_cache=True)),
        ("decode_4_rows", "Decode, 4 rows, weights from memory", lambda: decode(pool, isa, False, m=4)),
        ("prefill", f"Prefill, {PREFILL_M} rows", lambda: prefill(pool, isa)),
        ("quantize", f"Quantize {PREFILL_M} rows", lambda: quantize(pool, isa)),
    ]
    if options.only:
        parts = [part for part in parts if part[0] == options.only]
        if not parts:
            parser.error(f"no part is called {options.only}")
    figures: dict[str, Any] = {}
    for key, title, make in parts:
        contenders = make()
        if peers and key in ("decode", "prefill"):
            contenders += onnxruntime_contenders(1 if key == "decode" else PREFILL_M, options.threads)
        results = measure(contenders, options.rounds, clock)
        show(title, results)
        figures[key] = [asdict(result) for result in results]
    if options.json:
        about = {
            "cpu": features.brand,
            "architecture": features.architecture,
            "threads": options.threads,
            "isa": isa,
            "rounds": options.rounds,
            "clock": options.clock,
            "python": sys.version.split()[0],
            "versions": {name: version(name) for name in ("sqcompile", "numpy", "onnxruntime")},
        }
        options.json.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
