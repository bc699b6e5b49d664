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


def _check_shapes(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"The {what} of student and teacher do not fit together.",
            where="distillation",
            seen=f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}",
            expected="one shape",
            next_step="distil from the model that was compressed, on the same batch",
        )
