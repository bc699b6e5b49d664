"""Texts as data: read, tokenized with the model's own tokenizer, and cut into samples.

Texts are separated by blank lines; in a file without blank lines, each line is one. A language model
gets them joined and cut into equal pieces, as it is trained; an encoder gets one text a sample, padded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sqcompile.errors import CalibrationError, FileError
from sqcompile.expected import ExpectedInputs

if TYPE_CHECKING:
    from sqcompile.data import DataFile

DEFAULT_CONTEXT = 256
"""Tokens a sample, where neither the user nor the model says how many."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def read_text(
    file: DataFile, path: Path, expected: ExpectedInputs, source: str | Path | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Read a text file as one array of tokens an input.

    Raises:
        FileError: If the text is no UTF-8, or there is no tokenizer.
        CalibrationError: If there is no text, or the model takes no tokens.
    """
    texts = read_texts(path)
    tokens_input = "input_ids" if "input_ids" in expected.names else expected.names[0]
    tokenizer = load_tokenizer(file.tokenizer, source)
    context = file.context or expected.traced_size(tokens_input, 1) or DEFAULT_CONTEXT
    if _takes_pieces(tokenizer, expected):
        return _pieces(texts, tokenizer, context, expected, tokens_input, path)
    return _padded(texts, tokenizer, context, expected, path)


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file.

    Raises:
        FileError: If it is no UTF-8.
        CalibrationError: If it holds none.
    """
    texts = split_texts(_read(path))
    if not texts:
        raise CalibrationError(
            f"'{path}' holds no text.",
            where=f"data file '{path}'",
            seen="blank lines only" if path.stat().st_size else "an empty file",
            expected="one text a line, or texts separated by blank lines",
            next_step="write texts that look like those in use",
        )
    return texts


def split_texts(text: str) -> list[str]:
    """Split at blank lines; if there are none, at every line."""
    separator = r"\n[ \t]*\n" if re.search(r"\S\s*\n[ \t]*\n\s*\S", text) else r"\n"
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def load_tokenizer(folder: str | None, source: str | Path | None) -> Any:
    """Return the tokenizer of a folder, or the one beside the model.

    Raises:
        FileError: If there is none, it cannot be loaded, or transformers is not installed.
    """
    found = Path(folder) if folder else find_tokenizer(source)
    if found is None:
        raise FileError(
            "Text needs a tokenizer, and there is none beside the model.",
            where=str(source) if source else "data",
            seen="no " + " or ".join(_TOKENIZER_FILES[:3]),
            expected="the folder of a Hugging Face model, with its tokenizer",
            next_step="name the folder that holds it (--tokenizer), or tokenize the text into a .npz file",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise FileError(
            "Tokenizers need the transformers package.",
            where=str(found),
            seen=str(error),
            next_step="pip install sqcompile[llm]",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(found), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes it raise
        raise FileError(
            f"The tokenizer in '{found}' cannot be loaded.",
            where=str(found),
            seen=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            expected="tokenizer.json and tokenizer_config.json as save_pretrained writes them",
            next_step="check that the folder is complete",
        ) from error


def find_tokenizer(source: str | Path | None) -> Path | None:
    """Return the folder that holds a model's tokenizer: the model's own, or that of its file."""
    if source is None:
        return None
    path = Path(source)
    for folder in (path, path.parent):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return folder
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"'{path}' is no text.",
            where=str(path),
            seen=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            expected="UTF-8",
            next_step="convert it: iconv -t utf-8",
        ) from error


def _takes_pieces(tokenizer: Any, expected: ExpectedInputs) -> bool:
    """Whether the model takes running text, without padding."""
    language_model = "past_key_values" in expected.names and "encoder_hidden_states" not in expected.names
    return language_model or tokenizer.pad_token_id is None or "attention_mask" not in expected.names


def _pieces(
    texts: Sequence[str], tokenizer: Any, context: int, expected: ExpectedInputs, name: str, path: Path
) -> dict[str, np.ndarray[Any, Any]]:
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens += [] if end is None else [end]
    if len(tokens) < context and expected.traced_size(name, 1) is None:
        context = len(tokens)
    rows = len(tokens) // context if context else 0
    if rows == 0:
        raise CalibrationError(
            "The text is too short.",
            where=f"data file '{path}'",
            seen=f"{len(tokens)} tokens",
            expected=f"at least {context}",
            next_step="add text",
        )
    pieces = np.array(tokens[: rows * context], dtype=np.int64).reshape(rows, context)
    samples = {name: pieces}
    if "attention_mask" in expected.required:
        samples["attention_mask"] = np.ones_like(pieces)
    return expected.assign(samples, f"data file '{path}'")


def _padded(
    texts: Sequence[str], tokenizer: Any, context: int, expected: ExpectedInputs, path: Path
) -> dict[str, np.ndarray[Any, Any]]:
    fixed = expected.traced_size("input_ids", 1) is not None
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=context,
        padding="max_length" if fixed else "longest",
        return_tensors="np",
    )
    samples = {name: encoded[name].astype(np.int64) for name in encoded if name in expected.names}
    return expected.assign(samples, f"data file '{path}'")
