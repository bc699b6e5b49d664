"""Quality of a model, dense or compiled: perplexity, accuracy, agreement.

Every function takes anything callable as the model is: a module, a program, a compiled model, a
loaded session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sqcompile.errors import InputError

Model = Callable[..., Any]


@torch.no_grad()
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
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2 or tokens.is_floating_point():
        raise InputError(
            "Perplexity needs rows of token ids.",
            seen=f"{tokens.dtype} {tuple(tokens.shape)}",
            expected="integers [rows, T] with T ≥ 2",
            next_step="cut the text into rows of equal length",
        )
    total, count = 0.0, 0
    for rows in tokens.long().split(batch_size):
        logits = logits_of(model(input_ids=rows))[:, :-1].float()
        targets = rows[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum"
        )
        total += float(loss)
        count += targets.numel()
    return math.exp(total / count)


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
