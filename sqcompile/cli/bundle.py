"""`sqcompile bundle`: a folder that runs a compiled model on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress

if TYPE_CHECKING:
    from rich.console import Console


@command
def bundle(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="A .sqm or .onnx file, or the folder with one.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write: a new or empty folder.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="x86_64-linux or aarch64-linux. [default: this machine]"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="sqrun, libsqcompile.so and sqcompile.h for the target, where they were built elsewhere.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls, where the target is this machine.")] = 30,
    threads: options.Threads = None,
    data: options.Data = None,
    batch: options.Batch = None,
    samples: options.Samples = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Make a folder that runs a compiled model without sqcompile: model, runtime, examples, README.

    A .sqm file comes with sqrun, with the library and its C header, and with an example in C that builds with one
    command; an .onnx file with session options and examples in Python and C++. Both come with inputs, and with the
    outputs that they gave here, so that a device can be checked. For another CPU a cross compiler builds the runtime.

    **Examples**

        sqcompile bundle build/net.sqm -o bundle

        sqcompile bundle build/net.sqm --target aarch64-linux -o bundle-arm -d images.npz

        sqcompile bundle build/net.onnx -o bundle-onnx
    """
    from sqcompile.bundle import check_bundle_target, write_bundle
    from sqcompile.cli.subjects import Feed, artifact_file, flat_batches, open_artifact
    from sqcompile.errors import InputError
    from sqcompile.files import require_file

    path = artifact_file(artifact)
    if path is None:
        raise InputError(
            f"'{artifact}' is no artifact.",
            where="sqcompile bundle",
            seen=artifact,
            expected="a .sqm or .onnx file, or the folder with one",
            next_step="compile the model first: sqcompile compile MODEL -o model.sqm",
        )
    check_bundle_target(target)
    require_file(path, "artifact")
    subject = open_artifact(artifact, path, Feed.of({**locals(), "inputs": None}), threads)
    first = [next(iter(subject.batches))]
    files = write_bundle(
        path,
        output,
        target=target,
        runtime=runtime,
        session=subject.session,
        inputs=flat_batches(subject, first)[0],
        threads=threads,
        runs=runs,
        progress=progress(),
    )
    about = {"folder": output, "files": files, "notes": subject.notes}
    return Answer(lambda console: _show(console, about), about)


def _show(target: Console, about: dict[str, Any]) -> None:
    from sqcompile.report_tables import size_text

    for path in about["files"]:
        target.print(f"Wrote {path} ({size_text(Path(path).stat().st_size)})", soft_wrap=True, markup=False)
    for note in about["notes"]:
        target.print(f"Note: {note}", markup=False)
    target.print(f"{about['folder']}/README.md says how to run it.", soft_wrap=True, markup=False)
