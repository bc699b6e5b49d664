"""Losses that bring a compressed model near its dense teacher, for use in a training function.

teacher = model.eval()

def train(student):
    for x, y in loader:
        with torch.no_grad():
            wanted = teacher(x)
        loss = distill_logits(student(x), wanted, temperature=2.0)
        ...
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sqcompile.errors import InputError


def distill_logits(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence KL(teacher ‖ student) of softened distributions, times temperature².

    Shapes: student and teacher [..., classes]; result [].
    Raises: InputError if the shapes differ, or the temperature is not positive.
    Source: Hinton et al. 2015, section 2 (the factor keeps gradients of one size at any temperature).
    """
    _check_shapes(student, teacher, "logits")
    if not temperature > 0:
        raise InputError(
            "A temperature is positive.", where="distill_logits", seen=temperature, expected="> 0"
        )
    classes = student.shape[-1]
    ours = functional.log_softmax(student.reshape(-1, classes) / temperature, -1)
    wanted = functional.log_softmax(teacher.detach().reshape(-1, classes) / temperature, -1)
    return functional.kl_div(ours, wanted, reduction="batchmean", log_target=True) * temperature**2


def distill_hidden(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of hidden states, relative to the teacher's own mean square.

    Shapes: student and teacher of one shape; result [].
    Raises: InputError if the shapes differ.
    """
    _check_shapes(student, teacher, "hidden states")
    wanted = teacher.detach()
    return (student - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


def distill_states(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of `distill_hidden` over all modules whose states both have; see `HiddenStates`.

    Shapes: states of one name have one shape; result [].
    Raises: InputError if the names or shapes differ, naming the module.
    """
    if set(student) != set(teacher) or not len(student):
        raise InputError(
            "Student and teacher do not show states of the same modules.",
            where="distillation",
            seen=f"student {sorted(student)}, teacher {sorted(teacher)}",
            expected="the same names, at least one",
            next_step="ask both for the same names",
        )
    losses = []
    for name in student:
        _check_shapes(student[name], teacher[name], f"states of '{name}'")
        losses.append(distill_hidden(student[name], teacher[name]))
    return torch.stack(losses).mean()


def _check_shapes(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"The {what} of student and teacher do not fit together.",
            where="distillation",
            seen=f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            expected="one shape",
            next_step="distil from the model that was compressed, on the same batch",
        )
