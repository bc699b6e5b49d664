from __future__ import annotations

from typing import Any

import pytest
import torch
from support.quantize import OBSERVE, calls, observed, refuse_level, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Level, Program, trace
from sqcompile.errors import InputError, PassOptionError, SelectionError
from sqcompile.passes import InsertObservers
from sqcompile.pipeline import PassContext, PassManager, parse_pass
from sqcompile.quantization import Fixed, Format, HistogramMSE, MinMax, Percentile
from sqcompile.testing import check_pass


class Function(nn.Module):
    """Layers by name, used as a function says."""

    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def insert(model: nn.Module, *inputs: Tensor, **options: Any) -> Program:
    return check_pass(InsertObservers(**options), settle(model), inputs).after


def test_observes_weights_and_the_values_between_integer_operators() -> None:
    checked = check_pass(
        InsertObservers(),
        settled(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        (values(2, 3, 6, 6),),
        expected="""
            program (level observed)
              input  %input_1: f32[2, 3, 6, 6]
              tensor @0.weight: f32[4, 3, 3, 3]
              tensor @0.bias: f32[4]
              tensor @3.weight: f32[2, 64]
              tensor @3.bias: f32[2]
              %observe_2: f32[2, 3, 6, 6] = observe(%input_1, observer='input_1')
              %observe: f32[4, 3, 3, 3] = observe(@0.weight, observer='0.weight')
              %conv2d: f32[2, 4, 4, 4] = conv2d(%observe_2, %observe, @0.bias)
              %relu: f32[2, 4, 4, 4] = relu(%conv2d)
              %observe_3: f32[2, 4, 4, 4] = observe(%relu, observer='relu')
              %flatten: f32[2, 64] = flatten.using_ints(%observe_3, start_dim=1)
              %observe_1: f32[2, 64] = observe(@3.weight, observer='3.weight')
              %linear: f32[2, 2] = linear(%flatten, %observe_1, @3.bias)
              return output=%linear
        """,
    )
    states = checked.after.observers
    assert {name: str(state.format) for name, state in states.items()} == {
        "0.weight": "int8:channel=0:narrow",
        "3.weight": "int8:channel=0:narrow",
        "input_1": "uint8:affine",
        "relu": "uint8:affine",
    }
    assert all(state.count == 0 for state in states.values())
    assert checked.record.facts == {"weights": 2, "values": 2}


def test_leaves_a_program_without_integer_operators() -> None:
    checked = check_pass(
        InsertObservers(),
        settled(nn.Tanh()),
        (values(2, 3),),
        unchanged=True,
        remarks=["has no operator to quantize"],
    )
    assert checked.after.level is Level.OBSERVED


def test_refuses_programs_past_its_level() -> None:
    refuse_level(InsertObservers(), Level.OBSERVED)
    refuse_level(InsertObservers(), Level.QDQ)


def test_a_convolution_writes_codes_even_for_an_output_and_a_linear_layer_does_not() -> None:
    """Integer convolutions end in codes; integer matrix products may end in floating point."""
    conv = insert(nn.Sequential(nn.Conv2d(3, 4, 3)), values(1, 3, 5, 5))
    assert observed(conv) == {"input_1": "input_1", "conv2d": "conv2d"}
    linear = insert(nn.Sequential(nn.Linear(3, 4)), values(1, 3))
    assert observed(linear) == {"input_1": "input_1"}


def test_a_linear_layer_writes_codes_where_all_take_them() -> None:
    """linear -> relu -> linear: the value between them exists only as codes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2))
    assert list(observed(insert(model, values(1, 3)))) == ["input_1", "relu", "tanh"]


def test_one_observer_serves_all_layers_that_take_a_value() -> None:
    def attention(self: Any, x: Tensor) -> Tensor:
        return self.q(x).softmax(-1) + self.k(x).tanh()

    program = insert(Function(attention, q=nn.Linear(3, 3), k=nn.Linear(3, 3)), values(2, 3))
    assert observed(program) == {"x": "x"}
    (observe,) = [node for node in calls(program, OBSERVE) if "." not in str(node.args[1])]
    assert {user.name for user in observe.users} == {"linear", "linear_1"}


def test_floating_point_users_keep_the_exact_value() -> None:
    """The residual connection around a linear layer does not see codes."""

    def residual(self: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x + self.fc(x), (3,))

    program = insert(Function(residual, fc=nn.Linear(3, 3)), values(2, 3))
    (add,) = calls(program, torch.ops.aten.add.Tensor)
    assert add.args[0] is program.placeholders[0]


def test_the_residual_stream_of_a_cnn_is_integer() -> None:
    def block(self: Any, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((x + self.second(x)).relu())

    convs = {name: nn.Conv2d(3, 3, 1) for name in ("first", "second", "last")}
    program = insert(Function(block, **convs), values(1, 3, 4, 4))
    # The activation behind add fuses into it: add itself is not observed.
    assert list(observed(program)) == ["x", "relu", "conv2d_1", "relu_1", "conv2d_2"]


def test_a_concatenation_shares_one_observer() -> None:
    def inception(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x).relu()], 1))

    layers = {"left": nn.Conv2d(3, 2, 1), "right": nn.Conv2d(3, 2, 1), "last": nn.Conv2d(4, 2, 1)}
    program = insert(Function(inception, **layers), values(1, 3, 4, 4))
    names = [str(node.args[1]) for node in calls(program, OBSERVE) if "." not in str(node.args[1])]
    assert names == ["x", "cat", "cat", "conv2d_2"]  # cat's own codes are those of its inputs


def test_concatenations_of_one_value_share_one_observer() -> None:
    """Dense connections: a value in two concatenations ties the scales of both."""

    def dense(self: Any, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(torch.cat([x, first], 1))
        return self.c(torch.cat([first, second], 1))

    layers = {"a": nn.Conv2d(2, 2, 1), "b": nn.Conv2d(4, 2, 1), "c": nn.Conv2d(4, 2, 1)}
    program = insert(Function(dense, **layers), values(1, 2, 4, 4))
    names = [str(node.args[1]) for node in calls(program, OBSERVE) if "." not in str(node.args[1])]
    assert names == ["cat", "cat", "cat", "conv2d_2"]


def test_moving_elements_needs_no_observer() -> None:
    def moved(self: Any, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(self.conv(x), 2)
        return self.fc(torch.nn.functional.pad(x, (1, 1)).flatten(1))

    program = insert(Function(moved, conv=nn.Conv2d(3, 2, 1), fc=nn.Linear(16, 2)), values(1, 3, 4, 4))
    assert list(observed(program)) == ["x", "conv2d"]


def test_padding_with_another_number_than_zero_is_no_move() -> None:
    def padded(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.pad(self.conv(x), (1, 1), value=7.0))

    layers = {"conv": nn.Conv2d(3, 2, 1), "last": nn.Conv2d(2, 2, 1)}
    program = insert(Function(padded, **layers), values(1, 3, 4, 4))
    assert list(observed(program)) == ["x", "conv2d", "pad", "conv2d_1"]


def test_a_selected_part_is_observed_behind_the_selection() -> None:
    """Quantizing what is dropped would be waste."""

    def first_token(self: Any, x: Tensor) -> Tensor:
        return self.fc(x.tanh()[:, 0])

    program = insert(Function(first_token, fc=nn.Linear(3, 2)), values(2, 5, 3))
    assert list(observed(program)) == ["select"]


def test_a_known_range_needs_no_data() -> None:
    def gate(self: Any, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(x * self.gate(x).sigmoid())

    convs = {name: nn.Conv2d(3, 3, 1) for name in ("conv", "gate", "last")}
    program = insert(Function(gate, **convs), values(1, 3, 4, 4))
    assert program.observers["sigmoid"].observer == Fixed(0.0, 1.0)
    assert program.observers["mul"].observer == HistogramMSE()


def test_says_why_an_operator_between_integers_stays_in_floating_point() -> None:
    def network(self: Any, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x + x.exp()).relu() + x * 2.0 + torch.add(x, x, alpha=3)

    checked = check_pass(
        InsertObservers(),
        settle(Function(network, conv=nn.Conv2d(3, 3, 1))),
        (values(1, 3, 4, 4),),
        remarks=[
            "stays in floating point: not all of its inputs are integers",
            "stays in floating point: one of its operands is the number 2.0",
            "stays in floating point: it adds with alpha=3",
        ],
    )
    assert list(observed(checked.after)) == ["x", "conv2d"]


def test_a_pooling_whose_result_is_returned_does_not_pay() -> None:
    check_pass(
        InsertObservers(),
        settled(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)),
        (values(1, 3, 6, 6),),
        remarks=["stays in floating point: no integer operator takes its result"],
    )


def test_other_types_than_float32_stay() -> None:
    check_pass(
        InsertObservers(),
        settled(nn.Linear(3, 2)).half(),
        (values(1, 3).half(),),
        unchanged=True,
        remarks=["its weight is torch.float16; convert the model with model.float()"],
    )


def test_embeddings_have_integer_weights_only_and_tied_weights_one_observer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh())

    program = insert(Tied(), torch.tensor([[1, 2]]))
    weights = [node for node in calls(program, OBSERVE) if "weight" in str(node.args[1])]
    assert len(weights) == 1 and {user.name for user in weights[0].users} == {"embedding", "linear"}
    assert list(observed(program)) == ["tanh"]


def test_a_dynamic_batch_stays_dynamic() -> None:
    checked = check_pass(
        InsertObservers(),
        settled(nn.Conv2d(3, 4, 3), nn.ReLU()),
        (values(2, 3, 6, 6),),
        dynamic_shapes={"input": {0: Dim("batch")}},
    )
    assert "%observe_2: f32[batch, 4, 4, 4] = observe(%relu" in checked.after.text()


def test_transposed_convolutions_have_their_channels_at_axis_one() -> None:
    program = insert(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), values(1, 3, 4, 4))
    assert str(program.observers["0.weight"].format) == "int8:channel=1:narrow"


TWO = (nn.Linear(6, 5), nn.Linear(5, 4))


def formats(program: Program) -> dict[str, str]:
    return {name: str(state.format) for name, state in program.observers.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight": Format.parse("int4")}, {"0.weight": "int4", "1.weight": "int4"}),
        ({"activation": Format.parse("int8")}, {"input_1": "int8", "linear": "int8"}),
        ({"layers": ("0",)}, {"0.weight": "int8:channel=0:narrow", "input_1": "uint8:affine"}),
        ({"exclude": ("0",)}, {"1.weight": "int8:channel=0:narrow", "linear": "uint8:affine"}),
        ({"formats": (("1", "float"),)}, {"0.weight": "int8:channel=0:narrow", "input_1": "uint8:affine"}),
        (
            {"formats": (("kind:linear", Format.parse("int4")), ("1", Format.parse("int8")))},
            {"0.weight": "int4", "1.weight": "int8", "input_1": "uint8:affine", "linear": "uint8:affine"},
        ),
        (
            {"formats": (("kind:head", Format.parse("int8:group=3")),)},
            {"0.weight": "int8:channel=0:narrow", "1.weight": "int8:group=3"},
        ),
        (
            {"activation_formats": (("1", "float"),)},
            {"1.weight": "int8:channel=0:narrow", "input_1": "uint8:affine"},
        ),
        (
            {"activation_formats": (("1", Format.parse("uint16:affine")),)},
            {"input_1": "uint8:affine", "linear": "uint16:affine"},
        ),
    ],
)
def test_options_choose_formats(options: dict[str, Any], expected: dict[str, str]) -> None:
    seen = formats(insert(nn.Sequential(*TWO), values(1, 6), **options))
    assert expected.items() <= seen.items()
    if set(options) & {"layers", "exclude"} or "float" in str(options):
        unexpected = {"0.weight", "1.weight", "input_1", "linear"} - set(expected)
        if "activation_formats" in options:
            unexpected -= {"0.weight"}
        assert not unexpected & set(seen)


def test_two_formats_of_one_value_have_two_observers() -> None:
    def fork(self: Any, x: Tensor) -> Tensor:
        x = x.tanh()
        return self.a(x).softmax(-1) + self.b(x).exp()

    model = Function(fork, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    program = insert(model, values(2, 3), activation_formats=(("b", Format.parse("uint16:affine")),))
    assert formats(program)["tanh"] == "uint8:affine"
    assert formats(program)["tanh_format1"] == "uint16:affine"


def test_kinds_choose_operators() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    program = insert(model, values(2, 3, 6, 6), kinds=("linear",))
    assert "0.weight" not in program.observers and "3.weight" in program.observers


def test_the_observer_option_reaches_every_value() -> None:
    program = insert(nn.Sequential(*TWO), values(1, 6), observer=Percentile(percentile=99.0))
    assert program.observers["input_1"].observer == Percentile(percentile=99.0)
    assert program.observers["0.weight"].observer == MinMax()


def test_patterns_that_match_nothing_name_the_nearest() -> None:
    program = trace(settled(nn.Linear(3, 2)), (values(1, 3),))
    with pytest.raises(SelectionError, match="The pattern 'O' matches no layer"):
        PassManager([InsertObservers(exclude=("O",))]).run(program, PassContext())
    with pytest.raises(SelectionError, match=r"(?s)no kind of operator 'liner'.*did you mean 'linear'"):
        PassManager([InsertObservers(formats=(("kind:liner", "float"),))]).run(program, PassContext())


@pytest.mark.parametrize(
    "text",
    [
        "insert-observers{weight=int8:dynamic}",
        "insert-observers{formats={fc:int8:dynamic}}",
        "insert-observers{activation=uint8:affine:dynamic}",
        "insert-observers{activation=int8:channel=1}",
        "insert-observers{activation-formats={fc:int8:token:dynamic}}",
    ],
)
def test_refuses_formats_that_are_not_static(text: str) -> None:
    with pytest.raises(PassOptionError, match="static"):
        parse_pass(text)


def test_weights_and_values_may_have_tables() -> None:
    model = settled(nn.Linear(4, 2), nn.Sigmoid(), nn.Linear(2, 2))
    weight, activation = Format.parse("int4:channel=0:mapping=tanh"), Format.parse("int4:mapping=codebook")
    program = insert(model, values(3, 4), weight=weight, activation=activation)
    assert program.observers["0.weight"].format.mapping.word == "tanh"
    assert program.observers["input_1"].format == activation
    # A range that is known beforehand says nothing about the table that fits.
    assert program.observers["sigmoid"].observer == InsertObservers().observer
    known = insert(model, values(3, 4), activation=Format.parse("int4:mapping=nf"))
    assert known.observers["sigmoid"].observer.word == "fixed"


def test_reads_and_writes_its_options_as_text() -> None:
    item = InsertObservers(
        weight=Format.parse("int4:group=32"),
        observer=Percentile(percentile=99.5),
        formats=(("kind:head", "float"), ("re:^fc", Format.parse("int8"))),
    )
    assert parse_pass(str(item)) == item


def test_refuses_weights_that_are_not_finite() -> None:
    model = settled(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 1] = float("nan")
    program = trace(model, (values(3, 4),))
    with pytest.raises(InputError, match=r"(?s)not finite.*layer '1', tensor @1.weight.*1 of 4 weights"):
        InsertObservers().run(program, PassContext())
