# SPDX-License-Identifier: Apache-2.0
"""Magnitude: keep the largest weights of each group."""

from __future__ import annotations

import torch

from ..pattern import NMPattern, Pattern
from .base import Criterion, InputStatistics, keep_highest, register_criterion, score_confidence


@register_criterion
class Magnitude(Criterion):
    """Score `|W_ij|`. Needs no calibration; equal weights are kept lowest index first. Unstructured: compared within a layer."""

    name = "magnitude"
    needs = "nothing"
    unstructured = True
    has_confidence = True

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        return keep_highest(weight.abs(), pattern, whole_layer=True)

    def confidence(
        self, weight: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern
    ) -> torch.Tensor:
        return score_confidence(weight.abs(), mask, pattern)
