"""Small random configurations of Hugging Face architectures.

transformers takes seconds to import, so each entry imports it when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .model import BATCH, SEQUENCE, Inputs, ZooModel, build_random, generator

VOCABULARY = 64
# The names that most configurations share.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**SIZES, **SPECIAL_TOKENS, "num_key_value_heads": 2, "use_cache": False}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": 3}
for _text_only in ("vocab_size", "max_position_embeddings"):
    del VISION[_text_only]

TEXT_SHAPES = {0: BATCH, 1: SEQUENCE}


def _tokens(seed: int, batch: int, sequence: int) -> Inputs:
    # The first three ids are special tokens, which a text does not hold in its middle.
    return (), {"input_ids": torch.randint(3, VOCABULARY, (batch, sequence), generator=generator(seed))}


def _padded_tokens(seed: int, batch: int, sequence: int, side: str = "right") -> Inputs:
    """Every second text is shorter and padded, as a tokenizer does it."""
    _, kwargs = _tokens(seed, batch, sequence)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    padding = slice(-(sequence // 3), None) if side == "right" else slice(0, sequence // 3)
    mask[1::2, padding] = 0
    kwargs["input_ids"] = torch.where(mask == 1, kwargs["input_ids"], 0)
    return (), {**kwargs, "attention_mask": mask}


def _left_padded_tokens(seed: int, batch: int, sequence: int) -> Inputs:
    return _padded_tokens(seed, batch, sequence, side="left")


def _typed_padded_tokens(seed: int, batch: int, sequence: int) -> Inputs:
    """As BERT takes a pair of texts: the second half has type 1."""
    _, kwargs = _padded_tokens(seed, batch, sequence)
    types = (torch.arange(sequence) >= sequence // 2).long().expand(batch, sequence)
    return (), {**kwargs, "token_type_ids": types.contiguous()}


def _pixels(seed: int, batch: int, _sequence: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator(seed))}


def _spectrogram(seed: int, batch: int, _sequence: int) -> Inputs:
    return (), {"input_features": torch.randn(batch, 8, 32, generator=generator(seed))}


def _build(
    module: str, class_name: str, config_name: str, options: dict[str, Any]
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(import_module("transformers"), config_name)(**options)
        model_class = getattr(import_module(module), class_name)
        return build_random(lambda: model_class(config), seed=1)

    return make


def _model(
    name: str,
    family: str,
    class_name: str,
    options: dict[str, Any],
    make_inputs: Callable[[int, int, int], Inputs],
    notes: str = "",
    config_name: str | None = None,
    module: str = "transformers",
) -> ZooModel:
    _, kwargs = make_inputs(0, 2, 12)
    text = "input_ids" in kwargs
    shapes = {key: dict(TEXT_SHAPES) if text else {0: BATCH} for key in kwargs}
    config_name = config_name or class_name.split("For")[0].removesuffix("Model") + "Config"
    make = _build(module, class_name, config_name, options)
    return ZooModel(name, family, make, make_inputs, shapes, notes, has_sequence=text)


DECODERS = (
    _model(
        "llama", "decoder", "LlamaForCausalLM", GROUPED, _tokens, "RMS norm, rotary, grouped heads, SwiGLU"
    ),
    _model(
        "qwen2",
        "decoder",
        "Qwen2ForCausalLM",
        {**GROUPED, "tie_word_embeddings": True},
        _left_padded_tokens,
        "biases on q, k, v; tied embedding and head; left padding",
    ),
    _model("qwen3", "decoder", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, _tokens, "norms on q and k"),
    _model(
        "mistral",
        "decoder",
        "MistralForCausalLM",
        {**GROUPED, "sliding_window": 6},
        _tokens,
        "sliding-window attention, shorter than the texts",
    ),
    _model("phi3", "decoder", "Phi3ForCausalLM", GROUPED, _tokens, "fused q, k, v; fused gate, up"),
    _model(
        "gemma",
        "decoder",
        "GemmaForCausalLM",
        {**GROUPED, "head_dim": 8},
        _tokens,
        "scaled embedding tied to the head, norms with 1 + weight",
    ),
    _model(
        "gemma2",
        "decoder",
        "Gemma2ForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        _tokens,
        "tanh soft caps on scores and logits; local and global layers in turn",
    ),
    _model(
        "gemma3",
        "decoder",
        "Gemma3ForCausalLM",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        _tokens,
        "two rotary frequencies, norms on q and k",
        config_name="Gemma3TextConfig",
    ),
    _model(
        "gpt2",
        "decoder",
        "GPT2LMHeadModel",
        {
            **SPECIAL_TOKENS,
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
        },
        _tokens,
        "Conv1D layers (addmm with [in, out] weights), learned positions, tied head",
        config_name="GPT2Config",
    ),
    _model(
        "opt",
        "decoder",
        "OPTForCausalLM",
        {
            **SPECIAL_TOKENS,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "use_cache": False,
        },
        _left_padded_tokens,
        "positions counted from the attention mask (cumsum), ReLU, biases",
    ),
    _model(
        "gpt_neox",
        "decoder",
        "GPTNeoXForCausalLM",
        {**SIZES, **SPECIAL_TOKENS, "rotary_pct": 0.25, "use_cache": False},
        _tokens,
        "parallel residual, partial rotary, fused q, k, v",
    ),
)

ENCODERS = (
    _model(
        "bert",
        "encoder",
        "BertForSequenceClassification",
        {**SIZES, "num_labels": 3},
        _typed_padded_tokens,
        "token types, pooled tanh head, right padding",
    ),
    _model(
        "roberta",
        "encoder",
        "RobertaModel",
        {**SIZES, "pad_token_id": 0},
        _padded_tokens,
        "positions counted from the tokens that are no padding; two outputs",
    ),
    _model(
        "distilbert",
        "encoder",
        "DistilBertModel",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        _padded_tokens,
    ),
    _model(
        "t5_encoder",
        "encoder",
        "T5EncoderModel",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        _padded_tokens,
        "relative position buckets, unscaled attention with an additive bias",
        config_name="T5Config",
    ),
)

VISION_AND_AUDIO = (
    _model(
        "vit",
        "vision",
        "ViTForImageClassification",
        {**VISION, "num_labels": 3},
        _pixels,
        "class token, learned positions",
    ),
    _model("clip_vision", "vision", "CLIPVisionModel", VISION, _pixels, "quick GELU, two outputs"),
    _model(
        "whisper_encoder",
        "audio",
        "WhisperEncoder",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        _spectrogram,
        "one-dimensional convolutions; the length is fixed by the model",
        config_name="WhisperConfig",
        module="transformers.models.whisper.modeling_whisper",
    ),
)

TRANSFORMERS_MODELS = (*DECODERS, *ENCODERS, *VISION_AND_AUDIO)
