# SPDX-License-Identifier: Apache-2.0
"""AST, the adaptive sparse trainer: weights trained under masks that are renewed every few steps (arXiv 2407.20584)."""

from __future__ import annotations

import torch

from .. import ops
from ..ops import SamplingState
from ..ops.shared_sample import SharedSample
from .base import RelaxationConfig, register_relaxation
from .schedule import Moment
from .trained_weight import TrainedWeightRelaxation


@register_relaxation
class ASTRelaxation(TrainedWeightRelaxation):
    """`W * M`, `M` the largest `|W| * norm of the input` of each group, renewed every `mask_interval` steps.

    The gradient passes the mask straight through to all of W. Before the optimizer steps the gradient of pruned weights gets
    `decay(t) * W` (annealed SR-STE, section 3.1), `decay(t) = srste_decay * min(1, t / (srste_ramp * max_steps))`: little at
    first, so that masks flip freely, then more, so that they settle.

    Parameters: `nmsparse_weight` `[out, in]`. Buffers: `nmsparse_current_codes`, the packed codes of the mask now; and
    `nmsparse_input_factors` `[in]`, ones for a mask by magnitude.
    """

    name = "ast"
    takes_prior = True

    def buffers(self, weight: torch.Tensor, config: RelaxationConfig) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        shape = rows, self.pattern.packed_row_bytes(columns)
        return {
            "nmsparse_current_codes": torch.zeros(shape, dtype=torch.uint8, device=weight.device),
            "nmsparse_input_factors": torch.ones(columns, device=weight.device),
        }

    def set_prior(
        self,
        parameters: dict[str, torch.Tensor],
        codes: torch.Tensor,
        config: RelaxationConfig,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Take a mask as it is; there is no strength to it."""
        columns = parameters["nmsparse_weight"].shape[1]
        parameters["nmsparse_current_codes"].copy_(ops.pack_codes(codes, self.pattern, columns))

    def begin_step(self, parameters: dict[str, torch.Tensor], config: RelaxationConfig, moment: Moment) -> None:
        if config.mask_interval is not None and moment.step % config.mask_interval == 0:
            weight = parameters["nmsparse_weight"].detach()
            scores = weight.abs().float() * parameters["nmsparse_input_factors"]
            self.set_prior(parameters, ops.top_n_codes(scores, self.pattern), config)

    def effective_weight(
        self,
        weight: torch.Tensor,
        parameters: dict[str, torch.Tensor],
        state: SamplingState,
        hard: bool,
        shared: SharedSample | None = None,
    ) -> torch.Tensor:
        return ops.straight_through(parameters["nmsparse_weight"], self._mask(parameters), weight.dtype)

    def add_to_gradients(self, parameters: dict[str, torch.Tensor], config: RelaxationConfig, moment: Moment) -> None:
        weight = parameters["nmsparse_weight"]
        decay = srste_decay(config, moment)
        if decay and weight.grad is not None:
            pruned = weight.detach().masked_fill(self._mask(parameters), 0)
            weight.grad.add_(pruned.to(weight.grad.dtype), alpha=decay)

    def codes(self, parameters: dict[str, torch.Tensor], in_features: int) -> torch.Tensor:
        return ops.unpack_codes(parameters["nmsparse_current_codes"], self.pattern, in_features)


def srste_decay(config: RelaxationConfig, moment: Moment) -> float:
    """The decay of pruned weights at a moment; without refreshed masks there is none."""
    if config.mask_interval is None:
        return 0.0
    ramp = config.srste_ramp * max(1, moment.max_steps - moment.first_step)
    return config.srste_decay * min(1.0, (moment.step - moment.first_step) / ramp if ramp else 1.0)
