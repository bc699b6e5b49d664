from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).parents[2] / "examples" / "pycode_llama_5m"
PROMPT = "def read(path):"


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """The likeliest tokens, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt")["input_ids"]
    return model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


def test_continues_a_text_as_transformers_does(run, folder: Path, expected: list[int]) -> None:
    about = run("generate", str(MODEL), PROMPT, "-n", "12", "--json").json
    assert about["new_tokens"] == expected
    assert about["prompt"] == PROMPT and about["text"].startswith("\n    ")


def test_streams_from_a_compiled_file(run, folder: Path, expected: list[int]) -> None:
    made = run(
        "compile", str(MODEL), "-o", "model.sqm", "-b", "native", "-i", "input_ids: i64[batch, sequence=32]"
    )
    assert made.code == 0, made.err
    result = run("generate", "model.sqm", PROMPT, "-n", "12", "--tokenizer", str(MODEL))
    assert result.code == 0, result.err
    assert result.out == PROMPT + AutoTokenizer.from_pretrained(MODEL).decode(expected) + "\n"
    assert "12 tokens;" in result.err


def test_onnxruntime_continues_too(run, folder: Path, expected: list[int]) -> None:
    options = ("-n", "12", "--json")
    compiled = run("generate", str(MODEL), PROMPT, *options, "-b", "onnxruntime")
    assert compiled.code == 0, compiled.err
    assert compiled.json["new_tokens"] == expected
    made = run(
        "compile", str(MODEL), "-o", "saved", "-b", "onnxruntime", "-i", "input_ids: i64[batch, sequence=32]"
    )
    assert made.code == 0, made.err
    saved = run("generate", "saved", PROMPT, *options)
    assert saved.code == 0 and saved.json["text"] == compiled.json["text"]


def test_draws_follow_the_seed(run, folder: Path) -> None:
    options = ("-n", "10", "--temperature", "1.0", "--top-k", "50", "--kv-cache", "int8", "--json")
    texts = [
        run("generate", str(MODEL), PROMPT, *options, "--seed", seed).json["new_tokens"] for seed in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


def test_passes_are_run_first(run, folder: Path) -> None:
    two = "quantize-weights{weight=int2:group=32}"
    coarse = run("generate", str(MODEL), PROMPT, "-n", "12", "--json", "-p", two).json
    fine = run("generate", str(MODEL), PROMPT, "-n", "12", "--json").json
    assert coarse["new_tokens"] != fine["new_tokens"]


def test_mistakes_lead_to_their_repair(run, folder: Path) -> None:
    result = run("generate", str(MODEL), "")
    assert result.code == 1 and "nothing to continue" in result.err
    result = run("generate", str(MODEL), PROMPT, "--kv-cache", "int4")
    assert result.code == 1 and "'float32' or 'int8'" in result.err
    shutil.copytree(MODEL, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = run("generate", "bare", PROMPT)
    assert result.code == 1 and "--tokenizer" in result.err
    made = run(
        "compile",
        str(MODEL),
        "-o",
        "model.onnx",
        "-i",
        "input_ids: i64[batch, sequence=32]",
        "-b",
        "onnxruntime",
    )
    assert made.code == 0, made.err
    result = run("generate", "model.onnx", PROMPT, "--tokenizer", str(MODEL))
    assert result.code == 1 and "save a folder" in result.err
    result = run("generate", "model.onnx", PROMPT, "--tokenizer", str(MODEL), "-p", "weight-only{bits=4}")
    assert result.code == 1 and "takes no passes" in result.err
