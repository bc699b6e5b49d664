"""What cannot be traced: the error names the model's own line, what was seen there, and what to do."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile.errors import InputError, TraceError


def place(comment: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))
    return f"test_refusals.py:{number}"


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branch
            return x
        return -x


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.max().item())  # size
        return torch.zeros(count) + x.sum()


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for value in x.flatten().tolist():
            if value > 0:  # loop
                return x
        return x + 1


class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)  # numpy


class DropsOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)  # dropout


class AddsNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)  # noise


class NormalizesByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=True)  # batch


class Autocasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)  # autocast


CASES = [
    (Branches, "branch", "branches on the values of a tensor", "torch.where"),
    (Sizes, "size", "a size or an index from the values", "pass it to the model as a Python number"),
    (Loops, "loop", "branches on the values of a tensor", "torch.where"),
    (Leaves, "numpy", "leaves PyTorch for NumPy", "torch function of the same name"),
    (DropsOut, "dropout", "draws random numbers", "training=self.training"),
    (AddsNoise, "noise", "draws random numbers", "take the numbers as an input"),
    (NormalizesByBatch, "batch", "normalizes by its batch", "training=self.training"),
    (Autocasts, "autocast", "enables autocast", "model.to(dtype)"),
]


@pytest.mark.parametrize(
    ("model", "comment", "what", "next_step"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_line_and_what_to_do(model: type[nn.Module], comment: str, what: str, next_step: str) -> None:
    nested = nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": model()})["inner"])
    with pytest.raises(TraceError, match=what) as caught:
        sqcompile.trace(nested, (torch.randn(2, 4),))
    error = caught.value
    assert place(comment) in str(error.where)
    assert "1" in str(error.where).split("test_refusals")[0], "the module path"
    assert error.seen
    assert error.expected
    assert next_step in str(error.next_step)


def test_the_code_of_the_line_is_shown() -> None:
    with pytest.raises(TraceError) as caught:
        sqcompile.trace(Branches(), (torch.randn(2),))
    assert str(caught.value.where).endswith(f"{place('branch')}: if x.sum() > 0:  # branch")


def test_dropout_that_is_switched_off_is_no_randomness() -> None:
    class Off(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.dropout(x, 0.0)
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.0)

    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(sqcompile.trace(Off(), (x,))(x), Off()(x))


def test_an_error_of_the_model_itself_is_not_about_tracing() -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 3:
                raise ValueError("three rows, please")  # check
            return x

    with pytest.raises(InputError, match="fails on the example inputs, traced or not") as caught:
        sqcompile.trace(Checks(), (torch.ones(2, 2),))
    assert place("check") in str(caught.value.where)
    assert "three rows, please" in str(caught.value.seen)


def test_programs_that_were_exported_in_training_mode() -> None:
    x = torch.randn(2, 4)
    for layer, what in (
        (nn.Dropout(0.5), "draws random numbers"),
        (nn.BatchNorm1d(4), "normalizes by its batch"),
    ):
        with pytest.raises(TraceError, match=what) as caught:
            sqcompile.trace(torch.export.export(layer.train(), (x,)))
        assert "after model.eval()" in str(caught.value.next_step)


def test_scripted_modules() -> None:
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TraceError, match="TorchScript") as caught:
        sqcompile.trace(scripted, (torch.ones(1, 2),))
    assert "original torch.nn.Module" in str(caught.value.next_step)


def test_weights_that_are_not_loaded() -> None:
    with pytest.raises(TraceError, match="weights are not loaded") as caught:
        sqcompile.trace(nn.Linear(2, 2, device="meta"), (torch.ones(1, 2),))
    assert "'weight'" in str(caught.value.where)


def test_weights_that_have_no_shape_yet() -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(TraceError, match="not initialized"):
        sqcompile.trace(model, (torch.ones(1, 2),))
    assert model.has_uninitialized_params()


def test_torch_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.root.manager.disable
    with pytest.raises(TraceError):
        sqcompile.trace(Branches(), (torch.randn(2),))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert logging.root.manager.disable == level


def test_what_the_model_prints_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    class Talks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            print("hello", file=sys.stderr)
            return x + 1

    sqcompile.trace(Talks(), (torch.randn(2),))
    assert capfd.readouterr().err == "hello\n"


def test_the_cause_is_kept_for_who_wants_it() -> None:
    with pytest.raises(TraceError) as caught:
        sqcompile.trace(Branches(), (torch.randn(2),))
    assert "data-dependent" in str(caught.value.__cause__)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_that_torch_ao_has_quantized() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)).eval(), {nn.Linear})
    with pytest.raises(TraceError, match=r"quantized already, by torch\.ao") as caught:
        sqcompile.trace(model, (torch.ones(2, 8),))
    assert "before" in str(caught.value.next_step)
