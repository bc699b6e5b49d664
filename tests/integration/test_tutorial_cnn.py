"""The tutorial of a CNN begins with files that an example writes: the command line takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from digits_cnn import Digits, build_model, write

import sqcompile


def test_the_files_of_the_example_compile(tmp_path: Path) -> None:
    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(300, dtype=torch.int64)
    model = build_model().eval()
    write(tmp_path, model, Digits(images, labels, images[:40], labels[:40]))
    compiled = sqcompile.compile(
        str(tmp_path / "model.pt2"),
        passes="int8-static",
        calibration=str(tmp_path / "calibration.npz"),
        backend="native",
    )
    assert isinstance(compiled, sqcompile.Compiled)
    test = np.load(tmp_path / "test.npz")
    assert test["x"].shape == (40, 1, 8, 8) and test["labels"].shape == (40,)
    compiled.save(tmp_path / "int8.sqm")
    # Another batch than the one that was traced.
    outputs = sqcompile.load(tmp_path / "int8.sqm")(torch.from_numpy(test["x"]))
    expected = model(images[:40])
    # 8 bits on random weights: an error of some percent of the outputs' size.
    assert (outputs - expected).norm() < 0.15 * expected.norm()
