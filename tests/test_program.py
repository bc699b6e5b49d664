"""The program: its tensors, snapshots that share them, and how it runs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.programs import Mlp, conv_net, data, mlp, seeded
from torch import nn

from sqcompile.errors import InputError, PassContractError
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.quantization import Format, MinMax
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Sparsity
from sqcompile.tracing import trace

aten = torch.ops.aten


class TestTensors:
    def test_have_the_models_own_names(self) -> None:
        model = seeded(Mlp)
        program = trace(model, (data(2, 8),))
        names = ["first.weight", "first.bias", "second.weight", "second.bias"]
        assert [name for name, _ in program.tensors()] == names
        for name, tensor in program.tensors():
            assert tensor is model.get_parameter(name) and program.tensor(name) is tensor

    def test_by_node(self) -> None:
        program = mlp()
        node = next(node for node in program.graph.nodes if node.op == "get_attr")
        assert program.tensor(node) is program.tensor(str(node.target))

    @pytest.mark.parametrize(
        "name", ["no", "first", "first.no", "no.weight", "first.weight.no", "forward", ""]
    )
    def test_that_are_none(self, name: str) -> None:
        program = mlp()
        assert not program.has_tensor(name)
        with pytest.raises(KeyError):
            program.tensor(name)

    def test_replacing_keeps_the_kind(self) -> None:
        program = mlp()
        program.tensor("second.weight").requires_grad_(True)
        program.set_tensor("first.weight", torch.zeros(16, 8))
        assert isinstance(program.tensor("first.weight"), nn.Parameter)
        program.set_tensor("first.weight", torch.zeros(16, 8, dtype=torch.int8))
        assert not isinstance(program.tensor("first.weight"), nn.Parameter)  # integers cannot be trained
        program.set_tensor("first.table", torch.zeros(3))
        assert not isinstance(program.tensor("first.table"), nn.Parameter)
        own = nn.Parameter(torch.zeros(3))
        program.set_tensor("first.own", own)
        assert program.tensor("first.own") is own

    def test_frozen_parameters_stay_frozen(self) -> None:
        model = seeded(Mlp)
        model.first.weight.requires_grad_(False)
        program = trace(model, (data(2, 8),))
        for name in ("first.weight", "second.weight"):
            program.set_tensor(name, program.tensor(name).detach() * 2)
        assert not program.tensor("first.weight").requires_grad
        assert program.tensor("second.weight").requires_grad

    def test_nothing_of_how_a_tensor_was_made_is_kept(self) -> None:
        """Values made from parameters carry autograd's history; stored, it would hold the old weights."""
        program = mlp()
        made = program.tensor("first.weight") * 2
        assert made.grad_fn is not None
        program.set_tensor("first.weight", made)
        program.set_tensor("table", made)
        for name in ("first.weight", "table"):
            assert program.tensor(name).is_leaf and torch.equal(program.tensor(name), made)

    def test_deleting_forgets_the_promise(self) -> None:
        program = mlp()
        program.sparsity["first.weight"] = Sparsity(torch.ones(16, 8, dtype=torch.bool))
        program.delete_tensor("first.weight")
        assert not program.has_tensor("first.weight") and program.sparsity == {}

    def test_the_model_keeps_its_own(self) -> None:
        model = seeded(Mlp)
        program = trace(model, (data(2, 8),))
        before = copy.deepcopy(model.state_dict())
        program.set_tensor("first.weight", torch.zeros(16, 8))
        program.delete_tensor("second.bias")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])


class TestNames:
    def test_free_names(self) -> None:
        program = mlp()
        assert program.free_name("first.weight_codes") == "first.weight_codes"
        assert program.free_name("first.weight") == "first.weight_1"
        program.set_tensor("first.weight_1", torch.zeros(1))
        assert program.free_name("first.weight") == "first.weight_2"
        assert program.free_name("new.module.weight") == "new.module.weight"

    @pytest.mark.parametrize("name", ["first", "graph", "forward", "training", "first.forward", "_modules"])
    def test_what_is_no_tensor_takes_a_name_too(self, name: str) -> None:
        program = mlp()
        free = program.free_name(name)
        assert free == f"{name}_1"
        program.set_tensor(free, torch.zeros(1))
        with pytest.raises(PassContractError, match="is taken") as caught:
            program.set_tensor(name, torch.zeros(1))
        assert caught.value.where == f"tensor @{name}" and caught.value.next_step

    def test_nothing_lies_inside_a_tensor(self) -> None:
        program = mlp()
        with pytest.raises(PassContractError):
            program.set_tensor("first.weight.scale", torch.zeros(1))
        assert program.free_name("first.weight.scale") == "first.weight_scale"
        assert program.free_name("first.weight.inner.scale") == "first.weight_inner_scale"


