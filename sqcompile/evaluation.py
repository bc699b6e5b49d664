"""Quality of a model, dense or compiled: perplexity, divergence and agreement; accuracy.

Every function takes anything callable as the model is: a module, a program, a compiled model, a
loaded session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sqcompile.errors import InputError
from sqcompile.progress import Progress, SilentProgress

Model = Callable[..., Any]


@dataclass(frozen=True)
class LanguageQuality:
    """How well a language model predicts a text, and how far it is from another one.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        predicted: Tokens that were predicted.
        context: The most tokens that a call took.
        stride: Tokens from the start of one window to that of the next.
        reference: Perplexity of the reference on the same tokens; None without one.
        divergence: Mean Kullback-Leibler divergence of the next token's distribution from the reference's,
            KL(reference ‖ model), in nats; None without a reference.
        agreement: Share of places at which both find the same token most likely, 0 to 1; None without.
    """

    perplexity: float
    predicted: int
    context: int
    stride: int
    reference: float | None = None
    divergence: float | None = None
    agreement: float | None = None


@torch.no_grad()
def language_quality(
    model: Model,
    tokens: torch.Tensor,
    *,
    reference: Model | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LanguageQuality:
    """Return perplexity on rows of tokens, in windows that slide along each row, and distances from a reference.

    The first window of a row predicts all of its tokens but the first. Each further one starts `stride`
    tokens later, and predicts only what no earlier one did: with a stride below the context, every token
    but the first ones of a row is predicted from at least `context - stride` tokens before it. Windows that
    only touch leave the first token of each unpredicted.

    Args:
        model: Called as `model(input_ids=tokens)`; returns logits [N, T, vocabulary], or an output that
            has them as `logits`.
        tokens: Token ids, integers [rows, T], or [T] for one long text; T ≥ 2.
        reference: Another model over the same vocabulary, usually the dense one.
        context: Tokens of a window, at least 2; None takes whole rows.
        stride: From 1 to `context`; None is the context: windows that touch.
        batch_size: Windows a call.
        progress: Shows how far it is.

    Raises:
        InputError: If tokens, context or stride cannot be, or the two models' vocabularies differ.
    """
    rows = tokens[None] if tokens.dim() == 1 else tokens
    _check_rows(rows)
    length = rows.shape[1]
    context = length if context is None else context
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise InputError(
            "There are no such windows.",
            seen=f"context {context}, stride {stride}",
            expected="a context of at least 2 tokens, and a stride from 1 to the context",
        )
    context = min(context, length)
    totals = _Totals()
    batches = list(_windows(rows.long(), context, min(stride, context), batch_size))
    for windows, first in (progress or SilentProgress()).track(batches, "evaluating"):
        logits = _logits(model, windows)[:, first - 1 : -1].float()
        wanted = None
        if reference is not None:
            wanted = _logits(reference, windows)[:, first - 1 : -1].float()
        totals.add(logits, windows[:, first:], wanted)
    return totals.result(context, min(stride, context))


def _logits(model: Model, windows: torch.Tensor) -> torch.Tensor:
    try:
        logits = logits_of(model(input_ids=windows))
    except IndexError as error:  # what PyTorch's embeddings raise
        raise _foreign_token(windows, None) from error
    if windows.numel() and int(windows.max()) >= logits.shape[-1]:
        raise _foreign_token(windows, logits.shape[-1])
    return logits


def _foreign_token(windows: torch.Tensor, vocabulary: int | None) -> InputError:
    return InputError(
        "A token id lies outside of the model's vocabulary.",
        seen=f"ids from {int(windows.min())} to {int(windows.max())}",
        expected="ids below the size of the vocabulary" if vocabulary is None else f"ids below {vocabulary}",
        next_step="tokenize the text with the model's own tokenizer",
    )


class _Totals:
    """Sums over all predicted tokens."""

    def __init__(self) -> None:
        self.count = self.agree = 0
        self.loss = self.reference_loss = self.divergence = 0.0
        self.has_reference = False

    def add(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Take in some predictions. Shapes: logits and reference [N, T, V], targets [N, T]."""
        self.count += targets.numel()
        own = functional.log_softmax(logits, -1)
        self.loss -= float(own.gather(-1, targets[..., None]).double().sum())
        if reference is None:
            return
        if reference.shape != logits.shape:
            raise InputError(
                "The model and its reference have different vocabularies.",
                seen=f"logits {list(logits.shape)} and {list(reference.shape)}",
                expected="equal shapes",
                next_step="compare a model with the one that it was made from",
            )
        self.has_reference = True
        other = functional.log_softmax(reference, -1)
        self.reference_loss -= float(other.gather(-1, targets[..., None]).double().sum())
        self.divergence += float((other.exp() * (other - own)).double().sum())
        self.agree += int((logits.argmax(-1) == reference.argmax(-1)).sum())

    def result(self, context: int, stride: int) -> LanguageQuality:
        """Return the means."""
        quality = LanguageQuality(_exp(self.loss / self.count), self.count, context, stride)
        if not self.has_reference:
            return quality
        return LanguageQuality(
            quality.perplexity,
            self.count,
            context,
            stride,
            reference=_exp(self.reference_loss / self.count),
            divergence=self.divergence / self.count,
            agreement=self.agree / self.count,
        )


