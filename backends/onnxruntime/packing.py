"""MatMulNBits' weights: packing, unpacking, and the arithmetic of its integer kernels.

    packed [N, ceil(K / block), block · bits / 8] uint8, the first code in the lowest bits
    scales [N, ceil(K / block)] float32
    zero_points [N, ceil(ceil(K / block) · bits / 8)] uint8, packed alike along the row; absent: 2^(bits-1)

    weight[n, k] = (code[n, k] - zero_point[n, k // block]) · scales[n, k // block]

Source: ONNX Runtime's contrib operator MatMulNBits; its CPU kernels take 2, 4 and 8 bits (1.32: others are
refused when the session is made) and blocks of 16 and more that are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8)
SMALLEST_BLOCK = 16
# A scale for every 128 codes costs 3 % of an 8-bit weight. Smaller blocks round activations finer, and cost more.
CHANNEL_BLOCK = 128


@dataclass(frozen=True)
class Packed:
    """A weight as MatMulNBits takes it.

    Attributes:
        packed: Codes [N, blocks, block_size · bits / 8], uint8.
        scales: [N, blocks], float32.
        zero_points: Packed [N, …] uint8, or None where every zero point is the middle code.
        bits: Bits a code takes: 2, 4 or 8.
        block_size: Codes along K that share a scale.
        columns: K, without the padding of the last block.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int
    columns: int


def bits_for(codes_bits: int) -> int | None:
    """Return the fewest bits that hold `codes_bits` and that the kernels take, or None above 8."""
    return next((bits for bits in BITS if bits >= codes_bits), None)


def block_for(group_size: int | None, columns: int) -> int | None:
    """Return the block size that expresses groups of `group_size` along K, or None if none does.

    Args:
        group_size: Codes that share a scale; None or -1 for a whole row.
        columns: K.
    """
    if group_size is None or group_size == -1 or group_size >= columns:
        return min(CHANNEL_BLOCK, max(SMALLEST_BLOCK, _next_power_of_two(columns)))
    if group_size >= SMALLEST_BLOCK and group_size & (group_size - 1) == 0:
        return group_size
    # Groups of 96 are three blocks of 32 with one scale.
    divisor = group_size & -group_size
    return divisor if divisor >= SMALLEST_BLOCK else None


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    group_size: int | None,
) -> Packed | None:
    """Pack a weight, or return None if MatMulNBits cannot express it.

    Shapes: codes [N, K] of qmin..qmax; scale and zero_point [N, groups], [N] (one a row) or [] (one).
    """
    outputs, columns = codes.shape
    bits = bits_for((qmax - qmin).bit_length())
    block = block_for(group_size, columns)
    if bits is None or block is None or columns == 0:
        return None
    blocks = -(-columns // block)
    scales = _per_block(scale.float(), outputs, columns, group_size, block)
    zeros = _per_block(zero_point, outputs, columns, group_size, block)
    middle = 1 << (bits - 1)
    centered = (qmin + qmax + 1) // 2
    symmetric = bool((zeros == centered).all())
    # Symmetric codes move so that their zero point is the implied one; others start at zero.
    shift = middle - centered if symmetric else -qmin
    unsigned = (codes.to(torch.int32) + shift).to(torch.uint8)
    filler = middle if symmetric else 0  # its activations are zeros: any code does
    padded = torch.full((outputs, blocks * block), filler, dtype=torch.uint8)
    padded[:, :columns] = unsigned
    return Packed(
        packed=_pack_bits(padded.reshape(outputs, blocks, block), bits),
        scales=scales.contiguous(),
        zero_points=None if symmetric else _pack_bits((zeros + shift).to(torch.uint8), bits),
        bits=bits,
        block_size=block,
        columns=columns,
    )


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of a packed tensor [..., bytes] as uint8 [..., bytes · 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def dequantize_blocks(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, columns: int, bits: int
) -> Tensor:
    """Return the weight [N, K] in float32.

    Shapes: packed [N, blocks, bytes]; scales [N, blocks]; zero_points [N, bytes] or None.
    """
    codes = unpack_codes(packed, bits).float()
    blocks = scales.shape[1]
    if zero_points is None:
        zeros = torch.full_like(scales, 1 << (bits - 1))
    else:
        zeros = unpack_codes(zero_points, bits)[:, :blocks].float()
    values = (codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns]


def round_activations(x: Tensor, block_size: int) -> Tensor:
    """Return x as `accuracy_level=4` sees it: int8 with one scale max|x| / 127 for each block along K.

    Shapes: x [..., K]; result alike.
    """
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -columns % block_size))
    blocks = padded.unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes: Tensor = torch.where(scale > 0, blocks * (1 / scale.clamp(min=1e-38)), 0.0).round()
    rounded: Tensor = (codes * scale).flatten(-2)
    return rounded[..., :columns]


def _per_block(parameter: Tensor, outputs: int, columns: int, group_size: int | None, block: int) -> Tensor:
    """Spread scales or zero points over blocks: [N, blocks]."""
    blocks = -(-columns // block)
    if parameter.dim() == 0:
        return parameter.expand(outputs, blocks)
    if parameter.dim() == 1:
        return parameter.unsqueeze(1).expand(outputs, blocks)
    if parameter.shape[1] == 1:
        return parameter.expand(outputs, blocks)
    assert group_size is not None and group_size % block == 0
    return parameter.repeat_interleave(group_size // block, 1)[:, :blocks]


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes along the last axis, the first one into the lowest bits; zeros fill the last byte."""
    count = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    result: Tensor = padded[..., 0].clone()
    for index in range(1, count):
        result |= padded[..., index] << (bits * index)
    return result


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()
