"""Time of GPTQ on one large layer, beside a plain implementation of the reference code's algorithm.

    OMP_NUM_THREADS=2 python benchmarks/gptq_speed.py [--outputs 5632] [--inputs 2048] [--group 128] [--runs 5]

The other side is written here after the paper's reference repository (IST-DASLab/gptq): columns in order of the
Hessian's diagonal, scales of groups from the weight as it was (act-order with static groups, no search), blocks of
128 columns, one matrix with a weight a row. Both get the same weight, Hessian, damping, groups and threads, in turns;
`faster` is the median of the ratios of each turn. The errors that both leave, wᵀHw summed over outputs as a share
of the weight's own, show that they do the same work.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from common import alternate, median_ratio, spread, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sqcompile.quantization.format import Format, PerGroup
from sqcompile.second_order import Hessian
from sqcompile.second_order.rounding import round_weight

DAMPING = 0.01
BLOCK = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=5632)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.outputs, options.inputs, generator=generator) * options.inputs**-0.5
    hessian = Hessian(options.inputs)
    # Inputs that hang together, of uneven size, as those of a language model's layers.
    mixing = torch.randn(options.inputs, options.inputs, generator=generator) * options.inputs**-0.5
    sizes = torch.rand(options.inputs, generator=generator) * 4 + 0.1
    for _ in range(4):
        values = torch.randn(1024, options.inputs, generator=generator)
        hessian.add((values + values @ mixing) * sizes)
    format = Format(bits=options.bits, signed=False, symmetric=False, granularity=PerGroup(options.group))
    results: dict[str, Tensor] = {}

    def ours() -> None:
        results["sqcompile"] = round_weight(weight, hessian, format, search="minmax", damping=DAMPING).weight

    def theirs() -> None:
        results["reference"] = plain_gptq(weight, hessian.matrix, options.bits, options.group)

    with torch.inference_mode():
        times = alternate({"reference": theirs, "sqcompile": ours}, runs=options.runs, warmup=1)
        errors = {name: relative_error(weight, result, hessian.matrix) for name, result in results.items()}
    faster = median_ratio(times["reference"], times["sqcompile"])
    ratios = [one / other for one, other in zip(times["reference"], times["sqcompile"], strict=True)]
    table = Table("GPTQ", "time", "faster", "error", title=f"{options.outputs} × {options.inputs}, one layer")
    for name, taken in times.items():
        ratio = f"{faster:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if name == "sqcompile" else ""
        table.add_row(name, spread(taken), ratio, f"{errors[name]:.3e}")
    Console(width=110).print(table)
    row = {
        "times_ms": {name: [time / 1e6 for time in taken] for name, taken in times.items()},
        "faster": faster,
        "median_ms": {name: statistics.median(taken) / 1e6 for name, taken in times.items()},
        "errors": errors,
    }
    write_json(
        options.json,
        "gptq_speed",
        [row],
        outputs=options.outputs,
        inputs=options.inputs,
        bits=options.bits,
        group=options.group,
        threads=torch.get_num_threads(),
    )


def plain_gptq(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """Return a weight [O, K], rounded as the reference code does it: act-order, static groups, affine.

    Source: Frantar et al. 2023, arXiv 2210.17323, algorithm 1.
    """
    rest, matrix = weight.clone().float(), hessian.clone()
    dead = matrix.diagonal() == 0
    matrix[dead, dead] = 1
    rest[:, dead] = 0
    highest = 2**bits - 1
    scales, zeros = [], []
    for start in range(0, rest.shape[1], group):
        low = rest[:, start : start + group].amin(1).clamp(max=0)
        high = rest[:, start : start + group].amax(1).clamp(min=0)
        scale = ((high - low) / highest).clamp(min=1e-12)
        scales.append(scale)
        zeros.append((-low / scale).round())
    order = matrix.diagonal().argsort(descending=True)
    rest, matrix = rest[:, order], matrix[order][:, order]
    matrix.diagonal().add_(DAMPING * matrix.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounded, losses = torch.zeros_like(rest), torch.zeros_like(rest)
    places = order.tolist()
    for start in range(0, rest.shape[1], BLOCK):
        end = min(start + BLOCK, rest.shape[1])
        block, local = rest[:, start:end].clone(), upper[start:end, start:end]
        results, errors, lost = torch.zeros_like(block), torch.zeros_like(block), torch.zeros_like(block)
        for index in range(end - start):
            column, pivot = block[:, index], local[index, index]
            scale, zero = (item[places[start + index] // group] for item in (scales, zeros))
            codes = ((column / scale).round() + zero).clamp(0, highest)
            value = scale * (codes - zero)
            results[:, index] = value
            lost[:, index] = (column - value) ** 2 / pivot**2
            error = (column - value) / pivot
            block[:, index:] -= error[:, None] @ local[index : index + 1, index:]
            errors[:, index] = error
        rounded[:, start:end] = results
        losses[:, start:end] = lost / 2
        rest[:, end:] -= errors @ upper[start:end, end:]
    losses.sum()
    return rounded[:, order.argsort()]


def relative_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    """Return the mean square of the change of the layer's outputs, as a share of that of the outputs."""
    change = result - weight
    return float(((change @ hessian) * change).sum() / ((weight @ hessian) * weight).sum())


if __name__ == "__main__":
    main()
