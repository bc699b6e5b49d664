"""Every architecture of the zoo: traced, functional, and equal to the model at other sizes."""

from collections.abc import Iterator

import pytest
import torch
from support.zoo import ZOO, ZooModel
from torch import nn
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile import Program
from sqcompile.text import source_line
from sqcompile.tracing.functionalize import is_in_place


@pytest.fixture(scope="module", params=ZOO.values(), ids=ZOO.keys())
def traced(request: pytest.FixtureRequest) -> Iterator[tuple[ZooModel, nn.Module, Program]]:
    zoo: ZooModel = request.param
    model = zoo.make()
    yield zoo, model, sqcompile.trace(model, zoo.inputs(), dynamic_shapes=zoo.dynamic_shapes)


def assert_equal(actual: object, expected: object) -> None:
    """Same structure, same classes, same bits: the program runs the very operators of the model."""
    assert type(actual) is type(expected)
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize(("batch", "sequence"), [(1, 12), (3, 17)])
def test_equals_the_model_at_other_sizes(
    traced: tuple[ZooModel, nn.Module, Program], batch: int, sequence: int
) -> None:
    zoo, model, program = traced
    args, kwargs = zoo.inputs(seed=7, batch=batch, sequence=sequence)
    with torch.no_grad():
        assert_equal(program(*args, **kwargs), model(*args, **kwargs))


def test_dimensions_have_the_names_that_the_user_gave(traced: tuple[ZooModel, nn.Module, Program]) -> None:
    zoo, _, program = traced
    assert set(program.signature.dims) == ({"batch", "sequence"} if zoo.has_sequence else {"batch"})
    assert program.signature.dims["batch"] == (0, 64)


def test_nothing_is_written_in_place(traced: tuple[ZooModel, nn.Module, Program]) -> None:
    _, _, program = traced
    assert not [node.name for node in program.compute_nodes() if is_in_place(node)]
    program.to_exported_program()  # its verifier takes functional graphs only


def test_every_operator_knows_its_line(traced: tuple[ZooModel, nn.Module, Program]) -> None:
    _, _, program = traced
    # Sizes of inputs are torch.export's own nodes: no line of the model asks for them.
    nodes = [node for node in program.compute_nodes() if node.target is not torch.ops.aten.sym_size.int]
    assert not [node.name for node in nodes if not source_line(node)]


def test_tensors_are_the_models_own(traced: tuple[ZooModel, nn.Module, Program]) -> None:
    _, model, program = traced
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    parameters = {name for name, tensor in program.tensors() if isinstance(tensor, nn.Parameter)}
    assert parameters <= set(own)
    for name in parameters:
        assert program.tensor(name).data_ptr() == own[name].data_ptr()
    assert len({id(own[name]) for name in parameters}) == len(parameters)
