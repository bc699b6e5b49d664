"""Programs in files: everything comes back, and nothing wrong does."""

from __future__ import annotations

import base64
import errno
import json
import operator
import os
import resource
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.programs import conv_net, data, mlp, seeded
from torch import nn
from torch.export import Dim

from sqcompile import storage
from sqcompile.errors import FileError
from sqcompile.layers import layers_of
from sqcompile.levels import Level
from sqcompile.pipeline import verify_program
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity
from sqcompile.tracing import trace

ours = torch.ops.sqcompile
ENTRY = "archive/extra/sqcompile.json"


def quantized() -> Program:
    """A program of level QDQ: a masked weight of 4 bits in groups with a promise, and quantized data."""
    program = mlp(dynamic=True)
    edit = Rewriter(program, "quantize")
    layer = layers_of(program)[0]
    keep = torch.tensor([True, False, True, False] * 2).expand(16, 8).contiguous()
    codes = torch.randint(-8, 8, (16, 8), generator=torch.Generator().manual_seed(0)).to(torch.int8) * keep

    def parameters(name: str, *shape: int) -> list[Any]:
        scale = edit.constant(f"{name}_scale", torch.rand(shape) + 0.1)
        return [scale, edit.constant(f"{name}_zero_point", torch.zeros(shape, dtype=torch.int32))]

    with edit.before(layer.node):
        weight = edit.call(
            ours.dequantize.default,
            edit.constant("first.weight_codes", codes),
            *parameters("w", 16, 2),
            1,
            4,
            -8,
            7,
        )
        made = edit.call(ours.dynamic_scale.default, layer.data, -1, -1, 0, 255, False, like=layer.node)
        scale, zero = (edit.call(operator.getitem, made, index) for index in (0, 1))
        x = edit.call(ours.quantize.default, layer.data, scale, zero, -1, -1, 0, 255)
        x = edit.call(ours.dequantize.default, x, scale, zero, -1, -1, 0, 255)
    edit.set_argument(layer.node, 0, x)
    edit.set_argument(layer.node, 1, weight)
    edit.finish()
    program.level = Level.QDQ
    program.sparsity["first.weight_codes"] = Sparsity(keep, Pattern.parse("2:4"))
    verify_program(program)
    return program


def again(program: Program, folder: Path) -> Program:
    path = folder / "program.pt2"
    program.save(path)
    return Program.load(path)


