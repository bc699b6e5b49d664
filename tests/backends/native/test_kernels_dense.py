"""Quantized rows and dense products: scalar against NumPy, every instruction set against scalar."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sqcompile.backends.native import kernels
from sqcompile.errors import BackendError, FormatError, InputError

ISAS = kernels.available_isas()
EDGES = [1, 15, 16, 17]


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_rows(seed: int, m: int, k: int) -> NDArray[np.float32]:
    return random(seed).normal(size=(m, k)).astype(np.float32)


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def numpy_codes(
    x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.int32], signed: bool
) -> NDArray[np.int32]:
    low, high = (-128, 127) if signed else (0, 255)
    codes = np.rint(x / scale) + zero.astype(np.float32)
    return np.clip(codes, low, high).astype(np.int32)


# --- quantize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 127, 128, 129, 300])
@pytest.mark.parametrize("signed", [True, False])
def test_symmetric_rows(isa: str, k: int, signed: bool) -> None:
    x = random_rows(k, 3, k)
    rows = kernels.quantize_rows(x, signed=signed, isa=isa)
    largest = np.abs(x).max(axis=1, initial=0)
    assert np.array_equal(rows.scale, np.where(largest == 0, 1, largest / np.float32(127)))
    expected = numpy_codes(x, rows.scale[:, None], rows.zero_point, signed)
    assert np.array_equal(rows.codes[:, :k], expected)
    padding = rows.codes[:, k : -(-k // 4) * 4]
    assert (padding == (0 if signed else 128)).all()
    assert np.array_equal(rows.sum[:, 0], expected.sum(axis=1) + padding.astype(np.int32).sum(axis=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 17, 128, 129])
def test_affine_rows(isa: str, k: int) -> None:
    x = random_rows(k, 4, k) + np.float32([[0], [3], [-3], [0.1]])
    rows = kernels.quantize_rows(x, mode="affine", signed=False, isa=isa)
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    scale = (high - low) / np.float32(255)
    assert np.array_equal(rows.scale, scale)
    assert np.array_equal(rows.zero_point, np.rint(np.clip(-low / scale, 0, 255)))
    expected = numpy_codes(x, scale[:, None], rows.zero_point[:, None], signed=False)
    assert np.array_equal(rows.codes[:, :k], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_scales_and_sums(isa: str, group_size: int) -> None:
    x = random_rows(5, 3, 200)
    rows = kernels.quantize_rows(x, group_size=group_size, isa=isa)
    groups = -(-200 // group_size)
    assert rows.scale.shape == rows.sum.shape == (3, groups)
    for g in range(groups):
        part = x[:, g * group_size : (g + 1) * group_size]
        scale = np.abs(part).max(axis=1) / np.float32(127)
        assert np.array_equal(rows.scale[:, g], scale)
        expected = numpy_codes(part, scale[:, None], np.int32([0]), signed=True)
        assert np.array_equal(rows.codes[:, g * group_size : g * group_size + part.shape[1]], expected)
        assert np.array_equal(rows.sum[:, g], expected.sum(axis=1))


@pytest.mark.parametrize("isa", ISAS)
def test_static_rows_saturate_and_round_halves_to_even(isa: str) -> None:
    x = np.float32([[-1e30, -64.5, -0.75, -0.25, 0.25, 0.75, 1.25, 63.5, 1e30]])
    rows = kernels.quantize_rows_static(x, 0.5, 0, isa=isa)
    assert rows.codes[0, :9].tolist() == [-128, -128, -2, 0, 0, 2, 2, 127, 127]
    rows = kernels.quantize_rows_static(x, 0.5, 100, signed=False, isa=isa)
    assert rows.codes[0, :9].tolist() == [0, 0, 98, 100, 100, 102, 102, 227, 255]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_nan_and_spares_the_others(isa: str, bad: float) -> None:
    x = random_rows(6, 3, 64)
    x[1, 40] = bad
    weight = kernels.pack_int8(random(7).integers(-127, 128, (20, 64), np.int8), np.ones(20, np.float32))
    rows = kernels.quantize_rows(x, signed=False, isa=isa)
    assert np.isnan(rows.scale).tolist() == [False, True, False]
    result = kernels.int8_matmul(rows, weight, isa=isa)
    assert np.isnan(result[1]).all() and np.isfinite(result[[0, 2]]).all()


def test_impossible_quantization_is_refused() -> None:
    x = random_rows(8, 2, 8)
    with pytest.raises(FormatError, match="unsigned"):
        kernels.quantize_rows(x, mode="affine")
    with pytest.raises(FormatError, match="multiples of 16"):
        kernels.quantize_rows(x, group_size=24)
    with pytest.raises(InputError, match="no matrix of float32"):
        kernels.quantize_rows(x.astype(np.float64))
    with pytest.raises(InputError, match="finite and positive"):
        kernels.quantize_rows_static(x, math.nan, 0)
    with pytest.raises(InputError, match="no code"):
        kernels.quantize_rows_static(x, 1.0, 200)


# --- int8 -------------------------------------------------------------------------------------------------


def int8_reference(
    rows: kernels.QuantizedRows,
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32],
) -> NDArray[np.float64]:
    """In float64, where sums of codes are exact."""
    codes = rows.codes[:, : rows.k].astype(np.int64) - rows.zero_point[:, None]
    sums = (codes @ weight.T.astype(np.int64)).astype(np.float32)
    factors = (rows.scale[:, None] * scale).astype(np.float64)
    return sums.astype(np.float64) * factors + bias


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("n", [*EDGES, 64, 65])
def test_int8_product(m: int, n: int) -> None:
    for k in (1, 3, 4, 5, 63, 64, 65):
        x = random_rows(m * n + k, m, k)
        weight = random(n + k).integers(-128, 128, (n, k), np.int8)
        scale = random(n).uniform(0.01, 0.1, n).astype(np.float32)
        bias = random(m).normal(size=n).astype(np.float32)
        packed = kernels.pack_int8(weight, scale, bias)
        rows = kernels.quantize_rows(x, mode="affine", signed=False)
        results = [kernels.int8_matmul(rows, packed, isa=isa) for isa in ISAS]
        # One rounding of the fused multiply-add is all that separates float64 from the kernel.
        expected = int8_reference(rows, weight, scale, bias)
        assert np.array_equal(results[0], expected.astype(np.float32))
        assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("m,n,k", [(0, 5, 8), (5, 0, 8), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("isa", ISAS)
def test_empty_int8_product(isa: str, m: int, n: int, k: int) -> None:
    weight = kernels.pack_int8(np.zeros((n, k), np.int8), np.ones(n, np.float32), np.ones(n, np.float32))
    rows = kernels.quantize_rows(np.zeros((m, k), np.float32), signed=False, isa=isa)
    assert np.array_equal(kernels.int8_matmul(rows, weight, isa=isa), np.ones((m, n), np.float32))


def test_int8_threads_do_not_change_a_bit() -> None:
    x = random_rows(9, 9, 300)
    weight = kernels.pack_int8(random(10).integers(-128, 128, (200, 300), np.int8), np.ones(200, np.float32))
    for m in (1, 9):
        rows = kernels.quantize_rows(x[:m], signed=False)
        alone = kernels.int8_matmul(rows, weight)
        for threads in (2, 3):
            assert same_bits(kernels.int8_matmul(rows, weight, pool=kernels.ThreadPool(threads)), alone)


def test_int8_clamp_and_out() -> None:
    x = random_rows(11, 2, 32)
    weight = kernels.pack_int8(
        random(12).integers(-128, 128, (20, 32), np.int8), np.full(20, 0.01, np.float32)
    )
    rows = kernels.quantize_rows(x, signed=False)
    plain = kernels.int8_matmul(rows, weight)
    out = np.empty_like(plain)
    assert kernels.int8_matmul(rows, weight, low=0, high=1, out=out) is out
    assert np.array_equal(out, np.clip(plain, 0, 1)) and not np.array_equal(out, plain)


def test_int8_refuses_what_does_not_fit() -> None:
    x = random_rows(13, 2, 32)
    weight = kernels.pack_int8(np.zeros((4, 32), np.int8), np.ones(4, np.float32))
    with pytest.raises(InputError, match="unsigned"):
        kernels.int8_matmul(kernels.quantize_rows(x), weight)
    with pytest.raises(InputError, match="different K"):
        kernels.int8_matmul(kernels.quantize_rows(x[:, :31], signed=False), weight)
    with pytest.raises(InputError, match="out does not fit"):
        kernels.int8_matmul(kernels.quantize_rows(x, signed=False), weight, out=np.empty((2, 5), np.float32))
    with pytest.raises(InputError, match="one entry an output"):
        kernels.pack_int8(np.zeros((4, 32), np.int8), np.ones(3, np.float32))
    with pytest.raises(InputError, match="up to 65536"):
        kernels.pack_int8(np.zeros((1, 65537), np.int8), np.ones(1, np.float32))


# --- int4 -------------------------------------------------------------------------------------------------

NF4 = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]
TABLES = {
    "linear": list(range(-8, 8)),
    "nf4": NF4,
    "codebook": [3, -127, 127, 0, 5, 5, -1, 9, 90, -60, 7, 8, 2, 1, 4, -2],
}


def int4_reference(
    rows: kernels.QuantizedRows,
    codes: NDArray[np.uint8],
    table: list[int],
    scale: NDArray[np.float32],
    zero: NDArray[np.int8] | None,
    group_size: int,
) -> NDArray[np.float64]:
    k = codes.shape[1]
    group = np.arange(k) // group_size
    weight = np.array(table, np.float64)[codes]
    if zero is not None:
        weight -= zero[:, group]
    weight *= scale[:, group].astype(np.float64)
    a = rows.codes[:, :k].astype(np.float64)
    a *= rows.scale[:, group] if rows.scale.ndim == 2 else rows.scale[:, None]
    result: NDArray[np.float64] = a @ weight.T
    return result


@pytest.mark.parametrize("m", [1, 2, 4, 5, 6, 7, 13])
@pytest.mark.parametrize("n", [*EDGES, 33])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_product(m: int, n: int, group_size: int) -> None:
    for k in (1, 31, 32, 129, 256):
        for name, table in TABLES.items():
            generator = random(m * n + k)
            groups = -(-k // group_size)
            codes = generator.integers(0, 16, (n, k), np.uint8)
            scale = generator.uniform(0.01, 0.1, (n, groups)).astype(np.float16).astype(np.float32)
            zero = generator.integers(-20, 20, (n, groups), np.int8) if name == "linear" else None
            half = k != 31
            packed = kernels.pack_int4(codes, table, scale, group_size, zero_point=zero, half_scales=half)
            grouped = k == 129
            rows = kernels.quantize_rows(
                random_rows(k, m, k),
                group_size=group_size if grouped else None,
                sum_group_size=None if grouped else group_size,
            )
            results = [kernels.int4_matmul(rows, packed, isa=isa) for isa in ISAS]
            expected = int4_reference(rows, codes, table, scale, zero, group_size)
            # Sums of at most 8 groups in float32: a rounding of half a unit each, of terms that may cancel.
            limit = 1e-6 * (1 + np.abs(expected).max())
            assert np.abs(results[0] - expected).max() <= limit
            assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("m,n,k", [(0, 5, 64), (5, 0, 64), (3, 4, 0)])
@pytest.mark.parametrize("isa", ISAS)
def test_empty_int4_product(isa: str, m: int, n: int, k: int) -> None:
    weight = kernels.pack_int4(
        np.zeros((n, k), np.uint8),
        NF4,
        np.ones((n, -(-k // 32)), np.float32),
        32,
        bias=np.ones(n, np.float32),
    )
    rows = kernels.quantize_rows(np.zeros((m, k), np.float32), sum_group_size=32, isa=isa)
    assert np.array_equal(kernels.int4_matmul(rows, weight, isa=isa), np.ones((m, n), np.float32))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("m", [1, 7])
def test_products_of_fewer_bits(m: int, bits: int) -> None:
    generator = random(18)
    codes = generator.integers(0, 2**bits, (37, 200), np.uint8)
    table = generator.integers(-127, 128, 2**bits).astype(np.int8)
    scale = generator.uniform(0.01, 0.1, (37, 4)).astype(np.float16).astype(np.float32)
    packed = kernels.pack_int4(codes, table, scale, 64, bits=bits)
    # Whole panels and groups, half scales, and the table.
    assert packed.size_bytes == 48 * 256 * bits // 8 + 48 * 4 * 2 + 16
    rows = kernels.quantize_rows(random_rows(19, m, 200), sum_group_size=64)
    results = [kernels.int4_matmul(rows, packed, isa=isa) for isa in ISAS]
    expected = int4_reference(rows, codes, table.tolist(), scale, None, 64)
    assert np.abs(results[0] - expected).max() <= 1e-6 * (1 + np.abs(expected).max())  # as above
    assert all(same_bits(result, results[0]) for result in results)
    with pytest.raises(InputError, match=f"over {2**bits - 1}"):
        kernels.pack_int4(codes + np.uint8(1), table, scale, 64, bits=bits)
    with pytest.raises(InputError, match=f"{bits}-bit table holds {2**bits} integers"):
        kernels.pack_int4(codes, NF4, scale, 64, bits=bits)
    with pytest.raises(FormatError, match="2, 3 or 4 bits"):
        kernels.pack_int4(codes, NF4, scale, 64, bits=5)


@pytest.mark.parametrize("grouped_rows", [False, True])
@pytest.mark.parametrize("m", [1, 7])
def test_int8_products_with_group_scales(m: int, grouped_rows: bool) -> None:
    generator = random(20)
    weight = generator.integers(-127, 128, (37, 200), np.int8)
    scale = generator.uniform(0.01, 0.1, (37, 4)).astype(np.float16).astype(np.float32)
    packed = kernels.pack_grouped_int8(weight, scale, 64)
    x = random_rows(21, m, 200)
    rows = (
        kernels.quantize_rows(x, group_size=64)
        if grouped_rows
        else kernels.quantize_rows(x, sum_group_size=64)
    )
    results = [kernels.int4_matmul(rows, packed, isa=isa) for isa in ISAS]
    # As codes of a table with every int8 value.
    codes = weight.view(np.uint8)
    expected = int4_reference(rows, codes, [*range(128), *range(-128, 0)], scale, None, 64)
    assert np.abs(results[0] - expected).max() <= 1e-6 * (1 + np.abs(expected).max())  # as above
    assert all(same_bits(result, results[0]) for result in results)
    with pytest.raises(InputError, match="a weight is -128"):
        kernels.pack_grouped_int8(weight - np.int8(10), scale, 64)


def test_int4_threads_do_not_change_a_bit() -> None:
    codes = random(14).integers(0, 16, (200, 320), np.uint8)
    weight = kernels.pack_int4(codes, NF4, random(15).uniform(0.1, 1, (200, 5)).astype(np.float32), 64)
    for m in (1, 9):
        rows = kernels.quantize_rows(random_rows(16, m, 320), sum_group_size=64)
        alone = kernels.int4_matmul(rows, weight)
        for threads in (2, 3):
            assert same_bits(kernels.int4_matmul(rows, weight, pool=kernels.ThreadPool(threads)), alone)


def test_int4_refuses_what_does_not_fit() -> None:
    codes = np.zeros((4, 64), np.uint8)
    scale = np.ones((4, 2), np.float32)
    x = random_rows(17, 2, 64)
    weight = kernels.pack_int4(codes, NF4, scale, 32)
    with pytest.raises(InputError, match="sum for each group"):
        kernels.int4_matmul(kernels.quantize_rows(x), weight)
    with pytest.raises(InputError, match="signed symmetric"):
        kernels.int4_matmul(kernels.quantize_rows(x, signed=False, sum_group_size=32), weight)
    with pytest.raises(FormatError, match="32, 64 or 128"):
        kernels.pack_int4(codes, NF4, scale, 48)
    with pytest.raises(InputError, match="sixteen"):
        kernels.pack_int4(codes, [-128, *NF4[1:]], scale, 32)
    with pytest.raises(InputError, match="over 15"):
        kernels.pack_int4(codes + np.uint8(16), NF4, scale, 32)
    with pytest.raises(InputError, match="one entry a group"):
        kernels.pack_int4(codes, NF4, scale[:, :1], 32)


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(BackendError, match="no instruction set is called 'avx3'") as error:
        kernels.quantize_rows(random_rows(18, 1, 4), isa="avx3")
    assert "avx2" in str(error.value) or "scalar" in str(error.value)


def test_bad_thread_counts_are_errors() -> None:
    for threads in (0, -1, 1000):
        with pytest.raises(ValueError, match="a pool has 1 to"):
            kernels.ThreadPool(threads)
