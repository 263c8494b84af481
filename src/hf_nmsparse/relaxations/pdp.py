# SPDX-License-Identifier: Apache-2.0
"""PDP, parameter-free differentiable pruning: a soft mask of the weights alone (arXiv 2305.11203)."""

from __future__ import annotations

import torch

from .. import ops
from ..ops import SamplingState
from ..ops.shared_sample import SharedSample
from .base import register_relaxation
from .trained_weight import TrainedWeightRelaxation


@register_relaxation
class PDPRelaxation(TrainedWeightRelaxation):
    """`m(w) w`, `m(w) = sigmoid((w^2 - t^2) / tau)`, t in the middle between the smallest kept and the largest pruned magnitude
    of a group, so that m is above 1/2 for exactly its n largest weights.

    tau is `temperature` times the mean of `w^2` of the layer: the paper's 1e-4 is on the scale of the weights, which differs
    between models by orders of magnitude. With hard masks, in evaluation, the n largest of a group are kept as they are.

    Parameters: `nmsparse_weight` `[out, in]`.
    """

    name = "pdp"
    scheduled = ("temperature",)
    default_temperature = (0.25, 0.01)

    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        own, mask = parameters["nmsparse_weight"], self._mask(parameters)
        if hard:
            return ops.straight_through(own, mask, weight.dtype)
        thresholds = ops.pdp_thresholds(own, mask, self.pattern)
        temperature = state.temperature * own.detach().float().square().mean()
        return ops.pdp_weight(own, thresholds, self.pattern.m, temperature, weight.dtype)
