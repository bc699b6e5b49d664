"""Example inputs and calls: forms, nesting, dynamic sizes, and what is refused."""

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import sqcompile
from sqcompile.errors import InputError
from sqcompile.tracing import normalize_inputs


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:
        return x * scale + shift


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, list[Tensor]], options: dict[str, Any] | None = None) -> Tensor:
        first, (second, third) = pair
        total = first + second * third
        return total if options is None else total * options["gain"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 2), ((1, 2), {})),
        ([1, 2], ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        (UserDict(x=1), ((), {"x": 1})),
        (((1,), {"y": 2}), ((1,), {"y": 2})),
        (((), {}), ((), {})),
    ],
)
def test_forms_of_example_inputs(given: object, expected: object) -> None:
    assert normalize_inputs(given) == expected


def test_one_tensor_and_arrays_are_tensors() -> None:
    (x,), _ = normalize_inputs(torch.ones(2))
    assert torch.equal(x, torch.ones(2))
    (array,), kwargs = normalize_inputs(((np.ones(2, np.float32),), {"y": [np.zeros(3)]}))
    assert array.dtype is torch.float32
    assert isinstance(kwargs["y"][0], Tensor)


@pytest.mark.parametrize("given", [None, "text", 3])
def test_other_forms_are_refused(given: object) -> None:
    with pytest.raises(InputError) as caught:
        normalize_inputs(given)
    assert caught.value.next_step


def test_positional_and_keyword_inputs_mix_at_every_call() -> None:
    x, scale = torch.randn(2, 3), torch.randn(3)
    program = sqcompile.trace(Scaled(), ((x,), {"scale": scale, "shift": 2.0}))
    expected = x * scale + 2.0
    assert torch.equal(program(x, scale=scale, shift=2.0), expected)
    assert torch.equal(program(x, scale, shift=2.0), expected)
    assert torch.equal(program(shift=2.0, scale=scale, x=x), expected)


def test_a_number_that_was_traced_in_cannot_change() -> None:
    program = sqcompile.trace(Scaled(), ((torch.ones(2),), {"scale": torch.ones(2), "shift": 2.0}))
    with pytest.raises(InputError, match="shift"):
        program(torch.ones(2), torch.ones(2), shift=3.0)


def test_nested_inputs_are_named_by_their_path() -> None:
    leaves = [torch.randn(2) for _ in range(4)]
    call = (leaves[0], [leaves[1], leaves[2]]), {"gain": leaves[3]}
    program = sqcompile.trace(Nested(), (call, {}))  # a bare (tuple, dict) would be (args, kwargs)
    assert [value.name for value in program.signature.inputs] == [
        "pair.0",
        "pair.1.0",
        "pair.1.1",
        "options.gain",
    ]
    assert torch.equal(program(*call), Nested()(*call))


def test_nested_inputs_as_keywords() -> None:
    pair = (torch.randn(2), [torch.randn(2), torch.randn(2)])
    program = sqcompile.trace(Nested(), {"pair": pair, "options": None})
    assert torch.equal(program(pair=pair, options=None), Nested()(pair))


@dataclass
class Point:
    x: Tensor
    y: Tensor


class Adds(nn.Module):
    def forward(self, point: Point) -> Tensor:
        return point.x + point.y


def test_dataclass_inputs() -> None:
    program = sqcompile.trace(Adds(), (Point(torch.ones(2), torch.ones(2)),))
    assert torch.equal(program(Point(torch.ones(2), torch.full((2,), 4.0))), torch.full((2,), 5.0))
    assert [value.name for value in program.signature.inputs] == ["point.x", "point.y"]


class Opaque:
    x = y = torch.ones(2)


