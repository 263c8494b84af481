# SPDX-License-Identifier: Apache-2.0
"""Masks with a logit for each weight: the exact distribution over all subsets of fixed size, for any pattern.

    s_j  = (kappa * theta_j + g_j) / tau             g: Gumbel noise
    p(c) ~ exp(sum_{j in c} s_j)                     over the subsets c of n of the m positions
    M_j  = P(j in c)
    dtheta = kappa / tau * Cov(M) dM                 the Jacobian of the marginals is their covariance

This is conditional Bernoulli sampling (Chen, Dempster, Liu, "Weighted finite population sampling to maximize entropy",
Biometrika 81, 1994). With e_k(i) the elementary symmetric polynomial of degree k in exp(s_1) .. exp(s_i), element i is in,
given that k of the first i are, with probability

    w_i[k] = e^{s_i} e_{k-1}(i-1) / e_k(i) = sigmoid(s_i - D_{i-1}[k])       D_i[k] = log e_k(i) - log e_{k-1}(i)

    D_i[k] = D_{i-1}[k] + softplus(s_i - D_{i-1}[k]) - softplus(s_i - D_{i-1}[k-1])

so the mask is drawn from the last element to the first by a walk that is in state k, the number still to keep, with
probability R_i[k]. D_i[k] is a softened k-th largest of the first i scores: of their size, while log e_k would be the sum of
n of them and lose their digits. Nothing is divided and nothing overflows, whatever kappa / tau.

The covariance is symmetric, so the gradient is the derivative of M in the direction dM: the same recursions, differentiated
forward. Elements and states are numbered from 0 below; plane k of D stands for degree k + 1, and element i can be in or out
in states [lo, hi) alone; in the others it is surely in (nothing left to choose from) or surely out (nothing left to keep).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..pattern import NMPattern
from .packing import top_n_codes, top_n_mask
from .sampler import Sampler

# Score of the first position beyond the end of a row; the next ones get its multiples, so that the tail keeps its min(n, r)
# weights, and of the padding the first positions, all with probability exactly 1. Scores are far below its size.
_PADDING_SCORE = -1e9


class ElementwiseSampler(Sampler[list[torch.Tensor]]):
    """Distribution: for each of the m elements the probabilities `w`, `[hi - lo, rows, groups]`. Logits: `[out, in]`."""

    @staticmethod
    def values_per_group(pattern: NMPattern) -> int:
        # The scores, and half of the n (m - n) probabilities: measured fastest, as passes go over few planes at a time.
        return pattern.m + pattern.n * (pattern.m - pattern.n) // 2

    @staticmethod
    def hard_codes(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        return top_n_codes(logits, pattern)

    @staticmethod
    def hard_mask(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        return top_n_mask(logits, pattern)

    def distribution(self, rows: slice) -> list[torch.Tensor]:
        scores = self._to_planes(self.logits[rows].to(self.dtype)).mul_(self.slope)
        if self.noise:
            scores += self.scaled_noise(rows, self.pattern.m).transpose(0, 1)
        tail = self.pattern.tail(self.in_features)
        if tail:
            for beyond in range(self.pattern.m - tail):
                scores[tail + beyond, :, -1] = (beyond + 1) * _PADDING_SCORE
        return conditionals(scores, self.pattern)

    def mask(self, distribution: list[torch.Tensor]) -> torch.Tensor:
        return self._from_planes(marginals(distribution, self.pattern))

    def gradient(self, distribution: list[torch.Tensor], grad_mask: torch.Tensor) -> torch.Tensor:
        direction = self._to_planes(grad_mask)
        return self._from_planes(marginals_derivative(distribution, direction, self.pattern))

    def certainty(self, distribution: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return largest_probability(distribution, self.pattern).sum(), entropy(distribution, self.pattern).sum()

    def _to_planes(self, values: torch.Tensor) -> torch.Tensor:
        """`[rows, in]` -> a fresh `[m, rows, groups]`, 0 beyond the end."""
        m = self.pattern.m
        planes = values.new_empty(m, values.shape[0], self.groups)
        for position, plane in enumerate(planes):
            column = values[:, position::m]
            plane[:, : column.shape[1]] = column
            plane[:, column.shape[1] :] = 0
        return planes

    def _from_planes(self, planes: torch.Tensor) -> torch.Tensor:
        """`[m, rows, groups]` -> `[rows, in]`."""
        return planes.permute(1, 2, 0).flatten(1)[:, : self.in_features]


def _undecided(pattern: NMPattern) -> Iterator[tuple[int, int, int]]:
    """`(i, lo, hi)` for each element."""
    n, m = pattern.n, pattern.m
    return ((i, max(0, n - m + i), min(n, i)) for i in range(m))


def conditionals(scores: torch.Tensor, pattern: NMPattern) -> list[torch.Tensor]:
    """`w` of each element, `[hi - lo, rows, groups]`, from scores `[m, rows, groups]`."""
    n, shape = pattern.n, scores.shape[1:]
    ratios = scores.new_empty(n, *shape)  # D
    w = []
    for i, lo, hi in _undecided(pattern):
        x = scores[i] - ratios[lo:hi]
        w.append(x.sigmoid())
        if i < n:
            ratios[i] = scores[i]
        if i == pattern.m - 1:
            break
        # Planes below lo are no longer right, and no longer read.
        step = F.softplus(x, threshold=40.0)  # exact: e^-40 is below the rounding of float64
        ratios[lo:hi] += step
        ratios[lo + 1 : hi + 1] -= step[: n - 1 - lo]
    return w


def marginals(w: list[torch.Tensor], pattern: NMPattern) -> torch.Tensor:
    """`P(j in c)`, `[m, rows, groups]`."""
    n, shape = pattern.n, w[0].shape[1:]
    result = w[0].new_empty(pattern.m, *shape)
    states = _final_state(w, pattern)  # R
    for i, lo, hi in reversed(list(_undecided(pattern))):
        taken = states[lo + 1 : hi + 1] * w[i]
        torch.sum(taken, 0, out=result[i])
        states[lo + 1 : hi + 1] -= taken
        states[lo:hi] += taken
        if i < n:
            result[i] += states[i + 1]
            states[i] += states[i + 1]
    return result


def marginals_derivative(w: list[torch.Tensor], direction: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Derivative of the marginals as the scores move by `direction`; both `[m, rows, groups]`."""
    n = pattern.n
    dw = _conditionals_derivative(w, direction, pattern)
    result = torch.empty_like(direction)
    states = _final_state(w, pattern)
    dstates = torch.zeros_like(states)
    for i, lo, hi in reversed(list(_undecided(pattern))):
        dtaken = (dstates[lo + 1 : hi + 1] * w[i]).addcmul_(states[lo + 1 : hi + 1], dw[i])
        taken = states[lo + 1 : hi + 1] * w[i]
        torch.sum(dtaken, 0, out=result[i])
        for walk, part in ((states, taken), (dstates, dtaken)):
            walk[lo + 1 : hi + 1] -= part
            walk[lo:hi] += part
        if i < n:
            result[i] += dstates[i + 1]
            states[i] += states[i + 1]
            dstates[i] += dstates[i + 1]
    return result


