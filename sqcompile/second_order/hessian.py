"""The Hessian of a layer's output error, from the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.errors import CalibrationError

# Damping is raised tenfold at most this often until the matrix can be factored.
_ATTEMPTS = 8


class Hessian:
    """H = mean of x xᵀ over the inputs x of a layer, in float32.

    The output error of a layer whose weight row w changes by d is dᵀ H d, averaged over the inputs; the
    literature's H is twice this, which changes no result. Where the layers before have changed as well, the
    inputs z of the dense model may be taken along: C = mean of z xᵀ says what the layer should have seen.

    Args:
        size: Input channels of the layer, K.
        device: Where it is held.
        where: The layer, for errors.

    Attributes:
        matrix: H, [K, K].
        cross: C, [D, K], or None; D is K, or what the dense layer has more of.
        magnitude: Mean of |x|, [K].
        peak: Largest |x|, [K].
        count: Inputs seen.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", where: str = "") -> None:
        self._where = where
        self.matrix = torch.zeros(size, size, device=device)
        self.cross: Tensor | None = None
        self.magnitude = torch.zeros(size, device=device)
        self.peak = torch.zeros(size, device=device)
        self.count = 0

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take in a batch of inputs, in every batch with those of the dense model or in none.

        Shapes: x [..., K]; dense [..., D].

        Raises:
            CalibrationError: If it holds NaN or infinity.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.matrix)
        if rows.shape[0] == 0:
            return
        total = self.count + rows.shape[0]
        self.matrix.addmm_(rows.T, rows, beta=self.count / total, alpha=1 / total)
        if dense is not None:
            wanted = dense.detach().reshape(-1, dense.shape[-1]).to(self.matrix)
            if self.cross is None:
                self.cross = self.matrix.new_zeros(wanted.shape[1], rows.shape[1])
            self.cross.addmm_(wanted.T, rows, beta=self.count / total, alpha=1 / total)
        sizes = rows.abs()
        self.magnitude.mul_(self.count / total).add_(sizes.sum(0), alpha=1 / total)
        self.peak = torch.maximum(self.peak, sizes.amax(0))
        self.count = total
        if not bool(torch.isfinite(self.matrix.diagonal()).all()):
            raise CalibrationError(
                "The inputs of a layer are not finite, or their squares too large for float32.",
                where=self._where or None,
                seen=f"largest magnitude {float(rows.abs().max()):g}",
                expected="finite values",
                next_step="check the calibration data, and that the model itself runs without overflow",
            )

    @property
    def diagonal(self) -> Tensor:
        """Mean square of each input channel, [K]."""
        return self.matrix.diagonal()


def inverse_factor(hessian: Tensor, damping: float = 0.01, where: str = "") -> tuple[Tensor, float]:
    """Return the upper triangular U with Uᵀ U = (H + λ I)⁻¹, and the damping that it took.

    λ is `damping` times the mean of H's diagonal. With less data than channels H is singular, and in
    float32 it may be so by rounding: then the damping is raised tenfold, until the factor exists. Channels
    that were never active get a curvature of their own, so that nothing depends on them.

    Args:
        hessian: H, [K, K].
        damping: λ as a share of the mean of H's diagonal.
        where: The layer, for the error.

    Source: Frantar et al. 2023, arXiv 2210.17323, "Cholesky reformulation".

    Raises:
        CalibrationError: If no damping helps.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal == 0
    for _ in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean or 1.0
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping = max(10 * damping, 1e-4)
    raise CalibrationError(
        "The Hessian of a layer cannot be inverted.",
        where=where or None,
        seen=f"mean of its diagonal {mean:g}, damping raised to {damping:g}",
        expected="inputs of a usual scale",
        next_step="calibrate with more or other data, or leave the layer out",
    )
