# SPDX-License-Identifier: Apache-2.0
"""RIA: relative importance and activations ("Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
Models", Zhang et al., ICLR 2024). Its channel permutation is in `permutation.py`."""

from __future__ import annotations

import math

import torch

from ..errors import ConfigError
from ..pattern import Pattern
from .base import Criterion, InputStatistics, keep_highest, register_criterion


@register_criterion
class RIA(Criterion):
    """Score `(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^power`, in float32.

    A weight counts by its share in what leaves its input channel (column j) and in what reaches its output channel (row i),
    so that channels of small weights are not pruned away whole. Unstructured: all weights of the layer are compared with one
    another, as the authors' code does by default. The norm is the root of the *mean* square over tokens: a constant factor changes no order.

    Args:
        power (`float`): of the norm of the inputs, 0 or more; 0 leaves them out.

    Raises:
        ConfigError: for another power.
    """

    name = "ria"
    needs = "norms"
    unstructured = True

    def __init__(self, power: float = 0.5) -> None:
        if not (power >= 0 and math.isfinite(power)):
            raise ConfigError(f"ria: power={power}; expected a finite number, 0 or more (the paper uses 0.5)")
        self.power = power

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        scores = relative_importance(weight, statistics.squared_norm, self.power)
        return keep_highest(scores, pattern, whole_layer=True)


def relative_importance(weight: torch.Tensor, squared_norm: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    """The score of `RIA`.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype.
        squared_norm (`torch.Tensor`): mean over tokens of `x_j^2`, float32 `[in]`.
        power (`float`): of the root of `squared_norm`.

    Returns:
        float32 `[out, in]`; 0 in rows and columns that are all zero.
    """
    size = weight.float().abs()
    scores = _share(size, dim=0) + _share(size, dim=1)
    return scores * squared_norm.float().pow(power / 2)


def _share(size: torch.Tensor, dim: int) -> torch.Tensor:
    """Each number over the sum along `dim`; 0 / 0 is 0."""
    total = size.sum(dim, keepdim=True)
    return size / total.where(total > 0, 1)
