"""`sqcompile compile`: a model through passes to an artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress, say
from sqcompile.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.api import Compiled
    from sqcompile.pipeline.manager import Instrument
    from sqcompile.recipe import Recipe

_DEBUGGING = "Looking inside"


@command
def compile_model(
    model: Annotated[
        str | None, typer.Argument(help=f"{options.MODEL_HELP} May stand in the recipe.", show_default=False)
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--passes", "-p", help="Passes and named pipelines, in order: 'a,b{option=value}'. Repeatable."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="FILE",
            help="A recipe, or the name of one in the gallery (sqcompile recipe gallery); options given here win.",
        ),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Option("--from", metavar="ARTIFACT", help="The recipe that a compiled model carries, again."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Where to write: FILE.onnx, FILE.pt2, or a folder."
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Write a Hugging Face folder that `from_pretrained` reads; quantized weights are packed as "
            "compressed-tensors does.",
        ),
    ] = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random. [default: 0]")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", "-m", help="Measure latency, dense against compiled, by layer too.")
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each, with --measure.")] = 30,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write the report as HTML, too.")] = None,
    data: options.Data = None,
    batch: options.Batch = None,
    samples: options.Samples = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    inputs: options.Inputs = None,
    verify: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_DEBUGGING, help="Check programs after `each` pass, at the `ends`, or `off`."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cap on memory: 8GB, 512MiB; hard with --work-dir.")
    ] = None,
    work_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Work part by part in this folder, in bounded memory, and go on from there after a crash.",
        ),
    ] = None,
    address: options.Address = None,
    dump_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=_DEBUGGING,
            help="Write the graph after every pass, with its diff.",
        ),
    ] = None,
    print_before: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS", rich_help_panel=_DEBUGGING, help="Print the graph before a pass, or `all`."
        ),
    ] = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS", rich_help_panel=_DEBUGGING, help="Print the graph after a pass, or `all`."
        ),
    ] = None,
    imports: options.Imports = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Compile a model: trace it, run passes over it, check each, and write the result.

    `sqcompile passes` lists the passes and pipelines.

    **Examples**

    A language model with 4-bit weights, into a folder with tokenizer and report:

        sqcompile compile models/llama -p "weight-only{bits=4,group-size=32}" -o build/llama

    A CNN made by a function, half of its weights pruned, then int8, measured:

        sqcompile compile nets.py:resnet -d images.npz -p "int8-static{sparsity=0.5}" -o net.onnx --measure

    A language model without a quarter of its neurons, back into the form that transformers reads:

        sqcompile compile models/llama -p "remove-neurons{ratio=0.25}" --pretrained build/smaller

    A recipe, with another output:

        sqcompile compile -r recipe.yaml -o other.onnx

    What made an artifact, again, to the same bytes:

        sqcompile compile --from build/net.sqm -o again.sqm
    """
    given = {**locals()}
    import_files(imports or [])
    job = _job(given)
    if job.model is None:
        raise RecipeError(
            "There is no model to compile.",
            where="command line",
            seen="neither MODEL nor a recipe with `model:`",
            expected=options.MODEL_HELP,
            next_step="name the model: sqcompile compile MODEL -p PASSES -o OUTPUT",
        )
    if pretrained or (job.output or "").endswith(".gguf"):
        _require_transformers(job.model, "a Hugging Face folder" if pretrained else "a GGUF file")
    compiled = _run(job, _instruments(dump_dir, print_before or [], print_after or []), address)
    if measure:
        compiled.measure(runs=runs, threads=job.threads)
    files = compiled.save(job.output) if job.output else []
    same = None if artifact is None else _is_same(artifact, files)
    if pretrained:
        files += compiled.save_pretrained(pretrained)
    if html:
        compiled.report.to_html(html)
        files.append(Path(html))
    return Answer(
        lambda target: _show(target, compiled, files, same), {**_data(compiled, files, job), "same": same}
    )


def import_files(locations: list[str]) -> None:
    """Import files that define passes.

    Raises:
        FileError: If one cannot be imported.
    """
    from sqcompile.modules import import_module

    for location in locations:
        import_module(location)


