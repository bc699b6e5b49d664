from __future__ import annotations

from pathlib import Path

import pytest

from sqcompile.gallery import gallery


def test_valid_recipes(run, folder: Path) -> None:
    (folder / "a.yaml").write_text("model: net.py:make\npasses: [int8-static]\ndata: x.npz\n")
    result = run("recipe", "validate", "a.yaml")
    assert result.code == 0, result.err
    assert result.out.startswith("a.yaml: valid, ")
    assert run("recipe", "validate", "a.yaml", "--json").json[0]["passes"][0] == "remove-noops"


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("passes: [fold-batch-nrom]\n", 2, ["line 1", "did you mean 'fold-batch-norm'"]),
        ("bakend: native\n", 2, ["line 1", "did you mean 'backend'"]),
        ("seed: 0\npasses:\n  - wanda: {sparsty: 0.5}\n", 2, ["line 3", "did you mean 'sparsity'"]),
        ("passes: [quantize-weights, fold-batch-norm]\n", 1, ["fold-batch-norm"]),
        ("passes: [int8-static]\ndata: y.npz\n", 1, ["y.npz", "x.npz"]),
    ],
    ids=["pass", "key", "option", "order", "data"],
)
def test_mistakes_are_named(run, folder: Path, text: str, code: int, parts: list[str]) -> None:
    (folder / "a.yaml").write_text(text)
    result = run("recipe", "validate", "a.yaml")
    assert result.code == code, result.out + result.err
    assert all(part in result.err for part in parts), result.err


def test_prints_what_an_artifact_carries_and_makes_it_again(run, folder: Path) -> None:
    options = ("-d", "x.npz", "-p", "int8-static{correct-bias=false}", "--seed", "5", "-b", "native")
    assert run("compile", "net.py:make", *options, "-o", "a.sqm").code == 0
    printed = run("recipe", "print", "a.sqm")
    assert printed.code == 0 and "seed: 5" in printed.out and "# data sha256:" in printed.out
    (folder / "again.yaml").write_text(printed.out)
    assert run("recipe", "validate", "again.yaml").code == 0
    again = run("compile", "--from", "a.sqm", "-o", "b.sqm")
    assert again.code == 0, again.err
    assert "It is the same to the bit." in again.out
    assert (folder / "a.sqm").read_bytes() == (folder / "b.sqm").read_bytes()
    other = run("compile", "--from", "a.sqm", "-o", "c.sqm", "--seed", "6", "--json")
    assert other.json["same"] is False
    assert run("compile", "--from", "a.sqm", "-r", "again.yaml").code == 2


def test_the_gallery(run, folder: Path) -> None:
    listed = run("recipe", "gallery")
    assert listed.code == 0 and all(name in listed.out for name in gallery())
    shown = run("recipe", "gallery", "cnn-int8")
    assert "int8-static" in shown.out and shown.out.startswith("# A CNN")
    (folder / "mine.yaml").write_text(shown.out)
    assert run("recipe", "validate", "mine.yaml").code == 0
    wrong = run("recipe", "gallery", "cnn-int4")
    assert wrong.code == 2 and "did you mean 'cnn-int8'" in wrong.err
    assert "fold-batch-norm" in run("recipe", "print", "cnn-int8").out
    result = run("compile", "net.py:make", "-r", "cnn-int8", "-d", "x.npz", "-o", "net.onnx")
    assert result.code == 0, result.err
