from __future__ import annotations

from typing import Any

import pytest
import torch
from support.passes import refuse_other_levels
from torch import Tensor, nn

from sqcompile import Pass, PassContext, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, InputError, PassOptionError, SelectionError, TrainingError
from sqcompile.passes import ApplyMasks, DistillBlocks, MaskWeights, RemoveChannels
from sqcompile.pipeline import PassManager
from sqcompile.verify import check_sparsity

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(8))
ROWS: Any = {"x": {0: torch.export.Dim("rows")}}
HALF = MaskWeights(sparsity=0.5, layers=("blocks",))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Model(nn.Module):
    """Two blocks between a stem and a head that lie in none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x)
        return result


class Tied(Model):
    """The head multiplies with a weight of the last block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        last = self.blocks[1]
        assert isinstance(last, Block)
        return nn.functional.linear(x, last.up.weight)


def model(kind: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    return kind().eval()


def run(*passes: Pass, kind: type[Model] = Model, batches: Any = BATCHES) -> tuple[Program, list[Any]]:
    program = trace(model(kind), (X,), dynamic_shapes=ROWS)
    context = PassContext(calibration=None if batches is None else Calibration(batches, program.signature))
    return program, PassManager(passes).run(program, context)


def loss(program: Program, inputs: Tensor = X) -> float:
    with torch.no_grad():
        return float((program(inputs) - model()(inputs)).square().mean())


def test_recovers_what_pruning_cost() -> None:
    pruned, _ = run(HALF)
    program, (_, record) = run(HALF, DistillBlocks(epochs=40, rate=1e-2))
    assert program.text() == pruned.text(), "the graph is as it was"
    assert loss(program) < 0.25 * loss(pruned)
    assert set(record.facts) == {"blocks.0", "blocks.1"}
    assert all(item["error after"] < item["error before"] for item in record.facts.values())
    assert record.changes == 8, "weights and biases of four layers"
    for name, tensor in pruned.tensors():
        changed = not torch.equal(tensor, program.tensor(name))
        assert changed == (name.startswith("blocks.") and not name.endswith("mask")), name


def test_each_block_learns_on_what_the_blocks_before_it_make() -> None:
    """The second block is brought near the dense one's output although the first is left broken."""
    options: Any = {"epochs": 40, "rate": 1e-2}
    program, (_, record) = run(HALF, DistillBlocks(blocks=("blocks.1",), **options))
    (facts,) = record.facts.values()
    with torch.no_grad():
        dense = model()
        wanted = dense.blocks[1](dense.blocks[0](dense.stem(X)))
        seen = X
        for name in ("stem", "blocks.0", "blocks.1"):
            seen = _part(program, name, seen)
    error = (seen - wanted).square().mean() / wanted.square().mean()
    # Of all rows at once; the pass takes the mean of batches, each over its own mean square.
    assert facts["error after"] == pytest.approx(float(error), rel=0.1)
    assert facts["error after"] < 0.5 * facts["error before"]


def _part(program: Program, name: str, x: Tensor) -> Tensor:
    def weight(leaf: str) -> Tensor:
        value = program.tensor(f"{leaf}.weight")
        return value * program.tensor(f"{leaf}.weight_mask") if leaf != "stem" else value

    if name == "stem":
        return nn.functional.linear(x, weight("stem"), program.tensor("stem.bias"))
    hidden = torch.relu(nn.functional.linear(x, weight(f"{name}.up"), program.tensor(f"{name}.up.bias")))
    return x + nn.functional.linear(hidden, weight(f"{name}.down"), program.tensor(f"{name}.down.bias"))


@pytest.mark.parametrize("applied", [False, True], ids=["masked", "applied"])
def test_zeros_stay(applied: bool) -> None:
    program, _ = run(HALF, *([ApplyMasks()] if applied else []), DistillBlocks(epochs=3, rate=1e-2))
    check_sparsity(program)
    weight = program.tensor("blocks.0.up.weight").detach()
    (promise,) = [item for name, item in program.sparsity.items() if name.startswith("blocks.0.up")]
    assert int((~promise.mask).sum()) == weight.numel() // 2
    if applied:
        assert bool((weight[~promise.mask] == 0).all())


def test_narrower_blocks_are_brought_near_the_wide_ones() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1))
                for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = x + stage(x)
            return x

    torch.manual_seed(0)
    images = torch.randn(32, 3, 6, 6)
    program = trace(Net().eval(), (images[:8],))
    context = PassContext(calibration=Calibration(images.split(8), program.signature))
    passes = [RemoveChannels(ratio=0.5), DistillBlocks(epochs=20, rate=5e-3)]
    _, record = PassManager(passes).run(program, context)
    assert program.tensor("stages.0.0.weight").shape[0] == 6
    assert set(record.facts) == {"stages.0", "stages.1"}
    assert all(item["error after"] < 0.7 * item["error before"] for item in record.facts.values())


