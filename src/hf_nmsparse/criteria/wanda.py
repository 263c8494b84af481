# SPDX-License-Identifier: Apache-2.0
"""Wanda: weights times the norm of their input ("A Simple and Effective Pruning Approach for Large Language Models",
Sun et al., arXiv 2306.11695, equation 1)."""

from __future__ import annotations

import torch

from ..pattern import NMPattern, Pattern
from .base import Criterion, InputStatistics, keep_highest, register_criterion, score_confidence


@register_criterion
class Wanda(Criterion):
    """Score `|W_ij| * ||X_j||_2`, in float32; equal scores are kept lowest index first. Unstructured: compared within rows.

    The norm here is the root of the *mean* square over tokens: the order within a row is the same.
    """

    name = "wanda"
    needs = "norms"
    unstructured = True
    has_confidence = True

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: Pattern) -> torch.Tensor:
        return keep_highest(_scores(weight, statistics), pattern)

    def confidence(
        self, weight: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern
    ) -> torch.Tensor:
        return score_confidence(_scores(weight, statistics), mask, pattern)


def _scores(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    return weight.float().abs() * statistics.squared_norm.sqrt()
