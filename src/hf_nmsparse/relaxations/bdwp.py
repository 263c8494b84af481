# SPDX-License-Identifier: Apache-2.0
"""BDWP, bidirectional weight pruning: n:m weights in the forward and in the backward product (arXiv 2309.13015)."""

from __future__ import annotations

import torch

from .. import ops
from ..ops import SamplingState
from ..ops.shared_sample import SharedSample
from .base import register_relaxation
from .trained_weight import TrainedWeightRelaxation


class _MadeOnceAStep(TrainedWeightRelaxation):
    """`W * M` straight through to all of W, made once per optimizer step for all its passes."""

    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        own = parameters["nmsparse_weight"]

        def make() -> torch.Tensor:
            return torch.where(self._mask(parameters), own.detach(), 0).to(weight.dtype)

        return ops.take_through(own, make() if shared is None else shared.weight(make))


@register_relaxation
class BDWPRelaxation(_MadeOnceAStep):
    """`y = x W_F^T` with the n largest of each m weights along the inputs, `dx = dy W_B` with those along the outputs, and a
    dense weight gradient `dy^T x`, straight through to all of W.

    Both sparse weights are made once per optimizer step, for all its micro-batches and recomputed blocks. dx is not the
    gradient of the forward pass: W_B differs from W_F.

    Parameters: `nmsparse_weight` `[out, in]`.
    """

    name = "bdwp"
    held_weights = 2

    def backward_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        shared: SharedSample | None = None,
    ) -> torch.Tensor | None:
        def make() -> torch.Tensor:
            own = parameters["nmsparse_weight"].detach()
            return torch.where(ops.column_mask(own.abs(), self.pattern), own, 0).to(weight.dtype)

        return make() if shared is None else shared.weight(make)


@register_relaxation
class TransposableRelaxation(_MadeOnceAStep):
    """`W * M` with masks that are n:m along inputs and outputs alike, so that forward and backward products share one sparse
    weight: the best mask of each 4x4 block (90 for 2:4), of the weights at every step; for n:4.

    The gradient passes the mask straight through to all of W.

    Parameters: `nmsparse_weight` `[out, in]`.
    """

    name = "transposable"
    held_weights = 1

    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return ops.mask_to_codes(self._mask(parameters), self.pattern)

    def _mask(self, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.transposable_mask(parameters["nmsparse_weight"].detach().abs(), self.pattern)
