# SPDX-License-Identifier: Apache-2.0
"""The auxiliary variables of SparseLLM, each at the minimum of its terms while all else is fixed (see sparsellm.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .solve import damped_cholesky

GATE_STEPS = 3
ROUNDING = 1e-7  # relative to the diagonal; keeps a matrix that is positive definite so in float32


def hidden_factor(weight: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Cholesky factor of `I + beta / gamma W W^T`, float32 `[out, out]`, for the last layer's `W`."""
    matrix = (weight @ weight.t()).mul_(beta / gamma)
    matrix.diagonal().add_(1)
    return damped_cholesky(matrix, ROUNDING, "an FFN's last layer")


def update_hidden(
    activated: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    beta: float,
    gamma: float,
) -> torch.Tensor:
    """`p` that minimises `gamma |p - a|^2 + beta |y - W p|^2`.

    That is `(beta W^T W + gamma I)^-1 (beta W^T y + gamma a)`, here by the matrix inversion lemma with a matrix of the size
    of the outputs, `p = a + W^T (gamma / beta I + W W^T)^-1 (y - W a)`.

    Args:
        activated (`torch.Tensor`): `a`, float32 `[tokens, hidden]`.
        target (`torch.Tensor`): `y`, float32 `[tokens, out]`.
        weight (`torch.Tensor`): `W`, float32 `[out, hidden]`.
        factor (`torch.Tensor`): `hidden_factor(weight, beta, gamma)`.
        beta, gamma (`float`): weights of the terms.
    """
    missing = target - activated @ weight.t()
    return activated + beta / gamma * (torch.cholesky_solve(missing.t(), factor).t() @ weight)


def update_relu(p: torch.Tensor, output: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """`z` that minimises `alpha (z - m)^2 + gamma (p - relu(z))^2`, elementwise: the better of the best `z >= 0` and the
    best `z <= 0`; `output` is `m`."""
    positive = ((gamma * p + alpha * output) / (gamma + alpha)).clamp(min=0)
    negative = output.clamp(max=0)
    loss = alpha * (positive - output).square() + gamma * (p - positive).square()
    return torch.where(loss <= alpha * (negative - output).square() + gamma * p.square(), positive, negative)


def update_gated(
    p: torch.Tensor, output: torch.Tensor, gate: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """`z` that minimises `alpha (z - m)^2 + gamma (p - g z)^2`, elementwise: `(alpha m + gamma g p) / (alpha + gamma g^2)`;
    `output` is `m`. (The published code has the case alpha = gamma.)"""
    return (alpha * output + gamma * gate * p) / (alpha + gamma * gate.square())


def update_gate(
    s: torch.Tensor,
    p: torch.Tensor,
    z: torch.Tensor,
    output: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    alpha: float,
    gamma: float,
) -> torch.Tensor:
    """Lower `alpha (s - m)^2 + gamma (p - act(s) z)^2` elementwise; `output` is `m`. It rises nowhere.

    Gradient steps, each divided by the Gauss-Newton curvature `alpha + gamma (act'(s) z)^2`, so that they need no learning
    rate and do not depend on the scale of the layer. Where one would raise the term, the next is a quarter as long.
    """

    def loss(s: torch.Tensor) -> torch.Tensor:
        return alpha * (s - output).square() + gamma * (p - activation(s) * z).square()

    current, length = loss(s), torch.ones_like(s)
    for _ in range(GATE_STEPS):
        with torch.enable_grad():
            variable = s.detach().requires_grad_()
            activated = activation(variable)
            (slope,) = torch.autograd.grad(activated.sum(), variable)
        slope = slope * z
        gradient = alpha * (s - output) - gamma * (p - activated.detach() * z) * slope
        moved = s - length * gradient / (alpha + gamma * slope.square())
        reached = loss(moved)
        lower = reached < current
        s, current = torch.where(lower, moved, s), torch.where(lower, reached, current)
        length = torch.where(lower, length, length / 4)
    return s
