"""How the codes of a convolution's weight are stored: dense, or only what is not zero of them.

Every form takes the time of a dense convolution times what is calculated here from constants that were measured on
Zen 4 (docs/kernels.md), in cycles of a dense product of 16 outputs with four inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native.lower.images import padded_channels

# Inputs of a chunk, whose activations stay in an L1 cache: units of four in kernels/qconvblock, planes of one in
# kernels/qconvsparse. Indices are bytes.
BLOCK_CHUNK, ELEMENT_CHUNK = 96, 256

# What is kept is read once for each product; each pixel's inputs are brought in order once for all outputs, and each
# sum becomes a code once for all inputs.
_PER_BLOCK, _PER_BLOCK_INPUT, _BLOCK_FIXED = 1.22, 2.8, 0.13
_PER_FOUR, _PER_ELEMENT_INPUT, _ELEMENT_FIXED = 1.86, 3.4, 0.18
_PER_OUTPUT = 2.0

# From when on zeros are skipped, and where it is worth saying that they are not.
_SKIPPED_BELOW, _WORTH_A_REMARK = 0.85, 0.4

Parts = tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.uint64]]


@dataclass(frozen=True)
class WeightForm:
    """A form of the codes of a convolution's weight.

    Attributes:
        name: For people.
        operator: The step that takes it.
        time: Its time, as a part of a dense convolution's.
        size_bytes: Of what is stored.
        parts: Index, values and start of what is kept; None: the dense matrix.
        chunk: Inputs, or fours of them, of a chunk.
        remark: Why zeros are not skipped.
    """

    name: str
    operator: str
    time: float
    size_bytes: int
    parts: Parts | None = None
    chunk: int = 0
    remark: str = ""


def choose_form(matrix: NDArray[np.int8]) -> WeightForm:
    """Return the form that takes the least time.

    Args:
        matrix: Codes less zero points [outputs, K], where K counts places of the kernel times inputs in fours.
    """
    dense = WeightForm("int8", "conv_q8", 1.0, matrix.size)
    if not matrix.size:
        return dense
    outputs, inputs = matrix.shape
    units = inputs // 4
    blocks = matrix.reshape(outputs, units, 4).any(axis=2)
    times = {
        "blocks": block_time(np.count_nonzero(blocks) / blocks.size, outputs, units),
        "elements": element_time(int(_fours(matrix).sum()) / blocks.size, outputs, units),
    }
    best = min(times, key=times.__getitem__)
    zeros = 1 - np.count_nonzero(matrix) / matrix.size
    name = "int8 in 1x4 blocks" if best == "blocks" else "int8, nonzeros"
    if times[best] > _SKIPPED_BELOW:
        remark = (
            f"sparsity does not pay: as {name}, the convolution would take {times[best]:.2f}x its time "
            f"({zeros:.0%} of the weights are zero)"
        )
        return dense if zeros < _WORTH_A_REMARK else WeightForm(**{**vars(dense), "remark": remark})
    room = padded_channels(outputs) - outputs
    padded = np.pad(matrix, ((0, room), (0, 0)))
    if best == "blocks":
        parts, chunk = pack_blocks(padded), BLOCK_CHUNK
    else:
        parts, chunk = pack_elements(padded), ELEMENT_CHUNK
    operator = "conv_q8_block" if best == "blocks" else "conv_q8_sparse"
    return WeightForm(name, operator, times[best], sum(array.nbytes for array in parts), parts, chunk)


def block_time(density: float, outputs: int, units: int) -> float:
    """Return the time of a convolution in blocks of four inputs.

    Args:
        density: The part of the blocks that is kept.
        outputs: Output channels.
        units: Fours of inputs, over all places of the kernel.
    """
    return _PER_BLOCK * density + _overhead(_PER_BLOCK_INPUT, outputs, units) + _BLOCK_FIXED


def element_time(fours: float, outputs: int, units: int) -> float:
    """Return the time of a convolution by single weights that are not zero.

    Args:
        fours: Fours of such weights, as a part of all fours of weights.
        outputs: Output channels.
        units: Fours of inputs, over all places of the kernel.
    """
    return _PER_FOUR * fours + _overhead(_PER_ELEMENT_INPUT, outputs, units) + _ELEMENT_FIXED


def _overhead(per_input: float, outputs: int, units: int) -> float:
    return per_input / max(outputs, 1) + _PER_OUTPUT / max(units, 1)


def pack_blocks(matrix: NDArray[np.int8]) -> Parts:
    """Pack the blocks of four inputs that are not zero; see `kernels/qconvblock`."""
    outputs = matrix.shape[0]
    rows = matrix.reshape(outputs, -1, 4)
    index, values, counts = [], [], []
    for first in range(0, rows.shape[1], BLOCK_CHUNK):
        chunk = rows[:, first : first + BLOCK_CHUNK]
        where = np.nonzero(chunk.any(axis=2))
        index.append(where[1].astype(np.uint8))
        values.append(chunk[where].reshape(-1))
        counts.append(np.bincount(where[0], minlength=outputs))
    return np.concatenate(index), np.concatenate(values), _starts(counts)


def pack_elements(matrix: NDArray[np.int8]) -> Parts:
    """Pack the weights that are not zero, those of an output and chunk in fours; see `kernels/qconvsparse`."""
    index, values, counts = [], [], []
    for place, fours in enumerate(_fours(matrix)):
        chunk = matrix[:, place * ELEMENT_CHUNK : (place + 1) * ELEMENT_CHUNK]
        row, column = np.nonzero(chunk)
        kept = np.bincount(row, minlength=len(chunk))
        # Where each output's weights begin, and from there the how manieth each is.
        begin = np.concatenate([[0], np.cumsum(fours * 4)])
        to = begin[row] + np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
        index.append(np.zeros(begin[-1], np.uint8))
        values.append(np.zeros(begin[-1], np.int8))
        index[-1][to] = column
        values[-1][to] = chunk[row, column]
        counts.append(fours)
    return np.concatenate(index), np.concatenate(values), _starts(counts)


def _fours(matrix: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return how many fours of weights that are not zero each chunk of inputs has of each output: [chunks, outputs]."""
    edges = np.arange(0, matrix.shape[1], ELEMENT_CHUNK)
    counts = np.add.reduceat((matrix != 0).astype(np.int64), edges, axis=1).T
    fours: NDArray[np.int64] = -(-counts // 4)
    return fours


def _starts(counts: list[NDArray[np.int64]]) -> NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.uint64)
