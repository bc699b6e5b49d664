"""Writing `.sqm` files: docs/file_format.md."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import sympy
from numpy.typing import NDArray
from torch.utils._sympy import functions

from sqcompile.backends.native import _native
from sqcompile.backends.native.plan import Plan, Size, Value
from sqcompile.errors import BackendError

MAGIC = b"\x89SQM\r\n\x1a\n"

_NONE = 0xFFFFFFFF
_SECTIONS = 13
_GENERATION_SECTIONS = 10  # follow where the plan generates
_HEADER_BYTES = 64
_SECTION_ALIGNMENT = 64
_DATA_ALIGNMENT = 4096
_LARGE_TENSOR = 16384  # bytes from which on a tensor begins on a page of its own

_KINDS = {"input": 0, "constant": 1, "computed": 2}
_OPCODES = {
    "constant": 0,
    "symbol": 1,
    "add": 2,
    "sub": 3,
    "mul": 4,
    "floordiv": 5,
    "mod": 6,
    "min": 7,
    "max": 8,
}
_FUNCTIONS: dict[Any, str] = {
    sympy.Add: "add",
    sympy.Mul: "mul",
    functions.FloorDiv: "floordiv",
    functions.CleanDiv: "floordiv",
    functions.Mod: "mod",
    functions.PythonMod: "mod",
    functions.Min: "min",
    functions.Max: "max",
    sympy.Min: "min",
    sympy.Max: "max",
}

_SYMBOL = np.dtype([("name_offset", "<u4"), ("name_bytes", "<u4"), ("low", "<i8"), ("high", "<i8")])
_INSTRUCTION = np.dtype([("opcode", "<u4"), ("reserved", "<u4"), ("argument", "<i8")])
_RANGE = np.dtype([("first", "<u4"), ("count", "<u4")])
_VALUE = np.dtype(
    [
        ("dtype", "u1"),
        ("rank", "u1"),
        ("kind", "u1"),
        ("layout", "u1"),
        ("first_size", "<u4"),
        ("source", "<u4"),
        ("reserved", "<u4"),
    ]
)
_OPERATOR = np.dtype(
    [
        ("kind", "<u2"),
        ("inputs", "<u2"),
        ("outputs", "<u2"),
        ("ints", "<u2"),
        ("floats", "<u2"),
        ("reserved", "<u2"),
        ("first_list", "<u4"),
        ("first_float", "<u4"),
        ("name_offset", "<u4"),
        ("name_bytes", "<u4"),
        ("reserved2", "<u4"),
    ]
)
_PORT = np.dtype([("value", "<u4"), ("name_offset", "<u4"), ("name_bytes", "<u4"), ("reserved", "<u4")])
_TENSOR = np.dtype([("offset", "<u8"), ("bytes", "<u8"), ("crc", "<u4"), ("reserved", "<u4")])
_GENERATION = np.dtype([("limit", "<i8"), ("vocabulary", "<i8"), ("reserved", "V16")])
_SECTION = np.dtype(
    [("kind", "<u4"), ("crc", "<u4"), ("offset", "<u8"), ("bytes", "<u8"), ("reserved", "<u8")]
)
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("section_count", "<u4"),
        ("file_bytes", "<u8"),
        ("sections_crc", "<u4"),
        ("header_crc", "<u4"),
        ("reserved", "V32"),
    ]
)


class PlanFile:
    """A plan as the bytes of a file, which are written piece by piece.

    Attributes:
        size_bytes: Size of the file.
    """

    def __init__(self, plan: Plan) -> None:
        tables = _Tables(plan)
        self._tensors = plan.tensors
        # All sections but the data, by kind. Texts are collected while tables are made.
        sections = dict(enumerate(tables.sections()))
        version = _native.FORMAT_VERSION
        if plan.generation is not None:
            version = _native.FORMAT_VERSION_WITH_GENERATION
            more = _Tables(plan.generation.plan, tables).sections()
            settings = np.zeros(1, _GENERATION)
            settings["limit"], settings["vocabulary"] = plan.generation.limit, plan.generation.vocabulary
            sections[_SECTIONS] = settings.tobytes()
            sections |= {_SECTIONS + 1 + at: section for at, section in enumerate(more[1:10])}
            sections[0] = bytes(tables.strings)
        count = _SECTIONS + (_GENERATION_SECTIONS if plan.generation is not None else 0)
        offset = _align(_HEADER_BYTES + count * _SECTION.itemsize, _SECTION_ALIGNMENT)
        # The table of tensors holds offsets that depend on its own place, but not on its contents.
        kinds = list(sections)
        placed = _place([len(section) for section in sections.values()], offset)
        begin = _align(placed[-1] + len(sections[kinds[-1]]), _DATA_ALIGNMENT)
        self._offsets, self.size_bytes = _place_tensors(self._tensors, begin)
        records = np.zeros(len(self._tensors), _TENSOR)
        for index, array in enumerate(self._tensors):
            records[index] = (self._offsets[index], array.nbytes, zlib.crc32(_bytes(array)), 0)
        sections[_Tables.TENSORS] = records.tobytes()
        table = np.zeros(count, _SECTION)
        for kind, place in zip(kinds, placed, strict=True):
            table[kind] = (kind, zlib.crc32(sections[kind]), place, len(sections[kind]), 0)
        table[_SECTIONS - 1] = (_SECTIONS - 1, 0, begin, self.size_bytes - begin, 0)
        header = np.zeros(1, _HEADER)
        header["magic"], header["version"] = MAGIC, version
        header["section_count"], header["file_bytes"] = count, self.size_bytes
        header["sections_crc"] = zlib.crc32(table.tobytes())
        header["header_crc"] = zlib.crc32(header.tobytes()[:28])
        self._pieces = [(0, header.tobytes() + table.tobytes()), *zip(placed, sections.values(), strict=True)]

    def write(self, file: BinaryIO) -> None:
        """Write everything from the file's present position on."""
        at = 0
        for offset, piece in self._all():
            file.write(bytes(offset - at))
            file.write(piece)
            at = offset + len(piece)
        file.write(bytes(self.size_bytes - at))

    def _all(self) -> Iterator[tuple[int, Any]]:
        yield from self._pieces
        for offset, array in zip(self._offsets, self._tensors, strict=True):
            yield offset, _bytes(array)


