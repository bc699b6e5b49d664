"""The `.sqm` file: whatever is wrong with it is an error, never a crash or a wrong number."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.image_programs import images, images_program
from torch import Tensor, nn
from torch.export import Dim

from sqcompile.backends.native import _native
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.errors import FileError
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

GOLDEN = Path(__file__).parent / "data" / "golden.sqm"
IMAGES = GOLDEN.with_name("images.sqm")
HEADER_BYTES, SECTION_BYTES, SECTIONS = 64, 32, 13
NAMES = (
    "strings symbols code sizes values lists floats operators inputs outputs tensors metadata data".split()
)

Damage = Callable[[bytearray], None]


class Layers(nn.Module):
    """One layer of each packed form, an embedding, a norm and attention: most of what a file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 32)
        self.dense = nn.Linear(32, 24)
        self.masked = nn.Linear(24, 32)
        self.blocks = nn.Linear(32, 16, bias=False)
        self.few = nn.Linear(16, 32)
        self.sparse_few = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        x = self.masked(torch.relu(self.dense(x))) + x
        y = self.blocks(x)
        y = y + torch.nn.functional.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]
        y = self.sparse_few(self.few(y))
        return self.head(y.softmax(-1)) * ids.shape[1]


def layers_program() -> Program:
    generator = torch.Generator().manual_seed(5)
    model = Layers().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    dims = {"ids": {0: Dim("batch", min=1, max=8), 1: Dim("length", min=2, max=32)}}
    program = trace(model, (ids(2, 3),), dynamic_shapes=dims)
    int4 = Format.parse("int4:group=32")
    passes: list[Pass] = [
        MaskWeights(sparsity=0.5, layers=("masked", "sparse_few")),
        MaskWeights(sparsity=0.5, pattern="4x4", layers=("blocks",)),
        ApplyMasks(),
        QuantizeWeights(exclude=("head", "table"), formats=(("few", int4), ("sparse_few", int4))),
    ]
    PassManager(passes).run(program, PassContext())
    return program