class TestSnapshots:
    def test_share_tensors_and_nothing_else(self) -> None:
        program = conv_net()
        text, print_ = str(program), program.fingerprint()
        twin = program.snapshot()
        assert str(twin) == text and twin.fingerprint() == print_
        for (name, left), (other, right) in zip(program.tensors(), twin.tensors(), strict=True):
            assert name == other and left is right
        x = data(2, 3, 6, 6)
        before = program(x)

        edit = Rewriter(twin)
        result = twin.output.args[0][0]
        with edit.after(result):
            edit.replace(result, edit.call(aten.neg.default, result), only=lambda user: user.op == "output")
        edit.replace_tensor(
            next(node for node in twin.graph.nodes if node.op == "get_attr"), torch.zeros(8, 3, 3, 3)
        )
        edit.finish()
        twin.level = Level.QDQ
        twin.sparsity["stem.weight"] = Sparsity(torch.ones(8, 3, 3, 3, dtype=torch.bool))
        twin.output.meta["mark"] = True

        assert str(program) == text and program.fingerprint() == print_
        assert program.level is Level.ATEN and program.sparsity == {} and "mark" not in program.output.meta
        assert torch.equal(program(x), before) and not torch.equal(twin(x), before)

    def test_copy_what_observers_have_seen(self) -> None:
        program = mlp()
        program.observers["x"] = MinMax().start(Format())
        program.observers["x"].observe(torch.tensor([1.0, 2.0]))
        twin = program.snapshot()
        program.observers["x"].observe(torch.tensor([7.0]))
        assert [float(bound) for bound in twin.observers["x"].range()] == [1.0, 2.0]
        assert [float(bound) for bound in program.observers["x"].range()] == [1.0, 7.0]

    def test_restore(self) -> None:
        program = mlp()
        text = str(program)
        saved = program.snapshot()
        program.set_tensor("first.weight", torch.zeros(16, 8))
        program.output.args = ((program.placeholders[0],),)
        program.recompile()
        program.level = Level.QDQ
        program.restore(saved)
        assert str(program) == text and program.level is Level.ATEN
        assert torch.equal(program(data(2, 8)), mlp()(data(2, 8)))

    def test_make_no_code_until_they_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Code generation is most of a snapshot's cost, and most snapshots never run."""
        program = conv_net()
        monkeypatch.setattr(torch.fx.Graph, "python_code", lambda *a, **k: pytest.fail("it made code"))
        program.snapshot().snapshot()

    def test_modes_and_metadata_are_kept(self) -> None:
        program = mlp()
        twin = program.snapshot()
        assert not twin.graph_module.training
        for left, right in zip(program.graph.nodes, twin.graph.nodes, strict=True):
            assert left.name == right.name and left.meta == right.meta and left.meta is not right.meta

    def test_deep_copies(self) -> None:
        twin = copy.deepcopy(mlp().graph_module)
        assert torch.equal(twin(data(2, 8))[0], mlp()(data(2, 8)))


class TestRunning:
    def test_equals_the_model(self) -> None:
        model = seeded(Mlp)
        x = data(2, 8)
        program = trace(model, (x,))
        # The same operators on the same tensors: equal to the last bit.
        assert torch.equal(program(x), model(x)) and torch.equal(program.run([x])[0], model(x))

    def test_dynamic_sizes(self) -> None:
        program = mlp(dynamic=True)
        for rows in (1, 2, 5, 64):
            assert program(data(rows, 8)).shape == (rows, 4)

    def test_stays_trainable(self) -> None:
        program = mlp()
        program(data(2, 8)).sum().backward()
        gradient = program.tensor("first.weight").grad
        assert gradient is not None and gradient.abs().sum() > 0
        program.tensor("first.weight").grad = None

    def test_values_that_an_operator_refuses(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(10, 4)

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.table(ids + 0) * 2  # computed: the signature knows its limit otherwise

        program = trace(seeded(Model), (torch.tensor([[1, 2]]),))
        with pytest.raises(InputError, match="cannot run on these inputs") as caught:
            program(torch.tensor([[1, 10]]))
        error = caught.value
        assert "%embedding (table, test_program.py:" in str(error.where) and "IndexError" in str(error.seen)
        assert error.expected and error.next_step

    def test_numbers_of_another_type_than_the_weights(self) -> None:
        """Tracing takes them, with linear layers; NumPy's are float64 where nothing else is said."""
        x = torch.from_numpy(np.ones((2, 3)))
        with pytest.raises(InputError, match=r"with \.float\(\)"):
            trace(nn.Linear(3, 2), (x,))(x)
        assert trace(nn.Linear(3, 2), (x.float(),))(x.float()).shape == (2, 2)

    def test_another_number_of_inputs(self) -> None:
        with pytest.raises(InputError):
            mlp().run([])

    def test_errors_of_ours_pass_through(self) -> None:
        program = mlp()
        edit = Rewriter(program)
        linear = next(program.compute_nodes())
        with edit.before(linear):
            mask = edit.constant("mask", torch.ones(16, 8, dtype=torch.bool))
            edit.set_argument(linear, 1, edit.call(torch.ops.sqcompile.mask.default, linear.args[1], mask))
        edit.finish()
        program.set_tensor("mask", torch.ones(16, 7, dtype=torch.bool))
        with pytest.raises(InputError, match="mask does not fit"):
            program(data(2, 8))

    def test_edits_take_effect_after_recompile(self) -> None:
        program = mlp()
        x = data(2, 8)
        program(x)
        program.output.args = ((program.output.args[0][0].args[0],),)
        program.recompile()
        assert program.run([x])[0].shape == (2, 16)


def test_views_of_the_graph() -> None:
    program = mlp()
    assert [node.name for node in program.placeholders] == ["x"]
    assert [node.name for node in program.compute_nodes()] == ["linear", "relu", "linear_1"]
    assert program.output.op == "output" and program.graph is program.graph_module.graph


def test_save_and_load(tmp_path: Path) -> None:
    program = mlp()
    program.save(tmp_path / "mlp.pt2")
    again = Program.load(tmp_path / "mlp.pt2")
    assert str(again) == str(program) and torch.equal(again(data(2, 8)), program(data(2, 8)))


def test_to_exported_program() -> None:
    exported = mlp(dynamic=True).to_exported_program()
    assert torch.equal(exported.module()(data(3, 8)), mlp(dynamic=True)(data(3, 8)))
