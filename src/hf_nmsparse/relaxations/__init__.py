# SPDX-License-Identifier: Apache-2.0
"""Relaxations: trainable logits (or weights) -> effective weight. One file each, one registry."""

from .ast import ASTRelaxation
from .base import RELAXATION_BUFFERS, RELAXATIONS, Relaxation, RelaxationConfig, get_relaxation, register_relaxation
from .bdwp import BDWPRelaxation, TransposableRelaxation
from .candidates import CandidatesRelaxation
from .elementwise import ElementwiseRelaxation
from .logits import CONFIDENCE_FACTORS, LOGIT_STD, strength_factors
from .pdp import PDPRelaxation
from .schedule import SCHEDULES, Moment, get_schedule, sampling_state
from .straight_through import StraightThroughRelaxation
from .trained_weight import TrainedWeightRelaxation

# Relaxations that add the decay of pruned weights or scores to their gradients.
DECAYING = (ASTRelaxation, StraightThroughRelaxation)

__all__ = [
    "CONFIDENCE_FACTORS",
    "DECAYING",
    "LOGIT_STD",
    "RELAXATIONS",
    "RELAXATION_BUFFERS",
    "SCHEDULES",
    "ASTRelaxation",
    "BDWPRelaxation",
    "CandidatesRelaxation",
    "ElementwiseRelaxation",
    "Moment",
    "PDPRelaxation",
    "Relaxation",
    "RelaxationConfig",
    "StraightThroughRelaxation",
    "TrainedWeightRelaxation",
    "TransposableRelaxation",
    "get_relaxation",
    "get_schedule",
    "register_relaxation",
    "sampling_state",
    "strength_factors",
]
