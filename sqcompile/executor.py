"""Where independent pieces of work are done: in this process, or by the workers of a cluster."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqcompile.errors import ClusterError

if TYPE_CHECKING:
    from sqcompile.program import Program

ADDRESS_VARIABLE = "SQCOMPILE_RAY_ADDRESS"
"""Environment variable with the address of a Ray cluster, for whoever gives none."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Pending(Generic[T]):
    """What a piece of work gives, sooner or later.

    Attributes:
        result: Waits for the end of the work, and returns what it gave or raises what it raised.
    """

    result: Callable[[], T]

    def then(self, function: Callable[[T], U]) -> Pending[U]:
        """Return what a function makes of the result, once it is asked for, here."""
        return Pending(lambda: function(self.result()))


class Executor(ABC):
    """Does pieces of work that do not depend on each other.

    A piece of work is a function of its arguments alone, defined in a module, and gives the same wherever it is
    done. Whoever submits several asks for the results in the order in which they were submitted, so that
    nothing depends on which is ready first.
    """

    @abstractmethod
    def submit(self, function: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Begin a piece of work.

        Args:
            function: A function of a module, or a `functools.partial` of one.
            *arguments: What it takes; what `share` returned stands for the value that was shared.
        """

    def share(self, value: T) -> T:
        """Return what stands for a value that many pieces of work take, and that shall be sent only once."""
        return value


class InProcess(Executor):
    """Does each piece of work when it is submitted, in this process."""

    def submit(self, function: Callable[..., T], *arguments: Any) -> Pending[T]:
        """Do it."""
        result = function(*arguments)
        return Pending(lambda: result)


def check_reachable(program: Program, executor: Executor) -> None:
    """Refuse a program whose tensors the machines of a cluster could not take.

    Raises:
        ClusterError: If it is on a GPU, and work is done elsewhere.
    """
    if isinstance(executor, InProcess):
        return
    devices = {tensor.device.type for _, tensor in program.tensors()} - {"cpu", "meta"}
    if devices:
        raise ClusterError(
            "The machines of a cluster work on their CPUs.",
            where="address",
            seen=f"a model on {', '.join(sorted(devices))}",
            expected="a model on the CPU, or no address",
            next_step="leave the address out: the work is done where the model is; or move the model to the CPU",
        )


@contextmanager
def open_executor(address: str | None = None) -> Iterator[Executor]:
    """Open the executor at an address for a while; without an address, work is done in this process.

    Args:
        address: Of a Ray cluster: `host:port`, `ray://host:port`, `auto` for the one that runs on this machine, or
            `local` to start one on this machine. None: what `SQCOMPILE_RAY_ADDRESS` says, if anything.

    Raises:
        ClusterError: If Ray is not installed, or the cluster cannot be reached.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE) or None
    if address is None:
        yield InProcess()
        return
    from sqcompile.ray_executor import open_cluster

    with open_cluster(address) as executor:
        yield executor
