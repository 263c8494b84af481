# SPDX-License-Identifier: Apache-2.0
"""MaskLLM's relaxation: a logit for each candidate of each group, sampled by Gumbel-softmax (arXiv 2409.17481)."""

from __future__ import annotations

import torch

from .. import ops
from ..errors import UnsupportedError
from ..ops import SamplingState
from ..pattern import NMPattern
from .base import Relaxation, RelaxationConfig, register_relaxation

# Standard deviation of fresh logits, and the unit of the prior's strength (MaskLLM's initialisation).
LOGIT_STD = 0.01
MAX_CANDIDATES = 70


@register_relaxation
class CandidatesRelaxation(Relaxation):
    """`W * M` with `M` the expectation over C(m, n) candidates under a Gumbel-softmax of their logits.

    Parameters: `nmsparse_logits`, float32 `[out, C, groups]`.
    """

    name = "candidates"

    def __init__(self, pattern: NMPattern, key: ops.NoiseKey) -> None:
        if pattern.num_candidates > MAX_CANDIDATES:
            raise UnsupportedError(
                f"relaxation 'candidates' holds one logit a candidate, and pattern {pattern} has "
                f"{pattern.num_candidates} (limit {MAX_CANDIDATES}); choose a pattern with fewer, such as 2:4 or 4:8"
            )
        super().__init__(pattern, key)

    def parameters(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        out_features, in_features = weight.shape
        shape = (out_features, self.pattern.num_candidates, self.pattern.num_groups(in_features))
        logits = torch.zeros(shape, device=weight.device, dtype=torch.float32)
        if not config.init_weights and not logits.is_meta:
            # Its own generator: the default one belongs to the user's program.
            generator = torch.Generator().manual_seed(self.key.seed * 2**32 + self.key.layer)
            logits.copy_(torch.randn(shape, generator=generator) * LOGIT_STD)
        return {"nmsparse_logits": logits}

    def set_prior(self, parameters: dict[str, torch.Tensor], codes: torch.Tensor, config: RelaxationConfig) -> None:
        """`pi_c = strength * 0.01 * (<prior, S_c> - n^2/m)` (MaskLLM, section 3.3, without its noise).

        n^2/m is the mean overlap of a candidate with all candidates; the paper's code has it for m = 2n only.
        """
        logits = parameters["nmsparse_logits"]
        candidates = self.pattern.candidates(logits.device, torch.float32)
        overlap = candidates @ candidates.T - self.pattern.n**2 / self.pattern.m  # [C, C]
        table = (config.prior_strength * LOGIT_STD * overlap).to(logits.dtype)
        with torch.no_grad():
            for candidate in range(self.pattern.num_candidates):
                logits[:, candidate] = table[:, candidate][codes]

    def effective_weight(
        self, weight: torch.Tensor, parameters: dict[str, torch.Tensor], state: SamplingState, hard: bool
    ) -> torch.Tensor:
        return ops.masked_weight(weight, parameters["nmsparse_logits"], self.pattern, self.key, state, hard)

    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return ops.hard_codes(parameters["nmsparse_logits"], self.pattern, in_features)
