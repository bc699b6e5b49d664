"""`sqcompile generate`: a language model continues a text, token by token."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress, say

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.backend import Session

_TRACED_TOKENS = 32
"""Length of the sequence that a model is traced with; any other will do as well."""


@command
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help=f"An .sqm file, a saved folder; or, compiled first: {options.MODEL_HELP}"
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text to continue. [default: standard input]")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to add.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; the higher, the more varied.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw among so many of the likeliest tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    kv_cache: Annotated[str, typer.Option(help="How keys and values are kept: float32 or int8.")] = "float32",
    passes: Annotated[
        list[str] | None, typer.Option("--passes", "-p", help="Passes for a model that is compiled first.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option("--backend", "-b", help="native or onnxruntime, for a model that is compiled first."),
    ] = "native",
    tokenizer: options.Tokenizer = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Let a language model continue a text; it appears as it is made.

    **Examples**

        sqcompile generate llama/ "def fibonacci(n):" -p "weight-only{bits=4}"

        sqcompile generate llama/ "def fibonacci(n):" --backend onnxruntime

        sqcompile generate build/llama.sqm "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    """
    from sqcompile.data_text import load_tokenizer

    found = load_tokenizer(tokenizer, model)
    text = prompt if prompt is not None else sys.stdin.read()
    tokens = found(text)["input_ids"]
    _check_prompt(tokens, prompt)
    session = open_generator(model, passes or [], threads, backend)
    ends = _ends(model, found)

    def run(on_token: Callable[[int, int], object] | None) -> list[int]:
        result = session.generate(
            [tokens],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=ends,
            on_token=on_token,
            kv_cache=kv_cache,
        )
        return [int(token) for token in result[0][len(tokens) :]]

    if not as_json:
        return Answer(lambda target: _stream(target, found, text, run), None, live=True)
    started = time.perf_counter()
    new = _tracked(run, max_new_tokens)
    about = {
        "model": model,
        "prompt": text,
        "text": found.decode(new, skip_special_tokens=True),
        "prompt_tokens": len(tokens),
        "new_tokens": new,
        "seconds": time.perf_counter() - started,
    }
    return Answer(lambda target: None, about)


def _tracked(run: Callable[[Callable[[int, int], object]], list[int]], most: int) -> list[int]:
    """Generate with a bar, which the end of the text may cut short: nobody sees the words as they come."""
    bar = cast("Generator[int]", progress().track(range(most), "generating"))
    next(bar)

    def on_token(row: int, token: int) -> None:
        next(bar, None)

    try:
        return run(on_token)
    finally:
        bar.close()


def open_generator(model: str, passes: list[str], threads: int | None, backend: str = "native") -> Session:
    """Return a session that generates: of a file or folder of ours, or of a model that is compiled now.

    Raises:
        Error: If there is no such model, it cannot be compiled, or passes are given for what is compiled.
    """
    import sqcompile
    from sqcompile.api import resolve_passes
    from sqcompile.cli.subjects import artifact_file, open_session
    from sqcompile.errors import InputError
    from sqcompile.input_spec import InputSpec, example_inputs

    path = artifact_file(model)
    if path is not None:
        if passes:
            raise InputError(
                "A compiled file takes no passes.",
                where="--passes",
                seen=str(path),
                expected=options.MODEL_HELP,
                next_step="leave the passes out, or name the model that the file was made from",
            )
        return open_session(path, threads)
    spec = InputSpec.parse(f"input_ids: i64[batch, sequence={_TRACED_TOKENS}]")
    compiled = sqcompile.compile(
        model,
        passes=resolve_passes(passes),
        example_inputs=example_inputs([spec]),
        dynamic_shapes={spec.name: spec.dynamic_axes()},
        backend=backend,
        threads=threads,
        progress=progress(),
    )
    assert isinstance(compiled, sqcompile.Compiled)
    return compiled.session


def _check_prompt(tokens: list[int], prompt: str | None) -> None:
    from sqcompile.errors import InputError

    if not tokens:
        raise InputError(
            "There is nothing to continue.",
            where="PROMPT" if prompt is not None else "standard input",
            seen="a text without tokens",
            expected="some text",
            next_step="write a prompt behind the model, in quotation marks",
        )


def _ends(model: str, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of generation_config.json, else the tokenizer's."""
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get(
            "eos_token_id"
        )
    except (OSError, ValueError):
        found = None
    if found is None:
        found = tokenizer.eos_token_id
    return [found] if isinstance(found, int) else list(found or ())


def _stream(
    target: Console,
    tokenizer: Any,
    prompt: str,
    run: Callable[[Callable[[int, int], object]], list[int]],
) -> None:
    """Write the prompt and, as soon as they are whole, the words behind it; at last how fast it went."""
    import torch
    from transformers import TextStreamer

    def write(text: str) -> None:
        target.file.write(text)
        target.file.flush()

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    streamer: Any = Writer(tokenizer, skip_special_tokens=True)
    write(prompt)
    times = [time.perf_counter()]

    def on_token(row: int, token: int) -> None:
        times.append(time.perf_counter())
        streamer.put(torch.tensor([token]))

    run(on_token)
    streamer.end()
    write("\n")
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        say(
            f"{len(times) - 1} tokens; {rate:.1f} a second after the first, which took {times[1] - times[0]:.2f} s"
        )
