"""Times of layers: every layer is found again in what ONNX Runtime made of the model."""

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.passes import (
    Calibrate,
    FoldBatchNorm,
    FoldQDQ,
    FreezeObservers,
    InsertObservers,
    QuantizeWeights,
)

INPUTS = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions that fuse with batch norm, ReLU and a sum, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(y + self.second(y))
        return self.head(y.mean((2, 3)))


STATIC = (FoldBatchNorm(), InsertObservers(), Calibrate(), FreezeObservers(), FoldQDQ())


@pytest.mark.parametrize("passes", [(), STATIC], ids=["dense", "int8"])
@pytest.mark.parametrize("from_file", [False, True])
def test_every_layer_has_a_time(passes, from_file, tmp_path):
    compiled = sqcompile.compile(
        Net().eval(), passes=passes, example_inputs=INPUTS, calibration=[INPUTS], backend="onnxruntime"
    )
    session = compiled.session
    if from_file:
        compiled.save(tmp_path / "net.onnx")
        session = sqcompile.load(tmp_path / "net.onnx", threads=1)
    times = session.profile([INPUTS], {"first": 1, "second": 1, "head": 1}, runs=2)
    assert set(times) == {"first", "second", "head"}
    assert all(0 < time < 1e9 for time in times.values())


def test_the_report_gets_times_and_verdicts():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    compiled = sqcompile.compile(model, [QuantizeWeights()], example_inputs=inputs, backend="onnxruntime")
    assert compiled.report.layers[0].verdict == ""
    report = compiled.measure(runs=3)
    assert report.latency is not None and report.latency.runs == 3
    for row in report.layers:
        assert row.dense_ns and row.compiled_ns
        slower = row.compiled_ns > 0.97 * row.dense_ns
        assert row.verdict.startswith("does not pay here") == slower
    assert report.dense_file_bytes and report.dense_file_bytes > 4 * (64 * 64 + 64 * 8)
    assert "latency" in str(report)
