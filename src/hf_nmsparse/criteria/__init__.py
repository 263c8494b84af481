# SPDX-License-Identifier: Apache-2.0
"""One-shot criteria, and the engine that walks a model block by block with one of them."""

from .base import Criterion, InputStatistics, get_criterion, known_criteria, register_criterion
from .engine import LayerReport, PruneReport, prune, walk
from .magnitude import Magnitude
from .polish import Polish, polish_mask
from .targets import Target, expert_views, find_stacks, find_weights, is_router, name_matches
from .wanda import Wanda

__all__ = [
    "Criterion",
    "InputStatistics",
    "LayerReport",
    "Magnitude",
    "Polish",
    "PruneReport",
    "Target",
    "Wanda",
    "expert_views",
    "find_stacks",
    "find_weights",
    "get_criterion",
    "is_router",
    "known_criteria",
    "name_matches",
    "polish_mask",
    "prune",
    "register_criterion",
    "walk",
]
