# SPDX-License-Identifier: Apache-2.0
"""Polish: improve a mask by coordinate descent on the output error of its layer.

With `D = W * M - W` and `H` the mean of `x x^T` over tokens, the mean squared error of the outputs of row r is
`e_r = d_r H d_r^T`. Rows are independent. For the weights J of one group, `b = H_{J, not J} d_{not J}` fixed,

    e_r(c) = const + 2 d_J(c) . b + d_J(c)^T H_JJ d_J(c),        d_J(c) = -w_J * (1 - S_c)

is exact for every candidate c, so the best of the C(m, n) candidates is found without approximation, for all rows at once.
`G = D H` is needed one block of columns at a time: it is computed when the block is reached and kept current only
within it (the lazy batch updates of GPTQ, arXiv 2210.17323, section 3.3), so it is never stored whole and does not drift.

`Polish` descends with the root of H in its place (see `power`), and then makes sure that no `e_r` has risen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

from ..errors import ConfigError
from ..pattern import NMPattern
from .base import BlockInputs, Choice, Criterion, InputStatistics, get_criterion, register_criterion
from .error import row_error_change
from .solve import hessian_power

MAX_ENUMERATED = 70  # 4:8; beyond that enumeration costs more than the swaps it replaces
BLOCK_COLUMNS = 128
POWER = 0.5  # chosen on training text, SmolLM2-135M
ROUNDING = 1e-6  # a few float32 ulps of the terms that are compared


@register_criterion
class Polish(Criterion):
    """Start from another criterion's mask and descend; each row of the result has at most the start's output error.

    Patterns of up to 70 candidates (2:4, 4:8) try every candidate of a group; larger ones (8:16) try every exchange of
    one kept for one pruned weight of the group, best first, until none helps or min(n, m - n) were made.

    Args:
        start (`str` or `Criterion`): gives the first mask.
        sweeps (`int`): passes over the columns at most; stops early when one changes nothing. The first gives most.
        power (`float`): the descent is on `H^power`. 1 gives the lowest error on the calibration tokens and a worse model:
            there the errors of many pruned weights cancel along the few strong directions of the inputs, and with pruned
            inputs or on other text they do not. The root brings the directions closer to one another.
    """

    name = "polish"

    def __init__(self, start: str | Criterion = "wanda", sweeps: int = 2, power: float = POWER) -> None:
        if sweeps < 1:
            raise ConfigError(f"polish: sweeps={sweeps} would change nothing; use 1 or more")
        if not 0 <= power <= 1:
            raise ConfigError(f"polish: power={power}, expected 0 (inputs count alike) to 1 (the error as calibrated)")
        self.start = get_criterion(start)
        self.sweeps = sweeps
        self.power = power
        self.needs = "inputs" if self.start.needs == "inputs" else "hessian"

    def stages(self, names: list[str], block: nn.Module) -> list[list[str]]:
        return self.start.stages(names, block)

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        latest, objective = None, None
        for name, choice in self.start.choose_block(inputs):
            statistics = inputs.statistics[name]
            if statistics is not latest:  # layers with the same input follow one another and share the power
                latest, objective = statistics, None  # two of them are never in memory
                objective = hessian_power(statistics.hessian, self.power)
            weight, hessian = inputs.weights[name], statistics.hessian
            yield name, Choice(polish_mask(weight, choice.mask, hessian, inputs.pattern, self.sweeps, objective))

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        start, hessian = self.start.mask(weight, statistics, pattern), statistics.hessian
        return polish_mask(weight, start, hessian, pattern, self.sweeps, hessian_power(hessian, self.power))


def polish_mask(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    pattern: NMPattern,
    sweeps: int = 2,
    objective: torch.Tensor | None = None,
) -> torch.Tensor:
    """Lower `tr((W*M - W) H (W*M - W)^T)` by changing the mask only. Computes in float32.

    Every row that is changed is checked in float64 at the end and goes back to the given mask unless its error fell, so
    rounding can't make a mask worse.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype.
        mask (`torch.Tensor`): bool `[out, in]`, follows `pattern`.
        hessian (`torch.Tensor`): symmetric float32 `[in, in]`.
        pattern (`NMPattern`): n kept of m.
        sweeps (`int`): passes over the columns at most.
        objective (`torch.Tensor`, *optional*): symmetric float32 `[in, in]`, to descend on instead of `hessian`.

    Returns:
        bool `[out, in]`, follows `pattern`.
    """
    objective = hessian.float() if objective is None else objective
    weight_t = weight.float().t().contiguous()  # [in, out]: the weights of a group are whole rows
    kept_t = mask.t().clone(memory_format=torch.contiguous_format)
    for _ in range(sweeps):
        if not _sweep(weight_t, kept_t, objective, pattern):
            break
    polished = kept_t.t()
    before, after = (torch.where(kept, weight, 0) for kept in (mask, polished))
    improved = row_error_change(weight, before, after, hessian) < 0
    return torch.where(improved[:, None], polished, mask)


def _sweep(weight: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern) -> bool:
    """One pass over all groups; changes `kept` (`[in, out]`) in place and tells whether anything changed."""
    in_features = len(weight)
    removed = torch.where(kept, 0, -weight)  # D^T
    step = BLOCK_COLUMNS // pattern.m * pattern.m
    changed = torch.zeros((), dtype=torch.bool, device=weight.device)
    for start in range(0, in_features, step):
        rows = hessian[start : start + step].clone()  # [block, in]
        groups = [slice(g, min(g + pattern.m, len(rows))) for g in range(0, len(rows), pattern.m)]
        own = [rows[g, start + g.start : start + g.stop].clone() for g in groups]
        for g in groups:
            rows[g, start + g.start : start + g.stop] = 0
        outside = rows @ removed  # [block, out]: G^T without the share of the own group
        for g, own_hessian in zip(groups, own, strict=True):
            if g.stop - g.start <= pattern.n:
                continue  # a tail that keeps all it has
            here = slice(start + g.start, start + g.stop)
            best = _best_choice(weight[here], kept[here], removed[here], outside[g], own_hessian, pattern.n)
            changed |= (best != kept[here]).any()
            kept[here] = best
            update = torch.where(best, 0, -weight[here]) - removed[here]
            removed[here] += update
            outside[g.stop :].addmm_(rows[g.stop :, here], update)
    return bool(changed)


def _best_choice(
    weight: torch.Tensor,
    kept: torch.Tensor,
    removed: torch.Tensor,
    outside: torch.Tensor,
    hessian: torch.Tensor,
    n: int,
) -> torch.Tensor:
    """The positions to keep in one group, bool `[m, out]`. All arguments but `hessian` (`[m, m]`) are `[m, out]`."""
    pattern = NMPattern(n, len(weight))
    if pattern.num_candidates <= MAX_ENUMERATED:
        return _best_candidate(weight, kept, removed, outside, hessian, pattern)
    return _best_exchanges(weight, kept, outside, hessian, pattern)


@lru_cache(maxsize=64)
def _candidate_table(pattern: NMPattern, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Candidates as columns (bool `[m, C]`), pairs of positions (two int64 `[P]`), and what each candidate prunes:
    positions, then pairs of which both go (float32 `[C, m + P]`)."""
    candidates = pattern.candidates(device)
    first, second = torch.tensor(list(itertools.combinations(range(pattern.m), 2)), device=device).unbind(1)
    pruned = ~candidates
    table = torch.cat([pruned, pruned[:, first] & pruned[:, second]], dim=1).float()
    return candidates.t().contiguous(), first, second, table


