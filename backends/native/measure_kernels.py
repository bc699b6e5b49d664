"""Measuring what products take on this machine, for `sqcompile bench --kernels`.

Each form of weights is multiplied at several densities by several numbers of rows, once with weights that
stream from memory and once with weights that stay in the caches. All take turns, so that a slow moment of
the machine meets all alike: what counts is how forms compare. A figure is the lower quartile of its turns,
since whatever disturbs them makes them longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native, float_kernels, kernels
from sqcompile.backends.native.kernel_times import FormTimes, KernelTimes, cpu_name, default_threads
from sqcompile.backends.native.kernels import PANEL
from sqcompile.progress import Progress, SilentProgress

# Columns of every weight, and rows of activations: decoding one to a few texts, then prefill.
INPUTS = 2048
ROWS = (1, 2, 4, 8, 32, 128)
_STREAMED = 4  # rows from which on a product's time does not depend on where its weights come from

_GROUP = 128
_TABLE = list(range(-8, 8))
_SPARSE = (0.1, 0.3, 0.5, 0.7, 1.0)
_BLOCKS = (0.1, 0.25, 0.5, 0.75, 1.0)
_DENSE = (1.0,)


@dataclass(frozen=True)
class _Form:
    """How weights of one form are made and multiplied.

    Attributes:
        density: Densities to measure.
        make: Makes a weight [N, K], N and K given, of which such a part is not zero.
        multiply: Multiplies rows by it, into `out`.
        rows: Makes rows of activations, so many.
    """

    density: tuple[float, ...]
    make: Callable[[int, int, float], Any]
    multiply: Callable[..., object]
    rows: Callable[[int], Any]


def measure_kernels(
    *,
    threads: int | None = None,
    isa: str | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> KernelTimes:
    """Measure every form of weights on this machine; takes about a minute.

    Args:
        threads: Threads of each product; None: as many as a session has.
        isa: Instruction set; None: the one that sessions use.
        quick: A tenth of the work, for tests: figures that say little.
        progress: Where it reports.
    """
    threads = threads or default_threads()
    isa = isa or kernels.default_isa()
    bench = _Bench(threads, isa, quick, progress or SilentProgress())
    overhead = bench.overhead()
    return KernelTimes(cpu_name(), isa, threads, overhead, bench.measure())


def _forms(isa: str) -> dict[str, _Form]:
    random = np.random.default_rng(1)

    def zeros(n: int, k: int, density: float, outputs: int = 1, inputs: int = 1) -> NDArray[np.bool_]:
        small = random.random((n // outputs, k // inputs)) >= density
        return small.repeat(outputs, axis=0).repeat(inputs, axis=1)

    def int8(n: int, k: int, zero: NDArray[np.bool_] | None = None) -> NDArray[np.int8]:
        weight = random.integers(1, 128, (n, k), np.int8)
        if zero is not None:
            weight[zero] = 0
        return weight

    def scale(n: int) -> NDArray[np.float32]:
        return np.full(n, 0.01, np.float32)

    def group_scale(n: int, k: int) -> NDArray[np.float32]:
        return np.full((n, k // _GROUP), 0.01, np.float32)

    def codes(n: int, k: int, bits: int = 4) -> NDArray[np.uint8]:
        return random.integers(0, 1 << bits, (n, k), np.uint8)

    def values(m: int) -> NDArray[np.float32]:
        return random.normal(size=(m, INPUTS)).astype(np.float32)

    def unsigned(m: int) -> Any:
        return kernels.quantize_rows(values(m), signed=False, isa=isa)

    def signed(m: int) -> Any:
        return kernels.quantize_rows(values(m), group_size=_GROUP, isa=isa)

    def blocks(outputs: int) -> _Form:
        def make(n: int, k: int, density: float) -> Any:
            weight = int8(n, k, zeros(n, k, density, outputs, 4))
            return kernels.pack_block_sparse_int8(weight, scale(n), outputs)

        return _Form(_BLOCKS, make, kernels.block_sparse_int8_matmul, unsigned)

    def groups(bits: int) -> _Form:
        def make(n: int, k: int, _: float) -> Any:
            return kernels.pack_int4(
                codes(n, k, bits), _TABLE[: 1 << bits], group_scale(n, k), _GROUP, bits=bits
            )

        return _Form(_DENSE, make, kernels.int4_matmul, signed)

    return {
        "float32": _Form(
            _DENSE,
            lambda n, k, _: float_kernels.pack_float(random.random((n, k), np.float32)),
            _multiply_floats,
            values,
        ),
        "int8": _Form(
            _DENSE, lambda n, k, _: kernels.pack_int8(int8(n, k), scale(n)), kernels.int8_matmul, unsigned
        ),
        "int8, bitmask": _Form(
            _SPARSE,
            lambda n, k, density: kernels.pack_sparse_int8(int8(n, k, zeros(n, k, density)), scale(n)),
            kernels.sparse_int8_matmul,
            unsigned,
        ),
        **{f"int8 in {outputs}x4 blocks": blocks(outputs) for outputs in (1, 4, 16)},
        "8-bit": _Form(
            _DENSE,
            lambda n, k, _: kernels.pack_grouped_int8(int8(n, k), group_scale(n, k), _GROUP),
            kernels.int4_matmul,
            signed,
        ),
        **{f"{bits}-bit": groups(bits) for bits in (4, 3, 2)},
        "4-bit, bitmask": _Form(
            _SPARSE,
            lambda n, k, density: kernels.pack_sparse_int4(
                codes(n, k), ~zeros(n, k, density), _TABLE, group_scale(n, k), _GROUP
            ),
            kernels.sparse_int4_matmul,
            signed,
        ),
    }


def _multiply_floats(
    a: NDArray[np.float32],
    weight: float_kernels.FloatWeight,
    *,
    out: NDArray[np.float32],
    pool: kernels.ThreadPool,
    isa: str,
) -> None:
    scratch = _native.allocate(pool.threads * _native.fgemm_scratch_bytes(len(a), weight.bfloat16))
    _native.fgemm(pool, isa, a, weight.data, weight.bfloat16, weight.bias, out, scratch)


@dataclass
class _Contender:
    """A weight that takes its turns.

    Attributes:
        form: What it is one of.
        weight: The weight.
        tiny: One of 16 outputs, which shows what a call costs beside the weights.
        samples: Times for a million weights in ns, by number of rows.
    """

    form: _Form
    weight: Any
    tiny: Any
    samples: dict[int, list[float]]

    def measure(self, rows: int, a: Any, pool: kernels.ThreadPool, isa: str, warm: int) -> None:
        """Multiply once, behind so many times that are not counted."""

        def time_of(weight: Any, out: NDArray[np.float32], before: int) -> float:
            call = partial(self.form.multiply, a, weight, out=out, pool=pool, isa=isa)
            for _ in range(before):
                call()
            started = time.perf_counter_ns()
            call()
            return float(time.perf_counter_ns() - started)

        taken = time_of(self.weight, np.empty((rows, self.weight.n), np.float32), warm)
        small = np.empty((rows, self.tiny.n), np.float32)
        beside = min(time_of(self.tiny, small, 1) for _ in range(2))
        million = (self.weight.n - self.tiny.n) * INPUTS / 1e6
        self.samples[rows].append(max(taken - beside, 0.1 * taken) / million)


class _Bench:
    """All forms of weights, in turns.

    Weights of the size of a layer are more than any cache holds all together, so that each comes from memory when
    its turn is there again. Small ones are multiplied a few times before a time counts.
    """

    def __init__(self, threads: int, isa: str, quick: bool, progress: Progress) -> None:
        self.pool, self.isa, self.progress = kernels.ThreadPool(threads), isa, progress
        self.forms = _forms(isa)
        self.rounds = 2 if quick else 25
        self.outputs = {"cache": 128, "memory": 256} if quick else {"cache": 1024, "memory": 8192}

    def measure(self) -> dict[str, FormTimes]:
        """Return the times of every form."""
        cache, memory = (self._tables(kind) for kind in ("cache", "memory"))
        found = {}
        for name, form in self.forms.items():
            slow = _ascending(memory[name])
            # What is read once for many rows hardly matters; and memory is not faster than a cache.
            fast = np.minimum(_ascending(np.vstack([cache[name], slow[len(cache[name]) :]])), slow)
            found[name] = FormTimes(ROWS, form.density, _rounded(fast), _rounded(slow))
        return found

    def _tables(self, kind: str) -> dict[str, NDArray[np.float64]]:
        rows = [count for count in ROWS if kind == "memory" or count <= _STREAMED]
        contenders = {
            name: [
                _Contender(
                    form,
                    form.make(self.outputs[kind], INPUTS, density),
                    form.make(PANEL, INPUTS, density),
                    {count: [] for count in rows},
                )
                for density in form.density
            ]
            for name, form in self.forms.items()
        }
        for _ in self.progress.track(range(self.rounds), f"measuring kernels, weights in {kind}"):
            for count in rows:
                for name, items in contenders.items():
                    a = self.forms[name].rows(count)
                    for item in items:
                        item.measure(count, a, self.pool, self.isa, 3 if kind == "cache" else 0)
        return {
            name: np.array([[_quartile(item.samples[count]) for item in items] for count in rows])
            for name, items in contenders.items()
        }

    def overhead(self) -> float:
        """Return the time of a product with hardly any work, without Python's part."""
        n, repeat = PANEL * 8, 2000
        weight = kernels.pack_int8(np.ones((n, INPUTS), np.int8), np.ones(n, np.float32))
        rows = kernels.quantize_rows(np.ones((1, INPUTS), np.float32), signed=False, isa=self.isa)
        out = np.empty((1, n), np.float32)

        def run(pool: kernels.ThreadPool) -> float:
            options = (weight.tiles, weight.sum, weight.scale, None, -np.inf, np.inf, out, repeat)
            started = time.perf_counter_ns()
            _native.qgemm(pool, self.isa, INPUTS, rows.codes, rows.scale, rows.zero_point, *options)
            return (time.perf_counter_ns() - started) / repeat

        # What threads need to find together: beside the half of the work that each of them has.
        single = kernels.ThreadPool(1)
        alone = _quartile([run(single) for _ in range(self.rounds)])
        together = _quartile([run(self.pool) for _ in range(self.rounds)])
        return round(max(together - alone / self.pool.threads, 100.0), 1)


def _quartile(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=4, method="inclusive")[0]


def _ascending(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return times that do not fall with rows or density, as a quieter machine would have shown them."""
    ascending: NDArray[np.float64] = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
    return ascending


def _rounded(table: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{item:.4g}") for item in line) for line in table)
