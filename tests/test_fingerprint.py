"""The fingerprint changes with every kind of change, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import Mlp, conv_net, data, mlp, seeded
from torch import fx

from sqcompile.fingerprint import checksum, tensor_identity
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.quantization import Format, HistogramMSE, MinMax
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity
from sqcompile.tracing import trace

aten = torch.ops.aten
MASK = torch.arange(128).reshape(16, 8) % 2 == 0


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in program.graph.nodes if item.name == name)


def observed() -> Program:
    program = mlp()
    program.observers["x"] = HistogramMSE(bins=64).start(Format())
    program.observers["x"].observe(data(20))
    program.sparsity["first.weight"] = Sparsity(MASK)
    return program


def add_node(program: Program) -> None:
    with program.graph.inserting_after(node(program, "relu")):
        program.graph.call_function(aten.neg.default, (node(program, "relu"),))


def swap_order(program: Program) -> None:
    node(program, "first_weight").prepend(node(program, "first_bias"))


def keyword(program: Program) -> None:
    node(program, "relu").kwargs = {"extra": 1}


def replaced(program: Program) -> None:
    program.set_tensor("first.weight", program.tensor("first.weight").detach().clone())


def written(program: Program) -> None:
    replaced(program)
    before = program.fingerprint()
    with torch.no_grad():
        program.tensor("first.weight")[0, 0] += 1
    assert program.fingerprint() != before


CHANGES: dict[str, Callable[[Program], object]] = {
    "level": lambda p: setattr(p, "level", Level.QDQ),
    "operator": lambda p: setattr(node(p, "relu"), "target", aten.neg.default),
    "argument": lambda p: setattr(node(p, "linear_1"), "args", (*node(p, "linear_1").args[:2], None)),
    "keyword": keyword,
    "new node": add_node,
    "order": swap_order,
    "output": lambda p: setattr(p.output, "args", ((node(p, "relu"),),)),
    "recorded shape": lambda p: node(p, "relu").meta.update(val=torch.empty(3, 16, device="meta")),
    "recorded type": lambda p: node(p, "relu").meta.update(
        val=torch.empty(2, 16, dtype=torch.int8, device="meta")
    ),
    "recorded nothing": lambda p: node(p, "relu").meta.pop("val"),
    "tensor": replaced,
    "content of a tensor": written,
    "name of a tensor": lambda p: setattr(node(p, "first_weight"), "target", "second.weight"),
    "name of an input": lambda p: setattr(node(p, "x"), "name", "y"),
    "signature's input": lambda p: setattr(
        p, "signature", replace(p.signature, inputs=(replace(p.signature.inputs[0], name="y"),))
    ),
    "signature's output": lambda p: setattr(
        p, "signature", replace(p.signature, outputs=(replace(p.signature.outputs[0], name="y"),))
    ),
    "signature's dims": lambda p: setattr(p, "signature", replace(p.signature, dims={"n": (1, 2)})),
    "signature's arguments": lambda p: setattr(p, "signature", replace(p.signature, arg_names=("z",))),
    "structure of outputs": lambda p: setattr(
        p, "signature", replace(p.signature, out_spec=torch.utils._pytree.tree_structure([0]))
    ),
    "new observer": lambda p: p.observers.update(y=MinMax().start(Format())),
    "no observer": lambda p: p.observers.clear(),
    "what an observer saw": lambda p: p.observers["x"].observe(torch.tensor([0.5])),
    "another observer": lambda p: p.observers.update(x=HistogramMSE(bins=64).start(Format())),
    "promise": lambda p: p.sparsity.clear(),
    "promised mask": lambda p: p.sparsity.update({"first.weight": Sparsity(~MASK)}),
    "promised pattern": lambda p: p.sparsity.update({"first.weight": Sparsity(MASK, Pattern.parse("2:4"))}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    program = observed()
    before = program.fingerprint()
    assert program.snapshot().fingerprint() == before
    CHANGES[change](program)
    assert program.fingerprint() != before


def test_equal_data_in_another_order_is_what_an_observer_saw() -> None:
    """States count by content: two that saw the same are the same."""
    prints = set()
    for parts in ((1.0, 2.0), (2.0, 1.0)):
        program = mlp()
        program.observers["x"] = MinMax().start(Format())
        for value in parts:
            program.observers["x"].observe(torch.tensor([value]))
        prints.add(program.fingerprint())
    assert len(prints) == 1


def test_what_does_not_count() -> None:
    program = conv_net()
    before = program.fingerprint()
    for item in program.compute_nodes():
        item.name = f"{item.name}_renamed"
        item.meta["note"] = "anything"
    program.set_tensor("unused", torch.zeros(3))
    program.recompile()
    program(data(2, 3, 6, 6))
    assert program.fingerprint() == before


def test_an_edit_that_is_undone() -> None:
    program = mlp()
    before = program.fingerprint()
    edit = Rewriter(program)
    relu = node(program, "relu")
    with edit.after(relu):
        negated = edit.call(aten.neg.default, relu)
    edit.replace(relu, negated)
    assert program.fingerprint() != before
    edit.replace(negated, relu)
    edit.finish()
    assert program.fingerprint() == before


def test_arguments_that_hold_nodes_in_slices_and_tables() -> None:
    program = mlp()
    relu, linear = node(program, "relu"), node(program, "linear")
    prints = set()
    for argument in (
        slice(relu, None),
        slice(linear, None),
        {"a": relu},
        {"a": linear},
        [relu],
        [linear],
        (relu, linear),
    ):
        node(program, "linear_1").args = (argument,)
        prints.add(program.fingerprint())
    assert len(prints) == 7


class TestContent:
    def test_is_equal_where_identity_is_not(self) -> None:
        left, right = mlp(), mlp()
        for name, tensor in list(right.tensors()):
            right.set_tensor(name, tensor.detach().clone())
        assert left.fingerprint() != right.fingerprint()
        assert left.fingerprint(content=True) == right.fingerprint(content=True)
        with torch.no_grad():
            right.tensor("first.weight")[3, 3] += 1e-7
        assert left.fingerprint(content=True) != right.fingerprint(content=True)

    def test_is_equal_when_traced_again(self) -> None:
        prints = {trace(seeded(Mlp), (data(2, 8),)).fingerprint(content=True) for _ in range(2)}
        assert prints == {mlp().fingerprint(content=True)}


class TestTensors:
    def test_identity(self) -> None:
        tensor = torch.zeros(3, 4)
        before = tensor_identity(tensor)
        assert tensor_identity(tensor) == before == tensor_identity(tensor.detach())
        for other in (tensor.clone(), tensor.t(), tensor[:2], tensor[1:], tensor.view(torch.int32)):
            assert tensor_identity(other) != before
        tensor.add_(0)
        assert tensor_identity(tensor) != before

    def test_identity_of_inference_tensors(self) -> None:
        with torch.inference_mode():
            tensor = torch.zeros(3)
        assert tensor_identity(tensor) == tensor_identity(tensor)

    @settings(deadline=None)
    @given(
        st.lists(st.integers(0, 255), min_size=1, max_size=200),
        st.sampled_from([torch.uint8, torch.float32, torch.bfloat16, torch.int64]),
        st.data(),
    )
    def test_checksum_sees_every_value_and_its_place(
        self, values: list[int], dtype: torch.dtype, draw: st.DataObject
    ) -> None:
        tensor = torch.tensor(values).to(dtype)
        total = checksum(tensor)
        assert checksum(tensor.clone()) == total
        place = draw.draw(st.integers(0, len(values) - 1))
        other = tensor.clone()
        other[place] = (values[place] + 1) % 256
        assert checksum(other) != total
        order = draw.draw(st.permutations(range(len(values))))
        moved = tensor[torch.tensor(order)]
        assert (checksum(moved) == total) == torch.equal(moved, tensor)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (65, 129), (1000003,)])
    def test_checksum_of_any_shape(self, shape: tuple[int, ...]) -> None:
        tensor = data(*shape)
        assert checksum(tensor) == checksum(tensor.clone())
        if tensor.numel():
            other = tensor.clone()
            other.reshape(-1)[-1] += 1
            assert checksum(other) != checksum(tensor)

    def test_checksum_of_views(self) -> None:
        base = data(64, 33)
        for view in (
            base.t(),
            base[1:],
            base[:, 1:],
            base.reshape(-1)[1:],
            base.bool(),
            base.expand(2, 64, 33),
        ):
            assert checksum(view) == checksum(view.contiguous().clone())

    @pytest.mark.parametrize(
        "shuffle",
        [
            lambda x: x.flip(0),
            lambda x: x.flip(1),
            lambda x: x[[1, 0, *range(2, 256)]],
            lambda x: x[:, [2, 3, 0, 1, *range(4, 256)]],
        ],
    )
    def test_checksum_of_rows_and_columns_that_change_places(
        self, shuffle: Callable[..., torch.Tensor]
    ) -> None:
        tensor = data(256, 256)
        assert checksum(shuffle(tensor)) != checksum(tensor)
