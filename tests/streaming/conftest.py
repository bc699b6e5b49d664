"""A small language model as a Hugging Face folder with shards, its data, and what is done to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sqcompile.passes import GPTQ, FoldQDQ, pipelines
from sqcompile.pipeline import Pass
from sqcompile.program import Program
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.tracing import trace

LAYERS = 3
FORMAT = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(16))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of three layers, in bfloat16 and in shards; its head is tied."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def traced(llama: Path) -> Program:
    """The same model in memory, traced once."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokens = torch.zeros(2, 16, dtype=torch.long)
    shapes = {"input_ids": {0: torch.export.Dim("batch")}}
    return trace(model, {"input_ids": tokens}, dynamic_shapes=shapes)


@pytest.fixture(scope="session")
def batches() -> list[dict[str, Tensor]]:
    """Four batches of tokens."""
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": rows} for rows in tokens.split(2)]


@pytest.fixture
def passes() -> list[Pass]:
    """Rounding that looks at data, and fits each layer to the dense model."""
    return [*pipelines.canonical(), GPTQ(weight=FORMAT, exclude=("lm_head", "model.embed_tokens")), FoldQDQ()]