def test_objects_without_structure_are_refused() -> None:
    with pytest.raises(sqcompile.Error, match="neither a tensor, a number nor a container") as caught:
        sqcompile.trace(Adds(), (Opaque(),))
    assert "register_pytree_node" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "seen"),
    [
        ({"x": torch.ones(2)}, "missing a required argument: 'scale'"),
        ((torch.ones(2), torch.ones(2), torch.ones(2)), "too many positional arguments"),
        (((torch.ones(2),), {"scale": torch.ones(2), "shfit": 1.0}), "'shfit'"),
        (
            ((torch.ones(2),), {"x": torch.ones(2), "scale": torch.ones(2)}),
            "multiple values for argument 'x'",
        ),
    ],
)
def test_inputs_that_forward_does_not_take(inputs: object, seen: str) -> None:
    with pytest.raises(InputError, match=seen) as caught:
        sqcompile.trace(Scaled(), inputs)
    assert "scale" in str(caught.value.expected)


def test_a_misspelled_input_names_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        sqcompile.trace(Scaled(), {"x": torch.ones(2), "scale": torch.ones(2), "shfit": 1.0})
    assert caught.value.next_step == "did you mean 'shift'?"


def test_inputs_on_which_the_model_itself_fails() -> None:
    with pytest.raises(InputError, match="fails on the example inputs, traced or not") as caught:
        sqcompile.trace(nn.Sequential(nn.Linear(4, 2)), (torch.ones(1, 5),))
    assert "1x5 and 4x2" in str(caught.value.seen)


# --- dynamic sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [Dim("batch"), Dim("batch", min=1, max=512), Dim.DYNAMIC])
def test_an_example_of_size_one_traces_a_dynamic_dimension(dim: object) -> None:
    program = sqcompile.trace(nn.Linear(3, 2), (torch.ones(1, 3),), dynamic_shapes=({0: dim},))
    assert program(torch.ones(5, 3)).shape == (5, 2)
    assert program(torch.ones(1, 3)).shape == (1, 2)


def test_examples_that_share_a_dimension_grow_together() -> None:
    batch = Dim("batch")
    shapes = {"pair": ({0: batch}, [{0: batch}, None]), "options": None}
    pair = (torch.ones(1, 3), [torch.ones(1, 3), torch.ones(3)])
    program = sqcompile.trace(Nested(), {"pair": pair, "options": None}, dynamic_shapes=shapes)
    assert [str(value) for value in program.signature.tensor_inputs] == [
        "pair.0: f32[batch, 3]",
        "pair.1.0: f32[batch, 3]",
        "pair.1.1: f32[3]",
    ]
    large = (torch.randn(4, 3), [torch.randn(4, 3), torch.randn(3)])
    assert torch.equal(program(pair=large, options=None), Nested()(large))


def test_an_example_that_cannot_grow_says_so() -> None:
    shapes = {"pair": ({0: Dim("batch")}, [None, None]), "options": None}  # the second has a batch, too
    pair = (torch.ones(1, 3), [torch.ones(3, 3)[:1].expand(1, 3), torch.ones(3)])

    class Stacks(nn.Module):
        def forward(self, pair: tuple[Tensor, list[Tensor]], options: object = None) -> Tensor:
            return torch.cat([pair[0], pair[1][0]], dim=1)

    with pytest.raises(InputError, match="fails on the example inputs") as caught:
        sqcompile.trace(Stacks(), {"pair": pair, "options": None}, dynamic_shapes=shapes)
    assert "f32[2, 3], f32[1, 3]" in str(caught.value.seen)
    assert "repeated to size 2" in str(caught.value.expected)


def test_given_examples_are_not_changed() -> None:
    x = torch.ones(1, 3)
    sqcompile.trace(nn.Linear(3, 2), (x,), dynamic_shapes=({0: Dim("batch")},))
    assert x.shape == (1, 3)


def test_an_empty_example_is_refused() -> None:
    with pytest.raises(InputError, match="empty along a dynamic dimension"):
        sqcompile.trace(nn.Linear(3, 2), (torch.ones(0, 3),), dynamic_shapes=({0: Dim("batch")},))


