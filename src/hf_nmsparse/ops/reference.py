# SPDX-License-Identifier: Apache-2.0
"""Plain torch operations on masks and packed weights: the oracle that every fast backend must match."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..codec import mask_to_codes, pack_24
from ..pattern import NMPattern

PATTERN_24 = NMPattern(2, 4)


class Pruned24(NamedTuple):
    """A weight `[out, in]` pruned to 2:4 and packed.

    Args:
        values (`torch.Tensor`): the kept weights as they were, `[out, in/2]`.
        ids (`torch.Tensor`): their columns, uint8 `[out, in/8]`, as `codec.ids_of_24`.
        codes (`torch.Tensor`): the mask, uint8 `[out, in/4]`, as `codec.mask_to_codes`.
    """

    values: torch.Tensor
    ids: torch.Tensor
    codes: torch.Tensor


def top_n_mask(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Keep the n highest scores of each group of m; equal scores go to the lowest index, on every device.

    NaN counts as the highest score, as in `torch.topk`: what is broken shows, and every group keeps n all the same.

    Args:
        scores (`torch.Tensor`): floating point, `[out, in]`. A tail of r columns keeps min(n, r).

    Returns:
        bool `[out, in]`.
    """
    in_features = scores.shape[1]
    grouped = F.pad(scores, (0, -in_features % pattern.m), value=float("-inf")).unflatten(1, (-1, pattern.m))
    columns = grouped.unbind(-1)
    numbers = [~column.isnan() for column in columns]
    beaten_by = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            later_wins = ~(columns[i] >= columns[j]) & numbers[i]
            beaten_by[i] += later_wins
            beaten_by[j] += ~later_wins
    return (torch.stack(beaten_by, dim=-1) < pattern.n).flatten(1)[:, :in_features]


def top_n_codes(scores: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The codes of `top_n_mask`, int64 `[out, groups]`."""
    return mask_to_codes(top_n_mask(scores, pattern), pattern)


def prune_24(weight: torch.Tensor, scores: torch.Tensor | None = None) -> Pruned24:
    """Keep the weights with the two highest scores of each four, `top_n_mask`, and pack them.

    Args:
        weight (`torch.Tensor`): `[out, in]`.
        scores (`torch.Tensor`, *optional*): floating point, `[out, in]`; by default the magnitudes of the weight.

    Raises:
        PatternError: if in_features is no multiple of 8, or the scores have another shape.
    """
    mask = top_n_mask(weight.abs() if scores is None else scores, PATTERN_24)
    return Pruned24(*pack_24(weight, mask), mask_to_codes(mask, PATTERN_24).to(torch.uint8))
