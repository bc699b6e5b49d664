from __future__ import annotations

import pytest
import torch

from sqcompile.distillation import distill_hidden, distill_logits
from sqcompile.errors import InputError


def test_logits() -> None:
    teacher = torch.tensor([[0.0, 2.0], [1.0, -1.0]], requires_grad=True)
    student = torch.zeros(2, 2, requires_grad=True)
    for temperature in (1.0, 2.0):
        soft = (teacher.detach() / temperature).softmax(-1)
        expected = (soft * (soft / 0.5).log()).sum(-1).mean() * temperature**2
        torch.testing.assert_close(distill_logits(student, teacher, temperature=temperature), expected)
    distill_logits(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    assert float(distill_logits(teacher.detach(), teacher)) == pytest.approx(0, abs=1e-7)


def test_every_position_counts_alike() -> None:
    student, teacher = torch.zeros(2, 3, 5), torch.arange(30.0).reshape(2, 3, 5)
    whole = distill_logits(student, teacher)
    torch.testing.assert_close(whole, distill_logits(student.view(6, 5), teacher.view(6, 5)))


def test_hidden() -> None:
    teacher = torch.tensor([3.0, 4.0])
    assert float(distill_hidden(torch.zeros(2), teacher)) == 1.0
    assert float(distill_hidden(teacher * 10, teacher * 10)) == 0.0
    assert float(distill_hidden(torch.zeros(2), torch.zeros(2))) == 0.0


def test_refuses_a_mismatch() -> None:
    for loss in (distill_logits, distill_hidden):
        with pytest.raises(InputError, match="do not fit together"):
            loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="positive"):
        distill_logits(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
