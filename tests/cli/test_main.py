"""The command line as a process: what goes to which stream, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sqcompile


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sqcompile", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Of a test run in the background the child would inherit that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,  # type: ignore[call-overload]
    )


def call(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "command", [["generate"], ["compare"], ["recipe", "print"], ["recipe", "gallery"], ["bench"]]
)
def test_each_example_of_a_help_text_has_a_line_of_its_own(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one paragraph the examples would run together."""
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(*command, "--help")
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith("sqcompile ")]
    assert code == 0 and len(examples) >= 2
    assert all(line.count("sqcompile ") == 1 for line in examples)


def test_help_names_every_command_and_needs_no_pytorch() -> None:
    code = (
        "import sys\nsys.argv = ['sqcompile', '--help']\nfrom sqcompile.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'numpy', 'onnx'} & set(sys.modules), 'heavy'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for command in ("compile", "passes", "inspect", "compare", "bench"):
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", ["compile", "passes", "inspect", "compare", "bench"])
def test_every_command_has_examples(run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Examples" in result.out
    assert f"sqcompile {command}" in result.out


def test_version(run) -> None:
    assert run("--version").out.strip() == f"sqcompile {sqcompile.__version__}"


def test_exit_codes_and_streams(folder: Path) -> None:
    code, out, err = call("passes", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)
    code, out, err = call("compile", "net.py:make", "-d", "nope.npz")
    assert (code, out) == (1, "")
    assert err.startswith("FileError: The data file 'nope.npz' cannot be read.\n  where:    nope.npz\n")
    code, out, err = call("passes", "nope")
    assert (code, out) == (2, "")
    code, out, err = call("compile", "--pases", "x")
    assert (code, out) == (2, "")
    assert "--passes" in err  # the nearest option


def test_an_unexpected_failure_has_no_traceback_either(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from torch import nn\n\n\nclass Odd(nn.Module):\n    @property\n    def forward(self):\n"
        "        raise RuntimeError('odd')\n\n\ndef make():\n    return Odd()\n"
    )
    code, out, err = call("inspect", "odd.py:make", "-d", "x.npz")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert "odd" in err
    code, _, err = call("inspect", "odd.py:make", "-d", "x.npz", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_an_interrupt_before_the_first_word_does_too() -> None:
    """The packages of the command line take a moment to import; Ctrl-C may come in it."""
    lines = [
        "import sys",
        "class Interrupts:",
        "    def find_spec(self, name, *others):",
        "        if name == 'typer':",
        "            raise KeyboardInterrupt",
        "sys.meta_path.insert(0, Interrupts())",
        "from sqcompile.cli import main",
        "main()",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "Interrupted.")


def test_an_interrupt_ends_quietly(folder: Path) -> None:
    (folder / "slow.py").write_text("import time\nopen('started', 'w').close()\ntime.sleep(60)\n")
    process = start("inspect", "slow.py:make")
    deadline = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "Interrupted.")


def test_a_reader_that_leaves_does_no_harm() -> None:
    process = start("passes")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)


def test_answers_do_not_depend_on_the_terminal(folder: Path) -> None:
    plain = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "TERM", "NO_COLOR")}
    process = start("passes", "fold-batch-norm", env=plain)
    out, _ = process.communicate(timeout=60)
    assert "\x1b" not in out
