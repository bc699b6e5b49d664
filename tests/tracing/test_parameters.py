"""Tensors of a traced program: names, sharing, and that the model is left alone."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import sqcompile
from sqcompile.errors import TraceError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.arange(8.0))
        self.register_buffer("scratch", torch.full((8,), 2.0), persistent=False)
        self.constant = torch.full((8,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(self.embedding(x) + self.offset * self.scratch + self.constant)
        return self.head(out) + torch.tensor(0.5)


TOKENS = torch.tensor([[1, 2, 3]])


def test_parameters_and_buffers_keep_their_names_and_storage() -> None:
    model = Tied()
    program = sqcompile.trace(model, (TOKENS,))
    names = [name for name, _ in program.tensors()]
    assert {"block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias", "offset", "scratch"} <= set(
        names
    )
    for name in ("block.0.weight", "block.1.bias"):
        assert program.tensor(name) is model.get_parameter(name)
    assert program.tensor("offset") is model.offset


def test_tied_parameters_are_one_tensor_read_by_one_node() -> None:
    model = Tied()
    program = sqcompile.trace(model, (TOKENS,))
    readers = [node for node in program.graph.nodes if node.op == "get_attr" and node.target == "head.weight"]
    assert len(readers) == 1
    assert {user.target for user in readers[0].users} == {
        torch.ops.aten.embedding.default,
        torch.ops.aten.linear.default,
    }
    assert "embedding.weight" not in [name for name, _ in program.tensors()]


def test_a_tied_parameter_is_replaced_at_all_its_uses() -> None:
    model = Tied()
    program = sqcompile.trace(model, (TOKENS,))
    program.set_tensor("head.weight", torch.zeros(16, 8))
    assert torch.equal(program(TOKENS), torch.full((1, 3, 16), 0.5))


def test_one_module_called_twice_shares_its_parameters() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    program = sqcompile.trace(Twice(), (torch.ones(1, 4),))
    assert [name for name, _ in program.tensors()] == ["layer.weight", "layer.bias"]


def test_parameters_stay_trainable() -> None:
    model = Tied()
    program = sqcompile.trace(model, (TOKENS,))
    program(TOKENS).sum().backward()
    assert model.block[0].weight.grad is not None


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()  # one module frozen, the others in training mode
    before = copy.deepcopy(model.state_dict())
    sqcompile.trace(model, (torch.randn(2, 3, 8, 8),))
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_model_is_left_as_it_was_when_tracing_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x if x.sum() > 0 else -x

    model = Fails()
    with pytest.raises(TraceError):
        sqcompile.trace(model, (torch.ones(1),))
    assert model.training
    assert model.calls == 0


def test_a_model_in_training_mode_is_traced_as_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x = torch.randn(8, 4)
    program = sqcompile.trace(model, (x,))
    assert torch.equal(program(x), model.eval()(x))


# --- other things than modules ----------------------------------------------------------------------------


def test_an_exported_program() -> None:
    model, batch = Tied().eval(), torch.export.Dim("batch")
    exported = torch.export.export(model, (TOKENS.repeat(2, 1),), dynamic_shapes={"x": {0: batch}})
    program = sqcompile.trace(exported)
    assert program.tensor("block.0.weight") is model.block[0].weight
    assert [value.name for value in program.signature.inputs] == ["x"]
    assert torch.equal(program(TOKENS.repeat(5, 1)), model(TOKENS.repeat(5, 1)))


def test_an_exported_program_that_was_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Tied().eval()
    torch.export.save(torch.export.export(model, (TOKENS,)), tmp_path / "model.pt2")
    program = sqcompile.trace(torch.export.load(tmp_path / "model.pt2"))
    assert torch.equal(program(TOKENS), model(TOKENS))


def test_graph_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    exported = torch.export.export(model, (x,))
    for graph_module in (fx.symbolic_trace(model), exported.module()):
        program = sqcompile.trace(graph_module, (x,))
        assert [name for name, _ in program.tensors()] == ["0.weight", "0.bias"]
        assert torch.equal(program(x), model(x))


def test_a_program_is_copied() -> None:
    program = sqcompile.trace(Tied(), (TOKENS,))
    twin = sqcompile.trace(program)
    assert twin is not program
    assert twin.text() == program.text()


def test_functions_are_refused() -> None:
    with pytest.raises(TraceError, match="Only modules") as caught:
        sqcompile.trace(torch.relu, (TOKENS,))
    assert caught.value.next_step == "wrap the function in an nn.Module"
