# SPDX-License-Identifier: Apache-2.0
"""Magnitude: keep the largest weights of each group."""

from __future__ import annotations

import torch

from ..ops import top_n_mask
from ..pattern import NMPattern
from .base import Criterion, InputStatistics, register_criterion


@register_criterion
class Magnitude(Criterion):
    """Score `|W_ij|`. Needs no calibration; equal weights are kept lowest index first."""

    name = "magnitude"
    needs = "nothing"

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        return top_n_mask(weight.abs(), pattern)
