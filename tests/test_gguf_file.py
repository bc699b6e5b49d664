"""Language models as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.programs import Mlp, data, seeded
from support.zoo import ZOO

import sqcompile
from sqcompile.errors import PretrainedError
from sqcompile.evaluate import constant_value
from sqcompile.layers import layers_of
from sqcompile.passes import MaskWeights, QuantizeWeights, RemoveNeurons, RotateWeights, pipelines
from sqcompile.quantization import Format

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
EXAMPLE = Path(__file__).parents[1] / "examples/pycode_llama_5m"


def compiled(name: str, passes: list[Any]) -> sqcompile.Compiled:
    result = sqcompile.compile(
        ZOO[name].make(), passes, ZOO[name].inputs(), backend="reference", verify="ends"
    )
    assert isinstance(result, sqcompile.Compiled)
    return result


def quantized(weight: str, **options: Any) -> list[Any]:
    return [*pipelines.canonical(), QuantizeWeights(weight=Format.parse(weight), **options)]


def read(path: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Return the type and the values of each tensor, by the peer's own reader."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def as_llama_cpp_turns(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head as pairs of neighbours: (0, w/2, 1, w/2 + 1, …)."""
    width = len(weight) // heads
    order = [
        head * width + half * width // 2 + index
        for head in range(heads)
        for index in range(width // 2)
        for half in range(2)
    ]
    return weight[order]


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("uint4:group=32:affine", "Q4_1"),
        ("int4:group=32", "Q4_0"),
        ("int4:channel=0:narrow", "Q4_0"),
        ("int8:channel=0", "Q8_0"),
        ("int8:group=32", "Q8_0"),
    ],
)
def test_holds_the_codes(weight: str, kind: str, tmp_path: Path) -> None:
    result = compiled("llama", quantized(weight))
    result.save(tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    values = {
        layer.name: constant_value(result.program, layer.weight_value) for layer in layers_of(result.program)
    }
    config = ZOO["llama"].make().config
    for ours, theirs in (
        ("mlp.down_proj", "ffn_down"),
        ("mlp.gate_proj", "ffn_gate"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
    ):
        wanted = values[f"model.layers.1.{ours}"]
        assert wanted is not None
        if "q_proj" in ours:
            wanted = as_llama_cpp_turns(wanted, config.num_attention_heads)
        if "k_proj" in ours:
            wanted = as_llama_cpp_turns(wanted, config.num_key_value_heads)
        type_, stored = found[f"blk.1.{theirs}.weight"]
        assert type_ == kind
        # Scales and least values in float16: eleven bits of each.
        torch.testing.assert_close(stored, wanted, rtol=2**-9, atol=2**-10 * float(wanted.abs().max()))
    assert found["token_embd.weight"][0] == found["output.weight"][0] == kind
    assert found["output_norm.weight"][0] == "F32"


def test_tied_codes(tmp_path: Path) -> None:
    compiled("qwen2", quantized("int8:channel=0")).save(tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert "output.weight" not in found and found["token_embd.weight"][0] == "Q8_0"


def test_a_tied_weight_that_a_pass_has_parted(tmp_path: Path) -> None:
    result = compiled("qwen2", [*pipelines.canonical(), RotateWeights()])
    result.save(tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    for stored, name in (
        ("output.weight", "lm_head.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ):
        assert torch.equal(found[stored][1], result.program.tensor(name).detach())


def test_float_and_tied_weights(tmp_path: Path) -> None:
    result = compiled("qwen2", pipelines.canonical())
    result.save(tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert "output.weight" not in found  # tied: it is read from the embeddings
    assert torch.equal(found["token_embd.weight"][1], result.program.tensor("lm_head.weight").detach())
    assert {kind for kind, _ in found.values()} == {"F32"}
    query = result.program.tensor("model.layers.0.self_attn.q_proj.weight").detach()
    assert torch.equal(found["blk.0.attn_q.weight"][1], query)  # this architecture turns halves, as we do
    assert "blk.0.attn_q.bias" in found


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokens = torch.from_numpy(np.load(EXAMPLE / "tokens.npz")["eval"][:1, :64].astype(np.int64))
    result = sqcompile.compile(
        EXAMPLE, pipelines.weight_only(), ((), {"input_ids": tokens}), backend="reference", verify="ends"
    )
    assert isinstance(result, sqcompile.Compiled)
    result.save(tmp_path / "model.gguf")
    peer = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, verbose=False, logits_all=True)
    peer.eval(tokens[0].tolist())
    theirs = torch.from_numpy(np.array(peer.scores[:64]))
    ours = result(input_ids=tokens)
    ours = (ours if isinstance(ours, torch.Tensor) else ours.logits)[0]
    # It rounds activations to 8 bits in blocks of 32.
    assert float(torch.cosine_similarity(theirs, ours, dim=-1).min()) > 0.999
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


@pytest.mark.parametrize(
    ("name", "passes", "said"),
    [
        ("bert", [], "bert"),
        ("gemma", pipelines.canonical(), "gemma"),
        ("llama", quantized("uint4:group=16:affine"), "one scale for 16 inputs"),
        ("llama", quantized("uint2:group=32:affine"), "2 bits"),
        ("llama", quantized("uint8:channel=0:affine"), "8 bits with zero points"),
        ("llama", quantized("uint3:group=32:affine"), "3 bits"),
        ("llama", pipelines.int8_dynamic(), "quantizes data as well"),
        ("llama", [MaskWeights(sparsity=0.5)], "apply-masks"),
        ("llama", [RemoveNeurons(ratio=0.5)], "kept their sizes"),
    ],
    ids=["bert", "gemma", "group", "2-bits", "8-affine", "3-bits", "data", "masks", "removed"],
)
def test_says_what_it_cannot_hold(name: str, passes: list[Any], said: str, tmp_path: Path) -> None:
    result = compiled(name, passes)
    with pytest.raises(PretrainedError) as caught:
        result.save(tmp_path / "model.gguf")
    assert said in str(caught.value) and caught.value.next_step
    assert list(tmp_path.iterdir()) == []


def test_scales_that_float16_lacks(tmp_path: Path) -> None:
    model = ZOO["llama"].make()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-9)
    result = sqcompile.compile(
        model, quantized("int8:channel=0"), ZOO["llama"].inputs(), backend="reference", verify="ends"
    )
    assert isinstance(result, sqcompile.Compiled)
    with pytest.raises(PretrainedError, match="do not fit into float16") as caught:
        result.save(tmp_path / "model.gguf")
    assert "model.layers.0.mlp.down_proj" in str(caught.value)


def test_models_of_other_makers(tmp_path: Path) -> None:
    result = sqcompile.compile(seeded(Mlp), [], data(2, 8), backend="reference")
    assert isinstance(result, sqcompile.Compiled)
    with pytest.raises(PretrainedError, match="can be saved as a GGUF file"):
        result.save(tmp_path / "model.gguf")
