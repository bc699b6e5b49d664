"""What cannot shrink, and who says so: the node and the line of the model's own code."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.programs import data, seeded
from support.removal import remove
from torch import Tensor, nn

from sqcompile.channels import find_groups
from sqcompile.channels.flow import flow_of
from sqcompile.channels.shrink import Shrink
from sqcompile.errors import ChannelGroupError, PassContractError
from sqcompile.passes import RemoveChannels, RemoveNeurons
from sqcompile.pipeline import PassContext
from sqcompile.rewrite import Rewriter
from sqcompile.tracing import trace


class Net(nn.Module):
    """A layer whose neurons something is done to, and one that reads them."""

    kind = "neurons"

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.norm = nn.Linear(3, 8), nn.Linear(8, 2), nn.LayerNorm(8)


class Returned(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.fc(x)
        return self.out(hidden), hidden  # here


class Normed(Net):
    kind = "embedding"  # what a norm takes statistics over is no neuron

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc(x))
        hidden = self.norm(hidden)  # here
        result: Tensor = self.out(hidden)
        return result


class Selected(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        hidden = hidden[:, torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])]  # here
        result: Tensor = self.out(hidden)
        return result


class Regrouped(Net):
    """A number in the code cuts rows of a batch and neurons together."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        mixed = hidden.reshape(5, 8).t().reshape(10, 4)  # here
        result: Tensor = self.out(mixed.reshape(5, 8))
        return result


class Compared(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        hidden = hidden * torch.arange(8)  # here
        result: Tensor = self.out(hidden)
        return result


X = data(5, 3)
KINDS = (Returned, Normed, Selected, Regrouped, Compared)


def line_of(kind: type[nn.Module]) -> str:
    """Return `file:line` of the line that is marked."""
    lines, start = inspect.getsourcelines(kind)
    number = next(index for index, line in enumerate(lines) if line.rstrip().endswith("# here"))
    return f"test_refusals.py:{start + number}"


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_naming_what_cannot_shrink_is_an_error_with_node_and_line(kind: type[Net]) -> None:
    program = trace(seeded(kind), (X,))
    with pytest.raises(ChannelGroupError) as caught:
        remove(RemoveNeurons(ratio=0.5, layers=("fc",)), program)
    text = str(caught.value)
    assert "node %" in caught.value.where and f"8 units of {kind.kind}: " in caught.value.seen
    if kind is not Returned:  # where the value is made, not where it is returned
        assert line_of(kind) in text


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_not_naming_it_is_a_remark(kind: type[Net]) -> None:
    context = PassContext()
    _, result = remove(RemoveChannels(ratio=0.5, kinds=(kind.kind,)), trace(seeded(kind), (X,)), context)
    assert result.changes == 0
    assert any(
        f"keeps its 8 {kind.kind}" in remark.reason and "test_refusals.py" in remark.reason
        for remark in context.remarks
    )


def test_taking_all_of_a_dimension_is_refused_before_anything_changes() -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(torch.relu(self.fc(x)))
            return result

    program = trace(seeded(Plain), (X,))
    before = program.fingerprint(content=True)
    (group,) = find_groups(program)
    with pytest.raises(PassContractError, match="would leave nothing") as caught:
        Shrink(flow_of(program), Rewriter(program), group.units).run()
    assert "node %" in str(caught.value) and "all 8 positions" in str(caught.value)
    assert program.fingerprint(content=True) == before
