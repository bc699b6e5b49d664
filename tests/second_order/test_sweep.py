"""The sweep, the refit and the Hessian, against the papers' equations written plainly in NumPy.

Tolerances are those of float32 sums and factors against float64 ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqcompile.errors import CalibrationError
from sqcompile.quantization import affine
from sqcompile.quantization.format import Format
from sqcompile.second_order import Grid, Hessian, inverse_factor, refit, sweep, target
from sqcompile.second_order.sweep import chooser
from sqcompile.sparsity import Pattern

Matrix = NDArray[np.float64]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(count: int, depth: int, seed: int = 1) -> Tensor:
    """Correlated inputs, as layers have them."""
    return values(count, depth, seed=seed) @ (torch.eye(depth) + 0.4 * values(depth, depth, seed=seed + 1))


def hessian_of(x: Tensor, dense: Tensor | None = None) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x, dense)
    return hessian


def grid_of(weight: Tensor, text: str) -> tuple[Grid, Format]:
    format = Format.parse(text)
    scale, zero_point = affine.scale_for_tensor(weight, format)
    group_size = format.granularity.pair[1] or weight.shape[1]
    rows = scale.reshape(weight.shape[0], -1)
    return Grid(rows, zero_point.reshape(rows.shape).float(), group_size, format.qmin, format.qmax), format


def plain(weight: Matrix, hessian: Matrix, round_column: object = None, mask: Matrix | None = None) -> Matrix:
    """Optimal brain surgeon, one column after the other: Frantar et al. 2022, arXiv 2208.11580.

    w_rest += -(w_k - ŵ_k) / [H⁻¹]_kk · [H⁻¹]_k,rest; then the k-th row and column leave H⁻¹ by Gaussian
    elimination. No Cholesky factor, no blocks.
    """
    result = weight.copy()
    inverse = np.linalg.inv(hessian)
    for k in range(weight.shape[1]):
        column = result[:, k] if mask is None else result[:, k] * mask[:, k]
        rounded = column if round_column is None else round_column(column, k)  # type: ignore[operator]
        error = (result[:, k] - rounded) / inverse[k, k]
        result[:, k + 1 :] -= np.outer(error, inverse[k, k + 1 :])
        result[:, k] = rounded
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return result


def damped(matrix: Tensor, damping: float) -> Matrix:
    result = matrix.double().numpy().copy()
    result[np.diag_indices_from(result)] += damping * np.diag(result).mean()
    return result


class TestHessian:
    def test_is_the_mean_of_products_over_batches_of_any_shape(self) -> None:
        x = inputs(60, 8)
        hessian = Hessian(8)
        for part in (x[:10].reshape(2, 5, 8), x[10:11], x[:0], x[11:]):
            hessian.add(part)
        wanted = x.double().T @ x.double() / 60
        torch.testing.assert_close(hessian.matrix.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(hessian.diagonal.double(), wanted.diagonal(), rtol=1e-5, atol=1e-6)
        assert hessian.count == 60 and hessian.cross is None

    def test_takes_the_inputs_of_the_dense_model_along(self) -> None:
        x, z = inputs(40, 6), inputs(40, 6, seed=5)
        hessian = Hessian(6)
        hessian.add(x[:7], z[:7])
        hessian.add(x[7:], z[7:])
        assert hessian.cross is not None
        torch.testing.assert_close(hessian.cross, z.T @ x / 40, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_refuses_what_is_not_finite(self, bad: float) -> None:
        x = inputs(5, 4)
        x[2, 1] = bad
        with pytest.raises(CalibrationError, match=r"(?s)not finite.*layer 'fc'"):
            Hessian(4, where="layer 'fc'").add(x)

    def test_factor_of_the_inverse(self) -> None:
        matrix = hessian_of(inputs(60, 8)).matrix
        factor, damping = inverse_factor(matrix, 0.01)
        assert damping == 0.01 and torch.equal(factor, factor.triu())
        torch.testing.assert_close(
            (factor.T @ factor).double(),
            torch.from_numpy(np.linalg.inv(damped(matrix, 0.01))),
            rtol=1e-3,
            atol=1e-5,
        )

    def test_too_little_data_and_dead_channels(self) -> None:
        x = inputs(3, 16)
        x[:, 5] = 0
        matrix = hessian_of(1000 * x).matrix
        factor, damping = inverse_factor(matrix, 1e-12)
        assert damping > 1e-12 and bool(factor.isfinite().all())
        # Nothing depends on a channel that is always zero.
        assert factor[5, 6:].abs().max() == 0 and factor[:5, 5].abs().max() == 0
        nothing, _ = inverse_factor(torch.zeros(4, 4))
        assert bool(nothing.isfinite().all())

    def test_gives_up_on_what_is_no_hessian(self) -> None:
        with pytest.raises(CalibrationError, match=r"(?s)cannot be inverted.*layer 'fc'"):
            inverse_factor(torch.full((3, 3), float("nan")), where="layer 'fc'")


class TestRounding:
    @pytest.mark.parametrize("block", [4, 5, 16, 128])
    @pytest.mark.parametrize("text", ["uint4:group=8:affine", "int3:channel=0", "uint2:group=5:affine"])
    def test_is_the_paper_s_equation(self, text: str, block: int) -> None:
        weight, hessian = values(6, 24), hessian_of(inputs(100, 24)).matrix
        grid, _ = grid_of(weight, text)

        def round_column(column: Matrix, k: int) -> Matrix:
            scale = grid.scale[:, k // grid.group_size].double().numpy()
            zero = grid.zero_point[:, k // grid.group_size].double().numpy()
            return (np.clip(np.round(column / scale) + zero, grid.qmin, grid.qmax) - zero) * scale  # type: ignore[no-any-return]

        swept = sweep(weight, inverse_factor(hessian, 0.01)[0], grid=grid, step=1, block=block)
        wanted = plain(weight.double().numpy(), damped(hessian, 0.01), round_column)
        np.testing.assert_allclose(swept.weight.numpy(), wanted, rtol=1e-4, atol=1e-5)
        assert swept.mask is None

    def test_results_are_codes(self) -> None:
        """What it returns is exactly on the grid: quantizing it changes no bit."""
        weight, hessian = values(6, 24), hessian_of(inputs(100, 24)).matrix
        grid, format = grid_of(weight, "uint4:group=8:affine")
        swept = sweep(weight, inverse_factor(hessian)[0], grid=grid)
        scale, zero_point = affine.scale_for_tensor(weight, format)
        axis, size = format.granularity.pair
        again = affine.fake_quantize(swept.weight, scale, zero_point, axis, size, format.qmin, format.qmax)
        assert torch.equal(again, swept.weight)

    def test_beats_rounding_to_nearest_and_says_by_how_much(self) -> None:
        weight, hessian = values(32, 64), hessian_of(inputs(500, 64)).matrix
        grid, _ = grid_of(weight, "uint3:group=16:affine")
        nearest = torch.stack([grid.round(weight[:, k], k) for k in range(64)], 1)
        swept = sweep(weight, inverse_factor(hessian, 1e-3)[0], grid=grid)

        def error(result: Tensor) -> float:
            change = weight - result
            return float(((change @ hessian) * change).sum())

        assert error(swept.weight) < 0.7 * error(nearest)
        assert swept.error == pytest.approx(error(swept.weight), rel=0.1)  # but for the damping

    def test_in_another_order_with_the_same_groups(self) -> None:
        weight, hessian = values(6, 24), hessian_of(inputs(100, 24)).matrix
        grid, _ = grid_of(weight, "uint4:group=8:affine")
        order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
        swept = sweep(
            weight, inverse_factor(hessian[order][:, order])[0], grid=grid, order=order, block=7, step=7
        )
        places = order.tolist()

        def round_column(column: Matrix, k: int) -> Matrix:
            return grid.round(torch.from_numpy(column).float(), places[k]).double().numpy()  # type: ignore[no-any-return]

        wanted = plain(
            weight[:, order].double().numpy(), damped(hessian[order][:, order], 0.01), round_column
        )
        np.testing.assert_allclose(swept.weight[:, order].numpy(), wanted, rtol=1e-4, atol=1e-5)


class TestPruning:
    @pytest.mark.parametrize(("text", "step"), [("unstructured", 8), ("2:4", 4), ("1x4", 8), ("2x4", 8)])
    def test_holds_its_pattern_and_makes_up_as_the_equation_says(self, text: str, step: int) -> None:
        pattern = Pattern.parse(text)
        weight, hessian = values(6, 24), hessian_of(inputs(100, 24)).matrix
        factor = inverse_factor(hessian)[0]
        swept = sweep(weight, factor, choose=chooser(pattern, 0.5), step=step, block=2 * step)
        assert swept.mask is not None and pattern.holds(swept.mask)
        assert float(swept.mask.float().mean()) == 0.5
        assert not bool(swept.weight[~swept.mask].any())
        wanted = plain(weight.double().numpy(), damped(hessian, 0.01), mask=swept.mask.double().numpy())
        np.testing.assert_allclose(swept.weight.numpy(), wanted, rtol=1e-3, atol=1e-4)

    def test_chooses_by_what_the_loss_costs(self) -> None:
        weight, hessian = values(5, 8), hessian_of(inputs(100, 8)).matrix
        swept = sweep(weight, inverse_factor(hessian)[0], choose=chooser(Pattern(), 0.25), step=8)
        inverse = np.linalg.inv(damped(hessian, 0.01))
        factor = np.linalg.cholesky(inverse).T
        scores = (weight.double().numpy() / np.diag(factor)) ** 2
        assert swept.mask is not None
        assert set(np.argsort(scores, axis=None)[:10]) == set(np.flatnonzero(~swept.mask.numpy()))

    def test_what_is_gone_stays_gone(self) -> None:
        weight, hessian = values(6, 16), hessian_of(inputs(100, 16)).matrix
        kept = values(6, 16, seed=9) > -0.5
        swept = sweep(
            weight * kept, inverse_factor(hessian)[0], choose=chooser(Pattern(), 0.5), kept=kept, step=8
        )
        assert swept.mask is not None and not bool((swept.mask & ~kept).any())
        assert float(swept.mask.float().mean()) == 0.5
        again = sweep(
            swept.weight, inverse_factor(hessian)[0], choose=chooser(Pattern(), 0.5), kept=swept.mask, step=8
        )
        assert torch.equal(again.weight, swept.weight) and torch.equal(again.mask, swept.mask)  # type: ignore[arg-type]
        rounded = sweep(weight * kept, inverse_factor(hessian)[0], kept=kept)
        assert not bool(rounded.weight[~kept].any())

    def test_prunes_and_rounds_in_one_sweep(self) -> None:
        weight, hessian = values(16, 32), hessian_of(inputs(300, 32)).matrix
        grid, _ = grid_of(weight, "uint4:group=16:affine")
        factor = inverse_factor(hessian)[0]
        swept = sweep(weight, factor, grid=grid, choose=chooser(Pattern(), 0.5), step=16)
        assert swept.mask is not None and not bool(swept.weight[~swept.mask].any())
        kept = swept.mask
        wanted = sweep(weight, factor, grid=grid, kept=kept)
        torch.testing.assert_close(swept.weight, wanted.weight)


class TestRefit:
    def test_is_the_least_squares_solution_row_by_row(self) -> None:
        x, z = inputs(200, 12), inputs(200, 12) + 0.1 * values(200, 12, seed=7)
        weight, mask = values(5, 12), values(5, 12, seed=3) > 0
        for dense in (x, z):
            hessian = hessian_of(x, None if dense is x else dense)
            result = refit(weight, mask, hessian, damping=1e-9)
            assert not bool(result[~mask].any())
            for row, keep, got in zip(weight, mask, result, strict=True):
                solution = np.linalg.lstsq(x[:, keep].double().numpy(), (dense @ row).double().numpy())[0]
                np.testing.assert_allclose(got[keep].numpy(), solution, rtol=1e-3, atol=1e-4)

    def test_rows_in_several_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, mask, hessian = values(7, 12), values(7, 12, seed=3) > 0, hessian_of(inputs(200, 12))
        whole = refit(weight, mask, hessian)
        monkeypatch.setattr("sqcompile.second_order.least_squares._BYTES", 3 * 12 * 12 * 4)
        torch.testing.assert_close(refit(weight, mask, hessian), whole)

    def test_stays_at_the_dense_weight_where_data_says_nothing(self) -> None:
        weight, mask = values(3, 8), torch.ones(3, 8, dtype=torch.bool)
        torch.testing.assert_close(refit(weight, mask, hessian_of(torch.zeros(4, 8))), weight)
        few = refit(weight, mask, hessian_of(inputs(2, 8)))
        assert bool(few.isfinite().all())

    def test_target(self) -> None:
        x = inputs(200, 12)
        z = x @ (torch.eye(12) + 0.05 * values(12, 12, seed=8))
        weight = values(5, 12)
        assert target(weight, hessian_of(x)) is weight
        result = target(weight, hessian_of(x, z), damping=1e-9)
        solution = np.linalg.lstsq(x.double().numpy(), (z @ weight.T).double().numpy())[0].T
        np.testing.assert_allclose(result.numpy(), solution, rtol=0, atol=1e-3)  # solved in float32

    def test_target_for_fewer_inputs_than_the_dense_layer_has(self) -> None:
        z = inputs(200, 12)
        x = z[:, :7]
        weight, left = values(5, 12), values(5, 7, seed=9)
        result = target(weight, hessian_of(x, z), damping=1e-9, towards=left)
        solution = np.linalg.lstsq(x.double().numpy(), (z @ weight.T).double().numpy())[0].T
        np.testing.assert_allclose(result.numpy(), solution, rtol=0, atol=1e-3)  # solved in float32
        # Damped without end it stays at what is left of the weight.
        held = target(weight, hessian_of(x, z), damping=1e9, towards=left)
        np.testing.assert_allclose(held.numpy(), left.numpy(), rtol=0, atol=1e-5)