class _Tables:
    """The sections of a plan but the data; that of tensors holds zeros.

    Args:
        plan: The plan.
        others: Tables that names are shared with.
    """

    TENSORS = 10

    def __init__(self, plan: Plan, others: _Tables | None = None) -> None:
        self.plan = plan
        self.strings: bytearray = bytearray() if others is None else others.strings
        self.string_places: dict[str, tuple[int, int]] = {} if others is None else others.string_places
        self.symbols = list(plan.symbols)
        self.code: list[tuple[int, int, int]] = []
        self.sizes: dict[Size, int] = {}
        self.ranges: list[tuple[int, int]] = []
        self.lists: list[int] = []
        self.floats: list[float] = []

    def sections(self) -> list[bytes]:
        """Return the bytes of all sections in their order."""
        plan = self.plan
        operators = dict(_native.operators())
        symbols = [(*self._name(item.name), item.low, item.high) for item in plan.symbols.values()]
        values = [self._value(value) for value in plan.values]
        steps = []
        for step in plan.steps:
            first_list, first_float = len(self.lists), len(self.floats)
            self.lists += [_NONE if value is None else value.index for value in step.inputs]
            self.lists += [value.index for value in step.outputs]
            self.lists += [self._size(size) for size in step.ints]
            self.floats += step.floats
            counts = (len(step.inputs), len(step.outputs), len(step.ints), len(step.floats))
            kind = operators[step.operator]
            steps.append((kind, *counts, 0, first_list, first_float, *self._name(step.name), 0))
        inputs = [(value.index, *self._name(name), 0) for name, value in plan.inputs]
        outputs = [(value.index, *self._name(name), 0) for name, value in plan.outputs]
        return [
            bytes(self.strings),
            np.array(symbols, _SYMBOL).tobytes(),
            np.array(self.code, _INSTRUCTION).tobytes(),
            np.array(self.ranges, _RANGE).tobytes(),
            np.array(values, _VALUE).tobytes(),
            np.array(self.lists, "<u4").tobytes(),
            np.array(self.floats, "<f8").tobytes(),
            np.array(steps, _OPERATOR).tobytes(),
            np.array(inputs, _PORT).tobytes(),
            np.array(outputs, _PORT).tobytes(),
            bytes(len(plan.tensors) * _TENSOR.itemsize),
            plan.metadata.encode(),
        ]

    def _name(self, name: str) -> tuple[int, int]:
        if name not in self.string_places:
            data = name.encode()
            self.string_places[name] = (len(self.strings), len(data))
            self.strings += data
        return self.string_places[name]

    def _value(self, value: Value) -> tuple[int, ...]:
        first = len(self.lists)
        self.lists += [self._size(size) for size in value.shape]
        dtype, layout = _native.DTYPES[value.dtype], _native.LAYOUTS[value.layout]
        return dtype, value.rank, _KINDS[value.kind], layout, first, value.source, 0

    def _size(self, size: Size) -> int:
        """Return the number of a size; equal ones are one."""
        size = as_size(size)
        if size not in self.sizes:
            first = len(self.code)
            self._encode(size)
            self.sizes[size] = len(self.ranges)
            self.ranges.append((first, len(self.code) - first))
        return self.sizes[size]

    def _encode(self, size: Size) -> None:
        if isinstance(size, (int, sympy.Integer)):
            self._instruction("constant", int(size))
        elif isinstance(size, sympy.Symbol):
            if size not in self.plan.symbols:
                raise _no_size(size)
            self._instruction("symbol", self.symbols.index(size))
        elif isinstance(size, sympy.Pow) and size.exp.is_Integer and int(size.exp) > 0:
            self._chain("mul", [size.base] * int(size.exp))
        elif type(size) in _FUNCTIONS and size.args:
            self._chain(_FUNCTIONS[type(size)], list(size.args))
        else:
            raise _no_size(size)

    def _chain(self, operation: str, arguments: list[Any]) -> None:
        self._encode(arguments[0])
        for argument in arguments[1:]:
            self._encode(argument)
            self._instruction(operation, 0)

    def _instruction(self, opcode: str, argument: int) -> None:
        self.code.append((_OPCODES[opcode], 0, argument))


