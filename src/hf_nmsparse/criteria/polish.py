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
    has_confidence = True

    def __init__(self, start: str | Criterion = "wanda", sweeps: int = 2, power: float = POWER) -> None:
        if sweeps < 1:
            raise ConfigError(f"polish: sweeps={sweeps} would change nothing; use 1 or more")
        if not 0 <= power <= 1:
            raise ConfigError(f"polish: power={power}, expected 0 (inputs count alike) to 1 (the error as calibrated)")
        self.start = get_criterion(start)
        self.sweeps = sweeps
        self.power = power
        self.needs = "inputs" if self.start.needs == "inputs" else "hessian"
        self._latest: tuple[InputStatistics, torch.Tensor] | None = None

    def stages(self, names: list[str], block: nn.Module) -> list[list[str]]:
        return self.start.stages(names, block)

    def choose_block(self, inputs: BlockInputs) -> Iterator[tuple[str, Choice]]:
        try:
            for name, choice in self.start.choose_block(inputs):
                weight, statistics = inputs.weights[name], inputs.statistics[name]
                yield name, Choice(self._polished(weight, choice.mask, statistics, inputs.pattern))
        finally:
            self._latest = None

    def mask(self, weight: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern) -> torch.Tensor:
        try:
            return self._polished(weight, self.start.mask(weight, statistics, pattern), statistics, pattern)
        finally:
            self._latest = None

    def confidence(
        self, weight: torch.Tensor, mask: torch.Tensor, statistics: InputStatistics | None, pattern: NMPattern
    ) -> torch.Tensor:
        """By how much the next best candidate of a group raises what was descended on, relative to the error of pruning all
        its weights, each alone. Above 70 candidates the next best exchange."""
        return choice_margins(weight, mask, self._objective(statistics), pattern)

    def _polished(
        self, weight: torch.Tensor, start: torch.Tensor, statistics: InputStatistics, pattern: NMPattern
    ) -> torch.Tensor:
        objective = self._objective(statistics)
        return polish_mask(weight, start, statistics.hessian, pattern, self.sweeps, objective)

    def _objective(self, statistics: InputStatistics) -> torch.Tensor:
        """The power of H; layers with the same input follow one another and share it."""
        if self._latest is None or self._latest[0] is not statistics:
            self._latest = None  # two of them are never in memory
            self._latest = statistics, hessian_power(statistics.hessian, self.power)
        return self._latest[1]


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


def choice_margins(
    weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern
) -> torch.Tensor:
    """By how much another choice in one group alone raises `tr((W*M - W) H (W*M - W)^T)` at least, in float32.

    Args:
        weight (`torch.Tensor`): `[out, in]`, any float dtype.
        mask (`torch.Tensor`): bool `[out, in]`, follows `pattern`.
        hessian (`torch.Tensor`): symmetric float32 `[in, in]`.
        pattern (`NMPattern`): n kept of m. Up to 70 candidates all are tried, above all exchanges of one weight for another.

    Returns:
        float32 `[out, groups]`, relative to `sum_j H_jj w_j^2` over the group; 0 where it would not rise, or that sum is 0;
        infinite where there is no other choice.
    """
    weight_t, kept_t = weight.float().t().contiguous(), mask.t()
    removed = torch.where(kept_t, 0, -weight_t)
    margins = []
    for start, groups, own, _, outside in _blocks(hessian, removed, pattern.m):
        for g, own_hessian in zip(groups, own, strict=True):
            here = slice(start + g.start, start + g.stop)
            if g.stop - g.start <= pattern.n:
                margins.append(torch.full_like(weight_t[0], torch.inf))
                continue
            group = NMPattern(pattern.n, g.stop - g.start)
            parts = weight_t[here], kept_t[here], removed[here], outside[g], own_hessian, group
            rise = (_rises if group.num_candidates <= MAX_ENUMERATED else _exchange_rises)(*parts).amin(0)
            scale = own_hessian.diagonal() @ weight_t[here].square()
            margins.append((rise.clamp_min(0) / scale).where(scale > 0, 0))
    return torch.stack(margins, dim=1)


