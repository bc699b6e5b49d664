"""`--json` everywhere: one document on standard output, whatever happens, and nothing of the progress in it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from sqcompile.cli.app import app


def commands(found: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with its path; `recipe` holds others."""
    for name, item in found.commands.items():
        if hasattr(item, "commands"):
            yield from commands(item, (*path, name))
        else:
            yield (*path, name), item


COMMANDS = dict(commands(get_command(app)))

ANSWERS = {
    ("compile",): ["net.py:make", "-d", "x.npz", "-p", "int8-static", "-o", "b.onnx"],
    ("passes",): ["gptq"],
    ("inspect",): ["net.onnx"],
    ("compare",): ["net.py:make", "net.onnx", "-d", "x.npz", "--bisect"],
    ("report",): ["build"],
    ("evaluate",): ["lm.py:make", "-d", "tokens.npz", "--context", "8"],
    ("sensitivity",): ["net.py:make", "-d", "x.npz", "-f", "int4:channel=0"],
    ("bench",): ["net.py:make", "net.onnx", "-d", "x.npz", "--runs", "2"],
    ("bundle",): ["net.onnx", "-o", "bundled", "--target", "x86_64-linux"],
    ("doctor",): [],
    ("recipe", "validate"): ["job.yaml"],
    ("recipe", "print"): ["net.onnx"],
    ("recipe", "gallery"): [],
}

LANGUAGE_MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def make():
    torch.manual_seed(0)
    return Model().eval()
"""


@pytest.fixture
def work(run, folder: Path) -> Path:
    import numpy as np

    for output in ("net.onnx", "build"):
        made = run("compile", "net.py:make", "-d", "x.npz", "-p", "quantize-weights", "-o", output)
        assert made.code == 0, made.err
    (folder / "job.yaml").write_text("passes: [fold-batch-norm]\n")
    (folder / "lm.py").write_text(LANGUAGE_MODEL)
    np.savez(folder / "tokens.npz", input_ids=np.arange(64).reshape(2, 32) % 16)
    return folder


@pytest.mark.parametrize("path", COMMANDS, ids="-".join)
def test_every_command_has_the_option(path: tuple[str, ...]) -> None:
    assert "--json" in {name for parameter in COMMANDS[path].params for name in parameter.opts}


def test_every_command_is_tried() -> None:
    # What `generate` answers test_generate.py tries: it needs a tokenizer.
    assert set(ANSWERS) | {("generate",)} == set(COMMANDS)


def test_every_answer_is_one_document(run, work: Path) -> None:
    for path, arguments in ANSWERS.items():
        result = run(*path, *arguments, "--json")
        assert result.code == 0, (path, result.err)
        assert result.json, path


@pytest.mark.parametrize("path", COMMANDS, ids="-".join)
def test_a_wrong_command_line_is_an_answer(run, folder: Path, path: tuple[str, ...]) -> None:
    result = run(*path, "--no-such-option", "--json")
    assert result.code == 2
    error = result.json["error"]
    assert error["kind"] == "UsageError" and "--no-such-option" in error["what"]
    assert error["next_step"] == f"{error['where']} --help" and error["where"].endswith(" ".join(path))
    assert "--no-such-option" in result.err  # for people, too
    plain = run(*path, "--no-such-option")
    assert (plain.code, plain.out) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("comple",), id="no-such-command"),
        pytest.param(("inspect",), id="missing-argument"),
        pytest.param(("bench",), id="checked-by-the-command"),
        pytest.param(("bench", "a.onnx", "--runs", "0"), id="out-of-range"),
    ],
)
def test_so_are_other_mistakes_of_it(run, folder: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--json")
    assert result.code == 2 and result.json["error"]["kind"] == "UsageError"
    assert result.json["error"]["what"]


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        pytest.param(("compile", "net.py:make", "-d", "no.npz"), 1, "FileError", id="file"),
        pytest.param(("compile", "net.py:make", "-p", "gtpq"), 2, "RecipeError", id="pass"),
        pytest.param(("report", "x.npz"), 1, "FileError", id="report"),
        pytest.param(("recipe", "validate", "net.py"), 2, "RecipeError", id="recipe"),
        pytest.param(("generate", "net.py:make", "text"), 1, None, id="generate"),
    ],
)
def test_errors_are_answers(run, folder: Path, arguments: tuple[str, ...], code: int, kind: str) -> None:
    result = run(*arguments, "--json")
    assert result.code == code
    error = result.json["error"]
    assert set(error) == {"kind", "what", "where", "seen", "expected", "next_step"}
    assert kind is None or error["kind"] == kind


def test_bars_on_a_terminal_leave_the_answer_alone(work: Path) -> None:
    """Standard error is a terminal, on which bars and notes show; standard output is a file."""
    terminal, end = pty.openpty()
    arguments = ("net.py:make", "-d", "x.npz", "-p", "int8-static", "--json")
    with (work / "answer.json").open("wb") as answer:  # a pipe that nobody reads meanwhile may be full
        process = subprocess.Popen(
            [sys.executable, "-m", "sqcompile", "compile", *arguments],
            stdout=answer,
            stderr=end,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert json.loads((work / "answer.json").read_text())["report"]["passes"]
    text = shown.decode()
    assert "loading net.py:make" in text and "calibrating" in text and "lowering to" in text
    assert "making the net" in text  # what the model prints