def ids(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 11


@pytest.fixture(scope="module")
def program() -> Program:
    return layers_program()


@pytest.fixture(scope="module")
def whole(program: Program) -> bytes:
    artifact = BACKEND.lower(program)
    assert isinstance(artifact, NativeArtifact)
    return artifact.to_bytes()


def sections(data: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size of each section."""
    entries = struct.iter_unpack("<IIQQQ", data[HEADER_BYTES : HEADER_BYTES + SECTIONS * SECTION_BYTES])
    return {name: (entry[2], entry[3]) for name, entry in zip(NAMES, entries, strict=True)}


def sealed(data: bytearray) -> bytes:
    """The file with all checksums made right again, where they can still be found."""
    table = HEADER_BYTES
    for index in range(SECTIONS):
        at = table + index * SECTION_BYTES
        offset, size = struct.unpack_from("<QQ", data, at + 8)
        if NAMES[index] == "tensors" and offset + size <= len(data):
            for place in range(offset, offset + size - 23, 24):
                first, count = struct.unpack_from("<QQ", data, place)
                if first + count <= len(data):
                    struct.pack_into("<I", data, place + 16, zlib.crc32(data[first : first + count]))
        if NAMES[index] != "data" and offset + size <= len(data):
            struct.pack_into("<I", data, at + 4, zlib.crc32(data[offset : offset + size]))
    struct.pack_into("<I", data, 24, zlib.crc32(data[table : table + SECTIONS * SECTION_BYTES]))
    struct.pack_into("<I", data, 28, zlib.crc32(data[:28]))
    return bytes(data)


@pytest.fixture(scope="module")
def whole_images() -> bytes:
    artifact = BACKEND.lower(images_program())
    assert isinstance(artifact, NativeArtifact)
    return artifact.to_bytes()


def outcome(data: bytes, inputs: Tensor | None = None) -> str:
    """Open a file and run it; the error's text, or nothing."""
    try:
        session = _native.Session(_native.Model.from_bytes(data), 1, None)
        session.run([(ids(2, 3) if inputs is None else inputs).numpy()])
    except (RuntimeError, ValueError, MemoryError) as error:
        return str(error) or "not enough memory"
    return ""


def test_a_whole_file_opens_and_runs(whole: bytes, program: Program, tmp_path: Path) -> None:
    assert outcome(whole) == ""
    steps = {name for name, _ in _native.Model.from_bytes(whole).steps}
    assert {
        "linear",
        "linear_q8",
        "linear_q8_sparse",
        "linear_q8_block",
        "linear_q4",
        "linear_q4_sparse",
        "attention",
        "norm_rows",
        "index",
    } <= steps
    (tmp_path / "model.sqm").write_bytes(whole)
    session = BACKEND.load(tmp_path / "model.sqm", threads=1)
    assert session.signature.inputs[0].name == "ids"
    expected = program.run([ids(3, 4)])[0].detach()
    # activations of quantized weights are rounded to 8 bits on the way in
    assert float((session.run([ids(3, 4)])[0] - expected).norm() / expected.norm()) < 0.05


def test_the_same_program_makes_the_same_file(whole: bytes) -> None:
    artifact = BACKEND.lower(layers_program())
    assert isinstance(artifact, NativeArtifact)
    assert artifact.to_bytes() == whole
    assert artifact.size_bytes == len(whole)


def test_a_file_of_version_1_keeps_its_meaning(whole: bytes) -> None:
    """The golden file and its outputs were written when version 1 was made; see docs/file_format.md."""
    session = _native.Session(_native.Model.open(str(GOLDEN)), 1, None)
    expected = np.load(GOLDEN.with_name("golden.npy"))
    (result,) = session.run([ids(3, 4).numpy()])
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-6 * float(np.abs(expected).max()))


def test_a_file_of_images_keeps_its_meaning(whole_images: bytes) -> None:
    """As above, written when convolutions by single weights were new. Codes are exact, and what they stand for is."""
    model = _native.Model.open(str(IMAGES))
    steps = {name for name, _ in model.steps}
    assert steps == {name for name, _ in _native.Model.from_bytes(whole_images).steps}
    assert {"conv_q8", "conv_q8_block", "conv_q8_sparse", "conv_q8_depthwise", "quantize_image"} <= steps
    expected = np.load(IMAGES.with_name("images.npy"))
    for threads in (1, 2):
        (result,) = _native.Session(model, threads, None).run([images(2, 7, 11).numpy()])
        np.testing.assert_array_equal(result, expected)


def test_a_file_that_is_cut_off_is_refused(whole: bytes) -> None:
    for length in [*range(0, 600, 7), *range(600, len(whole), 997), len(whole) - 1]:
        assert outcome(whole[:length]) != "", length


def test_bytes_behind_the_end_are_refused(whole: bytes) -> None:
    assert "should have" in outcome(whole + b"\0")


def test_every_flipped_bit_outside_of_gaps_is_noticed(whole: bytes) -> None:
    places = [*range(32), *range(HEADER_BYTES, HEADER_BYTES + SECTIONS * SECTION_BYTES, 5)]
    for name, (offset, size) in sections(whole).items():
        if name != "data":
            places += range(offset, offset + size, 37)
    table, size = sections(whole)["tensors"]
    for place in range(table, table + size, 24):
        first, count = struct.unpack_from("<QQ", whole, place)
        places += [first, first + count - 1] if count else []
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        assert outcome(bytes(data)) != "", place


def test_another_version_is_refused_by_name(whole: bytes) -> None:
    for version in (0, 3, 2**31):
        data = bytearray(whole)
        struct.pack_into("<I", data, 8, version)
        assert outcome(sealed(data)) == f"the file has version {version}; this build reads versions 1 to 2"


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("symbols", 0, "a name is cut off"),
        ("code", 0, "there is no opcode"),
        ("sizes", 0, "the code of a size is cut off"),
        ("sizes", 4, "the code of a size is cut off"),
        ("values", 4, "is cut off"),
        ("lists", 0, "does not exist"),
        ("operators", 12, "are cut off"),
        ("operators", 20, "a name is cut off"),
        ("inputs", 0, "refers to a value that does not exist"),
        ("outputs", 0, "refers to a value that does not exist"),
        ("tensors", 0, "is not aligned"),
        ("tensors", 8, "cut off"),
    ],
)
def test_fields_that_are_too_large_are_refused(whole: bytes, name: str, field: int, text: str) -> None:
    offset, _ = sections(whole)[name]
    data = bytearray(whole)
    struct.pack_into("<I", data, offset + field, 0xFFFFFFF1)
    assert text in outcome(sealed(data))


def test_sections_that_lie_outside_are_refused(whole: bytes) -> None:
    for index in range(SECTIONS):
        for value in (len(whole) + 4096, 2**63, 2**64 - 4096):
            for field in (8, 16):
                data = bytearray(whole)
                struct.pack_into("<Q", data, HEADER_BYTES + index * SECTION_BYTES + field, value)
                assert outcome(sealed(data)) != "", (index, value, field)


def test_an_unknown_operator_is_refused_by_its_number(whole: bytes) -> None:
    offset, _ = sections(whole)["operators"]
    data = bytearray(whole)
    struct.pack_into("<H", data, offset, 255)
    assert outcome(sealed(data)) == "the file needs operator 255, which this build does not have"


def test_packed_weights_that_lead_outside_are_refused(whole: bytes) -> None:
    """With the right checksums: kernels follow masks, starts and indices without looking."""
    values, count = sections(whole)["values"]
    table, _ = sections(whole)["tensors"]
    found = set()
    for place in range(values, values + count, 16):
        dtype, _, kind, layout, _, source, _ = struct.unpack_from("<BBBBIII", whole, place)
        name = next(name for name, number in _native.LAYOUTS.items() if number == layout)
        if kind != 1 or name not in (
            "qsparse_masks",
            "q4sparse_masks",
            "panel_starts",
            "qblock_index",
            "qblock_start",
        ):
            continue
        found.add(name)
        first, size = struct.unpack_from("<QQ", whole, table + 24 * source)
        for at in (first, first + size - 8):
            data = bytearray(whole)
            data[at : at + 8] = b"\xff" * 8 if data[at : at + 8] != b"\xff" * 8 else bytes(8)
            assert "the weights of a product have wrong" in outcome(sealed(data)), (name, at - first, dtype)
    assert len(found) == 5


