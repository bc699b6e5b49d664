"""What onnxruntime-genai wants to know of a model: `genai_config.json`.

Source: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqcompile.backends.onnxruntime.generation.rewrite import MASK, TOKENS, Generation
from sqcompile.backends.onnxruntime.generation.wire import LOGITS, PAST, PRESENT

CONFIG = "genai_config.json"

# Its names for decoders; the last one stands for all that it does not know by name.
_TYPES = (
    "chatglm",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "internlm2",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3",
    "smollm3",
    "decoder",
)
_LONGEST = 4096  # where neither the model nor its configuration says


def genai_config(generation: Generation, config: Mapping[str, Any], file_name: str) -> str:
    """Return the text of `genai_config.json`.

    Args:
        generation: What is known of the model.
        config: The source's configuration, `config.json` and what `generation_config.json` says instead.
        file_name: Name of the model's file.
    """
    cache = generation.caches[0]
    context = _context_length(generation, config)
    ends = config.get("eos_token_id")
    first_end = ends[0] if isinstance(ends, list) and ends else ends
    first_end = 0 if first_end is None else first_end
    pad = config.get("pad_token_id")
    begin = config.get("bos_token_id")
    kind = config.get("model_type")
    names = {"layer": "%d"}
    described = {
        "model": {
            "type": kind if kind in _TYPES else _TYPES[-1],
            "vocab_size": config.get("vocab_size", generation.vocabulary),
            "context_length": context,
            "bos_token_id": first_end if begin is None else begin,
            "eos_token_id": first_end if ends is None else ends,
            "pad_token_id": first_end if pad is None else pad,
            "decoder": {
                "filename": file_name,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": cache.head_size,
                "hidden_size": config.get("hidden_size", generation.query_heads * cache.head_size),
                "num_attention_heads": generation.query_heads,
                "num_key_value_heads": cache.heads,
                "num_hidden_layers": len(generation.caches),
                "inputs": {
                    "input_ids": TOKENS,
                    "attention_mask": MASK,
                    "past_key_names": PAST.format(kind="key", **names),
                    "past_value_names": PAST.format(kind="value", **names),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": PRESENT.format(kind="key", **names),
                    "present_value_names": PRESENT.format(kind="value", **names),
                },
            },
        },
        "search": {
            "max_length": context,
            "min_length": 0,
            "do_sample": bool(config.get("do_sample", False)),
            "num_beams": 1,
            "num_return_sequences": 1,
            "temperature": config.get("temperature") or 1.0,
            "top_k": config.get("top_k") or 50,
            "top_p": config.get("top_p") or 1.0,
            "repetition_penalty": config.get("repetition_penalty") or 1.0,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            "past_present_share_buffer": True,
        },
    }
    return json.dumps(described, indent=2) + "\n"


def _context_length(generation: Generation, config: Mapping[str, Any]) -> int:
    stated = config.get("max_position_embeddings")
    lengths = [length for length in (generation.limit, stated) if isinstance(length, int)]
    return min(lengths, default=_LONGEST)
