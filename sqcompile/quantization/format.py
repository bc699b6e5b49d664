"""Formats: which integers a tensor's codes may be, and how many values share one scale."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch

from sqcompile.errors import FormatError, did_you_mean
from sqcompile.quantization.mappings import MAPPINGS, MOST_BITS, Linear, Mapping, parse_mapping

BITS = (2, 3, 4, 5, 6, 7, 8, 16)

_HEADS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in BITS)


def scale_shape(shape: Sequence[int], axis: int | None, group_size: int | None) -> tuple[int, ...]:
    """Return the shape of the scale for a tensor of `shape`.

    The pair (axis, group_size) is how operators spell a granularity: (None, None) one scale,
    (axis, None) one a channel, (axis, n) one per n values along the axis, (axis, -1) one over the
    whole axis. The last group may be incomplete. Symbolic sizes are allowed.

    Raises:
        FormatError: The axis or the group size does not exist for this tensor.
    """
    if axis is None:
        if group_size is not None:
            raise FormatError("a group size needs an axis", seen=f"axis=None, group_size={group_size}")
        return ()
    rank = len(shape)
    if not -rank <= axis < rank:
        raise FormatError(
            f"axis {axis} does not exist in a tensor of {rank} dimensions",
            seen=f"shape {list(shape)}",
            expected=f"an axis from {-rank} to {rank - 1}" if rank else "a tensor with dimensions",
        )
    axis %= rank
    if group_size is None:
        return (shape[axis],)
    if group_size == -1:
        groups = 1
    elif group_size > 0:
        groups = -(-shape[axis] // group_size)
    else:
        raise FormatError(
            "a group holds at least one value", seen=f"group_size={group_size}", expected=">= 1, or -1"
        )
    return (*shape[:axis], groups, *shape[axis + 1 :])


class Granularity(ABC):
    """How many values share one scale and zero point."""

    word: ClassVar[str]

    @property
    @abstractmethod
    def pair(self) -> tuple[int | None, int | None]:
        """The (axis, group_size) arguments of the operators."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scale for a tensor of `shape`.

        Raises:
            FormatError: The axis does not exist in such a tensor.
        """
        return scale_shape(shape, *self.pair)

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor.

    Shapes: x [N, C, H, W] -> scale []; x [N, K] -> scale [].
    """

    word: ClassVar[str] = "tensor"

    @property
    def pair(self) -> tuple[int | None, int | None]:
        """No axis, no groups."""
        return None, None


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale for each index of `axis`.

    Shapes (axis=0): weight [O, I, Kh, Kw] -> scale [O]; weight [N, K] -> scale [N].
    Shapes (axis=1): weight [I, O, Kh, Kw] of a transposed convolution -> scale [O].
    """

    axis: int = 0
    word: ClassVar[str] = "channel"

    @property
    def pair(self) -> tuple[int | None, int | None]:
        """The axis, no groups."""
        return self.axis, None

    def __str__(self) -> str:
        return f"channel={self.axis}"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `size` neighbours along `axis`; the last group may be incomplete.

    Shapes (size=32): weight [N, K] -> scale [N, ceil(K / 32)]; x [B, T, K] -> scale [B, T, ceil(K / 32)].
    Shapes (size=32, axis=0): weight [K, N] -> scale [ceil(K / 32), N].
    Source: ONNX QuantizeLinear-21, blocked quantization (`block_size`).
    """

    size: int
    axis: int = -1
    word: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError("a group holds at least one value", seen=f"group={self.size}", expected=">= 1")

    @property
    def pair(self) -> tuple[int | None, int | None]:
        """The axis and the group size."""
        return self.axis, self.size

    def __str__(self) -> str:
        return f"group={self.size}" if self.axis == -1 else f"group={self.size}@{self.axis}"


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each vector along the last dimension.

    Shapes: x [B, T, K] -> scale [B, T, 1]; x [N, K] -> scale [N, 1].
    """

    word: ClassVar[str] = "token"

    @property
    def pair(self) -> tuple[int | None, int | None]:
        """One group over the whole last axis."""
        return -1, -1


@dataclass(frozen=True)
class Format:
    """A number format: the codes, what they mean, and the granularity of their scale.

    The text form is `int8`, `uint8:affine`, `int4:group=32`, `int8:channel=0`, `int8:token:dynamic`,
    `int4:group=32:mapping=nf`; `Format.parse(str(format)) == format`.

    Args:
        bits: Bits a code: 2 to 8, or 16.
        signed: Codes around zero (int8: -128..127), or from zero on (uint8: 0..255).
        symmetric: The zero point is fixed at the middle code; otherwise it is fitted to the range.
        granularity: How many values share one scale.
        dynamic: The scale is taken from the tensor at run time, not from calibration.
        narrow: Leave out the lowest code (int8: -127..127), so that negation is always exact.
        mapping: The value of each code; all but the linear one take tables of at most sixteen levels, with
            codes from 0 on (`signed` changes nothing) and no zero point. With `dynamic` it has to be known.

    Raises:
        FormatError: No such number of bits, scales per token that are not dynamic, or a mapping that does not
            go with the rest.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerTensor)
    dynamic: bool = False
    narrow: bool = False
    mapping: Mapping = field(default_factory=Linear)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise FormatError(f"no format has {self.bits} bits", expected="2 to 8, or 16")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise FormatError(
                "scales per token exist only at run time",
                seen=str(self),
                expected=f"{self}:dynamic",
                next_step="add 'dynamic', or choose another granularity",
            )
        if not self.mapping.is_linear:
            self._check_table()

    def _check_table(self) -> None:
        seen = str(self)
        if self.bits > MOST_BITS:
            raise FormatError(
                f"a table has at most {1 << MOST_BITS} levels", seen=seen, expected=f"2 to {MOST_BITS} bits"
            )
        if self.narrow or not self.symmetric:
            raise FormatError(
                "a table goes with symmetric formats",
                seen=seen,
                expected=f"int{self.bits}:{self.granularity}:mapping={self.mapping}",
                next_step="leave out 'affine' and 'narrow'",
            )
        if self.dynamic and not self.mapping.is_known:
            raise FormatError(
                "a table for values at run time has to be known beforehand",
                seen=seen,
                expected="a mapping with its parameter, such as tanh@2 or mu-law@10; nf; log2",
                next_step="write the parameter; or let calibration fit it, with static values (insert-observers)",
            )

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return (-(1 << (self.bits - 1)) if self.signed else 0) + self.narrow

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def middle(self) -> int:
        """The zero point of the symmetric format: 0 when signed, 2**(bits - 1) when not."""
        return middle_code(self.qmin, self.qmax)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype that holds one code an element."""
        return storage_dtype(self.qmin, self.qmax)

    def size_bits(self, shape: Sequence[int], scale_bits: int = 32) -> int:
        """Return the bits that a tensor of `shape` takes, densely packed, with scales and zero points.

        A zero point takes as many bits as a code, and only affine formats store one. Dynamic formats
        store neither.

        Args:
            shape: The tensor's shape.
            scale_bits: Bits of one stored scale: 32, or 16 for half precision.
        """
        codes = self.bits * prod(shape)
        if self.dynamic:
            return codes
        if not self.mapping.is_linear:
            codes += 8 << self.bits  # the table
        zero_point_bits = 0 if self.symmetric else self.bits
        return codes + prod(self.granularity.scale_shape(shape)) * (scale_bits + zero_point_bits)

    def bits_per_weight(self, shape: Sequence[int], scale_bits: int = 32) -> float:
        """Return `size_bits` for each value of the tensor; `bits` for an empty one."""
        count = prod(shape)
        return self.size_bits(shape, scale_bits) / count if count else float(self.bits)

    def __str__(self) -> str:
        words = [f"{'' if self.signed else 'u'}int{self.bits}"]
        if not isinstance(self.granularity, PerTensor):
            words.append(str(self.granularity))
        if not self.symmetric:
            words.append("affine")
        if self.narrow:
            words.append("narrow")
        if not self.mapping.is_linear:
            words.append(f"mapping={self.mapping}")
        if self.dynamic:
            words.append("dynamic")
        return ":".join(words)

    @classmethod
    def parse(cls, text: str) -> Format:
        """Return the format that `text` writes; words after the first come in any order.

        Raises:
            FormatError: An unknown word (the nearest valid one is named), a word without the number it
                needs, or two words that contradict each other.
        """
        return _parse(text)


def middle_code(qmin: int, qmax: int) -> int:
    """Return the zero point of the symmetric format with these codes."""
    return (qmin + qmax + 1) // 2


def storage_dtype(qmin: int, qmax: int) -> torch.dtype:
    """Return the smallest integer dtype that holds the codes qmin..qmax, signed if qmin is negative.

    Raises:
        FormatError: The range is empty or wider than 16 bits.
    """
    if qmin >= qmax:
        raise FormatError("a format has at least two codes", seen=f"{qmin}..{qmax}", expected="qmin < qmax")
    for dtype in (torch.int8, torch.int16) if qmin < 0 else (torch.uint8, torch.uint16):
        limits = torch.iinfo(dtype)
        if limits.min <= qmin and qmax <= limits.max:
            return dtype
    raise FormatError(
        "codes have at most 16 bits", seen=f"{qmin}..{qmax}", expected="-32768..32767, or 0..65535"
    )


# Each word sets one option; a second word for the same option is a contradiction.
_FLAGS: dict[str, tuple[str, bool]] = {
    "symmetric": ("symmetric", True),
    "affine": ("symmetric", False),
    "static": ("dynamic", False),
    "dynamic": ("dynamic", True),
    "narrow": ("narrow", True),
}
_WORDS = (*_FLAGS, "tensor", "channel=0", "group=32", "token", "mapping=nf")


def _parse(text: str) -> Format:
    head, *words = text.strip().split(":")
    match = re.fullmatch(r"(u?)int(\d+)", head)
    if match is None or head not in _HEADS:
        raise FormatError(
            f"no number format is called {head!r}",
            where=f"format {text!r}",
            expected=", ".join(_HEADS),
            next_step=did_you_mean(head, _HEADS),
        )
    options: dict[str, object] = {"bits": int(match[2]), "signed": not match[1]}
    for word in words:
        option, value = _parse_word(word, text)
        if option in options:
            raise FormatError(f"{word!r} contradicts or repeats an earlier word", where=f"format {text!r}")
        options[option] = value
    return Format(**options)  # type: ignore[arg-type]


def _parse_word(word: str, text: str) -> tuple[str, object]:
    if word in _FLAGS:
        return _FLAGS[word]
    if word == "tensor":
        return "granularity", PerTensor()
    if word == "token":
        return "granularity", PerToken()
    name, _, value = word.partition("=")
    if name == "channel" and re.fullmatch(r"-?\d+", value):
        return "granularity", PerChannel(int(value))
    if name == "group" and (match := re.fullmatch(r"(\d+)(?:@(-?\d+))?", value)):
        return "granularity", PerGroup(int(match[1]), int(match[2] or -1))
    if name == "mapping" and (mapping := parse_mapping(value)) is not None:
        return "mapping", mapping
    valid = [f"mapping={mapping}" for mapping in MAPPINGS] if name == "mapping" else _WORDS
    raise FormatError(
        f"no format has the word {word!r}",
        where=f"format {text!r}",
        expected=", ".join((*_FLAGS, "tensor, token, channel=<axis>, group=<size>[@<axis>], mapping=<name>")),
        next_step=did_you_mean(word, valid),
    )
