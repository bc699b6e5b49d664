"""In-place operators: gone from every program, with the same numbers."""

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Program
from sqcompile.errors import TraceError
from sqcompile.tracing.functionalize import is_in_place


class Runs(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> object:
        return self.function(self.linear(x))


def chain(x: Tensor) -> Tensor:
    return x.mul_(2).add_(1).relu_()


def written_after_a_read(x: Tensor) -> tuple[Tensor, Tensor]:
    before = x * 1
    x += 3
    return before, x


def read_by_the_old_name(x: Tensor) -> Tensor:
    nn.functional.relu(x, inplace=True)
    return x * 2


def through_a_view_made_before(x: Tensor) -> Tensor:
    flat = x.view(-1)
    x.add_(1)
    return flat * 2


def into_a_view(x: Tensor) -> Tensor:
    x[:, 0] = 0
    x.view(-1)[1:2].mul_(5)
    return x


def into_a_view_that_alone_is_read(x: Tensor) -> Tensor:
    return x.view(-1).add_(1).sum()


def after_dropout(x: Tensor) -> tuple[Tensor, Tensor]:
    # In eval mode dropout returns its argument itself: writing into one writes into the other.
    dropped = nn.functional.dropout(x, 0.5, training=False)
    dropped += 1
    return dropped, x


def chunks(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    left.add_(right)
    return x


def list_of_results(x: Tensor) -> list[Tensor]:
    out = [x]
    out[0] += 1
    out.append(x * 2)
    return out


def integer_counter(x: Tensor) -> Tensor:
    steps = torch.arange(4)
    steps += 2
    steps[1] = 9
    return x * steps


def keeps_its_type(x: Tensor) -> Tensor:
    half = x.half()
    half += torch.ones(4)
    return half


def masked(x: Tensor) -> Tensor:
    x.masked_fill_(x > 0, 0.5)
    x[x < -0.5] = -0.5
    return x.clamp_(max=0.2)


FUNCTIONS = (
    chain,
    written_after_a_read,
    read_by_the_old_name,
    through_a_view_made_before,
    into_a_view,
    into_a_view_that_alone_is_read,
    after_dropout,
    chunks,
    list_of_results,
    integer_counter,
    keeps_its_type,
    masked,
)


def assert_functional(program: Program) -> None:
    assert not [node.name for node in program.compute_nodes() if is_in_place(node)]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_same_numbers_without_in_place_operators(function) -> None:  # type: ignore[no-untyped-def]
    model = Runs(function).eval()
    x = torch.randn(2, 4)
    program = sqcompile.trace(model, (torch.randn(2, 4),))
    assert_functional(program)
    with torch.no_grad():  # autograd forbids writing into some views
        actual, expected = program(x), model(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_simple_way_keeps_the_operators() -> None:
    program = sqcompile.trace(Runs(chain), (torch.ones(1, 4),))
    assert [node.name for node in program.compute_nodes()] == ["linear", "mul", "add", "relu"]


def test_inputs_are_not_written_into() -> None:
    class Shifts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.sub_(1)
            return x * 2

    program = sqcompile.trace(Shifts(), (torch.ones(2),))
    x = torch.full((2,), 5.0)
    assert torch.equal(program(x), torch.full((2,), 8.0))
    assert torch.equal(x, torch.full((2,), 5.0))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # the counter
        return x * self.calls


class Caches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[1:2] = x[:1]
        return x + self.cache


@pytest.mark.parametrize(("model", "name"), [(Counts(), "calls"), (Caches(), "cache")])
@pytest.mark.parametrize("decomposed", [False, True])
def test_writes_into_buffers_are_refused(model: nn.Module, name: str, decomposed: bool) -> None:
    x = torch.ones(4)
    given: object = model.eval()
    if decomposed:
        given = torch.export.export(model, (x,)).run_decompositions({})
    with pytest.raises(TraceError, match=f"own tensor '{name}'") as caught:
        sqcompile.trace(given, (x,))
    assert "test_functionalize.py:" in str(caught.value.where)
    assert torch.equal(getattr(model, name), torch.zeros_like(getattr(model, name)))
