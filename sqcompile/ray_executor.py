"""Work on the machines of a Ray cluster, with the same results as in one process."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

import sqcompile
from sqcompile.errors import ClusterError
from sqcompile.executor import Executor, Pending

T = TypeVar("T")

# How long a machine may take to answer at all, and a cluster to take this process in.
_CONNECT_S, _JOIN_S = 5.0, 60.0
# Pieces of work under way for each that can run at a time: enough that no worker waits, few enough that what
# they take does not pile up in the cluster's memory.
_AHEAD = 2
# The user's own logging stays as it is.
_QUIET = {"log_to_driver": False, "configure_logging": False}
_JOIN = f"import sys, ray; ray.init(address=sys.argv[1], **{_QUIET!r})"


class RayExecutor(Executor):
    """Sends pieces of work to the workers of the cluster that this process is connected to.

    Args:
        ray: The module.
        address: Of the cluster, for errors.
    """

    def __init__(self, ray: Any, address: str) -> None:
        self._ray = ray
        self._address = address
        self._threads = torch.get_num_threads()
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(cores, default=0) < 1:
            raise self._failed("no machine that offers a CPU", "one at least")
        taken = min(self._threads, max(cores))
        self._slots = sum(count // taken for count in cores)
        self._task = ray.remote(_work).options(num_cpus=taken)
        self._under_way: list[Any] = []

    @property
    def slots(self) -> int:
        """How many pieces of work the cluster does at a time."""
        return self._slots

    def share(self, value: T) -> T:
        """Put a value into the cluster's memory."""
        reference: T = self._ray.put(value)
        return reference

    def submit(self, function: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Send it, once no more than a few wait for a worker."""
        while len(self._under_way) >= _AHEAD * self._slots:
            _, self._under_way = self._ray.wait(self._under_way, num_returns=1)
        reference = self._task.remote(_identity(), self._threads, function, *arguments)
        self._under_way.append(reference)
        return Pending(lambda: self._result(reference))

    def _result(self, reference: Any) -> Any:
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            strange = (ImportError, exceptions.RayError)  # the worker could not even read what it was sent
            if isinstance(error.cause, Exception) and not isinstance(error.cause, strange):
                raise error.cause from None
            raise self._failed(_last_line(error), "sqcompile installed on every machine") from error
        except exceptions.RayError as error:
            raise self._failed(_last_line(error), "workers that stay until their work is done") from error

    def _failed(self, seen: str, expected: str) -> ClusterError:
        return ClusterError(
            "The Ray cluster cannot do the work.",
            where=f"address {self._address}",
            seen=seen,
            expected=expected,
            next_step="look at `ray status` there; or leave the address out to work in this process. With a work_dir, "
            "parts that are done stay done",
        )


@contextmanager
def open_cluster(address: str) -> Iterator[RayExecutor]:
    """Connect to a cluster for a while; if this process is in one already, that one is used and kept.

    Raises:
        ClusterError: If Ray is not installed, or the cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise ClusterError(
            "Ray is not installed.",
            where=f"address {address}",
            seen="no module 'ray'",
            expected="the extra 'ray'",
            next_step="pip install 'sqcompile[ray]', or leave the address out to work in this process",
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the user's machines
    ray: Any = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    if not joined:
        ray = _join(address)
    try:
        yield RayExecutor(ray, address)
    finally:
        if not joined:
            ray.shutdown()


def _join(address: str) -> Any:
    """Connect this process, and return the module; it is not even imported where nobody answers."""
    if address == "local":
        return _started(address, include_dashboard=False)
    _require_answer(address)
    # Where nobody answers as Ray does, Ray tries for minutes and then ends the process: so another one tries first.
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _JOIN, address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_JOIN_S,
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer of Ray's within {_JOIN_S:g} s") from None
    if tried.returncode:
        lines = [line for line in tried.stderr.splitlines() if line.strip()]
        raise _unreachable(address, lines[-1].strip() if lines else f"exit status {tried.returncode}")
    return _started(address)


def _started(address: str, **options: Any) -> Any:
    ray = importlib.import_module("ray")
    try:
        ray.init(address=address, **_QUIET, **options)
    except (RuntimeError, ConnectionError, OSError, ValueError) as error:
        raise _unreachable(address, _last_line(error)) from error
    return ray


def _require_answer(address: str) -> None:
    """Refuse at once where nobody listens."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise _unreachable(address, "no address")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, seen: str) -> ClusterError:
    return ClusterError(
        "The Ray cluster cannot be reached.",
        where=f"address {address}",
        seen=seen,
        expected="host:port or ray://host:port of a running cluster, auto for the one on this machine, or local to "
        "start one",
        next_step="start one with `ray start --head --port=6379`; or leave the address out to work in this process",
    )


def _identity() -> dict[str, str]:
    """What has to be the same on every machine, so that results are the same to the bit."""
    return {
        "sqcompile": sqcompile.__version__,
        "torch": torch.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }


def _work(identity: dict[str, str], threads: int, function: Callable[..., T], *arguments: Any) -> T:
    """Do a piece of work on a machine of the cluster, as it would be done where it comes from."""
    own = _identity()
    for name, wanted in identity.items():
        if own[name] != wanted:
            raise ClusterError(
                "A machine of the cluster would compute other numbers.",
                where=f"machine {socket.gethostname()}",
                seen=f"{name} {own[name]}",
                expected=f"{name} {wanted}, as where the work comes from",
                next_step="install the same versions everywhere; on different CPUs, set ATEN_CPU_CAPABILITY=avx2 (or "
                "default) everywhere",
            )
    torch.set_num_threads(threads)
    with torch.no_grad():
        return function(*arguments)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
