# SPDX-License-Identifier: Apache-2.0
"""MaskLLM's relaxation: a logit for each candidate of each group, sampled by Gumbel-softmax (arXiv 2409.17481)."""

from __future__ import annotations

import torch

from ..errors import UnsupportedError
from .base import RelaxationConfig, register_relaxation
from .logits import LOGIT_STD, LogitsRelaxation

MAX_CANDIDATES = 70


@register_relaxation
class CandidatesRelaxation(LogitsRelaxation):
    """`W * M` with `M` the expectation over C(m, n) candidates under a Gumbel-softmax of their logits.

    Parameters: `nmsparse_logits` `[out, C, groups]`, in `config.logits_dtype`.
    """

    name = "candidates"
    has_distribution = True
    scheduled = ("temperature", "logit_scale")

    def values_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """`[out, C, groups]`.

        Raises:
            UnsupportedError: if C is more than 70.
        """
        pattern = self.pattern
        if pattern.num_candidates > MAX_CANDIDATES:
            raise UnsupportedError(
                f"relaxation 'candidates' holds one logit a candidate, and pattern {pattern} has "
                f'{pattern.num_candidates} (limit {MAX_CANDIDATES}); use relaxation="elementwise", which holds one logit '
                "a weight for every pattern"
            )
        return out_features, pattern.num_candidates, pattern.num_groups(in_features)

    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """`pi_c = factor * strength * 0.01 * (<prior, S_c> - n^2/m)` (MaskLLM, section 3.3, without its noise).

        n^2/m is the mean overlap of a candidate with all candidates; the paper's code has it for m = 2n only.
        """
        logits = parameters["nmsparse_logits"]
        candidates = self.pattern.candidates(logits.device, torch.float32)
        overlap = candidates @ candidates.T - self.pattern.n**2 / self.pattern.m  # [C, C]
        table = config.prior_strength * LOGIT_STD * overlap
        with torch.no_grad():
            for candidate in range(self.pattern.num_candidates):
                chosen = table[:, candidate][codes]
                logits[:, candidate] = chosen if factors is None else chosen * factors
