# SPDX-License-Identifier: Apache-2.0
"""Straight-through scores: a hard mask at all times, of a score for each weight (AST's gradient with frozen weights)."""

from __future__ import annotations

import torch

from .. import ops
from ..ops import SamplingState
from ..ops.shared_sample import SharedSample
from .ast import srste_decay
from .base import RelaxationConfig, register_relaxation
from .elementwise import ElementwiseRelaxation
from .logits import LOGIT_STD
from .schedule import Moment


@register_relaxation
class StraightThroughRelaxation(ElementwiseRelaxation):
    """`W * M` of the frozen weight, `M` the largest scores of each group; the gradient of the scores is that of M, `dL/dW~ * W`.

    Before the optimizer steps, scores of pruned weights decay to 0 as weights do in `ast`. Nothing is sampled: temperature,
    logit scale and regulariser are without effect.

    Parameters: `nmsparse_logits` `[out, in]`.
    """

    name = "straight_through"
    has_distribution = False
    scheduled = ()

    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """`theta = factor * strength * 0.01 * prior`: kept weights above 0, towards which pruned ones decay."""
        scores = parameters["nmsparse_logits"]
        mask = ops.codes_to_mask(codes, self.pattern, scores.shape[1]).float()
        if factors is not None:
            mask *= factors.repeat_interleave(self.pattern.m, dim=1)[:, : scores.shape[1]]
        with torch.no_grad():
            scores.copy_(config.prior_strength * LOGIT_STD * mask)

    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        scores = parameters["nmsparse_logits"]
        mask = ops.top_n_mask(scores.detach(), self.pattern)
        return ops.straight_through_scores(weight, scores, mask)

    def add_to_gradients(self, parameters: dict[str, torch.Tensor], config: RelaxationConfig, moment: Moment) -> None:
        scores = parameters["nmsparse_logits"]
        decay = srste_decay(config, moment)
        if decay and scores.grad is not None:
            pruned = scores.detach().masked_fill(ops.top_n_mask(scores.detach(), self.pattern), 0)
            scores.grad.add_(pruned, alpha=decay)
