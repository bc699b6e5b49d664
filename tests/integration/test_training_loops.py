"""The examples with other people's training loops; skipped where those are not installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.passes import ApplyMasks, FineTune, MaskWeights, PruneGradually, TrainSparse


def zeros_hold(compiled: sqcompile.Compiled, count: int) -> None:
    promises = compiled.program.sparsity
    assert len(promises) == count
    for name, promise in promises.items():
        assert promise.sparsity == pytest.approx(0.75, abs=0.02)
        assert not compiled.program.tensor(name)[~promise.mask].any()


@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    pytest.importorskip("lightning")
    from digits_cnn import load_data, train_digits_cnn
    from train_with_lightning import fine_tune

    from sqcompile.evaluation import accuracy

    model, _ = train_digits_cnn(epochs=4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    data = load_data()
    prune = MaskWeights(sparsity=0.75)
    found = []
    for passes in ([prune], [PruneGradually(prune=prune, rounds=2, train=lambda m: fine_tune(m, 1))]):
        compiled = sqcompile.compile(
            model,
            passes=[*passes, ApplyMasks()],
            example_inputs=(data.train_images[:8],),
            dynamic_shapes={"x": {0: "batch"}},
            backend="reference",
        )
        assert isinstance(compiled, sqcompile.Compiled)
        zeros_hold(compiled, 6)
        found.append(accuracy(compiled, data.test_images, data.test_labels))
    assert found[1] > found[0] + 0.1, "a quarter of the weights is too few without training"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_transformers() -> None:
    pytest.importorskip("accelerate")
    from train_with_transformers import distill
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    teacher = LlamaForCausalLM(config).eval()
    rows = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(0))
    losses: list[float] = []

    def train(module: nn.Module) -> float:
        losses.append(distill(module, teacher, rows, steps=2))
        losses.append(distill(module, teacher, rows, steps=20))
        losses.append(distill(module, teacher, rows, steps=2))
        return losses[-1]

    prune = MaskWeights(sparsity=0.75, exclude=("lm_head",))
    compiled = sqcompile.compile(
        teacher,
        passes=[prune, FineTune(train=train), ApplyMasks()],
        example_inputs={"input_ids": rows[:4]},
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch")}},
        backend="reference",
    )
    assert isinstance(compiled, sqcompile.Compiled)
    zeros_hold(compiled, 14)
    assert losses[-1] < 0.8 * losses[0], "the trainer moves the weights that are left"


@pytest.mark.filterwarnings("ignore")
def test_penalties_follow_the_optimizer_of_a_trainer() -> None:
    """Accelerate wraps optimizers; a proximal step stands behind each of theirs all the same."""
    pytest.importorskip("accelerate")
    from train_with_transformers import distill
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).eval()
    rows = torch.randint(32, (8, 8), generator=torch.Generator().manual_seed(0))
    compiled = sqcompile.compile(
        model,
        passes=[TrainSparse(train=lambda module: distill(module, model, rows, 10), strength=2.0)],
        example_inputs={"input_ids": rows},
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch")}},
        backend="reference",
    )
    assert isinstance(compiled, sqcompile.Compiled)
    zeros = compiled.report.passes[0].facts["zero"]
    # Ten steps of a cosine from 5e-4 to 0 move weights of standard deviation 0.02 by about 5e-3 towards zero.
    assert len(zeros) == 8 and all(0.05 < part < 0.6 for part in zeros.values())
