"""Files are written whole or not at all, whatever goes wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sqcompile.errors import FileError
from sqcompile.files import SteadyWriter, atomic_file, atomic_folder, require_file, sync, write_errors


@contextlib.contextmanager
def small_files(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: a write that fails for real, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, where the process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("this process may not mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def write(path: Path, text: str = "new") -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def everything(folder: Path) -> list[str]:
    return sorted(str(item.relative_to(folder)) for item in folder.rglob("*"))


class TestFile:
    def test_appears_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "model.onnx"
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            assert not path.exists() and temporary.parent == path.parent and temporary.name.endswith(".part")
        assert path.read_text() == "new" and everything(tmp_path) == ["a", "a/b", "a/b/model.onnx"]

    def test_replaces_an_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_text("old")
        write(path)
        assert path.read_text() == "new" and everything(tmp_path) == ["model.onnx"]

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, RuntimeError])
    def test_nothing_happens_if_the_writer_fails(self, tmp_path: Path, error: type[BaseException]) -> None:
        path = tmp_path / "new" / "folder" / "model.onnx"
        with pytest.raises(error), atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error
        assert everything(tmp_path) == []

    def test_an_old_one_survives(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_text("old")
        with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
        assert path.read_text() == "old" and everything(tmp_path) == ["model.onnx"]

    def test_folders_that_others_use_meanwhile_stay(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "new" / "model.onnx"):
            (tmp_path / "new" / "other").write_text("theirs")
            raise ZeroDivisionError
        assert everything(tmp_path) == ["new", "new/other"]

    def test_permissions(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        old = os.umask(0o027)
        try:
            write(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as any new file here
            path.chmod(0o600)
            write(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600  # what was private stays private
        finally:
            os.umask(old)

    def test_links_are_followed(self, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        link = tmp_path / "model.onnx"
        link.symlink_to(tmp_path / "store" / "real.onnx")
        for text in ("first", "second"):
            write(link, text)
            assert link.is_symlink() and (tmp_path / "store" / "real.onnx").read_text() == text
        assert everything(tmp_path) == ["model.onnx", "store", "store/real.onnx"]

    def test_long_names(self, tmp_path: Path) -> None:
        path = tmp_path / ("n" * 250)
        write(path)
        assert path.read_text() == "new"

    def test_two_writers(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        with atomic_file(path) as first, atomic_file(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "first" and everything(tmp_path) == ["model.onnx"]


def refused(action: Callable[[], None]) -> FileError:
    with pytest.raises(FileError) as caught:
        action()
    error = caught.value
    assert error.what and error.where and error.seen and error.expected and error.next_step
    return error


class TestUnwritable:
    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        error = refused(lambda: write(tmp_path / "file" / "model.onnx"))
        assert error.seen == os.strerror(errno.ENOTDIR) and "is not a folder" in str(error.next_step)

    def test_a_folder_where_the_file_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").mkdir()

        def action() -> None:
            with atomic_file(tmp_path / "model.onnx"):
                pytest.fail("it did the work before it looked")

        assert "is a folder" in str(refused(action).next_step)
        assert everything(tmp_path) == ["model.onnx"]

    def test_a_file_system_that_cannot_be_written(self) -> None:
        error = refused(lambda: write(Path("/proc/no_such_folder/model.onnx")))
        assert error.what == "'/proc/no_such_folder/model.onnx' cannot be written."

    @pytest.mark.parametrize(
        ("number", "hint"),
        [
            (errno.ENOSPC, "free some room"),
            (errno.EDQUOT, "free some room"),
            (errno.EFBIG, "ulimit -f"),
            (errno.EACCES, "may write to"),
            (errno.EROFS, "may write to"),
            (errno.ENAMETOOLONG, "another path"),
        ],
    )
    def test_what_to_do(self, tmp_path: Path, number: int, hint: str) -> None:
        def action() -> None:
            with write_errors(tmp_path / "model.onnx"):
                raise OSError(number, os.strerror(number))

        error = refused(action)
        assert error.seen == os.strerror(number) and hint in str(error.next_step)


class TestFullDisk:
    @pytest.mark.parametrize("step", ["write", "replace"])
    def test_at_any_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        path = tmp_path / "model.onnx"
        path.write_text("old")

        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def action() -> None:
            with atomic_file(path) as temporary:
                if step == "write":
                    full()
                temporary.write_text("new")
                monkeypatch.setattr(os, "replace", full)

        error = refused(action)
        assert "free some room" in str(error.next_step)
        assert path.read_text() == "old" and everything(tmp_path) == ["model.onnx"]

    def test_a_limit_on_files(self, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_text("old")
        with small_files(1000):
            error = refused(lambda: write(path, "x" * 5000))
        assert error.seen == os.strerror(errno.EFBIG)
        assert path.read_text() == "old" and everything(tmp_path) == ["model.onnx"]

    def test_a_small_disk(self, small_disk: Path) -> None:
        path = small_disk / "model.onnx"
        write(path, "old")
        error = refused(lambda: write(path, "x" * 100_000))
        assert error.seen == os.strerror(errno.ENOSPC) and "free some room" in str(error.next_step)
        assert path.read_text() == "old" and everything(small_disk) == ["model.onnx"]
        write(path, "new")
        assert path.read_text() == "new"


class TestSteadyWriter:
    def test_writes(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file:
            writer = SteadyWriter(file)
            assert writer.writable() and writer.seekable() and not writer.readable()
            assert writer.write(b"abc") == 3 and writer.tell() == 3
            writer.seek(1)
            writer.write(b"X")
            writer.check()
        assert (tmp_path / "file").read_bytes() == b"aXc"

    def test_an_error_waits_until_it_is_asked_for(self, tmp_path: Path) -> None:
        with small_files(1000), pytest.raises(OSError, match="File too large"):
            with (tmp_path / "file").open("wb", buffering=0) as file:
                writer = SteadyWriter(file)
                for _ in range(3):
                    assert writer.write(b"x" * 900) == 900  # the C++ behind it must see no failure
                writer.check()

    def test_an_error_while_flushing(self, tmp_path: Path) -> None:
        with small_files(1000), pytest.raises(OSError, match="File too large"):
            file = (tmp_path / "file").open("wb", buffering=10_000)
            try:
                writer = SteadyWriter(file)
                writer.write(b"x" * 5000)
                writer.check()
            finally:
                with contextlib.suppress(OSError):
                    file.close()


class TestFolder:
    def test_appears_with_its_files(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "model"
        with atomic_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").write_text("a")
            (folder / "b").write_text("b")
            assert not path.exists()
        assert everything(path) == ["b", "sub", "sub/a"] and everything(tmp_path / "new") == [
            "model",
            "model/b",
            "model/sub",
            "model/sub/a",
        ]
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~_umask()

    def test_files_of_an_old_one_stay_unless_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "model"
        (path / "sub").mkdir(parents=True)
        for name in ("keep", "replace", "sub/replace"):
            (path / name).write_text("old")
        with atomic_folder(path) as folder:
            (folder / "sub").mkdir()
            for name in ("replace", "sub/replace", "sub/add"):
                (folder / name).write_text("new")
        found = {name: (path / name).read_text() for name in everything(path) if (path / name).is_file()}
        assert found == {"keep": "old", "replace": "new", "sub/replace": "new", "sub/add": "new"}
        assert everything(tmp_path) == ["model", *(f"model/{name}" for name in everything(path))]

    def test_nothing_happens_if_the_writer_fails(self, tmp_path: Path) -> None:
        for existing in (False, True):
            path = tmp_path / "model"
            if existing:
                path.mkdir()
                (path / "a").write_text("old")
            before = everything(tmp_path)
            with pytest.raises(ZeroDivisionError), atomic_folder(path) as folder:
                (folder / "a").write_text("new")
                raise ZeroDivisionError
            assert everything(tmp_path) == before
        assert (path / "a").read_text() == "old"

    def test_a_file_of_that_name(self, tmp_path: Path) -> None:
        (tmp_path / "model").write_text("old")

        def action() -> None:
            with atomic_folder(tmp_path / "model"):
                pytest.fail("it did the work before it looked")

        assert "is a file" in str(refused(action).next_step)
        assert everything(tmp_path) == ["model"]

    def test_a_small_disk(self, small_disk: Path) -> None:
        def action() -> None:
            with atomic_folder(small_disk / "model") as folder:
                (folder / "small").write_text("x")
                (folder / "large").write_text("x" * 100_000)

        assert "free some room" in str(refused(action).next_step)
        assert everything(small_disk) == []

    def test_errors_speak_of_the_folder_that_was_named(self, tmp_path: Path) -> None:
        def action() -> None:
            with atomic_folder(tmp_path / "model") as folder, atomic_file(folder / "missing" / "x"):
                raise OSError(errno.ENOSPC, "No space left on device")

        error = refused(action)
        assert error.where == str(tmp_path / "model" / "missing" / "x")
        assert ".part" not in str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestRequire:
    def test_similar_names_are_offered(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_text("")
        require_file(tmp_path / "model.onnx")
        error = refused(lambda: require_file(tmp_path / "modle.onnx", "artifact"))
        assert error.seen == "no such file" and "'model.onnx'" in str(error.next_step)
        assert error.what.startswith("The artifact '") and error.expected == "a readable artifact"

    def test_folders(self, tmp_path: Path) -> None:
        assert refused(lambda: require_file(tmp_path)).seen == "a folder"

    def test_nothing_near(self, tmp_path: Path) -> None:
        assert "there is no folder" in str(refused(lambda: require_file(tmp_path / "no" / "model.onnx")))
        (tmp_path / "notes.txt").touch()
        # Files of another kind are no help, unless the name is nearly theirs.
        assert "no .pt2 file is in" in str(refused(lambda: require_file(tmp_path / "resnet_20.pt2")))
        assert "did you mean 'notes.txt'?" in str(refused(lambda: require_file(tmp_path / "notes.tx")))
        assert "did you mean 'notes.txt'?" in str(refused(lambda: require_file(tmp_path / "notes.onnx")))
        (tmp_path / "CHANGELOG.md").touch()
        assert "no .sqm file is in" in str(refused(lambda: require_file(tmp_path / "none.sqm")))


def test_sync_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    sync(tmp_path / "file")
    sync(tmp_path)