def _best_candidate(
    weight: torch.Tensor,
    kept: torch.Tensor,
    removed: torch.Tensor,
    outside: torch.Tensor,
    hessian: torch.Tensor,
    pattern: NMPattern,
) -> torch.Tensor:
    candidates, first, second, table = _candidate_table(pattern, weight.device)
    alone = weight * (hessian.diagonal()[:, None] * weight - 2 * outside)  # error of pruning one weight
    together = weight[first] * weight[second] * (2 * hessian[first, second])[:, None]  # extra of pruning two
    error, best = (table @ torch.cat([alone, together])).min(0)  # [C, out] -> [out]
    current = (removed * (2 * outside + hessian @ removed)).sum(0)
    gains = current - error > ROUNDING * alone.abs().sum(0)
    return torch.where(gains, candidates[:, best], kept)


def _best_exchanges(
    weight: torch.Tensor, kept: torch.Tensor, outside: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern
) -> torch.Tensor:
    positions = torch.arange(pattern.m, device=weight.device)[:, None]
    cross = 2 * hessian[:, :, None] * weight[:, None] * weight  # [m, m, out]
    square = hessian.diagonal()[:, None] * weight * weight
    for _ in range(min(pattern.n, pattern.m - pattern.n)):
        linear = 2 * weight * (outside + hessian @ torch.where(kept, 0, -weight))
        prune = (square - linear).masked_fill(~kept, torch.inf)
        restore = (square + linear).masked_fill(kept, torch.inf)
        change, best = (prune[:, None] + restore - cross).flatten(0, 1).min(0)
        gains = change < -ROUNDING * (square + linear.abs()).sum(0)
        if not gains.any():
            break
        kept = kept ^ (((positions == best // pattern.m) | (positions == best % pattern.m)) & gains)
    return kept
