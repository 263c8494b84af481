# SPDX-License-Identifier: Apache-2.0
"""How temperature, logit scale and regulariser move during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import SamplingState
from .base import RelaxationConfig


@dataclass(frozen=True)
class Moment:
    """Where training stands.

    Args:
        step (`int`): optimizer steps done.
        max_steps (`int`): optimizer steps planned.
        draw (`int`): which sample of this step: `micro_step * world_size + rank`, or 0 with one mask a step.
        accumulation (`int`): micro-steps whose gradients are added up for one optimizer step.
    """

    step: int
    max_steps: int
    draw: int = 0
    accumulation: int = 1

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.max_steps))


def sampling_state(
    config: RelaxationConfig, moment: Moment | None, device: torch.device | str | None = None
) -> SamplingState:
    """Values of the linear schedules at `moment` (`None`: the start), as tensors on `device`.

    Temperature and logit scale go linearly from their first to their second value, the regulariser linearly from its
    value to 0 (as in MaskLLM's code). The regulariser acts once per optimizer step, so each micro-step has its share.
    """
    moment = moment or Moment(step=0, max_steps=1)
    progress = moment.progress
    temperature, logit_scale = (
        start + (end - start) * progress for start, end in (config.temperature, config.logit_scale)
    )
    regularization = config.magnitude_regularization * (1 - progress) / moment.accumulation
    return SamplingState.of(temperature, logit_scale, regularization, moment.step, moment.draw, device)
