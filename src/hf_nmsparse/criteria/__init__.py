# SPDX-License-Identifier: Apache-2.0
"""One-shot criteria, and the engine that walks a model block by block with one of them."""

from .activation_scaling import ScalingReport, rounded_weight, search_input_scale, search_input_scales
from .base import (
    BlockInputs,
    Choice,
    Criterion,
    InputStatistics,
    confident_criteria,
    get_criterion,
    keep_highest,
    known_criteria,
    register_criterion,
    score_confidence,
)
from .engine import WalkOptions, walk
from .ledger import finished_layers
from .magnitude import Magnitude
from .oneshot import prune
from .polish import Polish, polish_mask
from .refit import refit_weights
from .report import LayerCodes, LayerReport, PruneReport
from .ria import RIA
from .sensitivity import LayerSensitivity, SensitivityReport, sensitivity
from .sparsegpt import SparseGPT
from .sparsellm import SparseLLM
from .targets import (
    Target,
    expert_view,
    find_stacks,
    find_weights,
    in_place,
    modules_in_range,
    name_matches,
    without_routers,
)
from .wanda import Wanda

__all__ = [
    "RIA",
    "BlockInputs",
    "Choice",
    "Criterion",
    "InputStatistics",
    "LayerCodes",
    "LayerReport",
    "LayerSensitivity",
    "Magnitude",
    "Polish",
    "PruneReport",
    "ScalingReport",
    "SensitivityReport",
    "SparseGPT",
    "SparseLLM",
    "Target",
    "WalkOptions",
    "Wanda",
    "confident_criteria",
    "expert_view",
    "find_stacks",
    "find_weights",
    "finished_layers",
    "get_criterion",
    "in_place",
    "keep_highest",
    "known_criteria",
    "modules_in_range",
    "name_matches",
    "polish_mask",
    "prune",
    "refit_weights",
    "register_criterion",
    "rounded_weight",
    "score_confidence",
    "search_input_scale",
    "search_input_scales",
    "sensitivity",
    "walk",
    "without_routers",
]
