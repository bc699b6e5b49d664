"""Continuing prompts: what callers pass and get back, whatever backend makes the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sqcompile.errors import InputError

OnToken = Callable[[int, int], object]
"""Sees (row, token) when a token is chosen; False ends the generation."""


def as_tokens(tokens: Any, where: str) -> NDArray[np.int64]:
    """Return token ids as an array.

    Raises:
        InputError: If they are no list of whole numbers.
    """
    try:
        array = np.asarray(tokens.detach().cpu() if isinstance(tokens, torch.Tensor) else tokens)
    except (ValueError, TypeError):
        array = np.zeros((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            "Tokens are whole numbers in a row.",
            where=where,
            seen=f"{array.dtype} with {array.ndim} dimensions" if array.size else "nothing of that kind",
            expected="one dimension of token ids",
            next_step="pass what the tokenizer returns as input_ids",
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def split_rows(input_ids: Any, attention_mask: Any) -> list[NDArray[np.int64]]:
    """Return each row's tokens without its padding.

    Raises:
        InputError: If shapes do not fit, padding lies between tokens, or a token is negative.
    """
    if isinstance(input_ids, (torch.Tensor, np.ndarray)) and input_ids.ndim != 2:
        raise InputError(
            "Prompts are rows of tokens.",
            where="input_ids",
            seen=f"shape {tuple(input_ids.shape)}",
            expected="[batch, sequence], or a list of lists of different lengths",
            next_step="add a batch dimension: input_ids[None]",
        )
    rows = [as_tokens(row, f"row {number} of input_ids") for number, row in enumerate(input_ids)]
    if attention_mask is None:
        return _not_negative(rows)
    masks = [np.asarray(row).astype(bool) for row in attention_mask]
    if [mask.shape for mask in masks] != [row.shape for row in rows]:
        raise InputError(
            "The mask does not fit the prompts.",
            where="attention_mask",
            seen=f"{len(masks)} rows of {sorted({mask.shape for mask in masks})}",
            expected=f"{len(rows)} rows of {sorted({row.shape for row in rows})}",
            next_step="pass the attention_mask that the tokenizer returned with input_ids",
        )
    for number, mask in enumerate(masks):
        places = np.flatnonzero(mask)
        if len(places) and places[-1] - places[0] + 1 != len(places):
            raise InputError(
                "Padding lies between tokens.",
                where=f"row {number} of attention_mask",
                seen=f"{len(places)} ones between places {places[0]} and {places[-1]}",
                expected="zeros before or behind the tokens only",
                next_step="pad on one side",
            )
    return _not_negative([row[mask] for row, mask in zip(rows, masks, strict=True)])


def _not_negative(rows: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return the rows, none of whose tokens is negative: runtimes would count it from the vocabulary's end."""
    for number, row in enumerate(rows):
        if row.size and row.min() < 0:
            raise InputError(
                "A token is negative.",
                where=f"row {number} of input_ids, place {int((row < 0).argmax())}",
                seen=int(row[row < 0][0]),
                expected="tokens of the vocabulary, from 0 on",
                next_step="pass an attention_mask that hides padding, or leave it out of the rows",
            )
    return rows


def tokens_needed(prompts: Sequence[NDArray[np.int64]], max_new_tokens: int, limit: int | None) -> int:
    """Return how many tokens of a row a model will see: all but the last new one.

    Args:
        prompts: Tokens of each row.
        max_new_tokens: Tokens to choose for each row.
        limit: Tokens that the model takes; None: any number.

    Raises:
        InputError: If there are more than the model takes, or the number is none.
    """
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise InputError(
            "Tokens are counted in whole numbers.",
            where="max_new_tokens",
            seen=repr(max_new_tokens),
            expected="a number from 0 on",
            next_step="pass an int",
        )
    needed = max((len(prompt) for prompt in prompts), default=1) + max(max_new_tokens - 1, 0)
    if limit is not None and needed > limit:
        raise InputError(
            "The text becomes longer than the model takes.",
            where="input_ids and max_new_tokens",
            seen=f"{needed} tokens before the last new one",
            expected=f"at most {limit}",
            next_step="shorten the prompt, or ask for fewer tokens",
        )
    return needed


def continued(
    input_ids: Any,
    new: Sequence[Sequence[int]],
    ends: Sequence[int],
    pad_token_id: int | None,
) -> Any:
    """Return prompts and new tokens in the form that the prompts had.

    Args:
        input_ids: The prompts as they were given: [batch, sequence], or lists.
        new: New tokens of each row.
        ends: Tokens that end a row.
        pad_token_id: What follows in rows that ended earlier than others; None: the first that ends one.
    """
    if not isinstance(input_ids, (torch.Tensor, np.ndarray)):
        return [[*map(int, prompt), *tokens] for prompt, tokens in zip(input_ids, new, strict=True)]
    if pad_token_id is None:
        pad_token_id = [*ends, 0][0]
    longest = max(map(len, new), default=0)
    padded = [[*tokens, *[pad_token_id] * (longest - len(tokens))] for tokens in new]
    before = torch.as_tensor(input_ids).to(torch.int64)
    return torch.cat([before, torch.tensor(padded, dtype=torch.int64).reshape(len(new), longest)], 1)