def _job(given: dict[str, Any]) -> Recipe:
    """Return the command line as a recipe, on top of the recipe that it names."""
    from sqcompile.api import resolve_passes
    from sqcompile.cli.subjects import data_file
    from sqcompile.files import check_writable
    from sqcompile.input_spec import InputSpec
    from sqcompile.provenance import recipe_of
    from sqcompile.recipe import Recipe, check_choices
    from sqcompile.saving import SUFFIXES, check_target

    if given["recipe"] and given["artifact"]:
        raise RecipeError(
            "A recipe and an artifact's recipe contradict each other.",
            where="command line",
            seen=f"--recipe {given['recipe']} --from {given['artifact']}",
            expected="one of both",
            next_step="leave one out",
        )
    recipe = Recipe.load(given["recipe"]) if given["recipe"] else Recipe()
    if given["artifact"]:
        recipe = recipe_of(given["artifact"])
    plain = ("model", "output", "backend", "threads", "seed", "verify", "max_memory", "work_dir")
    changes = {name: given[name] for name in plain if given[name] is not None}
    if given["passes"]:
        changes["passes"] = tuple(resolve_passes(given["passes"]))
    if given["imports"]:
        changes["imports"] = (*recipe.imports, *given["imports"])
    if given["inputs"]:
        changes["inputs"] = tuple(InputSpec.parse(text) for text in given["inputs"])
    read = {
        name: given[name] for name in ("batch", "samples", "context", "tokenizer") if given[name] is not None
    }
    if given["data"] is not None:
        changes["data"] = data_file(given)
    elif read and recipe.data is not None:
        changes["data"] = dataclasses.replace(recipe.data, **read)
    elif read:
        raise RecipeError(
            f"--{next(iter(read))} says how to read data, and there is none.",
            where="command line",
            expected="--data FILE beside it",
            next_step="add --data, or leave it out",
        )
    job = check_choices(dataclasses.replace(recipe, **changes))
    if job.output is not None:
        check_target(Path(job.output))
        writer = SUFFIXES.get(Path(job.output).suffix)
        if job.backend == "auto" and writer is not None and not given["artifact"]:
            # The report then speaks of what is written: its size, its time, its numbers. An artifact's own recipe
            # stays as it is, for the artifact says it, and is made again to the bit.
            job = dataclasses.replace(job, backend=writer)
    for name, folder in (("html", False), ("pretrained", True), ("work_dir", True), ("dump_dir", True)):
        if given[name] is not None:
            check_writable(Path(given[name]), folder=folder)
    if job.data is not None:
        job.data.check()
    return job


def _require_transformers(model: str, kind: str) -> None:
    """Check, before hours of work, that a model is one of transformers: what else it is, such files cannot hold.

    Raises:
        PretrainedError: If it is none.
        Error: If it cannot be loaded.
    """
    from sqcompile.models import load_model, model_name
    from sqcompile.pretrained import Pretrained, refuse_others

    if Path(model).is_dir():
        return
    loaded = load_model(model)
    if Pretrained.of(loaded) is None:
        raise refuse_others(model_name(loaded, model), kind)


def _run(job: Recipe, instruments: list[Instrument], address: str | None) -> Compiled:
    from sqcompile.api import LazyCompiled
    from sqcompile.cli.subjects import unknown_inputs

    compiled = job.compile(progress=progress(), instruments=instruments, address=address)
    if isinstance(compiled, LazyCompiled):
        raise unknown_inputs(compiled._model)
    return compiled


def _instruments(dump_dir: str | None, before: list[str], after: list[str]) -> list[Instrument]:
    from sqcompile.pipeline.instruments import DumpGraphs, PrintGraphs

    found: list[Instrument] = []
    if dump_dir:
        found.append(DumpGraphs(Path(dump_dir)))
    if before or after:
        found.append(PrintGraphs(lambda title, text: say(f"# {title}\n{text}"), before=before, after=after))
    return found


def _is_same(artifact: str, files: list[Path]) -> bool | None:
    """Say whether an artifact was made again to the bit, or None where there is nothing to compare it with."""
    from sqcompile.cli.subjects import artifact_file

    old = artifact_file(artifact) or Path(artifact)
    new = next((path for path in files if path.suffix == old.suffix), None)
    return None if new is None else old.read_bytes() == new.read_bytes()


def _show(target: Console, compiled: Compiled, files: list[Path], same: bool | None) -> None:
    from sqcompile.report_tables import size_text

    compiled.report.print(target)
    for path in files:
        target.print(f"Wrote {path} ({size_text(path.stat().st_size)})", soft_wrap=True, markup=False)
    if same is not None:
        target.print(
            "It is the same to the bit." if same else "It is not the same: versions, CPU or model differ."
        )
    if not files:
        note = "Nothing was written; --output FILE.onnx (or a folder) keeps the result."
        target.print(note, style="dim")


def _data(compiled: Compiled, files: list[Path], job: Recipe) -> dict[str, Any]:
    import json

    return {"report": json.loads(compiled.report.to_json()), "files": files, "recipe": job.to_yaml()}