def test_packed_convolutions_that_lead_outside_are_refused(whole_images: bytes) -> None:
    """As above, for blocks and for single weights, whose index, values and start have the same layouts."""
    values, count = sections(whole_images)["values"]
    table, _ = sections(whole_images)["tensors"]
    refused = 0
    for place in range(values, values + count, 16):
        _, _, kind, layout, _, source, _ = struct.unpack_from("<BBBBIII", whole_images, place)
        name = next(name for name, number in _native.LAYOUTS.items() if number == layout)
        if kind != 1 or name not in ("qblock_index", "qblock_start"):
            continue
        first, size = struct.unpack_from("<QQ", whole_images, table + 24 * source)
        # A chunk of 256 inputs has any index, and is followed by smaller ones.
        for at in (first, first + size - 8) if name == "qblock_start" else (first + size - 8,):
            data = bytearray(whole_images)
            data[at : at + 8] = b"\xff" * 8
            assert "the weights of a convolution have wrong" in outcome(sealed(data), images(1, 4, 4)), name
            refused += 1
    assert refused == 6


def _mutations(data: bytes, count: int) -> Iterator[bytes]:
    """Files with a few wrong words in their tables, and right checksums."""
    generator = np.random.default_rng(20)
    spans = [
        (offset, size) for name, (offset, size) in sections(data).items() if name != "data" and size >= 4
    ]
    interesting = [0, 1, 2, 3, 7, 8, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1]
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(int(generator.integers(1, 4))):
            offset, size = spans[int(generator.integers(len(spans)))]
            at = offset + int(generator.integers(size // 4)) * 4
            choice = int(generator.integers(4))
            if choice == 0:
                value = interesting[int(generator.integers(len(interesting)))]
                struct.pack_into("<I", mutated, at, value)
            elif choice == 1:
                mutated[at + int(generator.integers(4))] ^= 1 << int(generator.integers(8))
            elif choice == 2:
                source = offset + int(generator.integers(size // 4)) * 4
                mutated[at : at + 4] = mutated[source : source + 4]
            else:
                old = struct.unpack_from("<I", mutated, at)[0]
                struct.pack_into("<I", mutated, at, (old + int(generator.integers(-2, 3))) % 2**32)
        yield sealed(mutated)


def test_mutated_tables_are_survived(whole: bytes) -> None:
    """Opened and run, whatever they say: most are refused, some still mean something."""
    results = [outcome(data) for data in _mutations(whole, 1500)]
    assert sum(result != "" for result in results) > 500


def test_mutated_tables_of_images_are_survived(whole_images: bytes) -> None:
    assert outcome(whole_images, images(1, 4, 4)) == ""
    results = [outcome(data, images(1, 4, 4)) for data in _mutations(whole_images, 1500)]
    assert sum(result != "" for result in results) > 500


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    cases: list[tuple[str, bytes, str]] = [
        ("empty", b"", "it is empty"),
        ("text", b"hello, world\n" * 99, "does not begin as one"),
        ("onnx", b"\x08\x0a\x12\x09sqcompile" * 99, "does not begin as one"),
    ]
    for name, data, text in cases:
        path = tmp_path / f"{name}.sqm"
        path.write_bytes(data)
        with pytest.raises(FileError, match=text):
            BACKEND.load(path)
    with pytest.raises(FileError, match="cannot be read"):
        BACKEND.load(tmp_path / "missing.sqm")


def test_metadata_that_is_no_signature_is_a_file_error(whole: bytes, tmp_path: Path) -> None:
    offset, _ = sections(whole)["metadata"]
    data = bytearray(whole)
    data[offset : offset + 4] = b"{{{{"
    path = tmp_path / "model.sqm"
    path.write_bytes(sealed(data))
    with pytest.raises(FileError, match="signature"):
        BACKEND.load(path)


def test_tensors_lie_where_the_format_says(whole: bytes) -> None:
    table, size = sections(whole)["tensors"]
    for place in range(table, table + size, 24):
        first, count, _, _ = struct.unpack_from("<QQII", whole, place)
        assert first % (4096 if count >= 16384 else 64) == 0
    assert sections(whole)["data"][0] % 4096 == 0


def test_equal_constants_are_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Any) -> Any:
            return self.layer(self.layer(x))

    artifact = BACKEND.lower(trace(Tied(), (torch.ones(2, 64),)))
    assert isinstance(artifact, NativeArtifact)
    assert sorted(array.nbytes for array in artifact.plan.tensors) == [64 * 4, 64 * 64 * 4]
