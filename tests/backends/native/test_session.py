"""Sessions: calls, threads, instruction sets, and the way through compile, save and load."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.programs import Mlp, seeded
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile.backends.native import _native, kernels
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.session import NativeSession
from sqcompile.errors import BackendError, InputError
from sqcompile.program import Program
from sqcompile.tracing import trace

Lower = Callable[[Program], NativeArtifact]
Load = Callable[..., NativeSession]


def dynamic_mlp() -> Program:
    dims = {"x": {0: Dim("batch", min=1, max=64)}}
    return trace(seeded(Mlp), (torch.randn(3, 8),), dynamic_shapes=dims)


def test_compile_takes_the_engine_where_it_runs_everything(tmp_path: Path) -> None:
    model = seeded(Mlp)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    compiled = sqcompile.compile(model, passes=[], example_inputs=(x,))
    assert compiled.report.backend == "native"
    assert compiled.report.backend_reason == "native runs every operator"
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-6)
    path = tmp_path / "model.sqm"
    assert compiled.save(path) == [path]
    loaded = sqcompile.load(path, threads=1)
    assert torch.equal(loaded(x), compiled(x))
    compiled.save(tmp_path / "folder")
    assert torch.equal(sqcompile.load(tmp_path / "folder")(x), compiled(x))


def test_compile_takes_onnx_runtime_where_it_does_not() -> None:
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.ReLU()).eval()
    compiled = sqcompile.compile(model, passes=[], example_inputs=(torch.randn(1, 4, 8, 8, 8),))
    assert compiled.report.backend == "onnxruntime"
    assert "native cannot run 1 operators, first %conv3d" in compiled.report.backend_reason


def test_a_model_can_be_saved_for_another_backend(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    compiled = sqcompile.compile(seeded(Mlp), passes=[], example_inputs=(x,), backend="onnxruntime")
    compiled.save(tmp_path / "model.sqm")
    torch.testing.assert_close(sqcompile.load(tmp_path / "model.sqm")(x), compiled(x), rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_fit_are_refused_before_the_engine_sees_them(lower: Lower, load: Load) -> None:
    session = load(lower(dynamic_mlp()))
    for wrong in (
        torch.randn(3, 9),
        torch.randn(8),
        torch.randn(65, 8),
        torch.zeros(3, 8, dtype=torch.int64),
    ):
        with pytest.raises(InputError):
            session(wrong)


def test_the_engine_refuses_what_does_not_fit_by_itself(lower: Lower, load: Load) -> None:
    run = load(lower(dynamic_mlp())).inner.run
    float32 = np.float32
    cases = [
        ([], "0 inputs were given; the model takes 1"),
        ([np.zeros((3, 8)), np.zeros((3, 8))], "type that no model takes"),
        ([np.zeros((3, 8), np.int64)], "input 'x' is i64 with 2 dimensions; the model takes f32 with 2"),
        ([np.zeros(8, float32)], "input 'x' is f32 with 1 dimensions"),
        ([np.zeros((3, 9), float32)], "dimension 1 of input 'x' is 9; the model takes 8 here"),
        ([np.zeros((0, 8), float32)], "batch is 0; the model takes 1 to 64"),
        ([np.zeros((65, 8), float32)], "batch is 65; the model takes 1 to 64"),
    ]
    for inputs, text in cases:
        with pytest.raises(ValueError, match=text):
            run(inputs)
    assert run([np.zeros((3, 8), float32)])[0].shape == (3, 4)


def test_inputs_of_any_memory_order_are_taken(lower: Lower, load: Load) -> None:
    session = load(lower(dynamic_mlp()))
    x = torch.randn(8, 6).t()
    assert torch.equal(session(x), session(x.contiguous()))
    assert torch.equal(session(x.requires_grad_()), session(x))


def test_memory_is_reserved_once_for_each_set_of_sizes(lower: Lower, load: Load) -> None:
    session = load(lower(dynamic_mlp()))
    assert session.inner.memory_bytes == 0
    session(torch.randn(8, 8))
    eight = session.inner.memory_bytes
    session(torch.randn(2, 8))
    session(torch.randn(8, 8))
    assert session.inner.memory_bytes == eight
    session(torch.randn(64, 8))
    assert session.inner.memory_bytes > eight


def test_more_sets_of_sizes_than_stay_prepared(lower: Lower, load: Load) -> None:
    program = dynamic_mlp()
    session = load(lower(program))
    for batch in [*range(1, 40), 3, 39, 1, 20]:
        x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch))
        torch.testing.assert_close(session(x), program(x).detach(), rtol=1e-5, atol=1e-6)


def test_one_session_serves_several_threads(lower: Lower, load: Load) -> None:
    session = load(lower(dynamic_mlp()))
    inputs = [torch.randn(1 + n % 7, 8, generator=torch.Generator().manual_seed(n)) for n in range(64)]
    expected = [session(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(session, inputs))
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_several_sessions_share_a_model(lower: Lower) -> None:
    program = dynamic_mlp()
    model = _native.Model.from_bytes(lower(program).to_bytes())
    sessions = [_native.Session(model, threads, None) for threads in (1, 2, 3)]
    assert [session.threads for session in sessions] == [1, 2, 3]
    del model
    x = np.ones((5, 8), np.float32)
    first, *others = [session.run([x])[0] for session in sessions]
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("threads", [0, -1, 257, 1.5, "two", True])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: Any, lower: Lower) -> None:
    with pytest.raises(BackendError, match="cannot have so many threads") as error:
        BACKEND.load(lower(dynamic_mlp()), threads=threads)
    assert error.value.seen == repr(threads) and error.value.expected == "1 to 256, or None"
    assert error.value.next_step


def vm_flags(address: int) -> list[str]:
    """Return what the system notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no huge pages to ask for"
)
def test_large_buffers_ask_for_huge_pages() -> None:
    """Whether the system then grants them is its own matter."""
    with mmap.mmap(-1, 4 << 20) as asked:
        try:
            asked.madvise(mmap.MADV_HUGEPAGE)
            shown = "hg" in vm_flags(np.frombuffer(asked, np.uint8).ctypes.data)
        except (OSError, AssertionError):
            shown = False
    if not shown:
        pytest.skip("this system has no huge pages, or does not show who asks for them")
    large = _native.allocate(6 << 20)
    assert large.ctypes.data % (2 << 20) == 0
    assert "hg" in vm_flags(large.ctypes.data)


