# SPDX-License-Identifier: Apache-2.0
"""How temperature, logit scale and regulariser move during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..ops import SamplingState
from .base import RelaxationConfig

# (start, end, progress in [0, 1]) -> value.
Schedule = Callable[[float, float, float], float]
SCHEDULES: dict[str, Schedule] = {
    "linear": lambda start, end, progress: start + (end - start) * progress,
    "cosine": lambda start, end, progress: end + (start - end) * (1 + math.cos(math.pi * progress)) / 2,
    "exponential": lambda start, end, progress: start * (end / start) ** progress,
    "constant": lambda start, end, progress: start,
}


def get_schedule(name: str) -> Schedule:
    """The schedule called `name`: a function of start, end and progress in [0, 1].

    Raises:
        ConfigError: if there is none.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is not known; choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]


@dataclass(frozen=True)
class Moment:
    """Where training stands.

    Args:
        step (`int`): optimizer steps done.
        max_steps (`int`): the step at which the schedules end; as a rule the optimizer steps planned.
        draw (`int`): which sample of this step: `micro_step * world_size + rank`, or 0 with one mask a step.
        accumulation (`int`): micro-steps whose gradients are added up for one optimizer step.
        first_step (`int`): the step at which the schedules start; later than 0 in phases.
    """

    step: int
    max_steps: int
    draw: int = 0
    accumulation: int = 1
    first_step: int = 0

    @property
    def progress(self) -> float:
        """Share of the schedules that is done, in [0, 1]."""
        done = (self.step - self.first_step) / max(1, self.max_steps - self.first_step)
        return min(1.0, max(0.0, done))


def sampling_state(
    config: RelaxationConfig, moment: Moment | None, device: torch.device | str | None = None
) -> SamplingState:
    """Values of the schedules at `moment` (`None`: the start), as tensors on `device`.

    Temperature and logit scale go from their first to their second value as `config.schedule` says, the regulariser
    always linearly from its value to 0 (as in MaskLLM's code). The regulariser acts once per optimizer step, so each
    micro-step has its share.
    """
    moment = moment or Moment(step=0, max_steps=1)
    progress, schedule = moment.progress, get_schedule(config.schedule)
    temperature, logit_scale = schedule(*config.temperature, progress), schedule(*config.logit_scale, progress)
    regularization = config.magnitude_regularization * (1 - progress) / moment.accumulation
    return SamplingState.of(temperature, logit_scale, regularization, moment.step, moment.draw, device)
