"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqcompile.errors import FileError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    Raises:
        FileError: If it cannot be written; nothing is left behind, and an old file stays as it was.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    temporary = Path(name)
    try:
        with write_errors(path):
            yield temporary
            sync(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files move into `path`, which may exist.

    Files of `path` that the new ones do not replace stay.

    Raises:
        FileError: If it cannot be written; nothing is left behind.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with write_errors(path):
            yield temporary
            path.mkdir(exist_ok=True)
            for item in sorted(temporary.rglob("*")):
                target = path / item.relative_to(temporary)
                if item.is_dir():
                    target.mkdir(exist_ok=True)
                else:
                    sync(item)
                    os.replace(item, target)
            sync(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the errors of the operating system into a `FileError` about `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"'{path}' cannot be written.",
            where=str(path),
            seen=error.strerror or str(error),
            expected="a writable path on a disk with room",
            next_step=_write_hint(error, path),
        ) from error


def require_file(path: Path, what: str = "file") -> None:
    """Check that a file exists and can be read.

    Raises:
        FileError: If not; files of similar names are offered.
    """
    if path.is_file() and os.access(path, os.R_OK):
        return
    from sqcompile.errors import did_you_mean

    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileError(
        f"The {what} '{path}' cannot be read.",
        where=str(path),
        seen="no such file" if not path.exists() else "a folder" if path.is_dir() else "no permission",
        expected=f"a readable {what}",
        next_step=did_you_mean(path.name, siblings) if siblings else "check the path",
    )


def sync(path: Path) -> None:
    """Force a file (or a folder's entries) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_hint(error: OSError, path: Path) -> str:
    if error.errno == errno.ENOSPC:
        return "free some room on the disk and save again; nothing was left behind"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"'{path.parent}' is not a folder: choose another path"
    return "choose another path"