class TestRoundTrip:
    def test_of_a_quantized_program(self, tmp_path: Path) -> None:
        program = quantized()
        found = again(program, tmp_path)
        assert str(found) == str(program) and found.level is Level.QDQ
        assert found.signature == program.signature and found.signature.dims == {"batch": (1, 64)}
        for (name, left), (other, right) in zip(program.tensors(), found.tensors(), strict=True):
            assert name == other and torch.equal(left, right) and type(left) is type(right)
        promise, expected = found.sparsity["first.weight_codes"], program.sparsity["first.weight_codes"]
        assert torch.equal(promise.mask, expected.mask) and promise.pattern == expected.pattern
        verify_program(found)
        for rows in (1, 2, 7):
            assert torch.equal(found(data(rows, 8)), program(data(rows, 8)))
        assert found.fingerprint(content=True) == program.fingerprint(content=True)

    def test_twice_is_once(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a.pt2", tmp_path / "b.pt2"
        quantized().save(first)
        Program.load(first).save(second)
        assert str(Program.load(first)) == str(Program.load(second))

    def test_files_are_reproducible(self, tmp_path: Path) -> None:
        program = conv_net()
        for name in ("a.pt2", "b.pt2"):
            program.save(tmp_path / name)
        assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()

    def test_dynamic_shapes_and_the_users_names(self, tmp_path: Path) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return (x.repeat_interleave(2, 1) + y).sum(1)

        batch, length = Dim("batch"), Dim("length", min=2, max=50)
        shapes = {"x": {0: batch, 1: length}, "y": {0: batch, 1: 2 * length}}
        program = trace(Model(), (data(3, 4), data(3, 8)), dynamic_shapes=shapes)
        found = again(program, tmp_path)
        assert str(found) == str(program)
        assert "f32[batch, 2*length]" in str(found) and found.signature.dims["length"] == (2, 50)
        assert found(data(1, 5), data(1, 10)).shape == (1,)

    def test_tied_weights_stay_one(self, tmp_path: Path) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.head(self.embed(ids))

        program = trace(seeded(Model), (torch.tensor([1, 2]),))
        found = again(program, tmp_path)
        assert len(dict(found.tensors())) == 1 and str(found) == str(program)

    def test_output_classes(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers.modeling_outputs")

        class Model(nn.Module):
            def forward(self, x: torch.Tensor, kind: str = "pair") -> Any:
                pair = Pair(x + 1, (x, None))
                return (
                    pair
                    if kind == "pair"
                    else transformers.BaseModelOutput(last_hidden_state=x, hidden_states=(x,))
                )

        for kind in ("pair", "transformers"):
            program = trace(Model(), ((data(2),), {"kind": kind}))
            found = again(program, tmp_path)(data(2))
            assert type(found) is (Pair if kind == "pair" else transformers.BaseModelOutput)

    def test_parameters_and_buffers_of_every_type(self, tmp_path: Path) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.frozen = nn.Parameter(data(3), requires_grad=False)
                self.low = nn.Parameter(data(3).half())
                self.wide = nn.Parameter(data(3).bfloat16())
                self.register_buffer("table", torch.tensor([1, 2, 3]), persistent=False)
                self.register_buffer("flags", torch.tensor([True, False, True]))
                self.register_buffer("empty", torch.empty(0, 3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = x * self.frozen + self.low + self.wide + self.table
                return torch.where(self.flags, x, torch.cat([x[None], self.empty])[0])

        program = trace(Model().eval(), (data(3),))
        found = again(program, tmp_path)
        assert str(found) == str(program) and torch.equal(found(data(3)), program(data(3)))
        assert not found.tensor("frozen").requires_grad and found.tensor("low").requires_grad

    def test_what_comparisons_go_by(self, tmp_path: Path) -> None:
        program = mlp()
        edit = Rewriter(program, "test")
        relu = next(node for node in program.compute_nodes() if node.name == "relu")
        with edit.after(relu):
            new = edit.call(torch.ops.aten.gelu.default, relu.args[0])
        edit.replace(relu, new)
        edit.rescale(new, torch.tensor([2.0] * 16))
        edit.finish()
        found = next(node for node in again(program, tmp_path).compute_nodes() if node.name == "gelu")
        assert found.meta["stands_for"] == "relu" and torch.equal(
            found.meta["rescaled"], torch.tensor([2.0] * 16)
        )

    def test_promises_about_tensors_that_are_gone_are_not_stored(self, tmp_path: Path) -> None:
        program = mlp()
        program.sparsity["gone"] = Sparsity(torch.ones(3, dtype=torch.bool))
        assert again(program, tmp_path).sparsity == {}

    @pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9, 3), (0, 4)])
    def test_masks_of_any_size(self, shape: tuple[int, ...]) -> None:
        mask = torch.rand(shape) > 0.5
        found = storage._unpack(json.loads(json.dumps(storage._pack(Sparsity(mask)))))
        assert torch.equal(found.mask, mask)

    def test_any_suffix(self, tmp_path: Path) -> None:
        mlp().save(tmp_path / "program.bin")
        assert str(Program.load(tmp_path / "program.bin")) == str(mlp())


class Pair(NamedTuple):
    first: Any
    second: Any


class TestForeignFiles:
    def test_of_torch_export(self, tmp_path: Path) -> None:
        exported = torch.export.export(
            seeded(lambda: nn.Linear(4, 3)), (data(2, 4),), dynamic_shapes=({0: Dim("rows")},)
        )
        torch.export.save(exported, tmp_path / "foreign.pt2")
        program = Program.load(tmp_path / "foreign.pt2")
        assert program.level is Level.ATEN and [name for name, _ in program.tensors()] == ["weight", "bias"]
        assert torch.equal(program(data(5, 4)), exported.module()(data(5, 4)))
        verify_program(program)

    def test_ours_are_read_by_torch_export(self, tmp_path: Path) -> None:
        program = conv_net()
        program.save(tmp_path / "ours.pt2")
        x = data(2, 3, 6, 6)
        assert torch.equal(torch.export.load(tmp_path / "ours.pt2").module()(x), program(x))

    @pytest.mark.parametrize(
        "content",
        [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100, zipfile.ZipFile],
        ids=["empty", "text", "head", "zip"],
    )
    def test_that_are_none(self, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "other.pt2"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme.txt", "hello")
        refused(path)

    def test_that_are_missing(self, tmp_path: Path) -> None:
        mlp().save(tmp_path / "program.pt2")
        error = refused(tmp_path / "progam.pt2")
        assert error.seen == "no such file" and "program.pt2" in str(error.next_step)
        assert refused(tmp_path).seen == "a folder"


def refused(path: Path) -> FileError:
    with pytest.raises(FileError) as caught:
        Program.load(path)
    error = caught.value
    assert type(error) is FileError and str(path) in str(error.where)
    assert error.what and error.seen and error.expected and error.next_step
    return error


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "program.pt2"
    quantized().save(path)
    return path


class TestDamage:
    def test_truncated(self, saved: Path, tmp_path: Path) -> None:
        content = saved.read_bytes()
        for share in (0.01, 0.3, 0.7, 0.99):
            path = tmp_path / "cut.pt2"
            path.write_bytes(content[: int(len(content) * share)])
            refused(path)

    def test_torch_prints_nothing_of_its_own(self, saved: Path, tmp_path: Path) -> None:
        """It would log a traceback where the archive's last record, its index, is damaged."""
        lines = [
            "import sys, pathlib, sqcompile",
            "data = bytearray(pathlib.Path(sys.argv[1]).read_bytes())",
            "data[-30] ^= 0x55",  # what stands before the last record, of 22 bytes, and says where the index is
            "pathlib.Path(sys.argv[2]).write_bytes(data)",
            "try: sqcompile.load(sys.argv[2])",
            "except sqcompile.Error as error: print(type(error).__name__, error)",
        ]
        command = [sys.executable, "-c", "\n".join(lines), str(saved), str(tmp_path / "index.pt2")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("FileError") and "index.pt2" in done.stdout
        assert "Traceback" not in done.stderr

    def test_every_part_has_a_checksum_that_is_checked(self, saved: Path, tmp_path: Path) -> None:
        """PyTorch would load a flipped bit of a weight without a word."""
        content = bytearray(saved.read_bytes())
        with zipfile.ZipFile(saved) as archive:
            parts = {item.filename: item for item in archive.infolist() if item.file_size}
        flipped = 0
        for name, item in parts.items():
            start = item.header_offset + 30
            start += int.from_bytes(content[start - 4 : start - 2], "little")
            start += int.from_bytes(content[item.header_offset + 28 : item.header_offset + 30], "little")
            place = start + item.file_size // 2
            content[place] ^= 1
            path = tmp_path / "flipped.pt2"
            path.write_bytes(content)
            content[place] ^= 1
            assert name in str(refused(path).seen)
            flipped += "weights/weight" in name
        assert flipped >= 5

    @pytest.mark.parametrize(
        "change",
        [
            lambda entry: entry.clear(),
            lambda entry: entry.pop("version"),
            lambda entry: entry.update(version="1"),
            lambda entry: entry.pop("signature"),
            lambda entry: entry.update(signature="{"),
            lambda entry: entry.update(signature=3),
            lambda entry: entry.update(level="float"),
            lambda entry: entry.update(sparsity=[]),
            lambda entry: entry.update(stands_for=3),
            lambda entry: entry.update(rescaled={"linear": [[2], [1.0]]}),
            lambda entry: entry["sparsity"].update(other=next(iter(entry["sparsity"].values()))),
            lambda entry: promise(entry).update(mask="AAAA"),
            lambda entry: promise(entry).update(mask="not base 64!"),
            lambda entry: promise(entry).update(mask=base64.b64encode(zlib.compress(bytes(8))).decode()),
            lambda entry: promise(entry).update(shape=[8, 16]),
            lambda entry: promise(entry).update(shape=[16, 9]),
            lambda entry: promise(entry).update(shape=[-16, -8]),
            lambda entry: promise(entry).update(pattern="4:2"),
            lambda entry: promise(entry).pop("pattern"),
        ],
    )
    def test_of_our_entry(self, saved: Path, tmp_path: Path, change: Callable[[Any], Any]) -> None:
        refused(edited(saved, tmp_path, change))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
    def test_an_entry_that_is_none(self, saved: Path, tmp_path: Path, text: str) -> None:
        refused(edited(saved, tmp_path, text))

    def test_from_a_newer_version(self, saved: Path, tmp_path: Path) -> None:
        error = refused(edited(saved, tmp_path, lambda entry: entry.update(version=99)))
        assert (
            "newer version" in error.what and error.seen == "version 99" and "update" in str(error.next_step)
        )

    def test_a_signature_of_another_program(self, saved: Path, tmp_path: Path) -> None:
        other = conv_net().signature.to_json()
        error = refused(edited(saved, tmp_path, lambda entry: entry.update(signature=other)))
        assert "describes another program" in error.what

    def test_a_signature_that_imports(
        self, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "trapped.py").write_text("raise SystemExit('imported')\n")
        monkeypatch.syspath_prepend(tmp_path)

        def change(entry: Any) -> None:
            signature = json.loads(entry["signature"])
            signature["kinds"] = [["trapped", "Kind"]]
            entry["signature"] = json.dumps(signature)

        assert "not imported" in str(refused(edited(saved, tmp_path, change)).seen)


def promise(entry: Any) -> Any:
    return entry["sparsity"]["first.weight_codes"]


def edited(saved: Path, folder: Path, change: Callable[[Any], Any] | str) -> Path:
    """Return a copy of a file with our entry changed, and all checksums right."""
    path = folder / "edited.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename == ENTRY:
                if isinstance(change, str):
                    content = change.encode()
                else:
                    entry = json.loads(content)
                    change(entry)
                    content = json.dumps(entry).encode()
            new.writestr(item, content)
    return path


class TestUnwritable:
    def everything(self, folder: Path) -> list[str]:
        return sorted(item.name for item in folder.iterdir())

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """PyTorch's own writer ends the process here, in a destructor that throws."""
        path = tmp_path / "program.pt2"
        mlp().save(path)
        old = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for limit in (100, 3000, len(conv_bytes(tmp_path)) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(FileError) as caught:
                    conv_net().save(path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.seen == os.strerror(errno.EFBIG) and caught.value.next_step
            assert path.read_bytes() == old and self.everything(tmp_path) == ["program.pt2"]

    def test_a_writer_that_fails_midway(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "program.pt2"
        mlp().save(path)
        old = path.read_bytes()

        def failing(exported: Any, writer: Any, **options: Any) -> None:
            writer.write(b"half")
            raise RuntimeError("something inside\nwith a long traceback")

        monkeypatch.setattr(torch.export, "save", failing)
        with pytest.raises(FileError, match="cannot be stored") as caught:
            conv_net().save(path)
        error = caught.value
        assert error.seen == "RuntimeError: something inside" and error.next_step and error.expected
        assert path.read_bytes() == old and self.everything(tmp_path) == ["program.pt2"]

    def test_a_disk_that_was_full_for_a_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One write fails, and all later ones succeed: the file has a hole, and must not appear."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def save(exported: Any, writer: Any, **options: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            try:
                writer.write(b"x" * 1_000_000)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(torch.export, "save", save)
        with pytest.raises(FileError, match="cannot be written"):
            mlp().save(tmp_path / "program.pt2")
        assert self.everything(tmp_path) == []

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FileError, match="cannot be written"):
            mlp().save(tmp_path / "file" / "program.pt2")
        assert self.everything(tmp_path) == ["file"]

    def test_programs_with_observers(self, tmp_path: Path) -> None:
        program = mlp()
        program.level = Level.OBSERVED
        with pytest.raises(FileError, match="observers cannot be saved") as caught:
            program.save(tmp_path / "program.pt2")
        error = caught.value
        assert error.seen and error.expected and "freeze-observers" in str(error.next_step)
        assert self.everything(tmp_path) == []


def conv_bytes(folder: Path) -> bytes:
    path = folder / "size.pt2"
    conv_net().save(path)
    content = path.read_bytes()
    path.unlink()
    return content
