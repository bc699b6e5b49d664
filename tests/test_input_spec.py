from __future__ import annotations

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.errors import RecipeError
from sqcompile.input_spec import InputSpec, example_call, example_inputs, with_dims


@pytest.mark.parametrize(
    ("text", "shape", "sizes"),
    [
        ("x: f32[2, 3]", (2, 3), (2, 3)),
        ("x:f32[batch,3]", ("batch", 3), (2, 3)),
        (" x : float32 [ batch , h = 64 , w ] ", ("batch", "h", "w"), (2, 64, 16)),
        ("x: f32[]", (), ()),
    ],
)
def test_reads_sizes_and_names(text: str, shape: tuple, sizes: tuple) -> None:
    spec = InputSpec.parse(text)
    assert (spec.name, spec.dtype, spec.shape, spec.sizes) == ("x", torch.float32, shape, sizes)
    assert InputSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["x", "x: f32", "f32[2]", "x: f32[2", "x: f32[2,,3]", "x: f32[-1]", "x: f33[2]"]
)
def test_what_is_no_input_is_an_error(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        InputSpec.parse(text)
    assert caught.value.next_step


def test_examples_have_the_type_and_are_valid_tokens() -> None:
    inputs = example_inputs([InputSpec.parse("x: f16[2, 3]"), InputSpec.parse("ids: i64[n, seq]")])
    assert inputs["x"].dtype == torch.float16
    assert inputs["x"].std() > 0
    assert torch.equal(inputs["ids"], torch.ones(2, 16, dtype=torch.int64))
    again = example_inputs([InputSpec.parse("x: f16[2, 3]")])
    assert torch.equal(inputs["x"], again["x"])  # the same every time


def test_names_become_shared_dims_and_other_inputs_stay_fixed() -> None:
    shapes = with_dims({"x": {0: "batch"}, "y": {1: "batch", 0: "rows"}}, ["x", "y", "z"])
    assert shapes["x"][0] is shapes["y"][1]
    assert shapes["x"][0] is not shapes["y"][0]
    assert shapes["z"] is None


def test_names_may_stand_in_the_order_of_the_inputs() -> None:
    shapes = with_dims([{0: "batch"}, None, {1: "batch"}], ["x", "y", "z"])
    assert shapes["x"][0] is shapes["z"][1]
    assert list(shapes) == ["x", "y", "z"] and shapes["y"] is None


def test_other_forms_of_dynamic_shapes_are_left_alone() -> None:
    for given in (None, ({0: torch.export.Dim("n")},), {"x": {0: torch.export.Dim("n")}}, {"x": None}):
        assert with_dims(given, ["x", "y"]) is given


class Two(nn.Module):
    def forward(
        self, x: torch.Tensor, options: dict[str, torch.Tensor], *, flag: bool = True
    ) -> torch.Tensor:
        return x + options["ids"] if flag else x


def test_makes_up_a_call_for_a_traced_program() -> None:
    batch = torch.export.Dim("batch", min=3, max=5)
    inputs = ((torch.zeros(4, 2), {"ids": torch.zeros(4, 2, dtype=torch.int64)}), {"flag": True})
    shapes = {"x": {0: batch}, "options": {"ids": {0: batch}}, "flag": None}
    program = sqcompile.trace(Two().eval(), inputs, dynamic_shapes=shapes)
    call = example_call(program.signature)
    assert call is not None
    assert call[0][0].shape == (3, 2)  # within the dimension's range
    assert program(*call[0], **call[1]).shape == (3, 2)
