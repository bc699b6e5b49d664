from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sqcompile.evaluation import language_quality

MODEL = Path(__file__).parents[2] / "examples" / "pycode_llama_5m"


@pytest.fixture
def tokens(folder: Path) -> np.ndarray:
    """A few held-out rows, in eval.npz."""
    rows = np.load(MODEL / "tokens.npz")["eval"][:3, :48]
    np.savez(folder / "eval.npz", rows=rows)
    return rows


def test_perplexity_of_a_folder(run, tokens: np.ndarray) -> None:
    about = run("evaluate", str(MODEL), "-d", "eval.npz", "--context", "16", "--stride", "4", "--json").json
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    quality = language_quality(dense, torch.from_numpy(tokens).long(), context=16, stride=4)
    assert about["perplexity"] == pytest.approx(quality.perplexity, rel=1e-5)
    assert about["predicted_tokens"] == quality.predicted == 3 * 47
    assert (about["context"], about["stride"]) == (16, 4)
    assert about["dense_perplexity"] is None


@pytest.mark.parametrize("suffix", ["onnx", "sqm"])
def test_an_artifact_beside_the_dense_model(run, tokens: np.ndarray, suffix: str) -> None:
    made = run(
        "compile", str(MODEL), "-p", "quantize-weights{weight=int4:group=32}", "-o", f"four.{suffix}",
        "--backend", {"onnx": "onnxruntime", "sqm": "native"}[suffix], "-i", "input_ids: i64[batch, sequence=32]",
    )  # fmt: skip
    assert made.code == 0, made.err
    result = run("evaluate", f"four.{suffix}", "--against", str(MODEL), "-d", "eval.npz")
    assert result.code == 0, result.err
    assert "141 tokens predicted; context 48, stride 48" in result.out
    about = run("evaluate", f"four.{suffix}", "-a", str(MODEL), "-d", "eval.npz", "--json").json
    assert about["dense_perplexity"] == pytest.approx(
        run("evaluate", str(MODEL), "-d", "eval.npz", "--json").json["perplexity"], rel=1e-5
    )
    # Four bits cost some percent here; another model or another text would be far away.
    assert 0.9 < about["perplexity"] / about["dense_perplexity"] < 1.2
    assert 0.001 < about["divergence_nats"] < 0.2 and 0.8 < about["agreement"] < 1


def test_text_is_tokenized_by_the_models_own_tokenizer(run, folder: Path) -> None:
    (folder / "text.txt").write_text("import os\n\n\ndef main():\n    print(os.getcwd())\n" * 8)
    about = run("evaluate", str(MODEL), "-d", "text.txt", "--context", "32", "--json").json
    assert 1 < about["perplexity"] < 100 and about["context"] == 32


def test_mistakes_lead_to_their_repair(run, folder: Path, tokens: np.ndarray) -> None:
    result = run("evaluate", str(MODEL), "-d", "eval.npz:row")
    assert result.code == 1 and "did you mean 'rows'?" in result.err
    np.savez(folder / "two.npz", a=tokens, b=tokens)
    result = run("evaluate", str(MODEL), "-d", "two.npz")
    assert result.code == 1 and "name it: --data two.npz:a" in result.err
    np.save(folder / "floats.npy", np.ones((2, 8), np.float32))
    result = run("evaluate", str(MODEL), "-d", "floats.npy")
    assert result.code == 1 and "holds no token ids" in result.err
    np.save(folder / "foreign.npy", np.full((2, 8), 10**6))
    result = run("evaluate", str(MODEL), "-d", "foreign.npy")
    assert result.code == 1 and "outside of the model's vocabulary" in result.err
    result = run("evaluate", str(MODEL), "-d", "eval.npz", "--context", "8", "--stride", "9")
    assert result.code == 1 and "a stride from 1 to the context" in result.err
    shutil.copytree(MODEL, folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / "text.txt").write_text("import os")
    result = run("evaluate", "bare", "-d", "text.txt")
    assert result.code == 1 and "--tokenizer" in result.err


OWN = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, idx):
        return self.head(self.table(idx))

def tiny():
    torch.manual_seed(0)
    return Tiny()

def image():
    return nn.Conv2d(1, 2, 3)
"""


def test_models_that_call_their_tokens_otherwise(run, tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    np.savez(tmp_path / "rows.npz", np.arange(32).reshape(4, 8))
    model, data, artifact = f"{tmp_path}/own_model.py:tiny", f"{tmp_path}/rows.npz", f"{tmp_path}/own.sqm"
    done = run("compile", model, "-i", "idx: i64[batch, length]", "-p", "weight-only{bits=8}", "-o", artifact)
    assert done.code == 0, done.out
    done = run("evaluate", artifact, "--against", model, "-d", data)
    assert done.code == 0, done.out
    assert "28 tokens predicted" in done.out
    done = run("evaluate", f"{tmp_path}/own_model.py:image", "-d", data)
    assert done.code == 1
    assert "fails on tokens" in done.err and "sqcompile compare" in done.err


def test_arrays_that_hold_no_tokens_are_not_offered(run, tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    np.savez(tmp_path / "images.npz", image=np.zeros((2, 3), dtype=np.float32))
    done = run("evaluate", f"{tmp_path}/own_model.py:tiny", "-d", f"{tmp_path}/images.npz")
    assert done.code == 1
    assert "holds no token ids" in done.err and "tokenizer" in done.err and "images.npz:image" not in done.err
    np.savez(tmp_path / "both.npz", image=np.zeros((2, 3)), words=np.zeros((2, 3), dtype=np.int64))
    assert (
        "both.npz:words" in run("evaluate", f"{tmp_path}/own_model.py:tiny", "-d", f"{tmp_path}/both.npz").err
    )
