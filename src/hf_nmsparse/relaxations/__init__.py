# SPDX-License-Identifier: Apache-2.0
"""Relaxations: trainable logits (or weights) -> effective weight. One file each, one registry."""

from .base import RELAXATIONS, Relaxation, RelaxationConfig, get_relaxation, register_relaxation
from .candidates import CandidatesRelaxation
from .elementwise import ElementwiseRelaxation
from .logits import CONFIDENCE_FACTORS, LOGIT_STD, strength_factors
from .schedule import SCHEDULES, Moment, get_schedule, sampling_state

__all__ = [
    "CONFIDENCE_FACTORS",
    "LOGIT_STD",
    "RELAXATIONS",
    "SCHEDULES",
    "CandidatesRelaxation",
    "ElementwiseRelaxation",
    "Moment",
    "Relaxation",
    "RelaxationConfig",
    "get_relaxation",
    "get_schedule",
    "register_relaxation",
    "sampling_state",
    "strength_factors",
]
