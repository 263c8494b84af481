# SPDX-License-Identifier: Apache-2.0
"""What the relaxations with logits share: one trainable tensor, `nmsparse_logits`, over a frozen weight."""

from __future__ import annotations

from abc import abstractmethod

import torch

from .. import ops
from ..ops import SamplingState
from ..ops.shared_sample import SharedSample
from .base import Relaxation, RelaxationConfig

# Standard deviation of fresh logits, and the unit of the prior's strength (MaskLLM's initialisation).
LOGIT_STD = 0.01


# Factors on the prior's strength where `prior_confidence` is set: of the group that its criterion was least and most sure
# of. Their mean is 1, so the strength of a layer's prior on the whole is the same.
CONFIDENCE_FACTORS = (0.25, 1.75)


def strength_factors(confidence: torch.Tensor) -> torch.Tensor:
    """Factors on the strength of a prior, by the ranks of a layer's groups in the confidence of its criterion.

    They are spread evenly over `CONFIDENCE_FACTORS`, whatever the confidences themselves are; equal ones share the mean
    of their ranks, so that all groups of a layer of equal ones have 1.

    Args:
        confidence (`torch.Tensor`): `[out, groups]`, float; infinite where there is nothing to choose (a tail that keeps
            all it has), which gets 1.

    Returns:
        float32 `[out, groups]`, with mean 1.
    """
    lowest, highest = CONFIDENCE_FACTORS
    factors = torch.ones(confidence.shape, dtype=torch.float32, device=confidence.device)
    choice = confidence.isfinite()
    values, order = confidence[choice].sort()
    if len(values) == 0:
        return factors
    _, inverse, counts = values.unique_consecutive(return_inverse=True, return_counts=True)
    quantile = (counts.cumsum(0) - counts / 2) / len(values)  # the middle of each run of equal ones
    ranked = torch.empty(len(values), dtype=torch.float32, device=confidence.device)
    ranked[order] = lowest + (highest - lowest) * quantile[inverse]
    factors[choice] = ranked
    return factors


class LogitsRelaxation(Relaxation):
    """`W * M` with `M` the mean of a distribution over masks that is given by perturbed logits."""

    @abstractmethod
    def values_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the logits of a weight `[out, in]`."""

    def parameters(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        shape = self.values_shape(*weight.shape)
        logits = torch.zeros(shape, device=weight.device, dtype=getattr(torch, config.logits_dtype))
        if not config.init_weights and not logits.is_meta:
            logits.copy_(torch.randn(shape, generator=self.key.generator()) * LOGIT_STD)
        return {"nmsparse_logits": logits}

    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        return ops.masked_weight(weight, parameters["nmsparse_logits"], self.pattern, self.key, state, hard, shared)

    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return ops.hard_codes(parameters["nmsparse_logits"], self.pattern, in_features)

    def certainty(
        self, parameters: dict[str, torch.Tensor], in_features: int, state: SamplingState
    ) -> tuple[float, float, int]:
        return ops.mask_certainty(parameters["nmsparse_logits"], self.pattern, in_features, self.key, state)