def as_size(size: Any) -> Size:
    """Return a size as an int where it is one."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else size


def can_encode(size: Size) -> bool:
    """Whether a size is made of what files can hold."""
    if isinstance(size, (int, sympy.Integer, sympy.Symbol)):
        return True
    if isinstance(size, sympy.Pow):
        return bool(size.exp.is_Integer) and int(size.exp) > 0 and can_encode(size.base)
    return type(size) in _FUNCTIONS and all(can_encode(argument) for argument in size.args)


def _no_size(size: Size) -> BackendError:
    return BackendError(
        "A size of the program cannot be written to a file.",
        seen=str(size),
        expected="sums, products, quotients, minima and maxima of the inputs' dynamic dimensions",
    )


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _place(lengths: list[int], offset: int) -> list[int]:
    places = []
    for length in lengths:
        places.append(offset)
        offset = _align(offset + length, _SECTION_ALIGNMENT)
    return places


def _place_tensors(tensors: list[NDArray[Any]], offset: int) -> tuple[list[int], int]:
    """Return each tensor's place, and where the last one ends."""
    places = []
    for array in tensors:
        offset = _align(offset, _DATA_ALIGNMENT if array.nbytes >= _LARGE_TENSOR else _SECTION_ALIGNMENT)
        places.append(offset)
        offset += array.nbytes
    return places, offset


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
