"""How a convolution's weight is stored: what packing keeps, and when."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from sqcompile.backends.native.lower.convolution_forms import (
    BLOCK_CHUNK,
    ELEMENT_CHUNK,
    block_time,
    choose_form,
    element_time,
    pack_blocks,
    pack_elements,
)


def _matrix(outputs: int, inputs: int, density: float, block: int = 1) -> NDArray[np.int8]:
    generator = np.random.default_rng(3)
    keep = np.repeat(generator.random((outputs, inputs // block)) < density, block, axis=1)
    return np.where(keep, generator.integers(1, 128, (outputs, inputs)), 0).astype(np.int8)


@pytest.mark.parametrize("density", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("inputs", [4, 256, 260, 600])
def test_packed_elements_are_the_weights(inputs: int, density: float) -> None:
    matrix = _matrix(16, inputs, density)
    index, values, start = pack_elements(matrix)
    unpacked = np.zeros_like(matrix, np.int32)
    runs = start.reshape(-1)
    assert len(runs) == -(-inputs // ELEMENT_CHUNK) * 16 + 1 and runs[-1] * 4 == len(index) == len(values)
    for place, (first, last) in enumerate(pairwise(runs)):
        chunk, row = divmod(place, 16)
        for at in range(int(first) * 4, int(last) * 4):
            unpacked[row, chunk * ELEMENT_CHUNK + int(index[at])] += values[at]
    assert np.array_equal(unpacked, matrix)
    assert len(values) <= np.count_nonzero(matrix) + 3 * len(runs)


@pytest.mark.parametrize("density", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("inputs", [4, 4 * BLOCK_CHUNK, 4 * BLOCK_CHUNK + 8])
def test_packed_blocks_are_the_weights(inputs: int, density: float) -> None:
    matrix = _matrix(16, inputs, density, block=4)
    index, values, start = pack_blocks(matrix)
    unpacked = np.zeros((16, inputs // 4, 4), np.int8)
    for place, (first, last) in enumerate(pairwise(start)):
        chunk, row = divmod(place, 16)
        for at in range(int(first), int(last)):
            unpacked[row, chunk * BLOCK_CHUNK + int(index[at])] = values[at * 4 : at * 4 + 4]
    assert np.array_equal(unpacked.reshape(16, inputs), matrix)
    assert len(index) == np.count_nonzero(matrix.reshape(16, -1, 4).any(axis=2))


def test_the_form_follows_the_zeros() -> None:
    forms = {
        "dense": choose_form(_matrix(256, 2304, 1.0)),
        "half": choose_form(_matrix(256, 2304, 0.5)),
        "elements": choose_form(_matrix(256, 2304, 0.1)),
        "blocks": choose_form(_matrix(256, 2304, 0.15, block=4)),
        "small": choose_form(_matrix(8, 36, 0.1)),
        "empty": choose_form(np.zeros((0, 4), np.int8)),
    }
    assert {name: form.operator for name, form in forms.items()} == {
        "dense": "conv_q8",
        "half": "conv_q8",
        "elements": "conv_q8_sparse",
        "blocks": "conv_q8_block",
        "small": "conv_q8",
        "empty": "conv_q8",
    }
    assert {name for name, form in forms.items() if form.remark} == {"half", "small"}
    assert "50% of the weights are zero" in forms["half"].remark
    assert forms["elements"].time < 1 and forms["elements"].size_bytes < 256 * 2304
    assert forms["dense"].time == 1.0 and forms["dense"].parts is None


def test_times_grow_with_what_is_kept_and_with_few_channels() -> None:
    for time in (block_time, element_time):
        assert time(0.1, 256, 576) < time(0.2, 256, 576)
        assert time(0.1, 256, 576) < time(0.1, 32, 576) and time(0.1, 256, 576) < time(0.1, 256, 16)


def test_layers_of_few_channels_skip_zeros_too() -> None:
    """A 3x3 layer of 32 channels takes half the dense time at 85 %, by `benchmarks/sparse_convolutions.py`."""
    assert block_time(0.15, 32, 72) < 0.6
    assert choose_form(_matrix(32, 288, 0.15, block=4)).operator == "conv_q8_block"
    assert choose_form(_matrix(32, 4, 0.15, block=4)).operator == "conv_q8"
