# SPDX-License-Identifier: Apache-2.0
"""Masks with a logit for each candidate of each group (MaskLLM, arXiv 2409.17481, section 3).

y   = softmax_c((kappa * pi + g) / tau)          g: Gumbel noise
M   = y S                                        S: the C candidates as 0/1 rows

dy  = dM S^T
dpi = kappa / tau * y * (dy - sum_c y_c dy_c)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..pattern import NMPattern
from .philox import NoiseKey
from .sampler import Sampler, SamplingState


class CandidateSampler(Sampler[torch.Tensor]):
    """Distribution: the probabilities `y`, `[rows, C, groups]`. Logits: `[out, C, groups]`."""

    def __init__(
        self,
        logits: torch.Tensor,
        pattern: NMPattern,
        in_features: int,
        key: NoiseKey,
        state: SamplingState,
        noise: bool,
    ) -> None:
        super().__init__(logits, pattern, in_features, key, state, noise)
        self.candidates = pattern.candidates(logits.device, self.dtype)
        has_tail = pattern.tail(in_features) > 0
        self.barred_in_tail = ~pattern.tail_candidates(in_features, logits.device) if has_tail else None

    @staticmethod
    def values_per_group(pattern: NMPattern) -> int:
        return pattern.num_candidates

    @staticmethod
    def hard_codes(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        best = logits[:, 0]
        codes = torch.zeros_like(best, dtype=torch.int64)
        for candidate in range(1, logits.shape[1]):
            better = logits[:, candidate] > best
            codes.masked_fill_(better, candidate)
            best = torch.maximum(best, logits[:, candidate])
        if pattern.tail(in_features):
            allowed = pattern.tail_candidates(in_features, logits.device)
            tail = logits[:, :, -1].masked_fill(~allowed, float("-inf"))  # [out, C]
            codes[:, -1] = (tail == tail.amax(1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
        return codes

    @staticmethod
    def hard_mask(logits: torch.Tensor, pattern: NMPattern, in_features: int) -> torch.Tensor:
        codes = CandidateSampler.hard_codes(logits, pattern, in_features)
        return pattern.candidates(logits.device)[codes].flatten(1)[:, :in_features]

    def distribution(self, rows: slice) -> torch.Tensor:
        scores = self.logits[rows].to(self.dtype) * self.slope
        if self.noise:
            scores += self.scaled_noise(rows, self.pattern.num_candidates)
        if self.barred_in_tail is not None:
            scores[:, :, -1].masked_fill_(self.barred_in_tail, float("-inf"))
        return scores.softmax(1)

    def mask(self, distribution: torch.Tensor) -> torch.Tensor:
        return (distribution.transpose(1, 2) @ self.candidates).flatten(1)[:, : self.in_features]

    def gradient(self, distribution: torch.Tensor, grad_mask: torch.Tensor) -> torch.Tensor:
        padded = F.pad(grad_mask, (0, -self.in_features % self.pattern.m))
        grouped = padded.unflatten(1, (-1, self.pattern.m))  # [rows, groups, m]
        grad_y = self.candidates @ grouped.transpose(1, 2)  # [rows, C, groups]
        grad_y -= (distribution * grad_y).sum(1, keepdim=True)
        return grad_y.mul_(distribution)

    def certainty(self, distribution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return distribution.amax(1).sum(), torch.special.entr(distribution).sum()