def _blocks(
    hessian: torch.Tensor, removed: torch.Tensor, m: int
) -> Iterator[tuple[int, list[slice], list[torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Blocks of columns: the first, their groups within the block, the part of H of each group, the rows of H without
    those parts (`[block, in]`), and G^T without the share of each weight's own group (`[block, out]`)."""
    step = BLOCK_COLUMNS // m * m
    for start in range(0, len(removed), step):
        rows = hessian[start : start + step].clone()
        groups = [slice(g, min(g + m, len(rows))) for g in range(0, len(rows), m)]
        own = [rows[g, start + g.start : start + g.stop].clone() for g in groups]
        for g in groups:
            rows[g, start + g.start : start + g.stop] = 0
        yield start, groups, own, rows, rows @ removed


def _sweep(weight: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern) -> bool:
    """One pass over all groups; changes `kept` (`[in, out]`) in place and tells whether anything changed."""
    removed = torch.where(kept, 0, -weight)  # D^T
    changed = torch.zeros((), dtype=torch.bool, device=weight.device)
    for start, groups, own, rows, outside in _blocks(hessian, removed, pattern.m):
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
    candidates = _candidate_table(pattern, weight.device)[0]
    errors, alone = _candidate_errors(weight, outside, hessian, pattern)
    error, best = errors.min(0)  # [C, out] -> [out]
    current = (removed * (2 * outside + hessian @ removed)).sum(0)
    gains = current - error > ROUNDING * alone.abs().sum(0)
    return torch.where(gains, candidates[:, best], kept)


def _candidate_errors(
    weight: torch.Tensor, outside: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of all candidates of one group, `[C, out]`, and of pruning each weight alone, `[m, out]`."""
    _, first, second, table = _candidate_table(pattern, weight.device)
    alone = weight * (hessian.diagonal()[:, None] * weight - 2 * outside)
    together = weight[first] * weight[second] * (2 * hessian[first, second])[:, None]  # extra of pruning two
    return table @ torch.cat([alone, together]), alone


def _rises(
    weight: torch.Tensor,
    kept: torch.Tensor,
    removed: torch.Tensor,
    outside: torch.Tensor,
    hessian: torch.Tensor,
    pattern: NMPattern,
) -> torch.Tensor:
    """By how much the error rises with each candidate of one group, `[C, out]`; infinite for the one that is kept."""
    errors, _ = _candidate_errors(weight, outside, hessian, pattern)
    candidates = _candidate_table(pattern, weight.device)[0]
    is_kept = (kept[:, None] == candidates[:, :, None]).all(0)
    current = errors.masked_fill(~is_kept, 0).sum(0)  # by the same rounding as the others
    return (errors - current).masked_fill(is_kept, torch.inf)


def _best_exchanges(
    weight: torch.Tensor, kept: torch.Tensor, outside: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern
) -> torch.Tensor:
    positions = torch.arange(pattern.m, device=weight.device)[:, None]
    cross = 2 * hessian[:, :, None] * weight[:, None] * weight  # [m, m, out]
    square = hessian.diagonal()[:, None] * weight * weight
    for _ in range(min(pattern.n, pattern.m - pattern.n)):
        linear = 2 * weight * (outside + hessian @ torch.where(kept, 0, -weight))
        change, best = _exchange_changes(kept, square, linear, cross).min(0)
        gains = change < -ROUNDING * (square + linear.abs()).sum(0)
        if not gains.any():
            break
        kept = kept ^ (((positions == best // pattern.m) | (positions == best % pattern.m)) & gains)
    return kept


def _exchange_changes(
    kept: torch.Tensor, square: torch.Tensor, linear: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """Change of the error by pruning one kept weight and restoring a pruned one, `[m * m, out]`; infinite for other pairs."""
    prune = (square - linear).masked_fill(~kept, torch.inf)
    restore = (square + linear).masked_fill(kept, torch.inf)
    return (prune[:, None] + restore - cross).flatten(0, 1)


def _exchange_rises(
    weight: torch.Tensor,
    kept: torch.Tensor,
    removed: torch.Tensor,
    outside: torch.Tensor,
    hessian: torch.Tensor,
    pattern: NMPattern,
) -> torch.Tensor:
    """As `_rises`, for exchanges of one weight: `[m * m, out]`."""
    cross = 2 * hessian[:, :, None] * weight[:, None] * weight
    square = hessian.diagonal()[:, None] * weight * weight
    return _exchange_changes(kept, square, 2 * weight * (outside + hessian @ removed), cross)
