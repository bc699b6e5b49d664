"""Products that skip blocks of zeros, against our own dense int8 product: the product alone, in one run.

    python benchmarks/block_products.py [--threads 2] [--rounds 21] [--json out.json]

128 rows, as in the prefill of a prompt, times the matrices of a 1.1B-parameter Llama. Weights are zero in 1x4
blocks (one output, four inputs) at random. Activations are quantized before; every contender makes a call that is not
timed before each that is. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import alternate, median_ratio, write_json
from rich.console import Console
from rich.table import Table

from sqcompile.backends.native import cpu_features, kernels
from sqcompile.backends.native.kernels import default_isa

ROWS = 128
SHAPES = {"gate and up": (11264, 2048), "down": (2048, 5632), "query and output": (2048, 2048)}
TARGETS = {0.75: 1.8, 0.85: 2.8}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=cpu_features().physical_cores)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pool = kernels.ThreadPool(options.threads)
    random = np.random.default_rng(0)
    table = Table("128 rows", "outputs x inputs", "zeros", "GOPS", "of dense int8", "spread", "target")
    rows: list[dict[str, Any]] = []
    for name, (n, k) in SHAPES.items():
        a = kernels.quantize_rows(random.normal(size=(ROWS, k)).astype(np.float32), signed=False)
        scale, out = np.full(n, 0.01, np.float32), np.empty((ROWS, n), np.float32)
        weight = random.integers(1, 128, (n, k), np.int8)
        dense = kernels.pack_int8(weight, scale)
        calls = {0.0: partial(kernels.int8_matmul, a, dense, out=out, pool=pool)}
        for zeros in TARGETS:
            kept = (random.random((n, k // 4)) >= zeros).repeat(4, axis=1)
            blocks = kernels.pack_block_sparse_int8(weight * kept, scale, 1)
            calls[zeros] = partial(kernels.block_sparse_int8_matmul, a, blocks, out=out, pool=pool)
        times = alternate(
            {str(zeros): call for zeros, call in calls.items()}, runs=options.rounds, settle=True
        )
        for zeros in calls:
            taken, base = times[str(zeros)], times["0.0"]
            ratios = sorted(slow / fast for slow, fast in zip(base, taken, strict=True))
            rate = 2 * ROWS * n * k / sorted(taken)[len(taken) // 2]
            ratio = median_ratio(base, taken)
            target = TARGETS.get(zeros)
            table.add_row(
                name,
                f"{n} x {k}",
                f"{zeros:.0%}",
                f"{rate:.0f}",
                f"{ratio:.2f}" if zeros else "",
                f"{ratios[0]:.2f}–{ratios[-1]:.2f}" if zeros else "",
                f"{target}" if target else "",
            )
            rows.append({"layer": name, "n": n, "k": k, "zeros": zeros, "gops": rate, "ratios": ratios})
    console = Console(width=110)
    console.print(table)
    console.print(
        f"{cpu_features().brand}, {default_isa()}, {options.threads} threads, {options.rounds} rounds"
    )
    write_json(
        options.json,
        "block_products",
        rows,
        isa=default_isa(),
        threads=options.threads,
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()
