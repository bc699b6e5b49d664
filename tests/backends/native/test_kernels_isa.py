"""Which kernel runs: by this CPU, by SQCOMPILE_ISA, by a CPU that lacks the instructions."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sqcompile.backends.native import kernels

ISAS = kernels.available_isas()

RUN_ONE = """
import numpy as np
from sqcompile.backends.native import kernels
print(kernels.default_isa(), kernels.quantize_rows(np.ones((1, 16), np.float32)).kernel)
"""


def run_with(isa: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "SQCOMPILE_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", RUN_ONE], env=environment, capture_output=True, text=True, timeout=300
    )


def test_each_family_lists_its_kernels_best_first_and_ends_with_scalar() -> None:
    by_family: dict[str, list[kernels.KernelInfo]] = {}
    for kernel in kernels.list_kernels():
        by_family.setdefault(kernel.family, []).append(kernel)
    families = {"machine", "quantize", "qgemm", "q4gemm", "qsparse", "q4sparse", "qblock"}
    families |= {"qconv", "qconvblock", "qconvsparse", "qdepthwise", "fconv", "qbinary", "qimage"}
    assert families <= set(by_family)
    for family, lines in by_family.items():
        assert lines[-1].isa == "scalar" and lines[-1].available, family
        assert len({line.isa for line in lines}) == len(lines), family
        assert all(line.name == f"{family}_{line.isa}" for line in lines)


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_asked_for_is_the_one_that_runs(isa: str) -> None:
    expected = next(
        kernel.isa
        for kernel in kernels.list_kernels()
        if kernel.family == "quantize" and (kernel.isa in ISAS[: ISAS.index(isa) + 1])
    )
    rows = kernels.quantize_rows(np.ones((1, 16), np.float32), isa=isa)
    assert rows.kernel == f"quantize_{expected}"


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_the_environment_variable_forces_an_instruction_set(isa: str) -> None:
    if isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    result = run_with(isa)
    assert result.stdout.split() == [isa, f"quantize_{isa}"], result.stderr


def test_an_unknown_name_in_the_environment_is_an_error() -> None:
    result = run_with("avx9")
    assert result.returncode != 0
    assert "no instruction set is called 'avx9'" in result.stderr and "BackendError" in result.stderr


def test_the_same_bits_on_every_instruction_set_across_a_whole_layer() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(7, 300)).astype(np.float32)
    weight = kernels.pack_int8(
        generator.integers(-128, 128, (70, 300), np.int8), np.full(70, 0.01, np.float32)
    )
    results = set()
    for isa in ISAS:
        rows = kernels.quantize_rows(x, mode="affine", signed=False, isa=isa)
        results.add(kernels.int8_matmul(rows, weight, isa=isa).tobytes())
    assert len(results) == 1