def _windows(
    rows: torch.Tensor, context: int, stride: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield windows [N, T] of equal length, and the first of their tokens that none before has predicted."""
    done, start = 1, 0
    while done < rows.shape[1]:
        end = min(start + context, rows.shape[1])
        if end - start > 1:
            for windows in rows[:, start:end].split(batch_size):
                yield windows, max(done - start, 1)
        done, start = end, start + stride


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _check_rows(tokens: torch.Tensor) -> None:
    if tokens.dim() == 2 and tokens.shape[0] >= 1 and tokens.shape[1] >= 2 and not tokens.is_floating_point():
        return
    raise InputError(
        "Perplexity needs rows of token ids.",
        seen=f"{tokens.dtype} {tuple(tokens.shape)}",
        expected="integers [rows, T] with T ≥ 2",
        next_step="cut the text into rows of equal length",
    )


def perplexity(model: Model, tokens: torch.Tensor, *, batch_size: int = 8) -> float:
    """Return the perplexity of a causal language model: exp of the mean negative log-likelihood.

    Every token but the first of a row is predicted from those before it in the same row, so the
    context length is the row length T: state it beside the figure.

    Args:
        model: Called as `model(input_ids=tokens[i:j])`; returns logits [N, T, vocabulary], or an
            output that has them as `logits`.
        tokens: Token ids, integers [rows, T], T ≥ 2.
        batch_size: Rows a call.

    Raises:
        InputError: If there are no tokens, or they are not [rows, T].
    """
    _check_rows(tokens)
    return language_quality(model, tokens, batch_size=batch_size).perplexity


@torch.no_grad()
def accuracy(model: Model, inputs: torch.Tensor, labels: torch.Tensor, *, batch_size: int = 64) -> float:
    """Return the fraction of samples whose largest logit is their label, 0 to 1.

    Args:
        model: Called as `model(inputs[i:j])`; returns logits [N, classes], or an output with `logits`.
        inputs: Samples along the first axis.
        labels: Class of each sample, integers [samples].
        batch_size: Samples a call.

    Raises:
        InputError: If the numbers of samples and labels differ.
    """
    if len(inputs) != len(labels) or len(inputs) == 0:
        raise InputError(
            "Accuracy needs one label a sample.",
            seen=f"{len(inputs)} samples, {len(labels)} labels",
            expected="as many labels as samples, at least one",
        )
    hits = 0
    for samples, truth in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
        hits += int((logits_of(model(samples)).argmax(-1) == truth).sum())
    return hits / len(inputs)


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of a model's output: the tensor itself, its field `logits`, or its first item."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise InputError(
            "The model's output holds no logits.",
            seen=type(output).__name__,
            expected="a tensor, or an output with the field 'logits'",
        )
    return output
