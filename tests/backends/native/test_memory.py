"""Peak memory of generation: the mapped file, the cache, and little more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from sqcompile.backends.native.backend import BACKEND
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 64 << 20
VOCABULARY, WIDTH = 8192, 2048
PROMPT, TOKENS = 128, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


class Model(nn.Module):
    """A language model whose weights alone are more than what may be used beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 8192, bias=False), nn.Linear(8192, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        query = x[:, None]
        found = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)[:, 0]
        result: Tensor = self.head(x + self.down(self.up(found).relu()))
        return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    dims = {"input_ids": {0: Dim("batch", max=8), 1: Dim("sequence", max=512)}}
    program = trace(Model().eval(), {"input_ids": torch.arange(24).reshape(2, 12)}, dynamic_shapes=dims)
    passes = [QuantizeWeights(weight=Format.parse("int8:channel=0:narrow"))]
    PassManager(passes, verify="off").run(program, PassContext())
    path = tmp_path_factory.mktemp("memory") / "model.sqm"
    BACKEND.lower(program).save(path)
    return path


@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_generation_takes_file_cache_and_little_more(model: Path, kv_cache: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peak_memory.py"), str(model), "--json"]
    command += ["--prompt", str(PROMPT), "--tokens", str(TOKENS), "--kv-cache", kv_cache]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # A copy of the weights in memory of our own would not fit into what may be used.
    assert found["file_bytes"] > LIMIT
    assert found["beyond_bytes"] <= LIMIT, found
    assert found["peak_bytes"] > 0.9 * found["file_bytes"]  # the file is mapped, and counted


# Prints the peak of a program that it runs. A process starts with the peak of the one that it was split off from,
# which is that of all tests so far unless a small one stands between.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def test_sqrun_as_a_whole_takes_no_more(model: Path, native_build: Callable[[str], Path]) -> None:
    """Here nothing was loaded before: program, file and cache are all there is."""
    sqrun = native_build("plain") / "sqrun"
    prompt = ",".join(str(7 * place % VOCABULARY) for place in range(PROMPT))
    command = [str(sqrun), str(model), "--generate", str(TOKENS), "--threads", "2", prompt]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    cache_bytes = 2 * 4 * WIDTH * (PROMPT + TOKENS + 16)  # keys and values of one layer, in whole panels
    assert int(result.stdout) <= model.stat().st_size + cache_bytes + LIMIT