def test_nothing_to_learn_changes_nothing() -> None:
    program, (record,) = run(DistillBlocks(epochs=2))
    assert record.changes == 0 and loss(program) == 0
    assert any("brought it no nearer" in str(remark) for remark in record.remarks)


def test_a_weight_that_something_else_reads_stays() -> None:
    program, _ = run(HALF, DistillBlocks(epochs=3, rate=1e-2), kind=Tied)
    dense = model(Tied)
    assert torch.equal(program.tensor("blocks.1.up.weight"), dense.get_parameter("blocks.1.up.weight"))
    assert not torch.equal(
        program.tensor("blocks.1.down.weight"), dense.get_parameter("blocks.1.down.weight")
    )


def test_the_model_keeps_its_weights_and_runs_repeat() -> None:
    original = model()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    results = []
    for _ in range(2):
        program = trace(original, (X,), dynamic_shapes=ROWS)
        context = PassContext(calibration=Calibration(BATCHES, program.signature), seed=3)
        PassManager([HALF, DistillBlocks(epochs=2)]).run(program, context)
        results.append(program.fingerprint(content=True))
    assert results[0] == results[1]
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


def test_memory_bounds_the_batches() -> None:
    _, (_, record) = run(HALF, DistillBlocks(epochs=1, max_bytes=4000))
    assert any("batches only" in str(remark) for remark in record.remarks)


def test_blocks_and_exclude_choose() -> None:
    _, (_, record) = run(HALF, DistillBlocks(epochs=1, exclude=("blocks.0",)))
    assert set(record.facts) == {"blocks.1"}
    _, (_, record) = run(HALF, DistillBlocks(epochs=1, blocks=("blocks.*.up", "head")))
    assert set(record.facts) == {"blocks.0.up", "blocks.1.up", "head"}


def test_a_model_without_blocks() -> None:
    program = trace(nn.Sequential(nn.ReLU()), (BATCHES[0],))
    context = PassContext(calibration=Calibration(BATCHES, program.signature))
    (record,) = PassManager([DistillBlocks()]).run(program, context)
    assert record.changes == 0 and "no block" in str(record.remarks[0])


def test_a_named_block_of_another_width_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = torch.randn(4, 3, 5, 5)

    def compress(item: DistillBlocks) -> Any:
        program = trace(net, (images,))
        context = PassContext(calibration=Calibration([images], program.signature))
        return PassManager([RemoveChannels(ratio=0.5), item]).run(program, context)

    with pytest.raises(InputError, match="does not fit the dense") as caught:
        compress(DistillBlocks(blocks=("0",)))
    assert "block '0'" in str(caught.value) and "[4, 4, 5, 5]" in str(caught.value.seen)
    assert "[4, 8, 5, 5]" in str(caught.value.expected)
    _, record = compress(DistillBlocks(epochs=1))
    assert any("cannot be distilled" in str(remark) for remark in record.remarks)
    assert set(record.facts) == {"2"}, "the other block is trained all the same"


def test_divergence_names_the_block() -> None:
    with pytest.raises(TrainingError, match="diverged") as caught:
        run(HALF, DistillBlocks(epochs=5, rate=1e30))
    assert "blocks.0" in str(caught.value)


def test_needs_data_and_a_dense_program() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run(HALF, DistillBlocks(), batches=None)
    with pytest.raises(CalibrationError, match="no dense program"):
        DistillBlocks().run(trace(model(), (X,), dynamic_shapes=ROWS), PassContext())


def test_unknown_blocks() -> None:
    with pytest.raises(SelectionError, match=r"blocks\.7"):
        run(HALF, DistillBlocks(blocks=("blocks.7",)))


@pytest.mark.parametrize("options", [{"epochs": 0}, {"rate": 0.0}, {"rate": float("inf")}, {"max_bytes": 0}])
def test_refuses_options(options: dict[str, Any]) -> None:
    with pytest.raises(PassOptionError, match=next(iter(options)).replace("_", "[_-]")):
        DistillBlocks(**options)


def test_refuses_other_levels() -> None:
    refuse_other_levels(DistillBlocks())


def test_text_reads_back() -> None:
    item = DistillBlocks(epochs=3, rate=1e-3, blocks=("model.layers.*",))
    assert Pass.parse(str(item)) == item
