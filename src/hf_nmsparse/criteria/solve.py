# SPDX-License-Identifier: Apache-2.0
"""Factors and powers of a Hessian that may be singular: few tokens, dead channels and massive ones are the rule, not the
exception."""

from __future__ import annotations

import logging

import torch

from ..errors import NMSparseError

logger = logging.getLogger(__name__)

ATTEMPTS = 5


def damped_cholesky(hessian: torch.Tensor, damping: float, layer: str = "a layer") -> torch.Tensor:
    """The Cholesky factor `L` of `H + damping * mean(diag H) * I`, so that `L L^T` is that sum.

    The mean is over live channels only, and dead ones (`H_jj = 0`) get it as their diagonal: so the result neither depends
    on the scale of the inputs nor on how many are dead. In float32 rounding can make a Hessian indefinite; then damping
    is raised tenfold, up to four times, which logs one line.

    Args:
        hessian (`torch.Tensor`): symmetric, float32, `[in, in]`; is not changed.
        damping (`float`): relative to the mean of the diagonal.
        layer (`str`): how messages call the layer.

    Returns:
        lower triangular float32 `[in, in]`.

    Raises:
        NMSparseError: if the Hessian can't be factored even with the highest damping.
    """
    damped = hessian.to(torch.float32, copy=True)
    diagonal = damped.diagonal()  # a view
    mean = mean_diagonal(damped)
    diagonal[diagonal == 0] = torch.where(mean > 0, mean, 1)
    used = 0.0
    for attempt in range(ATTEMPTS):
        wanted = damping * 10**attempt
        diagonal += (wanted - used) * mean
        used = wanted
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            if attempt:
                logger.warning(
                    "%s: its Hessian is ill-conditioned; damping was raised from %g to %g", layer, damping, used
                )
            return factor
    raise NMSparseError(
        f"{layer}: its Hessian [{len(hessian)}, {len(hessian)}] can't be factored, even with damping {used:g}; calibrate "
        "with more tokens, in float32 or bfloat16, and check the inputs for NaN; or give a damping above "
        f"{damping:g}, or a criterion without a Hessian such as 'wanda'"
    )


def mean_diagonal(hessian: torch.Tensor) -> torch.Tensor:
    """The mean of the diagonal over live channels, a scalar; 0 if all are dead."""
    diagonal = hessian.diagonal().float()
    return diagonal.sum() / (diagonal != 0).sum().clamp(min=1)


def hessian_power(hessian: torch.Tensor, power: float) -> torch.Tensor:
    """`H^power` by its eigenvalues, in float64 inside. Negative eigenvalues, which are rounding, count as 0.

    Args:
        hessian (`torch.Tensor`): symmetric, `[in, in]`; is not changed.
        power (`float`): 1 gives `hessian` itself, 0.5 its symmetric root, 0 the identity.

    Returns:
        symmetric float32 `[in, in]`.
    """
    if power == 1:
        return hessian.float()
    exact = torch.device("cpu") if hessian.device.type == "mps" else hessian.device  # MPS has no float64
    values, vectors = torch.linalg.eigh(hessian.to(exact, torch.float64))
    half = vectors * values.clamp(min=0) ** (power / 2)  # its product with itself is symmetric to the last bit
    return (half @ half.t()).float().to(hessian.device)
