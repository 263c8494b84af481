# SPDX-License-Identifier: Apache-2.0
"""Relaxations: trainable logits (or weights) -> effective weight. One file each, one registry."""

from .base import RELAXATIONS, Relaxation, RelaxationConfig, get_relaxation, register_relaxation
from .candidates import CandidatesRelaxation
from .elementwise import ElementwiseRelaxation
from .schedule import Moment, sampling_state

__all__ = [
    "RELAXATIONS",
    "CandidatesRelaxation",
    "ElementwiseRelaxation",
    "Moment",
    "Relaxation",
    "RelaxationConfig",
    "get_relaxation",
    "register_relaxation",
    "sampling_state",
]