def _conditionals_derivative(w: list[torch.Tensor], direction: torch.Tensor, pattern: NMPattern) -> list[torch.Tensor]:
    n = pattern.n
    dratios = direction.new_empty(n, *direction.shape[1:])
    dw = []
    for i, lo, hi in _undecided(pattern):
        dx = direction[i] - dratios[lo:hi]
        step = w[i] * dx
        dw.append(step - w[i] * step)
        if i < n:
            dratios[i] = direction[i]
        dratios[lo:hi] += step
        dratios[lo + 1 : hi + 1] -= step[: n - 1 - lo]
    return dw


def _final_state(w: list[torch.Tensor], pattern: NMPattern) -> torch.Tensor:
    """R before the last element: all n are still to keep. `[n + 1, rows, groups]`."""
    states = w[0].new_zeros(pattern.n + 1, *w[0].shape[1:])
    states[pattern.n] = 1
    return states


def largest_probability(w: list[torch.Tensor], pattern: NMPattern) -> torch.Tensor:
    """Probability of the most probable subset, `[rows, groups]`: the likeliest walk."""
    best = w[0].new_ones(pattern.n + 1, *w[0].shape[1:])
    for i, lo, hi in _undecided(pattern):
        through = torch.maximum(best[lo:hi] * w[i], best[lo + 1 : hi + 1] * (1 - w[i]))
        if i < pattern.n:
            best[i + 1] = best[i]
        best[lo + 1 : hi + 1] = through
    return best[pattern.n]


def entropy(w: list[torch.Tensor], pattern: NMPattern) -> torch.Tensor:
    """Entropy over subsets in nats, `[rows, groups]`: that of the steps of the walk, by the chain rule."""
    states = _final_state(w, pattern)
    result = torch.zeros_like(states[0])
    for i, lo, hi in reversed(list(_undecided(pattern))):
        here = states[lo + 1 : hi + 1]
        result += (here * (torch.special.entr(w[i]) + torch.special.entr(1 - w[i]))).sum(0)
        taken = here * w[i]
        here -= taken
        states[lo:hi] += taken
        if i < pattern.n:
            states[i] += states[i + 1]
    return result
