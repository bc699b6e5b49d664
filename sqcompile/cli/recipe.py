"""`sqcompile recipe`: check recipes, print them, and start from those of the gallery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.recipe import Recipe

recipe = typer.Typer(
    name="recipe",
    no_args_is_help=True,
    help="Check recipes, print them, and start from those of the gallery.",
    rich_markup_mode="markdown",
)

_ARTIFACTS = (".onnx", ".sqm", ".pt2")


@command
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recipes.")],
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Check recipes without running them: keys, passes with their options, order, and that files are there.

    The first mistake is shown with its line and the nearest valid name; the exit code is then 2.

    **Example**

        sqcompile recipe validate job.yaml
    """
    from sqcompile.pipeline.manager import check_order
    from sqcompile.recipe import Recipe

    found = {}
    for file in files:
        made = Recipe.load(file)
        check_order(list(made.passes))
        if made.data is not None:
            made.data.check()
        found[file] = made
    about = [{"file": file, "passes": [str(item) for item in made.passes]} for file, made in found.items()]
    return Answer(lambda target: _show_valid(target, found), about)


@command
def show(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_ARTIFACT", help="A recipe, a name of the gallery, or a compiled model."
        ),
    ],
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Print a recipe with its pipelines spelled out, or the one that a compiled model carries.

    A model that was compiled from an object in Python carries a recipe without `model:`; comments say what is missing.

    **Examples**

        sqcompile recipe print job.yaml

        sqcompile recipe print build/net.sqm
    """
    from sqcompile.provenance import read_provenance, recipe_text
    from sqcompile.recipe import Recipe

    path = Path(source)
    if path.suffix in _ARTIFACTS or path.is_dir():
        about = dict(read_provenance(path))
        return Answer(lambda target: _show_text(target, recipe_text(about)), about)
    text = Recipe.load(source).to_yaml()
    return Answer(lambda target: _show_text(target, text), {"recipe": text})


@command
def gallery(
    name: Annotated[
        str | None, typer.Argument(help="A recipe to print, as it is, with its comments.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """List the recipes to start from, or print one.

    They name neither model nor data: give them on the command line, or copy one and add `model:` and `data:`.

    **Examples**

        sqcompile recipe gallery

        sqcompile recipe gallery cnn-int8

        sqcompile compile nets.py:resnet -r cnn-int8 -d images.npz -o resnet.onnx
    """
    from sqcompile.gallery import gallery as listed
    from sqcompile.gallery import gallery_file

    if name is None:
        found = listed()
        return Answer(lambda target: _show_gallery(target, found), found)
    text = gallery_file(name).read_text(encoding="utf-8")
    return Answer(lambda target: _show_text(target, text), {"name": name, "text": text})


def _show_valid(target: Console, found: dict[str, Recipe]) -> None:
    for file, made in found.items():
        target.print(f"{file}: valid, {len(made.passes)} passes", markup=False, soft_wrap=True)


def _show_text(target: Console, text: str) -> None:
    target.print(text.rstrip("\n"), markup=False, soft_wrap=True)


def _show_gallery(target: Console, found: dict[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, summary in found.items():
        table.add_row(Text(name, style="cyan"), Text(summary))
    target.print(table)
    target.print(
        Text(
            "\nsqcompile recipe gallery NAME prints one; sqcompile compile MODEL -r NAME takes it.",
            style="dim",
        )
    )


recipe.command("validate")(validate)
recipe.command("print")(show)
recipe.command("gallery")(gallery)
