# SPDX-License-Identifier: Apache-2.0
"""Plain torch operations on masks and packed weights: the oracle that every fast backend must match."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..pattern import NMPattern


def top_n_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Keep the n highest scores of each group of m; equal scores go to the lowest index, on every device.

    Args:
        scores (`torch.Tensor`): finite, `[out, in]`. A tail of r columns keeps min(n, r).

    Returns:
        bool `[out, in]`.
    """
    in_features = scores.shape[1]
    grouped = F.pad(scores, (0, -in_features % pattern.m), value=float("-inf")).unflatten(1, (-1, pattern.m))
    columns = grouped.unbind(-1)
    beaten_by = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            later_wins = columns[j] > columns[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
    return (torch.stack(beaten_by, dim=-1) < pattern.n).flatten(1)[:, :in_features]
