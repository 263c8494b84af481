# SPDX-License-Identifier: Apache-2.0
"""Refit: with the mask chosen, give the kept weights the values with the lowest output error.

For each row, with S its kept and P its pruned channels and `w_P` padded with zeros, the minimum over v supported on S of

    (v - w) H (v - w)^T + lambda * |v_S - w_S|^2        is at        v = w_S + u,   (H_SS + lambda) u = (w_P H)_S.

The pull is to the *dense* weight, not to zero: directions that calibration says nothing about stay as they were trained,
and a full mask changes nothing. As S differs from row to row, factoring would take one `[kept, kept]` matrix for each; the
method of conjugate gradients solves all rows at once, with one product by H an iteration. Scaling the channels so that
`H + lambda` has a unit diagonal (Jacobi's preconditioner) takes out the massive ones.

The iterations start at the masked weight and each lowers the objective above: even a few never raise the output error.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .error import row_error_change
from .solve import mean_diagonal

ROWS = 1024  # at once: bounds memory, and each lot stops when it is done


def refit_weights(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    damping: float = 0.01,
    iterations: int = 100,
    tolerance: float = 3e-3,
) -> torch.Tensor:
    """The kept weights that lower the output error of a masked layer most. Computes in float32.

    The values are rounded to the dtype of `weight`, and then each row is checked in float64: where its output error
    `(v - w) H (v - w)^T` isn't lower than that of the masked weight, it stays the masked weight. So neither rounding nor an
    ill-conditioned Hessian can make a row worse.

    Args:
        weight (`torch.Tensor`): dense, `[out, in]`, any float dtype; is not changed.
        mask (`torch.Tensor`): bool `[out, in]`, true where kept; any pattern, or none.
        hessian (`torch.Tensor`): mean of `x x^T`, symmetric float32 `[in, in]`; is not changed.
        damping (`float`): lambda, the pull to the dense weight, relative to the mean diagonal of live channels.
        iterations (`int`): at most.
        tolerance (`float`): done when the residuals have shrunk to this share of the first, in the root mean square of all
            rows. At 0.003 mostly less than a thousandth of what can be gained is left.

    Returns:
        float32 `[out, in]`, 0 where pruned, elsewhere values that the dtype of `weight` can hold.

    Raises:
        ConfigError: for negative damping.
    """
    if not damping >= 0:
        raise ConfigError(f"refit: damping={damping}, expected 0 or more, as a share of the mean diagonal; try 0.01")
    pull = damping * mean_diagonal(hessian)
    diagonal = hessian.diagonal().float() + pull
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)  # 0: dead channels stay as they are
    scaled = hessian * scale * scale[:, None]
    scaled.diagonal().add_(pull * scale.square())
    return torch.cat(
        [
            _refit_rows(dense, kept, hessian, scaled, scale, iterations, tolerance)
            for dense, kept in zip(weight.split(ROWS), mask.split(ROWS), strict=True)
        ]
    )


def _refit_rows(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    scaled: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    tolerance: float,
) -> torch.Tensor:
    masked = torch.where(mask, weight.float(), 0)
    target = torch.where(mask, (torch.where(mask, 0, weight.float()) @ hessian) * scale, 0)
    change = _conjugate_gradients(target, mask, scaled, iterations, tolerance) * scale
    refitted = (masked + change).to(weight.dtype).float()
    improved = row_error_change(weight, masked, refitted, hessian) < 0
    return torch.where(improved[:, None], refitted, masked)


def _conjugate_gradients(
    target: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, iterations: int, tolerance: float
) -> torch.Tensor:
    """Solve `H_SS u = t_S` for each row (Hestenes & Stiefel, 1952), from u = 0. Returns float32 `[out, in]`."""
    solution, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    square = residual.square().sum(1, keepdim=True)
    enough = tolerance**2 * square.sum()
    for _ in range(iterations):
        if not bool(square.sum() > enough):
            break
        product = torch.where(mask, direction @ hessian, 0)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, square / curvature, 0)  # at rows that are done all is 0
        solution.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        previous, square = square, residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(previous > 0, square / previous, 0)).add_(residual)
    return solution
