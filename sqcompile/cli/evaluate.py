"""`sqcompile evaluate`: how well a language model predicts a text, dense or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command, progress
from sqcompile.errors import Error, InputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sqcompile.evaluation import LanguageQuality


@command
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"An .onnx or .sqm file; {options.MODEL_HELP}")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE",
            help="Held-out text: .txt, or token ids in .npz (FILE.npz:name takes one array) or .npy.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against", "-a", metavar="MODEL", help="The dense model, for its perplexity and the distance."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens that the model sees at once. [default: 256, or whole rows]"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the starts of windows. [default: the context]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows a call.")] = 8,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Read at most so many rows of token ids.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Measure a language model on held-out text: perplexity, and how far it is from the dense model.

    Divergence is the mean Kullback-Leibler divergence from the dense model's next token, in nats; agreement
    the share of places where both find the same token most likely.

    **Examples**

        sqcompile evaluate llama/ -d held_out.txt --context 512 --stride 256

        sqcompile evaluate build/model.sqm --against llama/ -d tokens.npz:eval
    """
    from sqcompile.evaluation import language_quality

    tokens = read_tokens(data, tokenizer, (against, model), samples)
    if context is None and tokens.dim() == 1:
        from sqcompile.data_text import DEFAULT_CONTEXT

        context = DEFAULT_CONTEXT
    quality = language_quality(
        open_language_model(model, threads),
        tokens,
        reference=None if against is None else open_language_model(against, threads),
        context=context,
        stride=stride,
        batch_size=batch,
        progress=progress(),
    )
    about = {
        "model": model,
        "against": against,
        "data": data,
        "perplexity": quality.perplexity,
        "dense_perplexity": quality.reference,
        "divergence_nats": quality.divergence,
        "agreement": quality.agreement,
        "predicted_tokens": quality.predicted,
        "context": quality.context,
        "stride": quality.stride,
    }
    return Answer(lambda target: _show(target, model, against, quality), about)


def read_tokens(
    data: str, tokenizer: str | None, sources: tuple[str | None, ...], samples: int | None = None
) -> torch.Tensor:
    """Return token ids: [rows, T] of an array, or [T] of a text.

    Args:
        data: A file, or FILE.npz:name.
        tokenizer: The tokenizer's folder, or None for the one beside a source.
        sources: Models beside which a tokenizer may lie.
        samples: The most rows to read.

    Raises:
        FileError: If the file or the tokenizer cannot be read.
        CalibrationError: If there is no text.
        InputError: If the array holds no token ids.
    """
    import torch

    from sqcompile.data import DataFile
    from sqcompile.data_text import find_tokenizer, load_tokenizer, read_texts

    path, name = DataFile(data).check()
    if path.suffix == ".txt":
        texts = read_texts(path)
        source = next((item for item in sources if find_tokenizer(item) is not None), None)
        found = load_tokenizer(tokenizer, source)
        return torch.tensor(found("\n\n".join(texts), verbose=False)["input_ids"])
    array = _token_array(path, name)
    # Through NumPy: PyTorch has no wide unsigned integers.
    return torch.from_numpy((array[:samples] if array.ndim > 1 else array).astype("int64"))


def open_language_model(name: str, threads: int | None = None) -> Callable[..., Any]:
    """Return a model or an artifact as something that takes `input_ids`, and makes a mask if it wants one.

    What calls its tokens otherwise gets them in the first place.

    Raises:
        Error: If it cannot be loaded.
    """
    import torch
    from torch import nn

    from sqcompile.cli.subjects import artifact_file, open_session
    from sqcompile.models import load_model
    from sqcompile.tracing import argument_names

    path = artifact_file(name)
    loaded = load_model(name) if path is None else open_session(path, threads)
    if isinstance(loaded, nn.Module):
        loaded = loaded.eval()
        names = set(argument_names(loaded))
        wanted: set[str] = set()
    else:
        names = {value.name for value in loaded.signature.inputs} if hasattr(loaded, "signature") else set()
        wanted = names

    def call(input_ids: torch.Tensor) -> Any:
        more = {"attention_mask": torch.ones_like(input_ids)} if "attention_mask" in wanted else {}
        try:
            if names and "input_ids" not in names:
                return loaded(input_ids, **more)
            return loaded(input_ids=input_ids, **more)
        except (Error, IndexError):  # an index: of a token that the vocabulary has not, which the caller says
            raise
        except Exception as error:
            raise _takes_no_tokens(name, loaded, error) from error

    return call


def _takes_no_tokens(name: str, model: Any, error: Exception) -> InputError:
    from torch import nn

    from sqcompile.tracing.explain import model_line

    line = model_line(error.__traceback__, model) if isinstance(model, nn.Module) else None
    return InputError(
        f"'{name}' fails on tokens.",
        where=line or name,
        seen=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
        expected="a language model: token ids [N, T] to logits [N, T, vocabulary]",
        next_step="evaluate a language model; for any other: sqcompile compare",
    )


def _token_array(path: Path, name: str | None) -> Any:
    import numpy as np

    from sqcompile.data import load_arrays

    arrays = load_arrays(path, name)
    array = arrays.get("input_ids", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if array is None or not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        seen = ", ".join(f"{name}: {item.dtype} {list(item.shape)}" for name, item in arrays.items())
        raise InputError(
            f"'{path}' holds no token ids.",
            where=f"data file '{path}'",
            seen=seen,
            expected="an array of integers [rows, T] or [T]: the only one, or 'input_ids'",
            next_step=_which_array(path, arrays),
        )
    return array


def _which_array(path: Path, arrays: Mapping[str, Any]) -> str:
    import numpy as np

    usable = [
        name for name, item in arrays.items() if np.issubdtype(item.dtype, np.integer) and item.ndim in (1, 2)
    ]
    if usable:
        return f"name it: --data {path}:{usable[0]}"
    return "tokenize the text with the model's own tokenizer, and save the ids with numpy.savez; or pass a .txt file"


def _show(target: Console, model: str, against: str | None, quality: LanguageQuality) -> None:
    from rich.table import Table

    table = Table("model", "perplexity", "rise", "divergence, nats", "same token")
    if quality.reference is not None:
        table.add_row(str(against), f"{quality.reference:.4f}", "", "", "")
        rise = quality.perplexity / quality.reference - 1
        table.add_row(
            model,
            f"{quality.perplexity:.4f}",
            f"{rise:+.2%}",
            f"{quality.divergence:.5f}",
            f"{quality.agreement:.2%}",
        )
    else:
        table.add_row(model, f"{quality.perplexity:.4f}", "", "", "")
    target.print(table)
    target.print(
        f"{quality.predicted} tokens predicted; context {quality.context}, stride {quality.stride}",
        markup=False,
    )
