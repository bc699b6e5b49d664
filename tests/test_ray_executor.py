"""Work on a real cluster of Ray on this machine; and what is said where there is none."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.quantize import settled, values
from torch import nn

import sqcompile
from sqcompile import ray_executor
from sqcompile.errors import CalibrationError, ClusterError, FormatError
from sqcompile.mixed_precision import Candidate
from sqcompile.passes import GPTQ, MixedPrecision
from sqcompile.quantization.format import Format
from sqcompile.ray_executor import RayExecutor, open_cluster

FORMAT = Format.parse("uint4:group=8:affine")
# A machine without room for a cluster has no say about sqcompile; a cluster that starts has to work.
STARTS = "import ray; ray.init(address='local', num_cpus=2, include_dashboard=False)"


@pytest.fixture(scope="class")
def cluster() -> Iterator[ModuleType]:
    """A cluster with two CPUs on this machine."""
    pytest.importorskip("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        tried = subprocess.run(
            [sys.executable, "-c", STARTS], env=environment, capture_output=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        pytest.skip("no cluster of Ray starts here within two minutes")
    if tried.returncode:
        pytest.skip("no cluster of Ray starts here")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=2**28,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Work takes as many CPUs as threads compute: two pieces at a time here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compiled(passes: list[sqcompile.Pass], address: str | None) -> sqcompile.Compiled:
    model = settled(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    data = [values(64, 16, seed=seed) for seed in range(3)]
    result = sqcompile.compile(model, passes, calibration=data, backend="reference", address=address)
    assert isinstance(result, sqcompile.Compiled)
    return result


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
class TestCluster:
    def test_a_cluster_gives_what_one_process_gives(self, cluster: ModuleType) -> None:
        candidates = ("uint2:group=8:affine", "uint4:group=8:affine")
        passes: list[sqcompile.Pass] = [
            MixedPrecision(
                quantize=GPTQ(weight=FORMAT),
                bits=10.0,
                candidates=tuple(map(Candidate.parse, candidates)),
                measure="divergence",
            )
        ]
        here, there = (compiled(passes, address) for address in (None, "local"))
        wanted, found = dict(here.program.tensors()), dict(there.program.tensors())
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
        assert here.report.passes[0].facts == there.report.passes[0].facts
        assert cluster.is_initialized()  # it was there before, and stays

    def test_work_is_done_by_others_and_errors_come_back_whole(self, cluster: ModuleType) -> None:
        with open_cluster("local") as executor:
            assert executor.slots == 2
            others = {executor.submit(os.getpid).result() for _ in range(2)}
            assert os.getpid() not in others
            shared = executor.share(torch.arange(5))
            pending = [
                executor.submit(torch.add, shared, index) for index in range(7)
            ]  # more than run at a time
            assert [item.result()[0].item() for item in pending] == list(range(7))
            failing = executor.submit(Format.parse, "int4:grouped=32")
            with pytest.raises(FormatError) as wanted:
                Format.parse("int4:grouped=32")
            with pytest.raises(FormatError) as caught:
                failing.result()
            assert type(caught.value) is FormatError and vars(caught.value) == vars(wanted.value)
            with pytest.raises(ZeroDivisionError):
                executor.submit(divmod, 1, 0).result()
            # Workers do not have the tests' own modules, as machines without sqcompile do not have its.
            with pytest.raises(ClusterError, match="cannot do the work") as lost:
                executor.submit(only_here).result()
            assert "No module named" in str(lost.value) and "on every machine" in str(lost.value)


def only_here() -> None:
    """Work of a module that workers cannot import."""


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="not installed") as caught:
        compiled([], "auto")
    assert "pip install 'sqcompile[ray]'" in str(caught.value)


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "127.0.0.1:70000", "ray://nowhere"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ClusterError, match="cannot be reached") as caught:
        compiled([], address)
    assert f"address {address}" in str(caught.value) and "host:port" in str(caught.value)


def test_where_nobody_listens_is_refused_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match="cannot be reached") as caught:
        compiled([], f"127.0.0.1:{port}")
    assert str(port) in str(caught.value) and "ray start --head" in str(caught.value)


def test_where_something_else_listens_there_is_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
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
