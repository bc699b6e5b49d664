"""The signature: how calls are bound, what each mistake is told, and its form in files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.programs import TwoInputs, data, seeded
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sqcompile.errors import FileError, InputError
from sqcompile.signature import Signature, Value, describe_type, short_dtype
from sqcompile.tracing import trace


@pytest.fixture(scope="module")
def signature() -> Signature:
    """The signature of `TwoInputs`: x [batch, 4], pair of two [batch, 4], and the constant 3.0."""
    batch = Dim("batch", min=1, max=10)
    return trace(
        TwoInputs(),
        ((data(3, 4), {"left": data(3, 4), "right": data(3, 4)}), {"scale": 3.0}),
        dynamic_shapes={
            "x": {0: batch},
            "pair": {"left": {0: batch}, "right": {0: batch}},
            "scale": None,
        },
    ).signature


def pair(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"left": data(rows, 4, seed=2), "right": data(rows, 4, seed=3)}


def refused(signature: Signature, *args: Any, **kwargs: Any) -> InputError:
    """Return the error of a call that must be refused; all four parts are said."""
    with pytest.raises(InputError) as caught:
        signature.bind(args, kwargs)
    error = caught.value
    assert error.what and error.where and error.seen and error.expected and error.next_step
    return error


class TestBinding:
    def test_describes_inputs_and_outputs_by_name(self, signature: Signature) -> None:
        assert [str(value) for value in signature.inputs] == [
            "x: f32[batch, 4]",
            "pair.left: f32[batch, 4]",
            "pair.right: f32[batch, 4]",
            "scale = 3.0",
        ]
        assert [str(value) for value in signature.outputs] == [
            "total: f32[batch, 4]",
            "parts.0: f32[batch, 4]",
            "parts.1: f32[batch]",
        ]
        assert [value.name for value in signature.tensor_inputs] == ["x", "pair.left", "pair.right"]
        assert signature.dims == {"batch": (1, 10)}

    def test_positional_and_keyword_arguments_mix_freely(self, signature: Signature) -> None:
        x, both = data(3, 4), pair()
        calls = [
            ((x, both, 3.0), {}),
            ((x, both), {"scale": 3.0}),
            ((x, both), {}),  # what was fixed may be left out
            ((x,), {"pair": both}),
            ((), {"scale": 3.0, "pair": both, "x": x}),
            ((), {"pair": both, "x": x, "extra": None}),  # an argument left at None says nothing
            ((x, both, torch.tensor(3.0)), {}),  # the value that was fixed, in whatever form
        ]
        for args, kwargs in calls:
            flat = signature.bind(args, kwargs)
            assert flat[0] is x and flat[1] is both["left"] and flat[2] is both["right"]
            assert flat[3] == 3.0

    def test_keys_of_nested_dicts_come_in_any_order(self, signature: Signature) -> None:
        both = pair()
        flipped = {"right": both["right"], "left": both["left"]}
        assert list(flipped) != list(both)
        flat = signature.bind((data(3, 4), flipped), {})
        assert flat[1] is both["left"] and flat[2] is both["right"]

    def test_takes_arrays_for_tensors(self, signature: Signature) -> None:
        both = {name: value.numpy() for name, value in pair().items()}
        flat = signature.bind((np.ones((3, 4), np.float32), both), {})
        assert torch.equal(flat[0], torch.ones(3, 4)) and flat[1].dtype is torch.float32

    def test_unflatten_returns_the_models_structure(self, signature: Signature) -> None:
        total, right, sums = data(3, 4), data(3, 4), data(3)
        result = signature.unflatten([total, right, sums])
        assert list(result) == ["total", "parts"] and result["total"] is total
        assert isinstance(result["parts"], tuple) and result["parts"][1] is sums

    def test_variable_arguments(self) -> None:
        class Sum(nn.Module):
            def forward(self, first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
                return first + rest[0] * rest[1]

        signature = trace(Sum(), (data(2), data(2), data(2))).signature
        assert [value.name for value in signature.inputs] == ["first", "input_1", "input_2"]
        assert len(signature.bind((data(2), data(2), data(2)), {})) == 3
        assert "missing" in refused(signature, data(2), data(2)).what
        error = refused(signature, *[data(2)] * 4)
        assert error.what == "The program takes 3 inputs." and error.seen == "4 positional arguments"


class TestMistakes:
    def test_wrong_type(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4).double(), pair())
        assert error.what == "Input 'x' has the wrong type."
        assert error.seen == "f64[3, 4]" and error.expected == "x: f32[batch, 4]"
        assert error.next_step == "convert it with .to(torch.float32)"

    def test_bytes_are_not_only_converted(self, signature: Signature) -> None:
        """A model of images in 0 to 1 answers nonsense for 0 to 255, and nothing would say so."""
        error = refused(signature, torch.zeros(3, 4, dtype=torch.uint8), pair())
        assert error.what == "Input 'x' has the wrong type." and error.seen == "u8[3, 4]"
        assert str(error.next_step).startswith("scale it as in training")
        assert "divided by 255" in str(error.next_step) and ".to(torch.float32)" in str(error.next_step)

    @pytest.mark.parametrize(
        ("shape", "told"),
        [
            ((2, 8, 6, 3), "pass x.permute(0, 3, 1, 2)"),
            ((2, 8, 3, 6), "pass size 3, or make"),
            ((2, 5, 8, 6), "pass size 3, or make"),
        ],
    )
    def test_channels_last(self, shape: tuple[int, ...], told: str) -> None:
        signature = trace(nn.Conv2d(3, 4, 3), (data(2, 3, 8, 6),)).signature
        error = refused(signature, data(*shape))
        assert error.what == "Input 'input' has the wrong size." and told in str(error.next_step)

    def test_wrong_rank(self, signature: Signature) -> None:
        error = refused(signature, data(4), pair())
        assert error.what == "Input 'x' has the wrong number of dimensions." and error.seen == "f32[4]"

    def test_wrong_size(self, signature: Signature) -> None:
        error = refused(signature, data(3, 5), pair())
        assert error.what == "Input 'x' has the wrong size." and error.where == "input 'x', dimension 1"

    def test_two_sizes_of_one_dimension(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4), {**pair(3), "right": data(2, 4)})
        assert error.what == "Dimension 'batch' has two different sizes in one call."
        assert error.where == "input 'pair.right', dimension 0" and error.seen == "3 and 2"

    @pytest.mark.parametrize("rows", [0, 11])
    def test_out_of_range(self, signature: Signature, rows: int) -> None:
        error = refused(signature, data(rows, 4), pair(rows))
        assert error.what == "Dimension 'batch' is out of its range."
        assert error.seen == str(rows) and error.expected == "1 to 10"
        for bound in (1, 10):
            assert signature.bind((data(bound, 4), pair(bound)), {})[0].shape[0] == bound

    def test_a_size_that_follows_from_another(self) -> None:
        class Halves(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return x.repeat_interleave(2) + y[:-1]

        n = Dim("n", min=1)
        signature = trace(
            Halves(), (data(3), data(7)), dynamic_shapes={"x": {0: n}, "y": {0: 2 * n + 1}}
        ).signature
        assert [value.shape for value in signature.inputs] == [("n",), ("2*n + 1",)]
        assert len(signature.bind((data(5), data(11)), {})) == 2
        error = refused(signature, data(5), data(10))
        assert error.what == "A dimension is not '2*n + 1'."
        assert error.seen == "10, with n = 5" and error.expected == "2*n + 1 = 11"

    def test_missing(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4))
        assert error.what == "Input 'pair' is missing." and error.seen == "x"
        assert "pair.left: f32[batch, 4]" in str(error.expected)
        assert refused(signature).seen == "no inputs"

    def test_unknown(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4), pair(), scales=3.0)
        assert error.what == "The program has no input 'scales'."
        assert "did you mean 'scale'?" in str(error.next_step)

    def test_an_argument_of_the_model_that_was_not_traced(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4), pair(), extra=data(1))
        assert error.what == "The program has no input 'extra'."
        assert "trace again" in str(error.next_step)

    def test_given_twice(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4), pair(), x=data(3, 4))
        assert error.what == "Input 'x' was given twice." and error.seen == "positional argument 0, and x=…"

    def test_too_many(self, signature: Signature) -> None:
        error = refused(signature, data(3, 4), pair(), 3.0, None, data(1))
        assert error.what == "The program takes 3 inputs." and error.expected == "x, pair, scale"

    @pytest.mark.parametrize(
        "nested",
        [
            [data(3, 4), data(3, 4)],
            {"left": data(3, 4)},
            {"left": data(3, 4), "wrong": data(3, 4)},
            {"left": data(3, 4), "right": (data(3, 4),)},
            data(3, 4),
        ],
        ids=["list", "missing key", "other key", "deeper", "flat"],
    )
    def test_nested_differently(self, signature: Signature, nested: Any) -> None:
        error = refused(signature, data(3, 4), nested)
        assert error.what == "The inputs are nested differently from those that the model was traced with."
        assert "f32[3, 4]" in str(error.seen)  # types, never the values

    @pytest.mark.parametrize("value", [4.0, data(1), data(5), "3.0", np.ones(3)], ids=type)
    def test_another_constant(self, signature: Signature, value: Any) -> None:
        error = refused(signature, data(3, 4), pair(), scale=value)
        assert error.what == "Input 'scale' was fixed when the model was traced." and error.expected == "3.0"

    @pytest.mark.parametrize("value", ["text", None, object(), [[1.0], [1.0, 2.0]], 2**70], ids=type)
    def test_no_tensor(self, value: Any) -> None:
        error = refused(trace(nn.ReLU(), (data(1),)).signature, value)
        # A list is nested, unless it is the leaf's own values; either way it is an InputError.
        assert error.what in (
            "Input 'input' is not a tensor.",
            "The inputs are nested differently from those that the model was traced with.",
        )


class TestFiles:
    def test_round_trip(self, signature: Signature) -> None:
        again = Signature.from_json(signature.to_json())
        assert again == signature
        assert again.bind((data(3, 4), pair()), {})[3] == 3.0
        assert type(again.unflatten([1, 2, 3])["parts"]) is tuple

    def test_other_constants_survive(self) -> None:
        spec = pytree.tree_structure(((1, 2), {}))
        leaf = pytree.tree_structure(0)
        values = (Value("mode", constant="sum"), Value("dtype", constant=torch.float16))
        stored = Signature(values, (Value("y", (2,), torch.bfloat16),), spec, leaf, ("mode", "dtype"))
        again = Signature.from_json(stored.to_json())
        assert again.outputs[0].dtype is torch.bfloat16
        again.bind(("sum", torch.float16), {})
        assert refused(again, "sum", torch.float32).seen == "dtype"

    def test_hugging_face_outputs_in_a_new_process(self) -> None:
        outputs = pytest.importorskip("transformers.modeling_outputs")
        made = {
            "encoder": outputs.BaseModelOutput(last_hidden_state=data(2)),
            "decoder": outputs.CausalLMOutputWithPast(logits=data(2), hidden_states=(data(2), data(2))),
        }
        leaves, spec = pytree.tree_flatten(made)
        values = tuple(Value(f"output_{index}", (2,), torch.float32) for index in range(len(leaves)))
        stored = Signature((), values, pytree.tree_structure(((), {})), spec)
        script = (
            "import sys; from sqcompile.signature import Signature\n"
            "assert 'transformers' not in sys.modules\n"
            "s = Signature.from_json(sys.stdin.read())\n"
            "made = s.unflatten(range(len(s.outputs)))\n"
            "print(*(type(value).__name__ for value in made.values()), made['decoder'].hidden_states)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], input=stored.to_json(), capture_output=True, text=True
        )
        assert done.stdout.strip() == "BaseModelOutput CausalLMOutputWithPast (2, 3)", done.stderr

    def test_a_missing_package_is_named_with_the_extra_that_brings_it(self) -> None:
        outputs = pytest.importorskip("transformers.modeling_outputs")
        leaves, spec = pytree.tree_flatten(outputs.BaseModelOutput(last_hidden_state=data(2)))
        values = tuple(Value(f"output_{index}", (2,), torch.float32) for index in range(len(leaves)))
        text = Signature((), values, pytree.tree_structure(((), {})), spec).to_json()
        with pytest.raises(FileError, match=r"sqcompile\[llm\]") as caught:
            Signature.from_json(text.replace("transformers.modeling_outputs", "transformers.not_there"))
        assert "transformers.not_there" in str(caught.value.where)

    @pytest.mark.parametrize("container", ["Point", "Boxed", "OrderedDict", "defaultdict"])
    def test_other_containers(self, container: str) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return {
                    "Point": lambda: Point(x + 1, x * 2),
                    "Boxed": lambda: Boxed(x + 1, x * 2),
                    "OrderedDict": lambda: OrderedDict(x=x + 1, y=x * 2),
                    "defaultdict": lambda: defaultdict(list, x=x + 1, y=x * 2),
                }[container]()

        signature = trace(Model(), (data(2),)).signature
        again = Signature.from_json(signature.to_json())
        made = again.unflatten([1, 2])
        assert type(made).__name__ == container
        assert (made["x"] if isinstance(made, dict) else made.x) == 1

    def test_a_class_that_nothing_can_name_is_refused_when_stored(self) -> None:
        class Local:
            pass

        pytree.register_pytree_node(Local, lambda value: ([1], None), lambda leaves, context: Local())
        spec = pytree.tree_structure(Local())
        stored = Signature((), (Value("y", (1,), torch.float32),), pytree.tree_structure(((), {})), spec)
        with pytest.raises(FileError, match="cannot be stored") as caught:
            stored.to_json()
        assert "register" in str(caught.value.next_step)

    @pytest.mark.parametrize(
        "change",
        [
            lambda item: item.pop("inputs"),
            lambda item: item["inputs"][0].update(dtype="load"),
            lambda item: item["inputs"][0].update(dtype="no_such_dtype"),
            lambda item: item["inputs"][0].update(shape=[None]),
            lambda item: item["inputs"].pop(),
            lambda item: item["outputs"].append(item["outputs"][0]),
            lambda item: item.update(dims={"batch": 3}),
            lambda item: item.update(in_spec="[]"),
            lambda item: item.update(in_spec="[1, 2]"),
            lambda item: item.update(out_spec=item["out_spec"].replace("builtins.tuple", "builtins.nothing")),
            lambda item: item.update(kinds=[["builtins", "no_such_class"]]),
            lambda item: item.update(kinds=[["json", "dumps"]]),
        ],
    )
    def test_damaged_text(self, signature: Signature, change: Any) -> None:
        item = json.loads(signature.to_json())
        change(item)
        with pytest.raises(FileError, match="cannot be read") as caught:
            Signature.from_json(json.dumps(item))
        assert caught.value.seen and caught.value.next_step

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"inputs": 3}'])
    def test_no_signature_at_all(self, text: str) -> None:
        with pytest.raises(FileError):
            Signature.from_json(text)


class TestStoredReferences:
    """A stored signature is data: reading one must not run code of the file's choice."""

    @pytest.fixture
    def trap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "trapped_module.py").write_text("raise SystemExit('imported')\nclass Kind: pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        return "trapped_module"

    def stored(self, signature: Signature, **changes: Any) -> str:
        return json.dumps({**json.loads(signature.to_json()), **changes})

    def test_classes(self, signature: Signature, trap: str) -> None:
        with pytest.raises(FileError, match="not imported"):
            Signature.from_json(self.stored(signature, kinds=[[trap, "Kind"]]))

    def test_default_factories(self, signature: Signature, trap: str) -> None:
        context = {"default_factory_module": trap, "default_factory_name": "Kind", "dict_context": []}
        spec = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
        with pytest.raises(FileError, match="not imported"):
            Signature.from_json(self.stored(signature, out_spec=json.dumps(spec)))

    def test_enumerations(self, signature: Signature, trap: str) -> None:
        context = json.dumps([{"__enum__": True, "fqn": f"{trap}:Kind", "name": "x"}])
        spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
        with pytest.raises(FileError, match="not imported"):
            Signature.from_json(self.stored(signature, out_spec=json.dumps(spec)))

    def test_the_trap_works(self, trap: str) -> None:
        with pytest.raises(SystemExit):
            __import__(trap)


def test_short_types() -> None:
    kinds = {
        torch.float32: "f32",
        torch.float16: "f16",
        torch.bfloat16: "bf16",
        torch.int8: "i8",
        torch.uint8: "u8",
        torch.int64: "i64",
        torch.uint16: "u16",
        torch.bool: "bool",
        torch.complex64: "c64",
        None: "none",
    }
    assert {kind: short_dtype(kind) for kind in kinds} == kinds
    assert describe_type(torch.float32, ("batch", 3)) == "f32[batch, 3]"
    assert describe_type(torch.int64, ()) == "i64[]"


class Point(NamedTuple):
    x: Any
    y: Any


@dataclass
class Boxed:
    x: Any
    y: Any


def test_long_lists_are_not_repeated() -> None:
    signature = trace(nn.ReLU(), (data(4, 100),)).signature
    with pytest.raises(InputError, match="nested differently") as caught:
        signature.bind((data(4, 100).tolist(),), {})
    assert len(str(caught.value.seen)) < 400
    assert str(caught.value.seen).endswith("…")


class TwoTables(nn.Module):
    """Rows of two embeddings, one smaller; and an index that nothing looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Embedding(9, 4), nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.large(ids) + self.small(ids) + self.large((ids + shift).clamp(min=0))


@pytest.mark.parametrize("stored", [False, True], ids=["traced", "stored"])
@pytest.mark.parametrize(
    ("ids", "place", "seen", "hint"),
    [
        ([[0, 4], [2, -1]], [1, 1], -1, "mask"),
        ([[0, -100], [2, 3]], [0, 1], -100, "labels"),
        ([[5, 4], [2, 3]], [0, 0], 5, "tokenizer"),
    ],
    ids=["padding", "labels", "too-large"],
)
def test_what_an_embedding_has_no_row_for_is_refused(
    stored: bool, ids: list[list[int]], place: list[int], seen: int, hint: str
) -> None:
    good, shift = torch.tensor([[0, 4], [2, 3]]), torch.tensor([[-7, 0], [0, 0]])
    signature = trace(seeded(TwoTables), (good, shift)).signature
    if stored:
        signature = Signature.from_json(signature.to_json())
    assert [value.limit for value in signature.inputs] == [5, None]
    assert torch.equal(signature.bind((good, shift), {})[0], good)
    with pytest.raises(InputError) as caught:
        signature.bind((torch.tensor(ids), shift), {})
    assert (caught.value.where, caught.value.seen) == (f"input 'ids' at {place}", str(seen))
    assert caught.value.expected == "0 to 4"
    assert caught.value.next_step is not None
    assert hint in caught.value.next_step


def test_programs_are_called_as_their_models_are() -> None:
    model = seeded(TwoInputs)
    x, both = data(3, 4), pair()
    program = trace(model, (x, both))
    expected = model(x, both)
    found = program(pair={"right": both["right"], "left": both["left"]}, x=x)
    assert torch.equal(found["total"], expected["total"])
    assert torch.equal(found["parts"][1], expected["parts"][1])
