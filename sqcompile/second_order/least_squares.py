"""Least-squares fits of a weight to what the dense layer makes."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.second_order.hessian import Hessian

# Rows are solved together as long as their matrices take no more than this.
_BYTES = 2**28


def refit(weight: Tensor, mask: Tensor, hessian: Hessian, damping: float = 1e-4) -> Tensor:
    """Return the weight that is zero outside of the mask and has the least output error against `weight`.

    For every row: minimize the mean of (wᵀ z - ŵᵀ x)² over ŵ with the mask's support S, where z is what the
    dense layer sees and x what this one does: H_SS ŵ_S = (Cᵀ w)_S, with C = H where z = x. A row costs
    K³ / 3 multiplications.

    Args:
        weight: The dense weight, [O, K].
        mask: True where kept, [O, K].
        hessian: H, [K, K], and C if the dense layer sees something else.
        damping: λ as a share of the mean of H's diagonal; pulls the result towards `weight`.
    """
    matrix = hessian.matrix.clone()
    mean = float(matrix.diagonal().mean())
    least = damping * mean if mean > 0 else 1.0
    dense = weight.detach().to(matrix)
    right = dense @ (matrix if hessian.cross is None else hessian.cross)
    right = right.add_(dense, alpha=least).mul_(mask)
    matrix.diagonal().add_(least)
    result = torch.empty_like(dense)
    rows = max(1, _BYTES // (matrix.numel() * matrix.element_size()))
    for start in range(0, dense.shape[0], rows):
        kept = mask[start : start + rows]
        system = matrix * kept[:, :, None] * kept[:, None, :]
        system.diagonal(dim1=1, dim2=2).add_((~kept).to(system.dtype))
        factor, failed = torch.linalg.cholesky_ex(system)
        solved = torch.cholesky_solve(right[start : start + rows, :, None], factor)[:, :, 0]
        # A system that rounding has made singular leaves its row as it was.
        usable = (failed == 0) & torch.isfinite(solved).all(-1)
        solved = torch.where(usable[:, None], solved, dense[start : start + rows])
        result[start : start + rows] = solved * kept
    return result


def target(
    weight: Tensor, hessian: Hessian, damping: float = 1e-2, *, towards: Tensor | None = None
) -> Tensor:
    """Return the weight that makes the most of changed inputs: the refit without a mask.

    It minimizes the mean of (wᵀ z - ŵᵀ x)² + λ |ŵ - v|²; without C it is the weight itself.

    Shapes: weight [O, D], of the dense layer; result [O, K].
    Source: ordinary least squares; Li et al. 2025, arXiv 2504.02692, build the same target into the sweep.

    Args:
        weight: The dense weight w.
        hessian: H and C.
        damping: λ as a share of the mean of H's diagonal.
        towards: v, [O, K]: what the result stays near where the data says nothing; the weight itself if D is K.
    """
    towards = weight if towards is None else towards
    if hessian.cross is None:
        return towards
    matrix = hessian.matrix.clone()
    least = damping * float(matrix.diagonal().mean()) or 1.0
    matrix.diagonal().add_(least)
    right = (weight.detach().to(matrix) @ hessian.cross).add_(towards.detach().to(matrix), alpha=least)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        return towards
    return torch.cholesky_solve(right.T, factor).T.contiguous()
