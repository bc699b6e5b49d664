"""`sqcompile sensitivity`: what each format would do to each layer, before choosing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.mixed_precision import Sensitivity

FORMATS = ["uint2:group=32:affine", "uint3:group=32:affine", "uint4:group=32:affine", "int8:channel=0"]


@command
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="A format to try, with +50%, +2:4 or +1x4:80% behind it for zeros; repeat it. "
            f"[default: {', '.join(FORMATS)}]",
        ),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            help="fisher (predicted divergence, one backward run), divergence (measured), or error (for models "
            "whose first output is no logits)."
        ),
    ] = "fisher",
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", "-l", metavar="PATTERN", help="Layers to try. [default: *]"),
    ] = None,
    data: options.Data = None,
    batch: options.Batch = None,
    samples: options.Samples = None,
    context: options.Context = None,
    tokenizer: options.Tokenizer = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    address: options.Address = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Measure what each format would do to each layer, one at a time, all others as they are.

    The numbers are losses of the outputs: of layers and formats they add up, nearly, while they are small. The pass
    `mixed-precision` chooses by them.

    **Examples**

        sqcompile sensitivity llama/ -d calibration.txt

        sqcompile sensitivity llama/ -d tokens.npz -f uint4:group=32:affine -f uint4:group=32:affine+50%
    """
    from sqcompile.calibration import Calibration
    from sqcompile.cli.subjects import Feed, open_model
    from sqcompile.errors import CalibrationError
    from sqcompile.executor import open_executor
    from sqcompile.layers import layers_of, select_layers
    from sqcompile.mixed_precision import Candidate, measure_sensitivity
    from sqcompile.mixed_precision.sensitivity import measurable, parse_measure
    from sqcompile.pipeline import PassContext, PassManager, parse_pipeline

    chosen = parse_measure(measure)
    candidates = [Candidate.parse(text) for text in formats or FORMATS]
    if data is None:
        raise CalibrationError(
            "Sensitivity is measured on data, and there is none.",
            where="sqcompile sensitivity",
            seen="no --data",
            expected="text or arrays as the model takes them",
            next_step="give a file with --data FILE",
        )
    subject = open_model(model, Feed.of(locals()))
    program = subject.program
    assert program is not None
    work = PassContext(
        calibration=Calibration(subject.batches, program.signature), seed=seed, progress=progress()
    )
    # Products with stored matrices, as some models spell their layers, become layers.
    PassManager(parse_pipeline("canonicalize-layers"), verify="off").run(program, work)
    wanted = select_layers(layers_of(program), tuple(layers or ("*",)), where="sqcompile sensitivity")
    with open_executor(address) as work.executor:
        table = measure_sensitivity(
            program, measurable(program, wanted, work), candidates, work, measure=chosen
        )
    left_out = [
        f"{remark.node}: {remark.reason}" for remark in work.remarks if "not measured" in remark.reason
    ]
    about = {"model": model, "left_out": left_out, **_data(table)}
    return Answer(lambda target: _show(target, table, left_out), about)


def _data(table: Sensitivity) -> dict[str, Any]:
    return {
        "measure": table.measure,
        "formats": [str(candidate) for candidate in table.candidates],
        "layers": [
            {
                "name": name,
                "weights": int(weights),
                "losses": [float(loss) for loss in losses],
                "bits_per_weight": [float(count) / int(weights) for count in bits],
            }
            for name, weights, losses, bits in zip(
                table.layers, table.weights, table.losses, table.bits, strict=True
            )
        ],
    }


def _show(target: Console, table: Sensitivity, left_out: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=f"Loss of the outputs ({table.measure}) by layer and format", title_justify="left")
    shown.add_column("layer", overflow="fold")
    shown.add_column("weights", justify="right")
    for candidate in table.candidates:
        shown.add_column(str(candidate), justify="right", overflow="fold")
    worst = table.losses.argmax(0)
    for row, (name, weights, losses) in enumerate(
        zip(table.layers, table.weights, table.losses, strict=True)
    ):
        cells = [
            Text(f"{loss:.3g}" + (" ◀" if worst[column] == row else "")) for column, loss in enumerate(losses)
        ]
        shown.add_row(Text(name), f"{int(weights):,}", *cells)
    shown.add_section()
    shown.add_row("all", f"{int(table.weights.sum()):,}", *(f"{loss:.3g}" for loss in table.losses.sum(0)))
    mean = (table.bits.sum(0) / table.weights.sum()).tolist()
    shown.add_row("bits a weight", "", *(f"{bits:.3g}" for bits in mean))
    target.print(shown)
    for line in left_out:
        target.print(Text(line, style="dim"))
