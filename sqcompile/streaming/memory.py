"""How much memory this process takes: now, and at its worst."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes; 0 where the system does not say."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most resident memory since `reset_peak`, in bytes; 0 where the system does not say."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can; otherwise since the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def release() -> None:
    """Give memory that was freed back to the system: the allocator keeps small pieces otherwise."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