def test_threads_are_one_a_core_unless_told_otherwise(lower: Lower) -> None:
    session = BACKEND.load(lower(dynamic_mlp()))
    assert isinstance(session, NativeSession)
    assert 1 <= session.inner.threads <= (os.cpu_count() or 1)


@pytest.mark.parametrize("isa", kernels.available_isas())
def test_the_instruction_set_asked_for_runs_the_model(isa: str, tmp_path: Path, lower: Lower) -> None:
    program = dynamic_mlp()
    lower(program).save(tmp_path / "model.sqm")
    code = (
        "import torch, sqcompile\n"
        f"session = sqcompile.load({str(tmp_path / 'model.sqm')!r}, threads=1)\n"
        "print(session.inner.isa, *session(torch.ones(2, 8))[0].tolist())\n"
    )
    environment = {**os.environ, "SQCOMPILE_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    name, *numbers = result.stdout.split()
    assert name == isa, result.stderr
    expected = program(torch.ones(2, 8))[0].detach()
    torch.testing.assert_close(
        torch.tensor([float(item) for item in numbers]), expected, rtol=1e-5, atol=1e-6
    )


def test_outputs_that_are_inputs_or_constants(lower: Lower, load: Load) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("fixed", torch.arange(3.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
            return x.transpose(0, 1), self.fixed * 2, x, 5

    session = load(lower(trace(Same(), (torch.ones(2, 3),))))
    x = torch.randn(2, 3)
    turned, doubled, same, five = session(x)
    assert torch.equal(turned, x.t()) and torch.equal(doubled, torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(same, x) and five == 5


def test_results_stay_when_the_session_runs_again(lower: Lower, load: Load) -> None:
    session = load(lower(dynamic_mlp()))
    first = session(torch.ones(3, 8))
    kept = first.clone()
    session(torch.zeros(3, 8))
    assert torch.equal(first, kept)


def test_an_artifact_of_another_backend_is_refused(lower: Lower) -> None:
    from sqcompile.backends.reference import BACKEND as REFERENCE

    with pytest.raises(BackendError, match="belongs to another backend"):
        BACKEND.load(REFERENCE.lower(dynamic_mlp()))
