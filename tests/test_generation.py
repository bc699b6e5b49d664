"""What prompts may look like, and in which form they come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sqcompile.errors import InputError
from sqcompile.generation import as_tokens, continued, split_rows, tokens_needed


@pytest.mark.parametrize(
    "tokens",
    [
        [3, 1, 4],
        (3, 1, 4),
        np.array([3, 1, 4], np.int32),
        torch.tensor([3, 1, 4]),
        torch.tensor([3, 1, 4], dtype=torch.uint8),
    ],
    ids=["list", "tuple", "array", "tensor", "bytes"],
)
def test_tokens_are_taken_in_any_form(tokens: Any) -> None:
    found = as_tokens(tokens, "row 0")
    assert found.dtype == np.int64 and found.flags.c_contiguous and found.tolist() == [3, 1, 4]


@pytest.mark.parametrize("tokens", [[1.5, 2.0], [[1, 2], [3, 4]], "text", [[1], [2, 3]], [True, False], []])
def test_what_is_no_row_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(InputError, match="whole numbers in a row") as caught:
        as_tokens(tokens, "row 7 of input_ids")
    assert "row 7 of input_ids" in str(caught.value) and "input_ids" in (caught.value.next_step or "")


def test_rows_lose_their_padding_on_either_side() -> None:
    tokens = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0], [1, 2, 3, 4], [0, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    rows = [row.tolist() for row in split_rows(tokens, mask)]
    assert rows == [[5, 6], [7, 8, 9], [1, 2, 3, 4], []]
    assert [row.tolist() for row in split_rows([[5], [6, 7]], None)] == [[5], [6, 7]]
    assert [row.tolist() for row in split_rows([[5, 0], [6, 7]], [[1, 0], [1, 1]])] == [[5], [6, 7]]


def test_negative_tokens_are_refused_unless_the_mask_hides_them() -> None:
    """Runtimes would count them from the end of the vocabulary, and continue another text."""
    with pytest.raises(InputError, match=r"row 1 of input_ids, place 1(.|\n)*-3(.|\n)*attention_mask"):
        split_rows([[5, 6], [7, -3]], None)
    assert [row.tolist() for row in split_rows([[5, 6], [7, -3]], [[1, 1], [1, 0]])] == [[5, 6], [7]]


def test_masks_that_do_not_fit_are_refused() -> None:
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(InputError, match="rows of tokens") as caught:
        split_rows(tokens[0], None)
    assert "input_ids[None]" in str(caught.value) and "(3,)" in str(caught.value)
    with pytest.raises(InputError, match="does not fit the prompts"):
        split_rows(tokens, torch.ones(2, 3))
    with pytest.raises(InputError, match="does not fit the prompts"):
        split_rows(tokens, torch.ones(1, 4))
    with pytest.raises(InputError, match="lies between tokens") as caught:
        split_rows(tokens, torch.tensor([[1, 0, 1]]))
    assert "row 0" in str(caught.value)


def test_the_last_token_is_not_seen() -> None:
    prompts = [np.arange(4), np.arange(7)]
    assert tokens_needed(prompts, 1, None) == 7  # the new one is only chosen
    assert tokens_needed(prompts, 3, None) == 9
    assert tokens_needed(prompts, 0, 7) == 7
    assert tokens_needed([], 2, None) == 2
    assert tokens_needed(prompts, 3, 9) == 9
    with pytest.raises(InputError, match="longer than the model takes") as caught:
        tokens_needed(prompts, 4, 9)
    assert "10 tokens" in str(caught.value) and "at most 9" in str(caught.value)


@pytest.mark.parametrize("count", [1.5, "3", True, None])
def test_counts_are_whole_numbers(count: Any) -> None:
    with pytest.raises(InputError, match="whole numbers") as caught:
        tokens_needed([np.arange(3)], count, None)
    assert repr(count) in str(caught.value)


def test_lists_come_back_as_lists() -> None:
    found = continued([[1, 2], np.array([3])], [[7, 8], [9]], [2], None)
    assert found == [[1, 2, 7, 8], [3, 9]]
    assert all(type(token) is int for row in found for token in row)


@pytest.mark.parametrize(
    ("ends", "pad", "filled"), [([2], None, 2), ([2], 0, 0), ([], None, 0), ([5, 6], None, 5)]
)
def test_tensors_come_back_as_tensors(ends: list[int], pad: int | None, filled: int) -> None:
    prompts = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    found = continued(prompts, [[7, 8, 9], [9]], ends, pad)
    assert found.dtype == torch.int64
    assert found.tolist() == [[1, 2, 7, 8, 9], [3, 4, 9, filled, filled]]
    nothing = continued(prompts.numpy(), [[], []], ends, pad)
    assert nothing.tolist() == prompts.tolist()
