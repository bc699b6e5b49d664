"""Rotations: orthogonal, reversible, and even."""

from __future__ import annotations

import pytest
import torch
from support.programs import data

from sqcompile.rotation import hadamard_rotation, has_hadamard, mean_keeping_rotation

# Sylvester alone; Paley's first construction (11, 19, 3); his second one (5 -> 12, 13 -> 28, 17 -> 36).
KNOWN = (1, 2, 4, 8, 64, 128, 12, 20, 24, 28, 36, 40, 80, 96, 288, 768, 896)
UNKNOWN = (3, 6, 14, 92, 172)


@pytest.mark.parametrize("size", KNOWN)
def test_hadamard_matrices_spread_each_channel_evenly(size: int) -> None:
    assert has_hadamard(size)
    matrix = hadamard_rotation(size).turn(torch.eye(size, dtype=torch.float64))
    # Float64 keeps 15 digits; products of factors lose one.
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", UNKNOWN)
def test_other_sizes_get_an_orthogonal_matrix(size: int) -> None:
    assert not has_hadamard(size)
    matrix = hadamard_rotation(size).turn(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 12, 33])
def test_a_rotation_that_keeps_the_mean(size: int) -> None:
    rotation = mean_keeping_rotation(size)
    x = data(5, size).double()
    torch.testing.assert_close(rotation.turn(x).mean(-1), x.mean(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.turn(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(rotation.undo(rotation.turn(x)), x, rtol=0, atol=1e-12)
    if size > 2:  # of two dimensions one is left, where a rotation only has a sign
        assert not torch.allclose(rotation.turn(x), x)


def test_seeds() -> None:
    x = data(3, 16)
    assert torch.equal(hadamard_rotation(16, seed=1).turn(x), hadamard_rotation(16, seed=1).turn(x))
    assert not torch.equal(hadamard_rotation(16, seed=1).turn(x), hadamard_rotation(16, seed=2).turn(x))


def test_blocks_along_any_axis() -> None:
    rotation = hadamard_rotation(4, seed=3)
    x = data(2, 12, 5)
    turned = rotation.turn(x, 1)
    for block in range(3):
        part = slice(4 * block, 4 * block + 4)
        expected = rotation.turn(x[:, part].transpose(1, 2)).transpose(1, 2)
        assert torch.equal(turned[:, part], expected)
    assert turned.dtype == x.dtype and turned.is_contiguous()
    torch.testing.assert_close(rotation.undo(turned, 1), x, rtol=0, atol=1e-6)  # rounded to float32 twice


def test_what_was_scaled_and_shifted_before() -> None:
    scale, shift = data(8, seed=1).double().abs() + 0.5, data(8, seed=2).double()
    rotation = hadamard_rotation(4)
    x = data(3, 8).double()
    changed = rotation.after(scale, shift)
    torch.testing.assert_close(changed.turn(x), rotation.turn((x - shift) * scale), rtol=0, atol=1e-12)
    torch.testing.assert_close(changed.undo(changed.turn(x)), x, rtol=0, atol=1e-12)
    again = changed.after(scale, shift)
    torch.testing.assert_close(again.turn(x), changed.turn((x - shift) * scale), rtol=0, atol=1e-12)
