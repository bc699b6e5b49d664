"""Perplexity, divergence and agreement against sums written out token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sqcompile.errors import InputError
from sqcompile.evaluation import language_quality, perplexity

VOCABULARY = 11
Model = Callable[..., Any]


class Windowed(nn.Module):
    """Logits that depend on all tokens before, so that a window shows in them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table[input_ids].cumsum(1)}


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def by_hand(model: Windowed, rows: Tensor, context: int, stride: int) -> tuple[float, int]:
    """Sum of losses and count: each token by the first window that holds it and something before it."""
    total, count = 0.0, 0
    for row in rows:
        for place in range(1, len(row)):
            starts = [
                start
                for start in range(0, len(row), stride)
                if start < place < min(start + context, len(row))
            ]
            if not starts:
                continue
            logits = model(row[None, starts[0] : place])["logits"][0, -1]
            total -= float(logits.detach().log_softmax(-1)[row[place]])
            count += 1
    return total, count


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(10, 10, 10), (10, 4, 4), (9, 4, 4), (10, 4, 2), (11, 4, 1), (10, 7, 3), (10, 20, 20), (2, 2, 1)],
)
def test_windows_predict_each_token_once(length: int, context: int, stride: int) -> None:
    model, rows = Windowed(0), tokens(3, length)
    quality = language_quality(model, rows, context=context, stride=stride, batch_size=2)
    total, count = by_hand(model, rows, context, stride)
    assert quality.predicted == count
    assert quality.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_one_long_text_is_one_row() -> None:
    model, rows = Windowed(0), tokens(1, 12)
    assert language_quality(model, rows[0], context=5, stride=2) == language_quality(
        model, rows, context=5, stride=2
    )


def test_distances_from_a_reference() -> None:
    model, dense, rows = Windowed(1), Windowed(0), tokens(4, 8)
    quality = language_quality(model, rows, reference=dense, batch_size=3)
    own, other = (item(rows)["logits"][:, :-1].log_softmax(-1).double() for item in (model, dense))
    assert quality.reference == pytest.approx(perplexity(dense, rows))
    assert quality.divergence == pytest.approx(float((other.exp() * (other - own)).sum(-1).mean()), rel=1e-5)
    assert quality.agreement == pytest.approx(float((own.argmax(-1) == other.argmax(-1)).double().mean()))
    assert 0 < quality.agreement < 1


def test_a_model_is_no_distance_from_itself() -> None:
    quality = language_quality(Windowed(0), tokens(4, 8), reference=Windowed(0))
    assert quality.divergence == pytest.approx(0, abs=1e-7) and quality.agreement == 1.0
    assert quality.reference == quality.perplexity


def test_a_useless_model_has_no_finite_perplexity() -> None:
    def sure(input_ids: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.zeros_like(input_ids), VOCABULARY) * 1e4

    assert language_quality(sure, torch.ones(2, 4, dtype=torch.long)).perplexity == math.inf


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 0), (4, 5)])
def test_windows_that_cannot_be(context: int, stride: int) -> None:
    with pytest.raises(InputError, match="no such windows"):
        language_quality(Windowed(0), tokens(1, 8), context=context, stride=stride)


@pytest.mark.parametrize("shape", [(3, 1), (0, 8), (1, 2, 3)])
def test_no_rows_of_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="rows of token ids"):
        language_quality(Windowed(0), torch.ones(shape, dtype=torch.long))


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(InputError, match="outside of the model's vocabulary"):
        language_quality(Windowed(0), tokens(1, 8) + VOCABULARY)
    with pytest.raises(InputError, match=f"ids below {VOCABULARY}"):
        language_quality(lambda input_ids: torch.zeros(*input_ids.shape, VOCABULARY), tokens(1, 8) + 5)
    with pytest.raises(InputError, match="different vocabularies"):
        language_quality(
            Windowed(0), tokens(1, 8), reference=lambda input_ids: torch.zeros(*input_ids.shape, 20)
        )
