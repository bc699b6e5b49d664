"""Sparse products against the dense ones: the same bits from fewer bytes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sqcompile.backends.native import kernels
from sqcompile.errors import FormatError, InputError

ISAS = kernels.available_isas()
NF4 = [-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]
SPARSITIES = [0.0, 0.3, 0.5, 0.7, 0.9, 1.0]


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def sparse_matrix(seed: int, n: int, k: int, sparsity: float) -> NDArray[np.int8]:
    generator = np.random.default_rng(seed)
    weight = generator.integers(-128, 128, (n, k), np.int8)
    weight[generator.random((n, k)) < sparsity] = 0
    return weight


def rows_of(seed: int, m: int, k: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(m, k)).astype(np.float32)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("m", [1, 2, 4, 5, 7])
def test_sparse_int8_equals_dense(m: int, sparsity: float) -> None:
    for n, k in [(1, 1), (15, 4), (16, 63), (17, 64), (65, 130)]:
        weight = sparse_matrix(m, n, k, sparsity)
        scale = np.random.default_rng(n).uniform(0.01, 0.1, n).astype(np.float32)
        bias = np.random.default_rng(k).normal(size=n).astype(np.float32)
        rows = kernels.quantize_rows(rows_of(k, m, k), mode="affine", signed=False)
        expected = kernels.int8_matmul(rows, kernels.pack_int8(weight, scale, bias))
        packed = kernels.pack_sparse_int8(weight, scale, bias)
        for isa in ISAS:
            assert same_bits(kernels.sparse_int8_matmul(rows, packed, isa=isa), expected)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("m", [1, 2, 4, 5, 7])
def test_sparse_int4_equals_dense_with_a_code_for_zero(m: int, sparsity: float) -> None:
    for n, k, group_size in [(1, 1, 32), (15, 31, 32), (16, 64, 64), (17, 129, 128), (33, 300, 64)]:
        generator = np.random.default_rng(n + k)
        codes = generator.integers(0, 16, (n, k), np.uint8)
        keep = generator.random((n, k)) >= sparsity
        groups = -(-k // group_size)
        scale = generator.uniform(0.01, 0.1, (n, groups)).astype(np.float32)
        bias = generator.normal(size=n).astype(np.float32)
        zero = np.uint8(NF4.index(0))
        dense = kernels.pack_int4(np.where(keep, codes, zero), NF4, scale, group_size, bias=bias)
        packed = kernels.pack_sparse_int4(codes, keep, NF4, scale, group_size, bias=bias)
        for grouped in (False, True):
            rows = kernels.quantize_rows(
                rows_of(k, m, k),
                group_size=group_size if grouped else None,
                sum_group_size=None if grouped else group_size,
            )
            expected = kernels.int4_matmul(rows, dense)
            for isa in ISAS:
                assert same_bits(kernels.sparse_int4_matmul(rows, packed, isa=isa), expected)


def block_matrix(seed: int, n: int, k: int, outputs: int, sparsity: float) -> NDArray[np.int8]:
    generator = np.random.default_rng(seed)
    weight = generator.integers(-128, 128, (n, k), np.int8)
    zero = generator.random((-(-n // outputs), -(-k // 4))) < sparsity
    weight[zero.repeat(outputs, axis=0).repeat(4, axis=1)[:n, :k]] = 0
    return weight


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("outputs", [1, 4, 16])
def test_block_sparse_int8_equals_dense(outputs: int, sparsity: float) -> None:
    for m, n, k in [(1, 1, 1), (15, 15, 4), (16, 16, 63), (17, 17, 64), (65, 40, 130), (70, 33, 1100)]:
        weight = block_matrix(m, n, k, outputs, sparsity)
        scale = np.random.default_rng(n).uniform(0.01, 0.1, n).astype(np.float32)
        bias = np.random.default_rng(k).normal(size=n).astype(np.float32)
        rows = kernels.quantize_rows(rows_of(k, m, k), mode="affine", signed=False)
        expected = kernels.int8_matmul(rows, kernels.pack_int8(weight, scale, bias))
        packed = kernels.pack_block_sparse_int8(weight, scale, outputs, bias)
        for isa in ISAS:
            assert same_bits(kernels.block_sparse_int8_matmul(rows, packed, isa=isa), expected)


def test_two_of_four() -> None:
    weight = np.random.default_rng(1).integers(1, 128, (48, 96), np.int8)
    weight.reshape(48, 24, 4)[:, :, [1, 3]] = 0
    rows = kernels.quantize_rows(rows_of(2, 1, 96), signed=False)
    scale = np.ones(48, np.float32)
    packed = kernels.pack_sparse_int8(weight, scale)
    assert same_bits(
        kernels.sparse_int8_matmul(rows, packed), kernels.int8_matmul(rows, kernels.pack_int8(weight, scale))
    )
    assert len(packed.values) == 48 * 48 + 64  # values, and the slack that kernels may read


def test_sizes_are_as_promised() -> None:
    n, k = 512, 2048
    generator = np.random.default_rng(3)
    keep = generator.random((n, k)) < 0.5
    int4 = kernels.pack_sparse_int4(
        np.full((n, k), 7, np.uint8), keep, NF4, np.ones((n, k // 128), np.float32), 128
    )
    assert int4.size_bytes * 8 / (n * k) < 3.2
    int8 = kernels.pack_sparse_int8(keep.astype(np.int8), np.ones(n, np.float32))
    assert int8.size_bytes * 8 / (n * k) < 5.1


@pytest.mark.parametrize("m,n,k", [(0, 5, 64), (5, 0, 64), (3, 4, 0)])
@pytest.mark.parametrize("isa", ISAS)
def test_empty_products(isa: str, m: int, n: int, k: int) -> None:
    x, bias = np.zeros((m, k), np.float32), np.ones(n, np.float32)
    ones = np.ones((m, n), np.float32)
    int8 = kernels.pack_sparse_int8(np.zeros((n, k), np.int8), bias, bias)
    rows = kernels.quantize_rows(x, signed=False, isa=isa)
    assert np.array_equal(kernels.sparse_int8_matmul(rows, int8, isa=isa), ones)
    blocks = kernels.pack_block_sparse_int8(np.zeros((n, k), np.int8), bias, 4, bias)
    assert np.array_equal(kernels.block_sparse_int8_matmul(rows, blocks, isa=isa), ones)
    int4 = kernels.pack_sparse_int4(
        np.zeros((n, k), np.uint8),
        np.zeros((n, k), np.bool_),
        NF4,
        np.ones((n, k // 32), np.float32),
        32,
        bias=bias,
    )
    rows = kernels.quantize_rows(x, sum_group_size=32, isa=isa)
    assert np.array_equal(kernels.sparse_int4_matmul(rows, int4, isa=isa), ones)


def test_threads_do_not_change_a_bit() -> None:
    weight = sparse_matrix(4, 200, 320, 0.7)
    weight[:100] = 0  # the halves differ in bytes
    int8 = kernels.pack_sparse_int8(weight, np.ones(200, np.float32))
    int4 = kernels.pack_sparse_int4(
        (weight & 15).astype(np.uint8), weight != 0, NF4, np.ones((200, 5), np.float32), 64
    )
    blocks = kernels.pack_block_sparse_int8(block_matrix(4, 200, 320, 1, 0.7), np.ones(200, np.float32), 1)
    for m in (1, 9):
        unsigned = kernels.quantize_rows(rows_of(5, m, 320), signed=False)
        signed = kernels.quantize_rows(rows_of(5, m, 320), sum_group_size=64)
        alone8, alone4 = kernels.sparse_int8_matmul(unsigned, int8), kernels.sparse_int4_matmul(signed, int4)
        for threads in (2, 3):
            pool = kernels.ThreadPool(threads)
            assert same_bits(kernels.sparse_int8_matmul(unsigned, int8, pool=pool), alone8)
            assert same_bits(kernels.sparse_int4_matmul(signed, int4, pool=pool), alone4)
            assert same_bits(
                kernels.block_sparse_int8_matmul(unsigned, blocks, pool=pool),
                kernels.block_sparse_int8_matmul(unsigned, blocks),
            )


def test_what_does_not_fit_is_refused() -> None:
    codes, scale = np.zeros((4, 64), np.uint8), np.ones((4, 2), np.float32)
    keep = np.ones((4, 64), np.bool_)
    with pytest.raises(InputError, match="different shapes"):
        kernels.pack_sparse_int4(codes, keep[:, :32], NF4, scale, 32)
    with pytest.raises(InputError, match="over 15"):
        kernels.pack_sparse_int4(codes + np.uint8(99), keep, NF4, scale, 32)
    with pytest.raises(FormatError, match="32, 64 or 128"):
        kernels.pack_sparse_int4(codes, keep, NF4, scale, 16)
    int8 = kernels.pack_sparse_int8(np.ones((4, 64), np.int8), np.ones(4, np.float32))
    with pytest.raises(InputError, match="unsigned"):
        kernels.sparse_int8_matmul(kernels.quantize_rows(rows_of(6, 1, 64)), int8)
    with pytest.raises(FormatError, match="1, 4 or 16"):
        kernels.pack_block_sparse_int8(np.ones((4, 64), np.int8), np.ones(4, np.float32), 2)
    int4 = kernels.pack_sparse_int4(codes, keep, NF4, scale, 32)
    with pytest.raises(InputError, match="sum for each group"):
        kernels.sparse_int4_matmul(kernels.quantize_rows(rows_of(6, 1, 64)), int4)