def test_the_range_of_a_dimension_is_checked_at_a_call() -> None:
    program = sqcompile.trace(
        nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=({0: Dim("batch", min=2, max=4)},)
    )
    assert program.signature.dims == {"batch": (2, 4)}
    with pytest.raises(InputError, match="'batch' is out of its range"):
        program(torch.ones(5, 3))


def test_unnamed_dynamic_dimensions_get_names() -> None:
    program = sqcompile.trace(nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=((Dim.AUTO, Dim.AUTO),))
    assert str(program.signature.inputs[0]) == "input: f32[s0, s1]"
    assert program(torch.ones(4, 5)).shape == (4, 5)


def test_a_size_that_the_model_fixes_cannot_be_dynamic() -> None:
    with pytest.raises(InputError, match="fixes the size of dimension 'width'") as caught:
        sqcompile.trace(nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=({1: Dim("width")},))
    assert caught.value.seen == "always 3"


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:4], x[4:]
        return left + right[: left.shape[0]]


def test_a_range_that_the_model_does_not_take_comes_with_the_right_one() -> None:
    with pytest.raises(InputError, match="does not take every size") as caught:
        sqcompile.trace(Halves(), (torch.ones(12),), dynamic_shapes=({0: Dim("length")},))
    assert "min=" in str(caught.value.expected)


@pytest.mark.parametrize("shapes", [{"y": {0: Dim("batch")}}, ({0: Dim("batch")}, None)])
def test_dynamic_shapes_of_another_structure(shapes: object) -> None:
    with pytest.raises(InputError, match="dynamic_shapes do not fit"):
        sqcompile.trace(nn.ReLU(), (torch.ones(2, 3),), dynamic_shapes=shapes)


def test_a_slice_of_a_larger_tensor_is_an_example_like_any_other() -> None:
    class Sums(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.view(x.shape[0], 1, x.shape[1]) + x.unsqueeze(2)).sum(1)

    rows = torch.randn(4, 16)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}}
    program = sqcompile.trace(Sums(), rows[:2, :6], dynamic_shapes=shapes)
    assert torch.equal(program(rows), Sums()(rows))  # with the size that is the slice's stride


@pytest.mark.parametrize(
    ("shapes", "what", "seen"),
    [
        (True, "has a form", "True"),
        ({"input": {2: Dim("n")}}, "names an axis", "axis 2 of a tensor of shape (3, 4)"),
        (
            {"input": {0: Dim("n"), 1: Dim("n")}},
            "'n' has two sizes",
            "3 (tensor 0, axis 0) and 4 (tensor 0, axis 1)",
        ),
        ({"input": {1: Dim("n", max=3)}}, "'n' does not allow", "4"),
    ],
    ids=["form", "axis", "two-sizes", "range"],
)
def test_dynamic_shapes_that_the_examples_contradict(shapes: object, what: str, seen: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        sqcompile.trace(nn.ReLU(), (torch.ones(3, 4),), dynamic_shapes=shapes)
    assert caught.value.seen == seen
    assert caught.value.next_step


def test_dimensions_that_are_always_one_size_want_one_name() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    shapes = {"x": {0: Dim("rows")}, "y": {0: Dim("lines")}}
    with pytest.raises(InputError, match="always equal") as caught:
        sqcompile.trace(Adds(), (torch.ones(3, 4), torch.ones(3, 4)), dynamic_shapes=shapes)
    assert caught.value.next_step == "write 'rows' in both places"
    assert "export" not in str(caught.value)
    sqcompile.trace(Adds(), (torch.ones(3, 4),) * 2, dynamic_shapes={name: {0: Dim("rows")} for name in "xy"})


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_weights_of_another_type_than_the_inputs_are_what_to_convert(kind: torch.dtype) -> None:
    model, x = nn.Conv1d(4, 2, 1).to(kind), torch.ones(1, 4, 3)
    with pytest.raises(InputError, match=r"convert the model, with model\.float\(\)"):
        sqcompile.trace(model, (x,))
    sqcompile.trace(model.float(), (x,))
    with pytest.raises(InputError, match="give inputs"):
        sqcompile.trace(model, (x.to(kind),))
