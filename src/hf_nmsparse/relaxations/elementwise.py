# SPDX-License-Identifier: Apache-2.0
"""A logit for each weight, for any pattern: the candidate's logit is the sum of its weights' (see `ops.elementwise_masks`)."""

from __future__ import annotations

import torch

from .. import ops
from .base import RelaxationConfig, register_relaxation
from .logits import LOGIT_STD, LogitsRelaxation


@register_relaxation
class ElementwiseRelaxation(LogitsRelaxation):
    """`W * M` with `M` the marginals of the distribution over subsets of n of m that the logits of their weights give.

    Parameters: `nmsparse_logits` `[out, in]`, in `config.logits_dtype`.
    """

    name = "elementwise"
    has_distribution = True
    scheduled = ("temperature", "logit_scale")

    def values_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, in_features

    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """`theta = factor * strength * 0.01 * (prior - n/m)`.

        Summed over a candidate's weights this is the prior of candidates, `factor * strength * 0.01 * (<prior, S_c> - n^2/m)`.
        """
        logits = parameters["nmsparse_logits"]
        mask = ops.codes_to_mask(codes, self.pattern, logits.shape[1])
        theta = config.prior_strength * LOGIT_STD * (mask.float() - self.pattern.density)
        if factors is not None:
            theta *= factors.repeat_interleave(self.pattern.m, dim=1)[:, : logits.shape[1]]
        with torch.no_grad():
            logits.copy_(theta)
