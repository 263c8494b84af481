# SPDX-License-Identifier: Apache-2.0
"""The n:m pattern: **n weights kept** of every m consecutive ones along the input dimension. And sparsity without one."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from .errors import PatternError

MAX_M = 16


@dataclass(frozen=True, init=False)
class NMPattern:
    """A sparsity pattern with `n` kept weights in each group of `m`.

    Candidates, the C(m, n) ways to choose the kept positions, are numbered in the order of
    `itertools.combinations(range(m), n)`; that number is the *code* of a group.

    Args:
        n (`int` or `str` or `NMPattern`): kept weights of a group, or the whole pattern as `"2:4"`.
        m (`int`, *optional*): group size, at most 16.

    Raises:
        PatternError: unless `0 < n < m <= 16`.
    """

    n: int
    m: int

    def __init__(self, n: int | str | NMPattern, m: int | None = None) -> None:
        given = n if m is None else f"{n}:{m}"
        if isinstance(n, NMPattern):
            n, m = n.n, n.m
        elif isinstance(n, str) and m is None:
            match = re.fullmatch(r"\s*(\d{1,3})\s*:\s*(\d{1,3})\s*", n)
            if match is None:
                raise PatternError(f"pattern {n!r} is not of the form 'n:m'; write for example '2:4' (2 kept of 4)")
            n, m = int(match[1]), int(match[2])
        if isinstance(n, bool) or not isinstance(n, int) or not isinstance(m, int):
            raise PatternError(f"pattern {given!r} is not of the form 'n:m'; write for example '2:4' (2 kept of 4)")
        if not 0 < n < m <= MAX_M:
            raise PatternError(
                f"pattern {n}:{m}: need 0 < n < m <= {MAX_M}, where n is the number of weights kept of m"
            )
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    # --- candidates -------------------------------------------------------------------------------------------------
    @property
    def num_candidates(self) -> int:
        """C(m, n), the number of ways to keep n of m."""
        return math.comb(self.m, self.n)

    @property
    def density(self) -> float:
        """Share of weights kept, n/m."""
        return self.n / self.m

    @property
    def entropy_bits_per_weight(self) -> float:
        """Information content of an arbitrary mask, log2 C(m, n) / m (2:4: 0.646 bit)."""
        return math.log2(self.num_candidates) / self.m

    def candidates(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """All candidates as 0/1 rows, `[C, m]`, in code order."""
        return _candidates(self.n, self.m).to(device=device, dtype=dtype, non_blocking=True)

    def positions(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Kept positions of each candidate, ascending, int64 `[C, n]`."""
        return _positions(self.n, self.m).to(device=device, non_blocking=True)

    def rank(self, kept: tuple[int, ...] | list[int]) -> int:
        """Code of the candidate that keeps the positions `kept` (ascending, 0-based)."""
        code = _ranks(self.n, self.m).get(tuple(kept))
        if code is None:
            raise PatternError(
                f"{tuple(kept)} is not an ascending choice of {self.n} positions out of 0..{self.m - 1}"
            )
        return code

    def unrank(self, code: int) -> tuple[int, ...]:
        """Positions kept by the candidate with this code."""
        if not 0 <= code < self.num_candidates:
            raise PatternError(f"code {code} is outside 0..{self.num_candidates - 1} of pattern {self}")
        return tuple(_positions(self.n, self.m)[code].tolist())

    # --- groups and tails -------------------------------------------------------------------------------------------
    def num_groups(self, in_features: int) -> int:
        """Groups in a row of `in_features` weights; the last one may be a shorter tail."""
        return -(-in_features // self.m)

    def tail(self, in_features: int) -> int:
        """Real weights in the last group if it is shorter than m, else 0."""
        return in_features % self.m

    def tail_candidates(self, in_features: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Which candidates the last group of a row may use, bool `[C]`.

        A tail of r weights keeps min(n, r) of them: with r >= n only candidates inside the first r positions are
        allowed; with r < n everything is kept, and code 0 stands for it.
        """
        r = self.tail(in_features)
        positions = _positions(self.n, self.m)
        if r == 0:
            allowed = torch.ones_like(positions[:, 0], dtype=torch.bool)
        elif r < self.n:
            allowed = (positions == positions[0]).all(dim=1)
        else:
            allowed = (positions < r).all(dim=1)
        return allowed.to(device=device, non_blocking=True)

    def kept_per_row(self, in_features: int) -> int:
        """Weights kept of a row of `in_features`."""
        return in_features // self.m * self.n + min(self.n, self.tail(in_features))

    # --- packed codes -----------------------------------------------------------------------------------------------
    @property
    def packing(self) -> tuple[int, int]:
        """(k, b): k codes are stored in b bytes, with k/b largest (smallest b on ties), C^k <= 2^(8b), b <= 8."""
        return digit_packing(self.num_candidates)

    def packed_row_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed codes: b for each full run of k groups, ceil(r log2(C) / 8) for the r left."""
        k, b = self.packing
        full, rest = divmod(self.num_groups(in_features), k)
        return full * b + digit_bytes(self.num_candidates, rest)

    def max_groups(self, row_bytes: int) -> int:
        """Most groups that a row of so many packed bytes can hold; the real number comes from the layer's size."""
        k, b = self.packing
        full, rest = divmod(row_bytes, b)
        left = 0
        while digit_bytes(self.num_candidates, left + 1) <= rest:
            left += 1
        return full * k + left


@dataclass(frozen=True)
class Unstructured:
    """Sparsity without groups: a share of a layer's weights is pruned, wherever they are.

    Args:
        sparsity (`float`): share of weights *pruned*, over 0 and below 1.

    Raises:
        PatternError: for another share.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise PatternError(
                f"sparsity {self.sparsity:.0%}: expected more than 0 % and less than 100 % of weights pruned"
            )

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%"

    @property
    def density(self) -> float:
        """Share of weights kept."""
        return 1 - self.sparsity

    def num_pruned(self, weights: int) -> int:
        """How many of so many weights are pruned, rounded down."""
        # The nearest float of a share like 0.7 can lie below it, and 7 of 10 must not become 6.
        return int(weights * self.sparsity + 1e-6)


Pattern = NMPattern | Unstructured


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """`"2:4"` -> `NMPattern`, 2 kept of 4; `"60%"` -> `Unstructured`, 60 % pruned; patterns pass through.

    Raises:
        PatternError: if it is neither.
    """
    if isinstance(pattern, Unstructured):
        return pattern
    if isinstance(pattern, str) and (match := re.fullmatch(r"\s*(\d{1,2}(?:\.\d+)?)\s*%\s*", pattern)):
        return Unstructured(float(match[1]) / 100)
    if isinstance(pattern, str) and "%" in pattern:
        raise PatternError(f"pattern {pattern!r}: expected a share of pruned weights below 100 %, for example '60%'")
    return NMPattern(pattern)


# The tables are made once and kept, so they name their device: under `torch.device("meta")` they would be kept empty.
@lru_cache(maxsize=64)
def _positions(n: int, m: int) -> torch.Tensor:
    return torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int64, device="cpu")


@lru_cache(maxsize=64)
def _candidates(n: int, m: int) -> torch.Tensor:
    positions = _positions(n, m)
    return torch.zeros(len(positions), m, dtype=torch.bool, device="cpu").scatter_(1, positions, True)


@lru_cache(maxsize=64)
def _ranks(n: int, m: int) -> dict[tuple[int, ...], int]:
    return {kept: code for code, kept in enumerate(itertools.combinations(range(m), n))}


def digit_bytes(base: int, digits: int) -> int:
    """Fewest bytes that hold `digits` digits of the given base, in exact integer arithmetic."""
    return ((base**digits - 1).bit_length() + 7) // 8


@lru_cache(maxsize=64)
def digit_packing(base: int) -> tuple[int, int]:
    """(k, b): k digits of a base of at least 2 are stored in b bytes, see `NMPattern.packing`."""
    best = (0, 1)
    for b in range(1, 9):
        k = 0
        while base ** (k + 1) <= 256**b:
            k += 1
        if k * best[1] > best[0] * b:
            best = (k, b)
    return best
