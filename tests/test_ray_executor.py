"""Work on a real cluster of Ray on this machine; and what is said where there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantize import settled, values
from torch import nn

import sqcompile
from sqcompile import ray_executor
from sqcompile.errors import CalibrationError, ClusterError
from sqcompile.ray_executor import RayExecutor

CLUSTER = Path(__file__).parent / "support" / "ray_cluster.py"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def compiled(passes: list[sqcompile.Pass], address: str | None) -> sqcompile.Compiled:
    model = settled(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    data = [values(64, 16, seed=seed) for seed in range(3)]
    result = sqcompile.compile(model, passes, calibration=data, backend="reference", address=address)
    assert isinstance(result, sqcompile.Compiled)
    return result


@pytest.mark.slow
@needs_ray
def test_a_cluster_gives_what_one_process_gives() -> None:
    """In a process of its own: what Ray leaves behind in one does not go with the forks of other tests."""
    try:
        found = subprocess.run([sys.executable, CLUSTER], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("a cluster of Ray takes too long to start here")
    if "STARTED" not in found.stdout:
        pytest.skip("no cluster of Ray starts here")  # without memory or processes for one
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["STARTED", "same", "elsewhere", "in-order", "errors", "kept"]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="not installed") as caught:
        compiled([], "auto")
    assert "pip install 'sqcompile[ray]'" in str(caught.value)


@needs_ray
@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "127.0.0.1:70000", "ray://nowhere"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(ClusterError, match="cannot be reached") as caught:
        compiled([], address)
    assert f"address {address}" in str(caught.value) and "host:port" in str(caught.value)


@needs_ray
def test_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match="cannot be reached") as caught:
        compiled([], f"127.0.0.1:{port}")
    assert str(port) in str(caught.value) and "ray start --head" in str(caught.value)


@needs_ray
def test_where_something_else_listens_there_is_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_JOIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match="cannot be reached") as caught:
            compiled([], f"127.0.0.1:{port}")
    assert "no answer of Ray's within 0.5 s" in str(caught.value)


@pytest.mark.parametrize("name", ["sqcompile", "torch", "CPU capability"])
def test_a_machine_that_would_compute_other_numbers_is_refused(name: str) -> None:
    identity = {**ray_executor._identity(), name: "another"}
    with pytest.raises(ClusterError, match="other numbers") as caught:
        ray_executor._work(identity, 1, os.getpid)
    assert f"{name} another" in str(caught.value)
    threads = torch.get_num_threads()
    assert ray_executor._work(ray_executor._identity(), threads, divmod, 7, 2) == (3, 1)


class Broken:
    """A cluster that loses its workers, or that offers none."""

    class RayError(Exception):
        """As Ray calls it."""

    class RayTaskError(RayError):
        """As Ray calls it."""

        def __init__(self, cause: Exception) -> None:
            self.cause = cause
            super().__init__(f"a traceback\n{cause}")

    def __init__(self, cores: int, raised: Exception) -> None:
        self.exceptions = self
        self._cores = cores
        self._raised = raised

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": {"CPU": 64}}
        return [{"Alive": True, "Resources": {"CPU": self._cores} if self._cores else {}}, gone]

    def remote(self, function: object) -> Any:
        return self

    def options(self, num_cpus: int) -> Any:
        assert 1 <= num_cpus <= self._cores
        return type("Task", (), {"remote": staticmethod(lambda *arguments: object())})

    def wait(self, under_way: list[Any], num_returns: int) -> Any:
        return under_way[:1], under_way[1:]

    def get(self, reference: object) -> Any:
        raise self._raised


def test_a_lost_worker_is_told_of_as_an_error_of_ours() -> None:
    executor = RayExecutor(Broken(2, Broken.RayError("The node died.")), "head:6379")
    with pytest.raises(ClusterError, match="cannot do the work") as caught:
        executor.submit(os.getpid).result()
    assert "The node died." in str(caught.value) and "head:6379" in str(caught.value)


def test_a_machine_without_sqcompile_is_told_of_as_an_error_of_ours() -> None:
    cause = ModuleNotFoundError("No module named 'sqcompile'")
    executor = RayExecutor(Broken(1, Broken.RayTaskError(cause)), "head:6379")
    with pytest.raises(ClusterError, match="cannot do the work") as caught:
        executor.submit(os.getpid).result()
    assert "No module named 'sqcompile'" in str(caught.value) and "on every machine" in str(caught.value)


def test_an_error_of_the_work_is_the_one_that_was_raised() -> None:
    cause = CalibrationError("A layer never saw data.", where="layer 'a'")
    executor = RayExecutor(Broken(1, Broken.RayTaskError(cause)), "head:6379")
    with pytest.raises(CalibrationError) as caught:
        executor.submit(os.getpid).result()
    assert caught.value is cause


def test_a_cluster_without_cpus_is_refused() -> None:
    """Work would wait there forever."""
    with pytest.raises(ClusterError, match="cannot do the work") as caught:
        RayExecutor(Broken(0, Broken.RayError()), "head:6379")
    assert "no machine that offers a CPU" in str(caught.value)
