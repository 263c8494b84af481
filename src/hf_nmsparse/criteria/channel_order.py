# SPDX-License-Identifier: Apache-2.0
"""Which order of channels keeps most: one in which fewer important weights share a group ("Plug-and-Play: An Efficient
Post-training Pruning Method for Large Language Models", Zhang et al., ICLR 2024). Which orders
a model can absorb is in `permutation.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError
from ..pattern import NMPattern
from .permutation import Absorbable

LEAST_GAIN = 1e-4  # a sweep that gains less, relative to what is retained, is the last


def assignment_solver() -> Callable[..., Any]:
    """`scipy.optimize.linear_sum_assignment`. Call it early to fail early.

    Raises:
        UnsupportedError: if scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UnsupportedError(
            "channel permutation solves assignment problems with scipy, which is not installed; "
            "run: pip install 'hf-nmsparse[permute]'"
        ) from error
    return linear_sum_assignment


def best_order(scores: torch.Tensor, pattern: NMPattern, pair: Absorbable, sweeps: int = 2) -> torch.Tensor:
    """An order of input channels in which the mask of the pattern retains much of the scores, at least as much as now.

    Channels are sorted by their sum of scores and dealt to the groups to and fro, so that each gets strong and weak ones.
    Then, position by position, the channels at that position of all groups are assigned to the groups anew, which is best
    for that position: channel j gains `sum_r relu(s_rj - t_rg)` in group g, where t is the n-th highest score of the other
    channels there. As `relu(a - b) = (a - b + |a - b|) / 2`, and the sums of a and b are the same for every assignment, the
    L1 distance of columns stands for the gain.

    In an MLP with a tail (m does not divide the channels) the last channels stay in it. In attention with such heads all
    channels stay where they are.

    Args:
        scores (`torch.Tensor`): importance of the consumer's weights, not negative, any float dtype `[out, in]`.
        pattern (`NMPattern`): n kept of m.
        pair (`Absorbable`): says which channels may change places; the scores of all copies of a channel count.
        sweeps (`int`): passes over the m positions at most; stops early when one gains little.

    Returns:
        int64 `[in]`: the new channel i is the old channel `order[i]`.

    Raises:
        UnsupportedError: if scipy is not installed.
    """
    solve = assignment_solver()
    order = torch.arange(pair.in_features, device=scores.device)
    movable = pair.channels - pattern.tail(pair.channels)
    if movable == 0 or (movable < pair.channels and pair.heads * pair.copies > 1):
        return order  # there is one group, or groups reach across heads
    in_place = torch.arange(movable, device=scores.device)
    for head in order.view(pair.heads, pair.copies, pair.channels):
        columns = scores[:, head.flatten()].float().reshape(-1, pair.channels).t()[:movable].contiguous()
        start = max(in_place, _dealt(columns, pattern), key=lambda order: retained(columns, order, pattern))
        head[:, :movable] = head[:, _reassigned(columns, start, pattern, sweeps, solve)]
    return order


def retained(columns: torch.Tensor, order: torch.Tensor, pattern: NMPattern) -> float:
    """Sum of the scores that the pattern keeps if columns, `[columns, rows]`, stand in this order; m divides their number."""
    return _sum_of_highest(_ranked(columns, order.view(-1, pattern.m), pattern), pattern)


def _ranked(columns: torch.Tensor, groups: torch.Tensor, pattern: NMPattern) -> list[torch.Tensor]:
    """The highest n + 1 scores of each group of each row, from the highest, each `[groups, rows]`."""
    ranked = [columns[members] for members in groups.unbind(1)]
    # Bubbles of whole tensors: about five times as fast as topk or sort of many short rows.
    for rank in range(pattern.n + 1):
        for i in range(pattern.m - 1, rank, -1):
            higher = torch.maximum(ranked[i - 1], ranked[i])
            ranked[i] = torch.minimum(ranked[i - 1], ranked[i])
            ranked[i - 1] = higher
    return ranked[: pattern.n + 1]


def _sum_of_highest(ranked: list[torch.Tensor], pattern: NMPattern) -> float:
    return sum(float(scores.sum(dtype=torch.float64)) for scores in ranked[: pattern.n])


def _dealt(columns: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Columns from strong to weak, dealt to the groups: first to last, then last to first, and so on."""
    rounds = columns.sum(1, dtype=torch.float64).argsort(descending=True, stable=True).view(pattern.m, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.t().flatten()


def _reassigned(
    columns: torch.Tensor, order: torch.Tensor, pattern: NMPattern, sweeps: int, solve: Callable[..., Any]
) -> torch.Tensor:
    """Improve the order by assignments; what is retained never falls."""
    groups = order.view(-1, pattern.m)
    ranked = _ranked(columns, groups, pattern)
    best = _sum_of_highest(ranked, pattern)
    for _ in range(sweeps):
        before = best
        for position in range(pattern.m):
            own = columns[groups[:, position]]
            # Without its own member a group's n-th highest is the next one if that member was among the n highest.
            threshold = torch.where(own >= ranked[-2], ranked[-1], ranked[-2])
            distance = torch.cdist(threshold, own, p=1)  # [groups, channels]
            _, assigned = solve(distance.cpu().numpy(), maximize=True)
            candidate = groups.clone()
            candidate[:, position] = groups[torch.as_tensor(assigned, device=groups.device), position]
            candidate_ranked = _ranked(columns, candidate, pattern)
            total = _sum_of_highest(candidate_ranked, pattern)
            if total > best:  # rounding could otherwise lose what exact arithmetic cannot
                groups, ranked, best = candidate, candidate_ranked, total
        if best - before <= LEAST_GAIN * before:
            break
    return groups.flatten()
