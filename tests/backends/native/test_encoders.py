"""Encoders whose weights are mostly zero in blocks: native at any length and batch, and equal to the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.machines import machine
from support.parity import Steps
from torch.export import Dim

from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.backend import BACKEND
from sqcompile.backends.native.lower import context
from sqcompile.backends.native.session import NativeSession
from sqcompile.calibration import Calibration
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.passes.quantize import QuantizeWeights
from sqcompile.pipeline import PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

SHAPES = [(1, 16), (32, 16), (3, 77), (8, 128), (1, 512), (2, 16)]


def _ids(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 90, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    kept = torch.ones_like(ids)
    kept[-1, length - length // 4 :] = 0  # the last sequence is shorter
    return {"input_ids": ids, "attention_mask": kept}


def _bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=90,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            attn_implementation="sdpa",
        )
        return BertModel(config).eval()


@pytest.fixture(scope="module", params=[0.8, 0.9], ids=str)
def program(request: pytest.FixtureRequest) -> Program:
    dims = {
        name: {0: Dim("batch", min=1, max=32), 1: Dim("sequence", min=2, max=512)}
        for name in ("input_ids", "attention_mask")
    }
    made = trace(_bert(), _ids(3, 40), dynamic_shapes=dims)
    passes = [
        MaskWeights(sparsity=request.param, pattern="1x4"),
        ApplyMasks(),
        QuantizeWeights(activation=Format.parse("uint8:affine:token:dynamic")),
    ]
    calibration = Calibration([_ids(2, 24)], made.signature)
    PassManager(passes).run(made, PassContext(calibration=calibration))
    return made


def test_any_length_and_batch_runs_natively(
    program: Program, lower: Callable[[Program], NativeArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file, one session: sizes change from call to call, and every product is one of blocks."""
    assert not BACKEND.unsupported(program)
    monkeypatch.setattr(context, "kernel_times", lambda: (machine(int8_in_1x4_blocks=1.0), ""))
    artifact = lower(program)
    session: Any = BACKEND.load(artifact, threads=2)
    assert isinstance(session, NativeSession)
    steps = Counter(name for name, _ in session.model.steps)
    # Of each layer queries, keys, values, what attention found, and two more; and the pooler.
    assert steps["linear_q8_block"] == 2 * 6 + 1 and not steps["linear_q8"] and not steps["linear"]
    agreement = Steps()
    for batch, length in SHAPES:
        inputs = program.signature.bind((), _ids(batch, length))
        results = session.run(inputs)
        assert results[0].shape == (batch, length, 64)
        agreement.add(program, inputs, results)
    assert agreement.agree(), agreement


def test_a_sequence_does_not_depend_on_what_is_beside_it(
    program: Program, lower: Callable[[Program], NativeArtifact]
) -> None:
    """A scale a token, exact sums, sums of floats in one order: the same bits in any batch."""
    session = BACKEND.load(lower(program), threads=2)
    together = _ids(4, 33)
    results = session.run(program.signature.bind((), together))
    for row in range(4):
        alone = {name: value[row : row + 1] for name, value in together.items()}
        (single, pooled) = session.run(program.signature.bind((), alone))
        assert torch.equal(single[0], results[0][row]) and torch.equal(pooled[0], results[1][row])
