"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sqcompile.errors import FileError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    An old file keeps its permissions, a new one gets those that the process gives new files; a link is
    followed, as in any other way of writing a file.

    Raises:
        FileError: If it cannot be written; nothing is left behind, and an old file stays as it was.
    """
    with write_errors(path), _beside(path) as (temporary, target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        sync(temporary)
        temporary.chmod(mode)
        os.replace(temporary, target)
        sync(target.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files move into `path`, which may exist.

    Files of `path` that the new ones do not replace stay.

    Raises:
        FileError: If it cannot be written; nothing is left behind.
    """
    with write_errors(path), _beside(path) as (temporary, target):
        if target.exists() and not target.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        temporary.mkdir()
        try:
            yield temporary
        except FileError as error:  # of a file in it, under a name that the user has never seen
            for part in ("what", "where", "next_step"):
                setattr(error, part, (getattr(error, part) or "").replace(str(temporary), str(path)) or None)
            raise
        items = sorted(temporary.rglob("*"))
        for item in items:
            sync(item)
        if not target.exists():
            os.replace(temporary, target)
            sync(target.parent)
            return
        for item in items:
            if item.is_dir():
                (target / item.relative_to(temporary)).mkdir(exist_ok=True)
            else:
                os.replace(item, target / item.relative_to(temporary))
        sync(target)


@contextmanager
def _beside(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a free path in the same folder (made if missing) and the real path; clean up after errors."""
    target = Path(os.path.realpath(path))
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    temporary = target.parent / f".{target.name[:100]}.{secrets.token_hex(4)}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary, target
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # it was never made, or something is in it now
                folder.rmdir()


class SteadyWriter(io.RawIOBase):
    """A file to write to that never raises, and remembers the first error instead.

    For writers in C++ that end the process when a write fails, as PyTorch's does on a full disk: it
    throws in a destructor. After them, call `check`.

    Args:
        file: The file, open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error that was met.

        Raises:
            OSError: If a write failed.
        """
        if self._error is None:
            self._try(self._file.flush)
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        """Write, or do nothing after an error."""
        self._try(lambda: self._file.write(data))
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self._file.tell()

    def readable(self) -> bool:
        """Nothing can be read."""
        return False

    def writable(self) -> bool:
        """Everything can be written."""
        return True

    def seekable(self) -> bool:
        """Every place can be reached."""
        return True

    def _try(self, action: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            action()
        except OSError as error:
            self._error = error


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


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Check that a file, or a folder, can be written, before the work whose result goes there.

    It is tried, beside the path: permissions do not tell everything, and the superuser has all of them.

    Args:
        path: What is to be written; it may exist.
        folder: Whether it is a folder.

    Raises:
        FileError: If it cannot be written.
    """
    with write_errors(path):
        target = Path(os.path.realpath(path))
        nearest = next(parent for parent in (target, *target.parents) if parent.exists())
        if nearest == target and target.is_dir() != folder:
            code = errno.EEXIST if folder else errno.EISDIR
            raise OSError(code, os.strerror(code))
        if nearest == target and not folder:
            nearest = target.parent
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"'{nearest}' is a file, and no folder")
        probe = nearest / f".{secrets.token_hex(8)}.part"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        probe.unlink()


def require_file(path: Path, what: str = "file") -> None:
    """Check that a file exists and can be read.

    Raises:
        FileError: If not; files of similar names are offered.
    """
    if path.is_file() and os.access(path, os.R_OK):
        return
    raise FileError(
        f"The {what} '{path}' cannot be read.",
        where=str(path),
        seen="no such file" if not path.exists() else "a folder" if path.is_dir() else "no permission",
        expected=f"a readable {what}",
        next_step=_nearby(path),
    )


def _nearby(path: Path) -> str:
    """Return a next step for a file that is not there: a similar name beside it, or files of its kind."""
    from sqcompile.errors import did_you_mean, nearest

    if not path.parent.is_dir():
        return f"there is no folder '{path.parent}': check the path"
    siblings = [item.name for item in path.parent.iterdir() if item != path]
    alike = [name for name in siblings if path.suffix and name.endswith(path.suffix)]
    if alike:
        return did_you_mean(path.name, alike)
    # A file of another kind has to have nearly the same name, with its suffix or without.
    stems = nearest(path.stem, [Path(name).stem for name in siblings], cutoff=0.7)
    alike = nearest(path.name, siblings, cutoff=0.7)
    alike = alike or [name for stem in stems for name in siblings if Path(name).stem == stem]
    if alike:
        return f"did you mean {' or '.join(map(repr, alike[:3]))}?"
    return f"check the path: no {path.suffix or 'such'} file is in '{path.parent.resolve()}'"


def sync(path: Path) -> None:
    """Force a file (or a folder's entries) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_hint(error: OSError, path: Path) -> str:
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f), or choose another disk; nothing was left behind"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some room on the disk and save again; nothing was left behind"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to"
    if error.errno == errno.EISDIR:
        return f"'{path}' is a folder: name a file in it"
    if error.errno == errno.EEXIST and path.is_file():
        return f"'{path}' is a file: name a folder, or remove it"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"'{path.parent}' is not a folder: choose another path"
    return "choose another path"
