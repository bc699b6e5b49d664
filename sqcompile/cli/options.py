"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = "The folder of a Hugging Face model, a .pt2 file, or module.py:factory."

_DATA = "Data"
_HELP = "Help"

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        metavar="FILE",
        rich_help_panel=_DATA,
        help="Data: .npz (one array an input, samples along the first axis; FILE.npz:name takes one array), "
        ".npy (one input) or .txt (tokenized with the model's tokenizer).",
    ),
]
Batch = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_DATA, help="Samples a batch. [default: 8, or as traced]")
]
Samples = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_DATA, help="Read at most so many samples.")
]
Context = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_DATA, help="Tokens a sample of text. [default: 256]")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", rich_help_panel=_DATA, help="Folder of the tokenizer, if not the model's."
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SPEC",
        rich_help_panel=_DATA,
        help="What an input looks like: 'x: f32[batch, 3, 32, 32]'; names make dimensions dynamic, "
        "name=64 says with which size to trace. Repeat it for each input.",
    ),
]
Backend = Annotated[
    str | None, typer.Option("--backend", "-b", help="auto, native, native-exact, onnxruntime or reference.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads within an operator.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        envvar="SQCOMPILE_RAY_ADDRESS",
        help="Ray cluster that shares the work: host:port, auto, or local to start one here.",
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="FILE", help="Import a Python file or module that defines passes. Repeatable."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", rich_help_panel=_HELP, help="Print the answer as JSON, and nothing else.")
]
Debug = Annotated[
    bool, typer.Option("--debug", rich_help_panel=_HELP, help="Show Python's traceback of errors.")
]
